"""Steps that somebody else calls: how one of them changes nothing, and how we hear that it begins and is over."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps
from types import MethodType
from typing import Any, Final, Literal, TypeAlias
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ..kernels.device import reads_are_free
from ..shield import untraced
from . import refusals
from .fused import FOLDING, TORCH, folded, may_skip_on_device
from .wrapped import refuse_clip_before_step, refuse_proxy

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
SKIP: Final = "skip"
Begin: TypeAlias = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], Arguments | Literal["skip"] | None]

_PATCHED = Optimizer.profile_hook_step(Optimizer.step).__code__  # what torch puts in place of a class's step

_flags: WeakKeyDictionary[Optimizer, ExitStack] = WeakKeyDictionary()
_skipping: WeakKeyDictionary[Optimizer, ExitStack] = WeakKeyDictionary()  # what gives back, for the step to be skipped
_inside: WeakSet[Optimizer] = WeakSet()  # of those watched: whose step is under way
_watched: WeakSet[Optimizer] = WeakSet()


def withhold(parameters: Iterable[Tensor]) -> Callable[[], None]:
    """Take the gradients of ``parameters`` away; the result gives them back.

    A parameter that has got another gradient by then keeps that one.
    """
    withheld = [(p, p.grad) for p in parameters if p.grad is not None]
    for parameter, _ in withheld:
        parameter.grad = None

    def give_back() -> None:
        for parameter, gradient in withheld:
            if parameter.grad is None:
                parameter.grad = gradient

    return give_back


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """ValueError for what ``step()`` cannot step, or would step with other gradients than were clipped."""
    if not optimizers:
        raise refusals.no_optimizer()
    for index, optimizer in enumerate(optimizers):
        if not hasattr(optimizer, "param_groups"):
            raise refusals.not_an_optimizer(type(optimizer).__name__)
        if any(optimizer is other for other in optimizers[:index]):
            raise refusals.given_twice(type(optimizer).__name__)
        if isinstance(optimizer, LBFGS):
            raise refusals.lbfgs()
        if type(optimizer).__module__ not in TORCH:
            refuse_clip_before_step(optimizer)
            refuse_proxy(optimizer)


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Its parameters."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def skip_next_step(optimizers: Iterable[Optimizer], skip: Tensor, on_device: bool | None = None) -> None:
    """Let the next step of each optimizer, which a framework calls, change nothing where ``skip`` is true.

    ``skip`` is a report's: 0-d bool. Call it between the last backward and the step, or inside the step's closure.
    Fused Adam, AdamW, SGD and Adagrad are told through ``found_inf`` if ``on_device``, so that nothing waits (None:
    where ``skip`` is on an accelerator); otherwise ``skip`` is waited for, and the step not made: its hooks and what it
    counts see none.
    Inside the closure the step is under way, and an optimizer that nobody watched may be in it: gradients are taken
    away until the step is over or has raised, and what it counts by itself may go on.
    """
    on_device = not reads_are_free(skip.device) if on_device is None else on_device
    for optimizer in optimizers:
        _flags.pop(optimizer, ExitStack()).close()  # of a step that never came
        _skipping.pop(optimizer, None)  # what it withheld are not the gradients of this one
        if on_device and _folds(optimizer) and may_skip_on_device(optimizer):
            flag = _flags[optimizer] = ExitStack()
            flag.enter_context(folded(optimizer, None, skip))
        elif skip:
            give_back = _skipping[optimizer] = ExitStack()
            if optimizer in _inside or optimizer not in _watched:  # its step may be under way: this is the closure
                give_back.callback(withhold(parameters_of(optimizer)))
        else:
            continue
        watch(optimizer)


def watch(optimizer: Optimizer) -> None:
    """Hear of the steps of ``optimizer`` from now on, for good: torch does not let a hook remove itself.

    Whoever skips its steps later, and knows it now, says so: :func:`skip_next_step` then leaves gradients in place,
    and knows whether a step is under way, of the first one too that was when it was called.
    """
    if optimizer not in _watched:
        guard(optimizer, _end_of_skipping, _begin_skipping)
        _watched.add(optimizer)


def guard(
    optimizer: Optimizer,
    over: Callable[[Optimizer], None],
    begin: Begin | None = None,
    stepped: Callable[[Optimizer], None] | None = None,
    raised: Callable[[Optimizer, type[BaseException]], None] | None = None,
) -> Callable[[], None]:
    """Call ``begin`` once when a step of ``optimizer`` begins, and ``over(optimizer)`` when it has ended or raised.

    ``stepped(optimizer)`` comes before ``over`` where it has not raised, was not left out, and may raise itself;
    ``raised(optimizer, kind)`` where it has, by an exception of that kind, and was called as ``optimizer.step``.
    ``begin(optimizer, args, kwargs)`` may return other arguments, ``optimizer`` first among them, or SKIP: then the
    step is not made, and its later pre hooks and its post hooks are not called. The result takes all back and lets go
    of both, also where somebody has wrapped the step since.

    torch calls hooks only where ``Optimizer.__init__`` has patched the class, once for each class whose ``step`` calls
    that of its base, and post hooks not after an exception. So the instance's ``step`` is wrapped, as LR schedulers do:
    its beginning is the first pre hook inside, after those that others put in before, or the call, where the class has
    none or ``optimizer.__init__`` was called again, which drops all hooks; its end is the end. A step of the class past
    the wrapper is heard by the hooks alone, and gets no gradients where it is to be skipped.
    """
    inner, reference = optimizer.step, ref(optimizer)
    hearing, hooks = _Hearing(over, begin, stepped, raised), "_optimizer_step_pre_hooks" in vars(optimizer)
    called = hooks and _calls_hooks(optimizer)  # None: not known

    @untraced
    @wraps(inner)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        hearing.inside, hearing.begun = True, False
        try:
            if called is False or (handles and handles[0].id not in self._optimizer_step_pre_hooks):
                (_, *given), kwargs = hearing.before(self, (self, *args), kwargs) or ((self, *args), kwargs)
                args = tuple(given)
            versions = _versions(self) if called is None else 0
            result = inner(*args, **kwargs)
            if called is None and not hearing.begun and _versions(self) != versions:
                raise refusals.step_replaced(type(self).__name__)
            hearing.tell(self)
            return result
        except _Skipped as skipped:
            if skipped.hearing is not hearing:
                raise
            return None
        except BaseException as error:
            if hearing.raised is not None:
                hearing.raised(self, type(error))
            raise
        finally:
            hearing.inside = False
            hearing.after(self)

    wrapper = MethodType(step, optimizer)
    before = optimizer.__dict__.get("step")
    optimizer.step = wrapper  # type: ignore[method-assign]
    handles = []
    if hooks:
        handles = [optimizer.register_step_pre_hook(hearing.before), optimizer.register_step_post_hook(hearing.ended)]

    def remove() -> None:
        hearing.over = hearing.begin = hearing.stepped = hearing.raised = None
        for handle in handles:
            handle.remove()
        found = reference()
        if found is not None and found.__dict__.get("step") is wrapper:  # else somebody has wrapped it since
            del found.__dict__["step"]
            if before is not None:
                found.__dict__["step"] = before

    return remove


class _Skipped(Exception):
    """Leaves a step that must not be made, from a pre hook of it to the guard that has put the hook in."""

    def __init__(self, hearing: "_Hearing") -> None:
        super().__init__("distclip skips this step")
        self.hearing = hearing


@dataclass(slots=True)
class _Hearing:
    """Whom a guard tells, and where the step is: inside the wrapped one, and begun, by the hooks of the first class."""

    over: Callable[[Optimizer], None] | None
    begin: Begin | None
    stepped: Callable[[Optimizer], None] | None
    raised: Callable[[Optimizer, type[BaseException]], None] | None
    inside: bool = False
    begun: bool = False
    withheld: ExitStack = field(default_factory=ExitStack)  # by a step past the wrapper

    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if self.begin is None or (self.inside and self.begun):
            return None
        self.begun = True
        self.withheld.close()  # of a step past the wrapper that has raised
        begun = self.begin(optimizer, args, kwargs)
        if begun != SKIP:
            return begun
        if self.inside:
            raise _Skipped(self)
        self.withheld.callback(withhold(parameters_of(optimizer)))
        return None

    def tell(self, optimizer: Optimizer) -> None:
        if self.stepped is not None:
            self.stepped(optimizer)

    def ended(self, optimizer: Optimizer, *_: Any) -> None:
        if not self.inside:
            try:
                self.tell(optimizer)
            finally:
                self.after(optimizer)

    def after(self, optimizer: Optimizer) -> None:
        self.withheld.close()
        if self.over is not None:
            self.over(optimizer)


def _calls_hooks(optimizer: Optimizer) -> bool | None:
    """Whether the ``step`` that it has now is the one torch has patched, seen through what others put on the instance.

    None where they hide it. The attribute ``hooked`` tells nothing: decorators copy it, and an LR scheduler or a guard
    may hold a ``step`` from before the class was patched.
    """
    of_class = type(optimizer).step
    own, found = (of_class, getattr(of_class, "__wrapped__", None)), _function(optimizer.step)
    while found not in own and getattr(found, "__code__", None) is not _PATCHED:
        if not hasattr(found, "__wrapped__"):
            return None
        found = _function(found.__wrapped__)
    return getattr(found, "__code__", None) is _PATCHED


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)


def _versions(optimizer: Optimizer) -> int:
    return sum(parameter._version for parameter in parameters_of(optimizer))


def _folds(optimizer: Optimizer) -> bool:
    return type(optimizer) in FOLDING and all(group.get("fused") for group in optimizer.param_groups)


def _begin_skipping(optimizer: Optimizer, *_: Any) -> Literal["skip"] | None:
    _inside.add(optimizer)
    return SKIP if optimizer in _skipping else None


def _end_of_skipping(optimizer: Optimizer) -> None:
    _inside.discard(optimizer)
    _flags.pop(optimizer, ExitStack()).close()
    _skipping.pop(optimizer, ExitStack()).close()
