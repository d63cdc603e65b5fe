"""Expert parallelism: each rank holds some experts of every block, and tokens are exchanged."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from distclip import Layout
from distclip.layouts.layout import LayoutFn
from distclip.train.models.gpt import Gpt
from distclip.train.models.moe import Experts, Moe


class Exchange(torch.autograd.Function):
    """Exchange rows: `sent[i]` to rank i of the group, `received[i]` from it; the backward reverses it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    return Exchange.apply(rows, sent, received, group)  # type: ignore[no-any-return, no-untyped-call]


def all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group)
    return arrived


@dataclass(kw_only=True, slots=True, frozen=True)
class Travel:
    """The dispatch of tokens to experts on the ranks of `group`, each of which holds equally many, in order.

    Three exchanges per call: the numbers of tokens, with a host sync, the tokens, and the experts' outputs.
    """

    group: dist.ProcessGroup

    def __call__(self, experts: Experts, tokens: Tensor, counts: Tensor) -> Tensor:
        there = counts.view(self.group.size(), -1)  # (rank, its experts)
        here = torch.empty_like(there)  # (rank, experts of this one)
        dist.all_to_all_single(here, there.contiguous(), group=self.group)
        sent, received = there.sum(1).tolist(), here.sum(1).tolist()
        arrived = exchange(tokens, sent, received, self.group)  # by rank, then by expert
        expert = torch.arange(here.shape[1], device=here.device).repeat(here.shape[0]).repeat_interleave(here.flatten())
        order = expert.argsort(stable=True)
        answers = experts(arrived[order], here.sum(0))[order.argsort()]
        return exchange(answers, received, sent, self.group)


def keep_experts(model: Gpt, mesh: DeviceMesh) -> None:
    """Drop the experts that other ranks of `mesh` hold, and send them their tokens."""
    index, count = mesh.get_local_rank(), mesh.size()
    for moe in mixtures(model):
        names = list(moe.experts)
        mine = names[len(names) * index // count : len(names) * (index + 1) // count]
        moe.experts = Experts({name: moe.experts[name] for name in mine})
        moe.dispatch = Travel(group=mesh.get_group())


def shard_experts(model: Gpt, mesh: DeviceMesh, data_size: int, dtype: torch.dtype | None) -> None:
    """Let FSDP2 shard this rank's experts over the ranks that hold the same; `data_size` ranks made their gradients."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    for moe in mixtures(model):
        experts = fully_shard(moe.experts, mesh=mesh, mp_policy=policy)
        experts.set_gradient_divide_factor(data_size)
        # Gloo cannot divide inside of its sum; where nothing is summed, torch 2.13 would divide twice
        experts.set_force_sum_reduction_for_comms(mesh.size(mesh.ndim - 1) > 1)


def mixtures(model: Gpt) -> list[Moe]:
    return [module for module in model.modules() if isinstance(module, Moe)]


def layout_of_experts(replicas: int) -> LayoutFn:
    """The layout of experts, each element of which is on `replicas` ranks."""
    return lambda name, parameter: Layout(replicas) if ".experts." in name else None
