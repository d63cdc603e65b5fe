"""Steps that somebody else calls: how one of them changes nothing, and how we hear that it begins and is over."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from .folding import FOLDING, folded, may_skip_on_device
from .group import reads_are_free
from .shield import untraced

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
Begin: TypeAlias = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], Arguments | None]

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
    """ValueError for what ``step()`` cannot step."""
    if not optimizers:
        raise ValueError("step() needs the optimizers to step: step(optimizer), or call clip_() and step yourself")
    for index, optimizer in enumerate(optimizers):
        if not hasattr(optimizer, "param_groups"):
            raise ValueError(
                f"step() takes optimizers one by one, got {type(optimizer).__name__}: step(*optimizers, scaler=scaler)"
            )
        if any(optimizer is other for other in optimizers[:index]):
            raise ValueError(f"step() was given the same {type(optimizer).__name__} twice: give it once")
        if isinstance(optimizer, LBFGS):
            raise ValueError("LBFGS makes its gradients several times a step: call clip_() in its closure instead")


@contextmanager
def without_others(holders: Iterable[Tensor], held: Set[int]) -> Iterator[None]:
    """Inside, those of ``holders`` whose id is not in ``held`` have no gradient.

    No optimizer zeroes theirs, so that they would add up over the steps, and every norm with them.
    """
    give_back = withhold(p for p in holders if id(p) not in held)
    try:
        yield
    finally:
        give_back()


def held_by(optimizer: Optimizer) -> Iterator[Tensor]:
    """Its parameters."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def skip_next_step(optimizers: Iterable[Optimizer], skip: Tensor) -> None:
    """Let the next step of each optimizer, which a framework calls, change nothing where ``skip`` is true.

    ``skip`` is a report's: 0-d bool. Call it between the last backward and the step, or inside the step's closure.
    Fused Adam, AdamW, SGD and Adagrad are told through ``found_inf`` where ``skip`` is on an accelerator, so that
    nothing waits; from others the gradients are taken away until the step is over or has raised, and ``skip`` is
    waited for.
    """
    for optimizer in optimizers:
        _flags.pop(optimizer, ExitStack()).close()  # of a step that never came
        _skipping.pop(optimizer, None)  # what it withheld are not the gradients of this one
        if not reads_are_free(skip.device) and _folds(optimizer) and may_skip_on_device(optimizer):
            flag = _flags[optimizer] = ExitStack()
            flag.enter_context(folded(optimizer, None, skip))
        elif skip:
            give_back = _skipping[optimizer] = ExitStack()
            if optimizer in _inside or optimizer not in _watched:  # its step may be under way: this is the closure
                give_back.callback(withhold(held_by(optimizer)))
        else:
            continue
        watch(optimizer)


def watch(optimizer: Optimizer) -> None:
    """Hear of the steps of ``optimizer`` from now on, for good: torch does not let a hook remove itself.

    Whoever skips its steps later, and knows it now, says so: :func:`skip_next_step` then leaves gradients in place
    until the step begins, and knows the end of the first step too that was under way when it was called.
    """
    if optimizer not in _watched:
        guard(optimizer, _end_of_skipping, _begin_skipping)
        _watched.add(optimizer)


def guard(optimizer: Optimizer, over: Callable[[Optimizer], None], begin: Begin | None = None) -> Callable[[], None]:
    """Call ``over(optimizer)`` whenever a step of it has ended, by an exception too, and ``begin`` as a pre hook of it.

    The result takes that back and lets go of both, also where somebody has wrapped the step since. torch runs hooks
    once for each class whose ``step`` calls that of its base, and post hooks not after an exception, so the instance's
    ``step`` is wrapped, as LR schedulers do: inside of it the first pre hook is the beginning, and its end is the end.
    """
    inner, reference, hearing = optimizer.step, ref(optimizer), _Hearing(over, begin)

    @untraced
    @wraps(inner)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        hearing.inside, hearing.begun = True, False
        try:
            return inner(*args, **kwargs)
        finally:
            hearing.inside = False
            hearing.after(self)

    wrapper = MethodType(step, optimizer)
    before = optimizer.__dict__.get("step")
    optimizer.step = wrapper  # type: ignore[method-assign]
    handles = [optimizer.register_step_pre_hook(hearing.before), optimizer.register_step_post_hook(hearing.after)]

    def remove() -> None:
        hearing.over = hearing.begin = None
        for handle in handles:
            handle.remove()
        found = reference()
        if found is not None and found.__dict__.get("step") is wrapper:  # else somebody has wrapped it since
            del found.__dict__["step"]
            if before is not None:
                found.__dict__["step"] = before

    return remove


@dataclass(slots=True)
class _Hearing:
    """Whom a guard tells, and where the step is: inside the wrapped one, and begun, by the hooks of the first class."""

    over: Callable[[Optimizer], None] | None
    begin: Begin | None
    inside: bool = False
    begun: bool = False

    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if self.begin is None or (self.inside and self.begun):
            return None
        self.begun = True
        return self.begin(optimizer, args, kwargs)

    def after(self, optimizer: Optimizer, *_: Any) -> None:
        if self.over is not None and not self.inside:
            self.over(optimizer)


def _folds(optimizer: Optimizer) -> bool:
    return type(optimizer) in FOLDING and all(group.get("fused") for group in optimizer.param_groups)


def _begin_skipping(optimizer: Optimizer, *_: Any) -> None:
    _inside.add(optimizer)
    if optimizer in _skipping:
        _skipping[optimizer].callback(withhold(held_by(optimizer)))


def _end_of_skipping(optimizer: Optimizer) -> None:
    _inside.discard(optimizer)
    _flags.pop(optimizer, ExitStack()).close()
    _skipping.pop(optimizer, ExitStack()).close()
