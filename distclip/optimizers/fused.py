"""Folding: letting a fused optimizer apply the coefficient and the skip while it reads the gradients anyway.

torch's fused Adam, AdamW, SGD and Adagrad divide every gradient by ``optimizer.grad_scale`` and leave parameters and
state alone where ``optimizer.found_inf`` is 1: GradScaler's own way (torch 2.13, ``torch/optim/*.py``).
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer

from ..kernels.transfer import sent
from ..layouts.piece import local_of, local_tensor
from ..report import Report

FOLDING = (Adam, AdamW, SGD, Adagrad)
TORCH = {kind.__module__ for kind in (*FOLDING, LBFGS)}  # modules whose optimizers need no further checks
ABSENT = object()


@dataclass(frozen=True, slots=True)
class Folds:
    """Which of a step's optimizers fold, and ids of parameters.

    * ``parameters``: of all these optimizers; ``folded``: of those that fold; ``foreign``: that nobody clips here.
    * ``of_torch``: whether all are of torch's own classes, which need no further checks.
    """

    by_optimizer: tuple[bool, ...]
    parameters: frozenset[int]
    folded: frozenset[int]
    foreign: frozenset[int]
    of_torch: bool


@dataclass(frozen=True, slots=True)
class Stepping:
    """A decision for optimizers that step now: all gradients are scaled but those that folding ones scale themselves.

    * ``skipped``: the host knows that none of them must step.
    * ``coef``, ``skip_on_device``: for those that fold, 0-d; None where there is nothing to scale, or no step that only
      the device knows to be skipped.
    * ``scaler``: steps them, if there is one.
    """

    report: Report
    skipped: bool
    folds: Folds
    coef: Tensor | None
    skip_on_device: Tensor | None
    scaler: GradScaler | None = None

    def step(self, index: int, optimizer: Optimizer) -> None:
        """Step ``optimizer``, the one of this index, or let the scaler do it; nothing where all of them are skipped."""
        if self.skipped:
            return
        with self.around(index, optimizer):
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)

    def around(self, index: int, optimizer: Optimizer) -> AbstractContextManager[None]:
        """What the step of ``optimizer``, the one of this index, must run inside, whoever calls it."""
        if not self.folds.by_optimizer[index]:
            return nullcontext()
        return folded(optimizer, self.coef, self.skip_on_device, by_scaler=self.scaler is not None)


class Folding:
    """Which optimizers fold: those that can (see :func:`can_fold`) and whose every parameter is clipped by us.

    A parameter in two optimizers keeps both from folding: each would scale its gradient. Found anew only where the
    optimizers, their parameters or their ``fused`` have changed.
    """

    __slots__ = ("_clipped", "_folds", "_key", "_may_fold")

    def __init__(self, clipped: frozenset[int], may_fold: bool = True) -> None:
        """``clipped``: ids of the parameters that share the coefficient, kept alive by the caller.

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
            self._key, self._folds = key, self._found(optimizers)
        return self._folds

    def known(self, optimizers: Sequence[Optimizer]) -> Folds | None:
        """The same where these are the optimizers of the latest call and all of torch's own classes; None otherwise."""
        try:
            same = self._folds is not None and self._folds.of_torch and _key(optimizers) == self._key
        except AttributeError:  # some are no optimizers
            return None
        return self._folds if same else None

    def _found(self, optimizers: Sequence[Optimizer]) -> Folds:
        ids = [[id(p) for group in o.param_groups for p in group["params"]] for o in optimizers]
        holders = Counter(i for own in ids for i in own)
        folds = tuple(
            self._may_fold and can_fold(optimizer) and all(i in self._clipped and holders[i] == 1 for i in own)
            for optimizer, own in zip(optimizers, ids, strict=True)
        )
        folded_ids = frozenset(i for own, fold in zip(ids, folds, strict=True) if fold for i in own)
        of_torch = all(type(optimizer).__module__ in TORCH for optimizer in optimizers)
        return Folds(folds, frozenset(holders), folded_ids, frozenset(holders) - self._clipped, of_torch)


def _key(optimizers: Sequence[Optimizer]) -> Hashable:
    return tuple(  # an id would be that of the next optimizer too, where the last one was dropped
        (type(o), tuple((bool(g.get("fused")), tuple(map(id, g["params"]))) for g in o.param_groups), ref(o))
        for o in optimizers
    )


def can_fold(optimizer: Optimizer) -> bool:
    """Whether its step heeds ``grad_scale`` and ``found_inf``: exactly torch's classes, with every group fused.

    Not every torch has them for each of ``FOLDING``.
    """
    return (
        type(optimizer) in FOLDING
        and getattr(optimizer, "_step_supports_amp_scaling", False)
        and all(group.get("fused") for group in optimizer.param_groups)
    )


def prepare_skip_on_device(optimizer: Optimizer) -> bool:
    """Give this folding optimizer the state in which ``found_inf`` leaves it as if it had not stepped.

    False where there is none. An SGD that has not stepped gets momentum of zeros: its first step starts from them.
    """
    if type(optimizer) is not SGD:
        return True
    # Fused SGD with momentum that skips its very first step keeps uninitialised memory as momentum (torch 2.13), so we
    # make the buffers first. Zeros are what the first step starts from, but with dampening: then not until it was made.
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                if group["dampening"]:
                    return False
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return True


@contextmanager
def folded(optimizer: Optimizer, coef: Tensor | None, skip: Tensor | None, by_scaler: bool = False) -> Iterator[None]:
    """Inside, ``optimizer.step()`` multiplies gradients by ``coef`` and does nothing where ``skip`` is true.

    Either may be None: no factor, never skipped. Both are 0-d, and copied to the parameters' device if they are
    elsewhere. ``coef`` must be a normal number in float32, so that its inverse is finite. The gradients are left
    scaled; one whose strides are not its parameter's is replaced by a copy.

    A GradScaler's own ``found_inf`` holds as well, and its scale is not lowered for ``skip``. ``by_scaler``: it steps
    inside, and sets its ``found_inf`` there; False also where it has set that, as in a hook of the optimizer.
    """
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), None)
    if device is None:  # a rank whose stage or experts have no parameters for it
        yield
        return
    attributes: dict[str, Tensor] = {}
    if coef is not None:
        attributes["grad_scale"] = coef.float().reciprocal()  # fused kernels read it as float32
    if skip is not None:
        attributes["found_inf"] = _joined(optimizer, skip)
    attributes = {name: t if t.device == device else sent(t, device) for name, t in attributes.items()}
    _match_strides(optimizer)
    before = {name: optimizer.__dict__.get(name, ABSENT) for name in attributes}
    optimizer.__dict__.update(attributes)
    joins = _joins_in_step(optimizer, skip) if by_scaler and skip is not None else nullcontext()
    try:
        with joins:
            yield
    finally:
        for name, value in before.items():
            if value is ABSENT:
                optimizer.__dict__.pop(name, None)  # a GradScaler that has stepped has deleted it
            else:
                optimizer.__dict__[name] = value


def _joined(optimizer: Optimizer, skip: Tensor) -> Tensor:
    """``skip`` as ``found_inf``: 1 also where a scaler has set that of ``optimizer``, else 0."""
    found = getattr(optimizer, "found_inf", None)
    if not isinstance(found, Tensor):
        return skip.float()
    return (torch.maximum(skip.float().to(found.device), found) > 0).float()


@contextmanager
def _joins_in_step(optimizer: Optimizer, skip: Tensor) -> Iterator[None]:
    """Inside, a step of ``optimizer`` adds ``skip`` to the ``found_inf`` that a scaler sets just before it."""

    def join(stepping: Any, args: Any, kwargs: Any) -> None:
        stepping.found_inf = _joined(stepping, skip)

    hook = optimizer.register_step_pre_hook(join)
    try:
        yield
    finally:
        hook.remove()


def _match_strides(optimizer: Optimizer) -> None:
    """Give every gradient the strides of its parameter: those of a backward have them, those that users set may not.

    torch's fused CPU kernels (2.13) read and write gradients as if they had, and so other elements where they do not.
    """
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
