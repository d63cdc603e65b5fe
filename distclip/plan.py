"""Plan: made once from the parameters; says what is summed together, where, and whether ranks talk at all.

Which collectives run, and their shape, follow from the plan and never from which gradients exist: a rank without
tokens for its experts, with an empty shard or with gradients that are None contributes zeros and takes part.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import inf

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from .errors import LayoutError
from .group import Axis, ClippingGroup
from .kernels import local_norms
from .layout import LayoutFn, LayoutReader
from .words import Reduced, reduce_norm

SUPPORTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Local:
    """This rank's part of one measurement.

    * ``gradients``: the local gradients that exist, as plain tensors.
    * ``indices``: which parameter each belongs to.
    * ``norms``: the p-norm of each, float64, shape (len(gradients),), on the plan's device.
    * ``error``: what makes these gradients unusable on this rank, to be raised once all ranks have met.
    """

    gradients: list[Tensor]
    indices: list[int]
    norms: Tensor
    error: LayoutError | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Built by :meth:`of`. ``names`` may be empty where the caller gave bare tensors (see :meth:`label`)."""

    parameters: tuple[Tensor, ...]
    names: tuple[str, ...]
    group: ClippingGroup
    p: float
    weights: Tensor  # (len(parameters),) float64 on `device`: 1 / replicas, or 1 when no rank talks to another
    device: torch.device
    dtype: torch.dtype  # of the norm that users see
    common: tuple[bool, ...]  # which parameters every rank of the group must know
    code: int  # hash of the common parameters

    @classmethod
    def of(
        cls,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        p: float,
        group: ClippingGroup,
        split_over: Sequence[Axis] = (),
        layout: LayoutFn | None = None,
    ) -> "Plan":
        """Read every parameter's layout; a parameter listed twice counts once. No collective."""
        unique = {id(t): i for i, t in reversed(list(enumerate(parameters)))}
        order = sorted(unique.values())
        kept = tuple(parameters[i] for i in order)
        kept_names = tuple(names[i] for i in order) if names else ()
        reader = LayoutReader(group, split_over, layout)
        digest = blake2b(digest_size=6)
        replicas: list[int] = []
        common: list[bool] = []
        for i, parameter in enumerate(kept):
            name = kept_names[i] if kept_names else _label(i, parameter)
            holding = reader.read(name, parameter)
            replicas.append(holding.layout.replicas)
            common.append(holding.common)
            if holding.common:
                digest.update(_describe(kept_names[i] if kept_names else "", parameter, replicas[-1]))
        device = group.device_for(kept)
        return cls(
            parameters=kept,
            names=kept_names,
            group=group,
            p=p,
            weights=torch.tensor(replicas, dtype=torch.float64, device=device).reciprocal(),
            device=device,
            dtype=torch.float64 if any(t.dtype == torch.float64 for t in kept) else torch.float32,
            common=tuple(common),
            code=int.from_bytes(digest.digest()),
        )

    def label(self, index: int) -> str:
        """What errors call parameter ``index``."""
        return self.names[index] if self.names else _label(index, self.parameters[index])

    @property
    def can_overflow(self) -> bool:
        """Whether finite gradients can have a power sum beyond float64: |x| ** p of fp32 cannot up to p = 7."""
        return self.dtype == torch.float64 or 7 < self.p < inf

    @staticmethod
    def local(tensor: Tensor) -> Tensor:
        """This rank's piece, as a plain tensor. (``to_local()`` takes 3.6 us, the attribute 10 ns.)"""
        return tensor._local_tensor if isinstance(tensor, DTensor) else tensor

    def look(self, gradients: Iterable[Tensor | None]) -> Local:
        """Take the local norms of ``gradients``, one for each parameter, None where there is none."""
        found: list[Tensor] = []
        indices: list[int] = []
        error = None
        for i, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            if gradient is None:
                continue
            problem = _problem(parameter, gradient)
            if problem is None:
                found.append(self.local(gradient))
                indices.append(i)
            elif error is None:
                error = LayoutError(f"the gradient of {self.label(i)} {problem}")
        return Local(found, indices, self._norms(found), error)

    def reduce(self, local: Local, tag: int = 0) -> Reduced:
        """Make the local norms one total norm: one all-reduce if the group has one. Never waits for an accelerator.

        ``tag`` is mixed into the agreement word. Raises the local error, if any, after taking part.
        """
        code = self.code + tag * 0x9E37  # an odd step: different tags stay different modulo 2**16
        if self.p == inf:
            mine = local.norms.max() if len(local.indices) else local.norms.new_zeros(())
        else:
            complete = len(local.indices) == len(self.parameters)
            weights = self.weights if complete else self.weights[local.indices]
            mine = torch.dot(local.norms.pow(self.p), weights)
        reduced = reduce_norm(self.group, mine, self.p, code, faulty=local.error is not None)
        if local.error is not None:
            raise local.error
        return reduced

    def _norms(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        devices = {t.device for t in gradients}
        if len(devices) == 1:
            return local_norms(gradients, self.p).to(self.device, non_blocking=self.device.type != "cpu")
        norms: list[Tensor | None] = [None] * len(gradients)
        for device in devices:
            here = [i for i, t in enumerate(gradients) if t.device == device]
            for i, norm in zip(here, local_norms([gradients[i] for i in here], self.p).to(self.device), strict=True):
                norms[i] = norm
        return torch.stack([norm for norm in norms if norm is not None])


def named_parameters(models: Iterable[nn.Module]) -> tuple[list[str], list[Tensor]]:
    """Names and parameters of the parts this rank holds, FSDP2 modules in their sharded state; no collective."""
    names: list[str] = []
    parameters: list[Tensor] = []
    parts = list(models)
    for number, part in enumerate(parts):
        for module in part.modules():
            if isinstance(module, FullyShardedDataParallel):
                raise LayoutError(
                    f"{type(part).__name__} holds FSDP1 modules (FullyShardedDataParallel), which distclip does not "
                    "support yet: use FSDP2 (torch.distributed.fsdp.fully_shard)"
                )
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward without backward the module shows unsharded copies without gradients
        for name, parameter in part.named_parameters():
            names.append(name if len(parts) == 1 else f"{number}.{name}")
            parameters.append(parameter)
    return names, parameters


def _problem(parameter: Tensor, gradient: Tensor) -> str | None:
    """Why this gradient cannot be summed, or None."""
    if isinstance(gradient, DTensor) != isinstance(parameter, DTensor):
        kinds = ["a plain tensor", "a DTensor"]
        return f"is {kinds[isinstance(gradient, DTensor)]}, its parameter {kinds[isinstance(parameter, DTensor)]}"
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        if gradient.placements != parameter.placements:
            return (
                f"is placed as {gradient.placements}, its parameter as {parameter.placements}, which is not "
                "supported yet: redistribute the gradient to the parameter's placements"
            )
        gradient = gradient._local_tensor
    if gradient.layout != torch.strided:
        return f"has layout {gradient.layout}, which is not supported yet: use dense gradients"
    if gradient.dtype not in SUPPORTED:
        return f"has dtype {gradient.dtype}, which is not supported yet: use one of {', '.join(map(str, SUPPORTED))}"
    return None


def _label(index: int, parameter: Tensor) -> str:
    return f"parameter {index} of shape {tuple(parameter.shape)}"


def _describe(name: str, parameter: Tensor, replicas: int) -> bytes:
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    return f"{name}|{tuple(parameter.shape)}|{parameter.dtype}|{placements}|{replicas};".encode()
