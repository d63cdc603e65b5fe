"""Steps that someone else calls: how to make one of them change nothing, and how to notice its beginning and end."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps
from types import MethodType
from typing import Any, Concatenate, Final, Literal, TypeAlias
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from ..kernels.device import reads_are_free
from ..layouts.piece import local_tensor
from ..shield import untraced
from . import refusals
from .fused import TORCH, can_fold, folded, prepare_skip_on_device
from .wrapped import refuse_clip_before_step, refuse_proxy

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
SKIP: Final = "skip"
Begin: TypeAlias = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], Arguments | Literal["skip"] | None]

_PATCHED = Optimizer.profile_hook_step(Optimizer.step).__code__  # what torch patches a class's step with

_flags: WeakKeyDictionary[Optimizer, ExitStack] = WeakKeyDictionary()  # found_inf is set until these close
_skipping: WeakKeyDictionary[Optimizer, ExitStack] = WeakKeyDictionary()  # the next step is skipped; returns gradients
_inside: WeakSet[Optimizer] = WeakSet()  # of those watched: whose step is running
_watched: WeakSet[Optimizer] = WeakSet()


def withhold(parameters: Iterable[Tensor]) -> Callable[[], None]:
    """Take the gradients of ``parameters`` away, and return a function that gives them back.

    A parameter that has another gradient by then keeps that one.
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
    """ValueError for what ``step()`` cannot step, or would step with gradients other than the clipped ones."""
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
    """The parameters of all its groups."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def versions_of(optimizer: Optimizer) -> list[tuple[Tensor, int]]:
    """The gradients of its parameters, each with a number that grows whenever something writes to the gradient."""
    gradients = (parameter.grad for parameter in parameters_of(optimizer))
    return [(gradient, local_tensor(gradient)._version) for gradient in gradients if gradient is not None]


def skip_next_step(optimizers: Iterable[Optimizer], skip: Tensor, on_device: bool | None = None) -> None:
    """Let the next step of each optimizer, which a framework calls, change nothing where ``skip`` is true.

    ``skip`` is a report's: 0-d bool. Call this between the last backward and the step, or inside the step's closure.

    * ``on_device`` (None: where ``skip`` is on an accelerator): fused Adam, AdamW, SGD and Adagrad skip by
      ``found_inf``, without a host sync.
    * Otherwise ``skip`` is read, a host sync on an accelerator, and the step is not made: its hooks and step counts
      do not see it.
    * Inside the closure the step is already running, and so may be that of an optimizer that was not watched before:
      its gradients are taken away until it has ended or raised, and its step counts may advance.
    """
    on_device = not reads_are_free(skip.device) if on_device is None else on_device
    for optimizer in optimizers:
        _flags.pop(optimizer, ExitStack()).close()  # of a step that never came
        _skipping.pop(optimizer, None)  # the gradients it withheld are not those of this step
        if on_device and can_fold(optimizer) and prepare_skip_on_device(optimizer):
            flag = _flags[optimizer] = ExitStack()
            flag.enter_context(folded(optimizer, None, skip))
        elif skip:
            give_back = _skipping[optimizer] = ExitStack()
            if optimizer in _inside or optimizer not in _watched:  # its step may be running: this is the closure
                give_back.callback(withhold(parameters_of(optimizer)))
        else:
            continue
        watch(optimizer)


def watch_before_step(optimizers: Iterable[Optimizer]) -> None:
    """Watch them; RuntimeError for one whose step is running, as in a closure: it could be skipped no more."""
    for optimizer in optimizers:
        if optimizer in _inside:
            raise refusals.runs_already(type(optimizer).__name__)
        watch(optimizer)


def watch(optimizer: Optimizer) -> None:
    """Notice the steps of ``optimizer`` from now on, for good: torch does not let a hook remove itself (2.13).

    Call it early for optimizers whose steps may be skipped later: :func:`skip_next_step` then knows from the first step
    on whether one is running, and leaves the gradients of one that is not in place.
    """
    if optimizer not in _watched:
        guard(optimizer, _end_watched, _begin_watched)
        _watched.add(optimizer)


def guard(
    optimizer: Optimizer,
    end: Callable[[Optimizer], None],
    begin: Begin | None = None,
    stepped: Callable[[Optimizer], None] | None = None,
    raised: Callable[[Optimizer, type[BaseException]], None] | None = None,
) -> Callable[[], None]:
    """Call ``begin`` once when a step of ``optimizer`` begins, and ``end(optimizer)`` when it has ended or raised.

    * ``begin(optimizer, args, kwargs)`` may return other arguments, ``optimizer`` first among them, or SKIP: then the
      step is not made, and neither its later pre hooks nor its post hooks are called.
    * ``stepped(optimizer)`` comes before ``end`` if the step was made and has not raised; it may raise itself.
    * ``raised(optimizer, kind)`` comes before ``end`` if the step was called as ``optimizer.step`` and has raised an
      exception of that kind.

    Returns a function that removes all of it and drops the callbacks, also where someone has wrapped the step since.

    torch's hooks (2.13) are not enough: they run only where ``Optimizer.__init__`` has patched the class, once for each
    class whose ``step`` calls that of its base, and post hooks do not run after an exception. So the instance's
    ``step`` is wrapped, as LR schedulers do. The step begins with the first pre hook inside, after those that were
    registered before; or with the call, where the class has no hooks or a second ``optimizer.__init__`` has dropped
    them. If the class's ``step`` is called past the wrapper, only the hooks notice, and a step to be skipped runs
    without gradients.
    """
    guarded, hooked = _Guarded(end, begin, stepped, raised), "_optimizer_step_pre_hooks" in vars(optimizer)
    calls_hooks = hooked and _calls_hooks(optimizer)
    before, reference = optimizer.__dict__.get("step"), ref(optimizer)
    wrapper = MethodType(_wrapped(optimizer.step, guarded, calls_hooks), optimizer)
    optimizer.step = wrapper  # type: ignore[method-assign]
    if hooked:
        guarded.handles += [
            optimizer.register_step_pre_hook(guarded.pre_hook),
            optimizer.register_step_post_hook(guarded.post_hook),
        ]

    def remove() -> None:
        guarded.remove()
        found = reference()
        if found is not None and found.__dict__.get("step") is wrapper:  # else someone has wrapped it since
            del found.__dict__["step"]
            if before is not None:
                found.__dict__["step"] = before

    return remove


def _wrapped(
    inner: Callable[..., Any], guarded: "_Guarded", calls_hooks: bool | None
) -> Callable[Concatenate[Optimizer, ...], Any]:
    """``inner``, the step of an optimizer, with the callbacks of ``guarded``; ``calls_hooks``: None if unknown."""

    @untraced
    @wraps(inner)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        guarded.inside, guarded.begun = True, False
        try:
            if calls_hooks is False or guarded.lost_its_hooks(self):
                (_, *given), kwargs = guarded.pre_hook(self, (self, *args), kwargs) or ((self, *args), kwargs)
                args = tuple(given)
            versions = _versions(self) if calls_hooks is None else 0
            result = inner(*args, **kwargs)
            if calls_hooks is None and not guarded.begun and _versions(self) != versions:
                raise refusals.step_replaced(type(self).__name__)
            guarded.report_stepped(self)
            return result
        except _Skipped as skipped:
            if skipped.guarded is not guarded:
                raise
            return None
        except BaseException as error:
            if guarded.raised is not None:
                guarded.raised(self, type(error))
            raise
        finally:
            guarded.inside = False
            guarded.finish(self)

    return step


class _Skipped(Exception):
    """Leaves a step that must not be made: raised in its pre hook, caught by the guard that registered the hook."""

    def __init__(self, guarded: "_Guarded") -> None:
        super().__init__("distclip skips this step")
        self.guarded = guarded


@dataclass(slots=True)
class _Guarded:
    """The callbacks of a guard, and how far the step is.

    ``inside``: the wrapped step is running; ``begun``: ``begin`` was called in it, and is not for its base classes.
    """

    end: Callable[[Optimizer], None] | None
    begin: Begin | None
    stepped: Callable[[Optimizer], None] | None
    raised: Callable[[Optimizer, type[BaseException]], None] | None
    inside: bool = False
    begun: bool = False
    handles: list[RemovableHandle] = field(default_factory=list)  # of the hooks; empty where the class has none
    withheld: ExitStack = field(default_factory=ExitStack)  # from a step past the wrapper

    def lost_its_hooks(self, optimizer: Any) -> bool:
        """Whether ``optimizer.__init__`` was called again, which drops all hooks."""
        return bool(self.handles) and self.handles[0].id not in optimizer._optimizer_step_pre_hooks

    def remove(self) -> None:
        """Remove the hooks, and drop the callbacks: someone else's wrapper may keep this alive."""
        self.end = self.begin = self.stepped = self.raised = None
        for handle in self.handles:
            handle.remove()

    def pre_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
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

    def report_stepped(self, optimizer: Optimizer) -> None:
        if self.stepped is not None:
            self.stepped(optimizer)

    def post_hook(self, optimizer: Optimizer, *_: Any) -> None:
        if not self.inside:
            try:
                self.report_stepped(optimizer)
            finally:
                self.finish(optimizer)

    def finish(self, optimizer: Optimizer) -> None:
        self.withheld.close()
        if self.end is not None:
            self.end(optimizer)


def _calls_hooks(optimizer: Optimizer) -> bool | None:
    """Whether its present ``step`` is the one torch has patched, below whatever wraps it on the instance; None: hidden.

    The attribute ``hooked`` (torch 2.13) does not show it: decorators copy it, and an LR scheduler or a guard may hold
    a ``step`` from before the class was patched.
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


def _begin_watched(optimizer: Optimizer, *_: Any) -> Literal["skip"] | None:
    _inside.add(optimizer)
    return SKIP if optimizer in _skipping else None


def _end_watched(optimizer: Optimizer) -> None:
    _inside.discard(optimizer)
    _flags.pop(optimizer, ExitStack()).close()
    _skipping.pop(optimizer, ExitStack()).close()
