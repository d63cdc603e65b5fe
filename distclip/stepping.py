"""Steps that somebody else calls: how one of them changes nothing, and how we hear that it is over."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import wraps
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import Tensor
from torch.optim import Optimizer

from .folding import FOLDING, folded, may_skip_on_device
from .group import reads_are_free

_flags: WeakKeyDictionary[Optimizer, ExitStack] = WeakKeyDictionary()
_withheld: WeakKeyDictionary[Optimizer, Callable[[], None]] = WeakKeyDictionary()
_guarded: WeakSet[Optimizer] = WeakSet()


def withhold(optimizer: Optimizer) -> Callable[[], None]:
    """Take the gradients of ``optimizer`` away, so that its step changes nothing; the result gives them back.

    A parameter that has got another gradient by then keeps that one.
    """
    withheld = [(p, p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for parameter, _ in withheld:
        parameter.grad = None

    def give_back() -> None:
        for parameter, gradient in withheld:
            if parameter.grad is None:
                parameter.grad = gradient

    return give_back


def skip_next_step(optimizers: Iterable[Optimizer], skip: Tensor) -> None:
    """Let the next step of each optimizer, which a framework calls, change nothing where ``skip`` is true.

    ``skip`` is a report's: 0-d bool. Call it between the last backward and the step, or inside the step's closure.
    Fused Adam, AdamW, SGD and Adagrad are told through ``found_inf`` where ``skip`` is on an accelerator, so that
    nothing waits; from others the gradients are taken away until the step is over or has raised, and ``skip`` is
    waited for.
    """
    for optimizer in optimizers:
        _flags.pop(optimizer, ExitStack()).close()  # of a step that never came
        _withheld.pop(optimizer, None)  # these are not the gradients of this one
        if not reads_are_free(skip.device) and _folds(optimizer) and may_skip_on_device(optimizer):
            flag = _flags[optimizer] = ExitStack()
            flag.enter_context(folded(optimizer, None, skip))
        elif skip:
            _withheld[optimizer] = withhold(optimizer)
        else:
            continue
        if optimizer not in _guarded:  # for good: torch does not let a hook remove itself
            guard(optimizer, _end_of_skipping)
            _guarded.add(optimizer)


def guard(optimizer: Optimizer, over: Callable[[Optimizer], None]) -> Callable[[], None]:
    """Call ``over(optimizer)`` whenever a step of it has ended, by an exception too; the result takes that back.

    torch's post hooks do not run after an exception, so the instance's ``step`` is wrapped, as LR schedulers do.
    """
    inner, reference = optimizer.step, ref(optimizer)

    @wraps(inner)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        finally:
            over(self)

    wrapper = MethodType(step, optimizer)
    before = optimizer.__dict__.get("step")
    optimizer.step = wrapper  # type: ignore[method-assign]
    handle = optimizer.register_step_post_hook(lambda stepped, args, kwargs: over(stepped))

    def remove() -> None:
        handle.remove()
        found = reference()
        if found is not None and found.__dict__.get("step") is wrapper:  # else somebody has wrapped it since
            del found.__dict__["step"]
            if before is not None:
                found.__dict__["step"] = before

    return remove


def _folds(optimizer: Optimizer) -> bool:
    return type(optimizer) in FOLDING and all(group.get("fused") for group in optimizer.param_groups)


def _end_of_skipping(optimizer: Optimizer) -> None:
    _flags.pop(optimizer, ExitStack()).close()
    _withheld.pop(optimizer, lambda: None)()
