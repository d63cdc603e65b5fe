"""attach: the training loop stays as it is, and `optimizer.step()` clips by the true global norm first."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NoReturn, Unpack
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer

from .clipper import Clipper
from .optimizers.fused import Stepping
from .optimizers.hooks import SKIP, Arguments, guard, parameters_of, versions_of, withhold
from .optimizers.wrapped import clip_target, is_optimizer, with_inner
from .policies import Policy
from .policies.adopt import bound_by_place, without_signals
from .report import Fingerprint, Report
from .step.driver import Driver
from .step.engine import Engine
from .step.options import Options

_attached: WeakSet[Optimizer] = WeakSet()


class Attachment:
    """The optimizers of one :func:`attach`, whose steps make the calls of its Clipper."""

    def __init__(self, engine: Engine, optimizers: Sequence[Optimizer], in_grad: bool) -> None:
        """``in_grad``: gradients are in ``.grad``, of which they can be taken away from a step that is under way."""
        self._engine, self._in_grad = engine, in_grad
        # Kept alive as long as the Clipper or any of them is: one that went when a collector of garbage came by would
        # leave the norm on some ranks before others.
        self._optimizers = tuple(optimizers)
        self._stepped: set[int] = set()  # which optimizers, since the latest decision
        self._stepping: Stepping | None = None
        # Of those that have not stepped since: their gradients, with the versions that these had when they were scaled.
        self._scaled: dict[int, list[tuple[Tensor, int]]] = {}
        self._running: dict[int, ExitStack] = {}  # the steps now running; closed when they end
        self._undo: list[Callable[[], Any]] = []
        self._claimed: WeakSet[Optimizer] = WeakSet()  # those, and what they wrap
        for optimizer in optimizers:
            self._undo += (guard(optimizer, self._after, self._before, raised=self._raised), _refuse_copies(optimizer))
            self._claimed.update(with_inner(optimizer))
        _attached.update(self._claimed)
        engine.owner.register(optimizers)

    def detach(self) -> None:
        """Remove the hooks: from now on the optimizers step as if they had never been attached."""
        while self._undo:
            self._undo.pop()()
        for optimizer in self._optimizers:
            self._after(optimizer)
        _attached.difference_update(self._claimed)
        self._claimed.clear()
        self._engine.owner.release()

    def measure(self) -> Report:
        """Measure what the steps do: the gradients that the attached optimizers hold."""
        return self._engine.measure(self._optimizers, only_theirs=True)

    def fingerprint(self) -> Fingerprint:
        """Of the same gradients."""
        return self._engine.fingerprint(self._optimizers, only_theirs=True)

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | Literal["skip"] | None:
        if any(self._optimizers[index] is optimizer for index in self._running):
            self._after(optimizer)
            raise RuntimeError(
                f"{type(optimizer).__name__} was stepped past optimizer.step, which attach() wraps, and raised or "
                "called its base class there: call optimizer.step(), and replace it before attach(), not after"
            )
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            return SKIP if self._enter(optimizer) else None
        if not self._in_grad:
            raise RuntimeError(
                "a step with a closure cannot be skipped where gradients= says that gradients are not in .grad: call "
                "clip_() of a Clipper in the closure instead of attach()"
            )

        def clipped() -> Any:  # it makes the gradients, and by then the step cannot be left: skip by taking them away
            loss = closure()
            if self._enter(optimizer):
                self._running[self._index(optimizer)].callback(withhold(parameters_of(optimizer)))
            return loss

        if len(args) > 1:
            return (args[0], clipped, *args[2:]), kwargs
        return args, {**kwargs, "closure": clipped}

    def _index(self, optimizer: Optimizer) -> int:
        for index, attached in enumerate(self._optimizers):
            if attached is optimizer:
                return index
        raise RuntimeError(
            f"{type(optimizer).__name__} calls the hooks of an optimizer that was attached, and is another: attach the "
            "one whose step() is called"
        )

    def _enter(self, optimizer: Optimizer) -> bool:
        """The gradients of ``optimizer`` are complete: decide, or join the decision, and prepare its step.

        True if the host knows that the step is to be skipped.
        """
        if isinstance(getattr(optimizer, "grad_scale", None), Tensor):
            raise RuntimeError(
                "the gradients are still multiplied by the GradScaler's scale, and their norm would be as well: call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer), or use Clipper.step(..., scaler=scaler)"
            )
        index = self._index(optimizer)
        if index in self._running:
            raise RuntimeError(
                f"{type(optimizer).__name__} runs its closure more than once a step, and each would be clipped by "
                "itself: clip inside the closure, with distclip.clip_grad_norm_"
            )
        if self._stepping is None or index in self._stepped:
            self._decide_for_all()
        else:
            self._refuse_changed(index)
        stepping = self._stepping
        assert stepping is not None
        self._stepped.add(index)
        self._scaled.pop(index, None)
        stack, skips = ExitStack(), stepping.skipped
        self._running[index] = stack
        if not skips:
            stack.enter_context(stepping.around(index, optimizer))
        if len(self._stepped) == len(self._optimizers):
            self._stepping = None
        return skips

    def _after(self, optimizer: Optimizer) -> None:
        for index, attached in enumerate(self._optimizers):
            if attached is optimizer and index in self._running:
                self._running.pop(index).close()

    def _raised(self, optimizer: Optimizer, kind: type[BaseException]) -> None:
        """An exception left its step: if the ranks had decided by then, the other ranks have stepped."""
        if any(self._optimizers[index] is optimizer for index in self._running):
            self._engine.interruption.record(kind)

    def _decide_for_all(self) -> None:
        """The first step after all have stepped: measure, scale, and remember what the others will step with."""
        for index, known in self._scaled.items():
            kept = {id(gradient) for gradient, _ in versions_of(self._optimizers[index])}
            if any(id(gradient) in kept for gradient, _ in known):
                raise RuntimeError(
                    f"optimizer {index} of those attached together has not stepped since its gradients were clipped, "
                    "and they would be clipped again: where it steps less often, clear them by zero_grad() meanwhile, "
                    "which must set them to None, or attach optimizers that step at different times one by one"
                )
        self._stepping = self._engine.begin(self._optimizers, only_theirs=True)
        self._stepped.clear()
        if len(self._optimizers) > 1:
            self._scaled = {index: versions_of(optimizer) for index, optimizer in enumerate(self._optimizers)}

    def _refuse_changed(self, index: int) -> None:
        known = {id(gradient): version for gradient, version in self._scaled[index]}
        if any(known.get(id(gradient)) != version for gradient, version in versions_of(self._optimizers[index])):
            raise RuntimeError(
                f"the gradients of optimizer {index} of those attached together have changed since the first of them "
                "stepped, and are not in its norm: run every backward before the first step, or attach one by one"
            )


@bound_by_place("attach(optimizer, model, {})")
def attach(
    optimizers: Optimizer | Sequence[Optimizer],
    model: nn.Module | Sequence[nn.Module],
    policy: Policy | float,
    **options: Unpack[Options],
) -> Clipper:
    """Let every ``optimizer.step()`` clip by the true global norm first, or skip on all ranks alike.

    * ``optimizers``: one, or the list of those that step once each per iteration. The first to step decides for all,
      so every backward comes before it. Gradients in ``model`` that none of them holds are in no norm, and stay as they
      are: nobody zeroes them.
    * ``model``, ``policy``, ``options``: those of :class:`Clipper`, which says what is compared at construction.

    Returns the Clipper, for ``report``, ``state_dict``, ``verify`` and ``detach()``; its ``clip_`` and ``step`` raise
    RuntimeError, since the optimizers make these calls. Collectives and host syncs: those of :meth:`Clipper.step`, once
    for all optimizers.

    A skipped step

    * is not made, as a rule: parameters, state, counters and gradients stay, and neither post hooks nor later pre hooks
      run (an LR scheduler sees a call of ``optimizer.step``, which it does not count);
    * is made by torch's fused Adam, AdamW, SGD and Adagrad on accelerators, without a host sync, and changes nothing by
      ``found_inf``;
    * is already running with a closure, or if the class's ``step`` is called past the instance's. It has no gradients
      until it has ended or raised: step counts of the optimizer's own may advance, and one that demands gradients
      raises.

    Of an optimizer around another (what Accelerate, Lightning, Fabric or torchft return, SAM, Opacus) the one that
    applies the gradients clips, when it steps; a Lookahead or a schedule-free wrapper clips as a whole.

    A closure may make the gradients, once a step. RuntimeError for LBFGS, which runs it more often, for gradients that
    a GradScaler has not unscaled, for a closure with ``gradients=``, and where the gradients of the second optimizer
    are not those that the first one's step saw; ValueError for an optimizer that is attached already, for what is no
    optimizer, for a policy that asks for signals, for several with ``gradients=``, and for one that wraps two, so that
    it is not known which steps. Source: ``torch.optim.Optimizer.register_step_pre_hook``.

    >>> import torch
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> clipper = attach(optimizer, model, 1.0)
    >>> (model.weight * 4 - model.bias * 3).sum().backward()
    >>> optimizer.step()
    >>> round(clipper.report.norm.item(), 4)
    11.3578
    """
    listed = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
    attached, in_grad = _to_attach_to(listed), options.get("gradients") in (None, "grad")
    if len(attached) > 1 and not in_grad:  # nothing shows that they have changed since the first of them stepped
        raise ValueError(
            "attach takes one optimizer where gradients= says that gradients are not in .grad: call "
            "Clipper.step(*optimizers) instead"
        )
    engine = Engine(model, policy, **options)
    without_signals(policy, "optimizer.step()")  # when all ranks know that they have the same policy
    attachment = Attachment(engine, attached, in_grad)
    driver = Driver("optimizer.step()", attachment.measure, attachment.fingerprint, detach=attachment.detach)
    return Clipper.of(engine, driver)


def _refuse_copies(optimizer: Optimizer) -> Callable[[], None]:
    """Let ``copy`` and ``pickle`` of ``optimizer`` raise until the returned function is called.

    Both ask for ``__getstate__``, on the instance too; torch's keeps groups, state and defaults, but no hooks (2.13).
    """
    kind, attributes = type(optimizer).__name__, optimizer.__dict__

    def refuse() -> NoReturn:
        raise TypeError(
            f"{kind} clips in its step() by distclip.attach, and a copy of it would not: save its state_dict(), or "
            "detach() before it is copied or pickled and attach() again, to the copy as well"
        )

    attributes["__getstate__"] = refuse
    return lambda: attributes.pop("__getstate__", None)


def _to_attach_to(given: Sequence[Any]) -> list[Optimizer]:
    """Those that apply the gradients of the ``given`` ones; ValueError if that is not known, or one is attached."""
    if not given:
        raise ValueError("attach needs at least one optimizer")
    found: list[Optimizer] = []
    for index, optimizer in enumerate(given):
        if not is_optimizer(optimizer):
            inside = [name for name, value in getattr(optimizer, "__dict__", {}).items() if is_optimizer(value)]
            raise ValueError(
                f"attach takes optimizers, and then the model; got {type(optimizer).__name__} as optimizer {index}: "
                "call attach(optimizer, model, policy), with one optimizer or a list of them"
                + (f" (this one has an optimizer in .{inside[0]})" if inside else "")
            )
        applies = clip_target(optimizer)
        if any(applies is one for one in found) or any(one in _attached for one in with_inner(applies)):
            raise ValueError(
                "this optimizer has a Clipper attached already and would be clipped twice: call detach() on what "
                "attach() returned first"
            )
        found.append(applies)
    return found
