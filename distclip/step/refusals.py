"""Every error of this package and of Clipper: what is wrong, with which parameter or rank, and what to do about it."""

from collections.abc import Mapping, Sequence
from reprlib import repr as short

from torch import Tensor

from ..errors import LayoutError, NonFiniteError
from ..plan.refusals import ABSENT
from ..report import Culprit

READ_ONLY = "it says what a call did"
POLICY_IS_FIXED = (
    "a Clipper keeps the policy that its ranks have agreed on: build another for another bound, Clipper(model, 0.5), "
    "or give it a policy whose bound changes with its own state"
)
NO_GRADIENT = f"no gradient on this rank, and a norm of 0 over all: {ABSENT}"
SKIP_INSTEAD = "To skip such steps on all ranks, pass nonfinite='skip'"


# ---- what is passed -----------------------------------------------------------------------------------------


def unknown_mode(nonfinite: object, modes: Sequence[str]) -> ValueError:
    return ValueError(f"nonfinite must be one of {', '.join(modes)}, got {nonfinite!r}")


def unknown_drift(on_drift: object) -> ValueError:
    return ValueError(f"on_drift must be one of raise, warn, ignore, got {on_drift!r}")


def too_few_skips(max_consecutive_skips: object) -> ValueError:
    return ValueError(f"max_consecutive_skips must be at least 1 or None, got {max_consecutive_skips!r}")


def unknown_gradients(gradients: object) -> ValueError:
    return ValueError(
        'gradients must be the name of an attribute of parameters ("main_grad") or a function of a parameter\'s name '
        f"and the parameter that returns its gradient, got {gradients!r}"
    )


def unknown_watch(watch: object) -> ValueError:
    return ValueError(
        f"watch must be 'parameters', or patterns of parameters by the name to report: {{'experts': '*.experts.*'}}, "
        f"got {watch!r}"
    )


def by_unit_of_others(given: int, measured: int) -> ValueError:
    return ValueError(
        f"this decision has a factor for each of {measured} gradients, and was to be applied to {given}: hand "
        "outcome.gradients to apply_to, or copies of them in their order"
    )


def other_signals(signals: object, wanted: Sequence[str]) -> ValueError:
    if not wanted:
        return ValueError("signals= were given, and the policy asks for none: leave them out")
    names = sorted(map(str, signals)) if isinstance(signals, Mapping) else type(signals).__name__
    shown = ", ".join(f"{name!r}: ..." for name in wanted)
    return ValueError(f"the policy asks for signals={{{shown}}} in every call, got {names or 'none'}")


def no_signal(name: str, signal: object) -> ValueError:
    got = f"a {type(signal).__name__} of shape {tuple(signal.shape)}" if isinstance(signal, Tensor) else short(signal)
    return ValueError(f"signal {name} must be a number or a real tensor with one element, got {got}")


def signals_of_maxima() -> ValueError:
    return ValueError(
        "this policy asks for signals, means over ranks, which cannot travel with the maxima of norm_type=inf: use "
        "another norm_type"
    )


def zeros_of_nothing() -> ValueError:
    return ValueError("watch_zeros counts in the gradients that are watched: say which, watch='parameters' or groups")


def zeros_of_maxima() -> ValueError:
    return ValueError(
        "watch_zeros=True counts elements, which cannot travel with the maxima of norm_type=inf: use another norm_type"
    )


def more_than_exact() -> ValueError:
    return ValueError(
        "exact=True measures the norm of all gradients alone: watch=, and a policy that asks for norms of "
        "parameters or for signals, need sums that are rounded. Use another Clipper for these, or leave out exact=True"
    )


def no_engine(found: object) -> ValueError:
    return ValueError(f"Clipper.of takes an Engine, got {type(found).__name__}: build one, Engine(model, policy)")


def not_copied(kind: str) -> TypeError:
    return TypeError(
        f"{kind} cannot be copied or pickled, since it clips the parameters of one model: save state_dict(), or build "
        "one for the copied model and load_state_dict() that"
    )


# ---- whoever steps ------------------------------------------------------------------------------------------


def clips_already(driver: str) -> RuntimeError:
    return RuntimeError(
        f"{driver} clips with this Clipper already: do not call clip_() or step() yourself (measure() looks without "
        "changing anything, and report says what the latest step did)"
    )


def not_detachable(driver: str) -> RuntimeError:
    return RuntimeError(f"{driver} calls this Clipper as long as it lives: there is no detaching")


def rivals(others: int) -> LayoutError:
    return LayoutError(
        f"{others} other Clipper(s) hold parameters of this one and would clip them again: keep one Clipper for each "
        "parameter; where optimizers share parameters on purpose (DiLoCo), attach() one to each, or call verify() "
        "after each has made a step()"
    )


def not_clipped(optimizer: str, unknown: int, parameters: int, shape: Sequence[int]) -> LayoutError:
    """``unknown`` of the ``parameters`` of an optimizer, the first of this ``shape``, are clipped by nobody."""
    return LayoutError(
        f"{optimizer} holds {unknown} of {parameters} parameters, first one of shape {tuple(shape)}, that this Clipper "
        "does not: build it anew, after the model has got them, from all modules whose parameters are stepped "
        "(only=... leaves some of them unclipped)"
    )


def not_unscaled(name: str) -> LayoutError:
    return LayoutError(
        f"{name} has a gradient and is in none of the optimizers, so that the scaler cannot unscale it: pass every "
        "optimizer to one step()"
    )


def scaler_with_gradients() -> ValueError:
    return ValueError("a GradScaler unscales what is in .grad, and gradients= is elsewhere: unscale that before")


# ---- a call -------------------------------------------------------------------------------------------------


def ranks_disagree(who: str = "") -> LayoutError:
    """``who``: which ranks they are, where the ranks have compared; empty where that was not asked."""
    return LayoutError(
        "the ranks of the clipping group do not agree: one of them stopped with an error of its own (see its message), "
        "holds other parameters, lacks a gradient that others have, made a different number of Clipper calls, called "
        "another Clipper, or has a policy that decided otherwise in the step before; let every rank make the same "
        f"calls in order{who}"
    )


def read_in_capture() -> RuntimeError:
    return RuntimeError(
        "no norm can be read inside the capture of a CUDA graph: leave out nonfinite='raise', p > 7, float64 "
        "gradients, layout=, split_over= and DTensors that FSDP2 does not manage, and give step() fused optimizers"
    )


def inside_join() -> RuntimeError:
    return RuntimeError(
        "the model is inside join(), where a Clipper's all-reduce would wait for ranks that have run out of data: call "
        "distclip.clip_grad_norm_(model.parameters(), max_norm), which makes none under DDP, or "
        "join(throw_on_early_termination=True). A join that has ended leaves its mark: model.join(enable=False) "
        "removes it"
    )


def interrupted(exception: str) -> LayoutError:
    return LayoutError(
        f"an earlier call was broken off by {exception} on this rank, so that ranks may be a step apart: load one "
        "checkpoint on every rank, model and optimizer and Clipper.load_state_dict(), or start anew"
    )


def too_many_skips(skips: int, culprit: Culprit, limit: int) -> NonFiniteError:
    return NonFiniteError(
        f"{skips} steps in a row had a norm that is not finite: {culprit}; max_consecutive_skips={limit} allows no more"
    )
