"""Folding: letting a fused optimizer apply the coefficient and the skip while it reads the gradients anyway.

torch's fused Adam, AdamW, SGD and Adagrad divide every gradient by ``optimizer.grad_scale`` and leave parameters and
state alone where ``optimizer.found_inf`` is 1: the road that GradScaler takes (torch 2.13, ``torch/optim/*.py``).
On the CPU they take the elements of a gradient to lie in memory as those of its parameter do, and read and write others
where they do not.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer

from ..kernels.transfer import sent
from ..layouts.piece import local_of, local_tensor
from ..report import Report

FOLDING = (Adam, AdamW, SGD, Adagrad)
TORCH = {kind.__module__ for kind in (*FOLDING, LBFGS)}  # whose optimizers are looked at no further
ABSENT = object()


@dataclass(frozen=True, slots=True)
class Folds:
    """Which of a step's optimizers fold, and ids of parameters.

    ``held``: those that any of them holds; ``inside``: that the folding ones hold; ``foreign``: that nobody clips here.
    ``of_torch``: whether all are of classes of torch, of which nothing else has to be known.
    """

    by_optimizer: tuple[bool, ...]
    held: frozenset[int]
    inside: frozenset[int]
    foreign: frozenset[int]
    of_torch: bool


@dataclass(frozen=True, slots=True)
class Stepping:
    """A decision whose gradients are scaled already, but for those that folding optimizers scale themselves.

    ``skipped``: the host knows that nobody must step. ``coef``, ``skip``: what folding optimizers are told.
    """

    report: Report
    skipped: bool
    folds: Folds
    coef: Tensor | None
    skip: Tensor | None

    def around(self, index: int, optimizer: Optimizer) -> AbstractContextManager[None]:
        """What the step of ``optimizer``, the one of this index, must run inside of."""
        return folded(optimizer, self.coef, self.skip) if self.folds.by_optimizer[index] else nullcontext()


class Folding:
    """Which optimizers may fold: exactly torch's classes, every group fused, and every parameter clipped by us.

    A parameter in two optimizers keeps both from folding: each would scale its gradient. Worked out anew only where
    the optimizers, their parameters or their ``fused`` changed.
    """

    __slots__ = ("_clipped", "_folds", "_key", "_may_fold")

    def __init__(self, clipped: frozenset[int], may_fold: bool = True) -> None:
        """``clipped``: the ids of the parameters that share the coefficient, all of them kept alive by the caller.

        ``may_fold``: their gradients are in ``.grad``, where optimizers read them.
        """
        self._clipped = clipped
        self._may_fold = may_fold
        self._key: Hashable = None
        self._folds: Folds | None = None

    def of(self, optimizers: Sequence[Optimizer]) -> Folds:
        """Which of ``optimizers`` fold."""
        key = _key(optimizers)
        if self._folds is None or key != self._key:
            self._key, self._folds = key, self._worked_out(optimizers)
        return self._folds

    def known(self, optimizers: Sequence[Optimizer]) -> Folds | None:
        """The same where these are the optimizers of the latest call, all of them of torch; None otherwise."""
        try:
            same = self._folds is not None and self._folds.of_torch and _key(optimizers) == self._key
        except AttributeError:  # some are no optimizers
            return None
        return self._folds if same else None

    def _worked_out(self, optimizers: Sequence[Optimizer]) -> Folds:
        ids = [[id(p) for group in o.param_groups for p in group["params"]] for o in optimizers]
        holders = Counter(i for own in ids for i in own)
        folds = tuple(
            self._may_fold
            and type(optimizer) in FOLDING
            and getattr(optimizer, "_step_supports_amp_scaling", False)
            and all(group.get("fused") for group in optimizer.param_groups)
            and all(i in self._clipped and holders[i] == 1 for i in own)
            for optimizer, own in zip(optimizers, ids, strict=True)
        )
        inside = frozenset(i for own, fold in zip(ids, folds, strict=True) if fold for i in own)
        of_torch = all(type(optimizer).__module__ in TORCH for optimizer in optimizers)
        return Folds(folds, frozenset(holders), inside, frozenset(holders) - self._clipped, of_torch)


def _key(optimizers: Sequence[Optimizer]) -> Hashable:
    return tuple(
        (id(o), type(o), tuple((bool(g.get("fused")), tuple(map(id, g["params"]))) for g in o.param_groups))
        for o in optimizers
    )


def may_skip_on_device(optimizer: Optimizer) -> bool:
    """Whether ``found_inf`` leaves this folding optimizer as if the step had never been; prepares it so that it does.

    Fused SGD with momentum that skips its very first step would keep uninitialised memory as momentum, so the buffers
    are made first, as zeros. With dampening a zero buffer is not what the first step makes: False until it was taken.
    """
    if type(optimizer) is not SGD:
        return True
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                if group["dampening"]:
                    return False
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return True


@contextmanager
def folded(optimizer: Optimizer, coef: Tensor | None, skip: Tensor | None) -> Iterator[None]:
    """Inside, ``optimizer.step()`` multiplies gradients by ``coef`` and does nothing where ``skip`` is true.

    Either may be None: no factor, never skipped. Both are 0-d, and copied to the parameters' device where they are
    elsewhere; ``coef`` is normal in float32, which keeps its inverse finite. The gradients are left scaled; one that
    lies otherwise than its parameter is replaced by a copy.
    """
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), None)
    if device is None:  # a rank whose stage or experts have no parameters for it
        yield
        return
    words: dict[str, Tensor] = {}
    if coef is not None:
        words["grad_scale"] = coef.float().reciprocal()
    if skip is not None:
        words["found_inf"] = skip.float()
    words = {name: word if word.device == device else sent(word, device) for name, word in words.items()}
    _straighten(optimizer)
    before = {name: optimizer.__dict__.get(name, ABSENT) for name in words}
    optimizer.__dict__.update(words)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is ABSENT:
                optimizer.__dict__.pop(name, None)  # a GradScaler that stepped has taken it away
            else:
                optimizer.__dict__[name] = value


def _straighten(optimizer: Optimizer) -> None:
    """Let every gradient lie in memory as its parameter does: those of a backward do, those that users set may not."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters]
    likes, found = parameters, gradients
    types = set(map(type, gradients))
    if types == {DTensor}:
        likes, found = list(map(local_of, parameters)), list(map(local_of, gradients))
    elif types != {Tensor}:
        likes, found = list(map(local_tensor, parameters)), list(map(local_tensor, gradients))
    if all(map(Tensor.is_contiguous, found)) and all(map(Tensor.is_contiguous, likes)):
        return
    for parameter, gradient, like, values in zip(parameters, gradients, likes, found, strict=True):
        if values.layout != torch.strided or values.stride() == like.stride():
            continue
        copy = torch.empty_like(like, dtype=values.dtype, requires_grad=False).copy_(values.detach())
        if isinstance(gradient, DTensor):
            mesh, placements, shape = gradient.device_mesh, gradient.placements, gradient.shape
            copy = DTensor.from_local(copy, mesh, placements, shape=shape, stride=gradient.stride())
        parameter.grad = copy
