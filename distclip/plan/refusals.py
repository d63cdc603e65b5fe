"""Every error of this package and of the functions: what is wrong, with which parameter or rank, and what to do.

``who``: which ranks it is, as ranks have told each other; empty where that was not asked.
"""

from collections.abc import Mapping, Sequence

from ..errors import LayoutError, NonFiniteError, and_more
from ..policies.statistic import Dims
from ..report import Culprit

SAY_WHERE = (
    "pass layout=... (distclip.Layout.cut(parts=[tp])) where ranks hold different parts of these parameters, or "
    "split_over=[mesh['pp']] where all that they hold is different"
)
ABSENT = (
    "an optimizer in the backward has used them up, the last synchronisation was left out "
    "(set_requires_gradient_sync(False), set_requires_all_reduce(False)), or zero_grad came before; clip between the "
    "last backward and zero_grad"
)


# ---- what is passed -----------------------------------------------------------------------------------------


def neither_tensor_nor_module(kind: str) -> ValueError:
    return ValueError(f"parameters must be tensors or modules, got {kind} (named_parameters()?)")


def tensors_and_modules() -> ValueError:
    return ValueError("parameters must be tensors or modules, got both: pass the modules' parameters() instead")


def fsdp1_parameter(name: str) -> LayoutError:
    return LayoutError(
        f"{name} is managed by FSDP1 (FullyShardedDataParallel) and does not show of what it is a part: pass the FSDP1 "
        "module instead of its parameters, as in clip_grad_norm_(model, max_norm); with use_orig_params=True those of "
        "NO_SHARD do not tell either"
    )


def unsharded_parameter(name: str) -> LayoutError:
    return LayoutError(
        f"{name} is an unsharded copy, which FSDP2 shows between forward and backward and which has no gradient: pass "
        "the module, or call its reshard() first"
    )


def norm_is_dtensor() -> ValueError:
    return ValueError("total_norm must be a plain tensor, got a DTensor: use distclip.get_total_norm")


def norm_on_meta() -> ValueError:
    return ValueError(
        "total_norm is on the meta device, where it has no value: make it outside of torch.device('meta')"
    )


# ---- ranks that differ --------------------------------------------------------------------------------------


def functions_disagree(who: str) -> LayoutError:
    return LayoutError(
        "the ranks of the clipping group passed other parameters or settings, lack a gradient that others have, or one "
        f"of them stopped with an error of its own: pass the same everywhere, or pass split_over={who}"
    )


def calls_disagree(who: str) -> LayoutError:
    return LayoutError(f"the ranks do not agree: let every rank make the same calls with the same parameters{who}")


def not_made(what: str, who: str) -> LayoutError:
    return LayoutError(f"a rank of the clipping group could not make {what}{who}")


def other_parameters(who: str) -> LayoutError:
    return LayoutError(
        "the ranks of the clipping group hold parameters of different names, shapes, dtypes or placements: say which "
        f"ranks hold different ones by split_over=[mesh['pp']] or layout=...{who}"
    )


def other_settings(names: Sequence[str], who: str) -> ValueError:
    return ValueError(f"{', '.join(names)} must be the same on every rank: build every Clipper alike{who}")


# ---- replicas that differ -----------------------------------------------------------------------------------


def other_values(names: Sequence[str]) -> LayoutError:
    return LayoutError(
        f"ranks that should hold copies hold different values of {and_more(names)}: {SAY_WHERE}, only=... where nobody "
        "trains them, and build the Clipper after parameters are loaded or broadcast"
    )


def drifted_apart(names: Sequence[str]) -> LayoutError:
    return LayoutError(
        f"copies have drifted apart: ranks hold different values of {and_more(names)}; load or broadcast these "
        f"parameters anew, or {SAY_WHERE}"
    )


def copies_differ(call: str, norm: float) -> LayoutError:
    return LayoutError(
        f"copies of gradients differ between ranks since {call}, and here had a norm of {norm:.7g}: reduce gradients "
        "before clipping (leave no_sync for the last backward), pass split_over=[mesh['pp']] or layout=... where ranks "
        "hold different parameters, group=... where they train apart, or go on from the last checkpoint if a copy was "
        "damaged"
    )


def drifted(call: str, names: str, odd: Sequence[int], norms: Mapping[int, float]) -> str:
    """``odd``: the ranks whose bits are not those of the others, or all; ``norms``: by rank, theirs first."""
    where = "" if not odd else f" on rank{'s' if len(odd) > 1 else ''} {and_more(odd)}"
    there = "" if len(odd) == len(norms) else f" of ranks {and_more(sorted(norms))}"
    shown = ", ".join(f"{norm:.9g} on rank {rank}" for rank, norm in list(norms.items())[: len(odd) + 1][-2:])
    told = f"{where}{there}, of norm {shown}" if norms else ""
    return (
        f"copies of gradients have drifted apart in {call}: {names}{told}. Copies that had the same bits now differ: "
        "a bit was flipped in memory or on its way, or something changes gradients on one rank alone. Go on from the "
        "last checkpoint, and without this machine if it happens again; on_drift='ignore' compares no bits"
    )


def not_replicas(names: Sequence[str]) -> LayoutError:
    return LayoutError(
        f"ranks that should hold the same gradient do not: {and_more(names)}; reduce gradients before clipping (leave "
        "no_sync for the last backward; an optimizer that reduces them in its step() comes too late), or pass "
        "layout=lambda name, p: distclip.Layout(1) if ... else None for what each rank has for itself (experts), "
        "split_over=[mesh['pp']] for stages, group=... for ranks that train apart (local SGD, DiLoCo)"
    )


# ---- what verify() finds ------------------------------------------------------------------------------------


def not_exact(why: str) -> ValueError:
    return ValueError(f"exact=True: {why}")


def shares_not_whole(what: str, name: str, replicas: int, size: int) -> LayoutError:
    return LayoutError(f"{what}: {size} ranks cannot hold {replicas} replicas of each element of {name}")


def no_gradient() -> LayoutError:
    return LayoutError(f"there is no gradient on any rank: {ABSENT}")


def not_counted_once(elements: Sequence[str]) -> LayoutError:
    return LayoutError(f"elements are not counted once: {and_more(elements)}; {SAY_WHERE}")


def units_not_counted_once(elements: Sequence[str]) -> LayoutError:
    return LayoutError(
        f"norms do not count the elements of their units once: {and_more(elements)}; report how these parameters are "
        "cut, and ask for coarser norms (per='parameter') until then"
    )


def gradients_not_counted_once(rank: int, gradients: str) -> LayoutError:
    return LayoutError(
        f"gradients are not counted once: on rank {rank} {gradients}; return distclip.Layout(number of ranks that hold "
        "it) from layout= (a tied weight on two stages: Layout(2); norm layers that tensor-parallel ranks share: all "
        "of these; different parameters that are equal only while branches behind them are zero: Layout(1), and "
        "verify() once they differ)"
    )


# ---- statistics by group, parameter and row -----------------------------------------------------------------


def unknown_replicas(name: str) -> LayoutError:
    return LayoutError(
        f"layout= says how many ranks hold {name}, and not which: for a norm or a fingerprint of its own return "
        'Layout.cut(over=[mesh["ep"]]) instead of Layout(number)'
    )


def too_many_ranks(size: int, most: int) -> ValueError:
    return ValueError(f"fingerprints are added on {most} ranks at most, and the group has {size}: leave them out")


def unknown_places(name: str) -> LayoutError:
    return LayoutError(
        f"layout= says that ranks hold parts of {name}, and not which, so that it has no fingerprint: cut it by "
        "distribute_tensor or fully_shard, or leave fingerprints out"
    )


def unknown_rows(name: str) -> LayoutError:
    return LayoutError(
        f"layout= says that ranks hold parts of {name}, and not which rows, so that these have no norms: ask for norms "
        "per parameter"
    )


def units_differ(name: str, size: float, other: float) -> LayoutError:
    return LayoutError(
        f"{name} has {size:.0f} elements on one rank and {other:.0f} on another, which hold the same by their layout: "
        'return Layout.cut(over=[mesh["ep"]]) from layout=, or pass split_over, where these are different parameters'
    )


def unit_not_counted_once(name: str, times: float) -> LayoutError:
    return LayoutError(
        f"the ranks that have a parameter {name} count its elements {times:.3g}x, so that it has neither norm nor "
        "fingerprint of its own: the layout must say how many ranks hold it under this name (a weight that stages "
        "share needs one name on all)"
    )


def other_rows(one: Dims, other: Dims) -> ValueError:
    return ValueError(
        f"rows have one norm each, and two statistics want rows along different dimensions: {dict(one)} and "
        f"{dict(other)}: give both the same dims"
    )


def no_parameter(field: str, pattern: str, parameters: Sequence[str]) -> ValueError:
    return ValueError(f"no parameter matches {pattern!r} in {field}: choose among {and_more(parameters)}")


def empty_group(name: str, patterns: Sequence[str], parameters: Sequence[str]) -> ValueError:
    return ValueError(
        f"the group {name!r} is empty, no parameter matches {' or '.join(map(repr, patterns))}: choose among "
        f"{and_more(parameters)}"
    )


# ---- norms that are not finite ------------------------------------------------------------------------------


def nonfinite(p: float, culprit: Culprit, what_to_do: str) -> NonFiniteError:
    """It begins as torch's error does, by which people know it."""
    return NonFiniteError(
        f"The total norm of order {p} for gradients from `parameters` is non-finite, so it cannot be clipped: "
        f"{culprit}; no gradient was changed. {what_to_do}"
    )


def no_source_in_fsdp1() -> NotImplementedError:
    return NotImplementedError(
        "find_source cannot see gradients before FSDP1 reduces them: wrap it by fully_shard or DDP while you look for "
        "the source"
    )


def unseen_gradients(names: Sequence[str]) -> RuntimeError:
    return RuntimeError(
        f"find_source has not seen the gradients of {and_more(names) or 'another rank'}: call it before the forward, "
        "and FSDP2's modules themselves, not their methods"
    )
