"""Folding: letting a fused optimizer apply the coefficient and the skip while it reads the gradients anyway.

torch's fused Adam, AdamW, SGD and Adagrad divide every gradient by ``optimizer.grad_scale`` and leave parameters and
state alone where ``optimizer.found_inf`` is 1: the road that GradScaler takes (torch 2.13, ``torch/optim/*.py``).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

FOLDING = (Adam, AdamW, SGD, Adagrad)
ABSENT = object()


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def foldable(optimizers: Sequence[Optimizer], clipped: frozenset[int]) -> list[bool]:
    """Which optimizers may fold: exactly torch's classes, every group fused, and every parameter clipped by us.

    ``clipped``: the ids of the parameters that share the coefficient. A parameter in two optimizers keeps both from
    folding: each would scale its gradient.
    """
    holders: dict[int, int] = {}
    for optimizer in optimizers:
        for parameter in parameters_of(optimizer):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return [
        type(optimizer) in FOLDING
        and getattr(optimizer, "_step_supports_amp_scaling", False)
        and all(group.get("fused") for group in optimizer.param_groups)
        and all(id(p) in clipped and holders[id(p)] == 1 for p in parameters_of(optimizer))
        for optimizer in optimizers
    ]


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
    elsewhere. The gradients are left scaled.
    """
    device = next(parameters_of(optimizer)).device
    words: dict[str, Tensor] = {}
    if coef is not None:
        words["grad_scale"] = coef.float().reciprocal().to(device)
    if skip is not None:
        words["found_inf"] = skip.float().to(device)
    before = {name: optimizer.__dict__.get(name, ABSENT) for name in words}
    optimizer.__dict__.update(words)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is ABSENT:
                del optimizer.__dict__[name]
            else:
                optimizer.__dict__[name] = value
