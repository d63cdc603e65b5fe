"""A mixture of experts in place of an MLP: each token goes to the router's `top_k` best experts."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class Experts(nn.ModuleDict):
    """Experts by their numbers in the whole model, also on a rank that holds only some."""

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Tokens (tokens, width), the first `counts[0]` of them for the first expert held here, and so on.

        Every expert runs, even on no tokens: it then has zero gradients, as data parallelism needs.
        """
        parts = tokens.split(counts.tolist())  # type: ignore[no-untyped-call]
        return torch.cat([expert(part) for expert, part in zip(self.values(), parts, strict=True)])


Dispatch: TypeAlias = Callable[[Experts, Tensor, Tensor], Tensor]
"""Calls experts with tokens sorted by expert and the number of tokens of every expert of the whole model."""


def dispatch_here(experts: Experts, tokens: Tensor, counts: Tensor) -> Tensor:
    return experts(tokens, counts)  # type: ignore[no-any-return]


class Moe(nn.Module):
    """(batch, time, width) to the same: the chosen experts' outputs, weighted by the router's softmax.

    No token is dropped and there is no balance loss, so the output does not depend on how tokens are batched.
    """

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = Experts({str(i): Mlp(width) for i in range(experts)})
        self.dispatch: Dispatch = dispatch_here

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        shares = self.router(tokens).float().softmax(-1)  # (tokens, experts)
        weights, chosen = shares.topk(self.top_k)  # (tokens, top_k)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=shares.shape[1])
        answers = self.dispatch(self.experts, tokens[order // self.top_k], counts)[order.argsort()]
        answers = answers.view(*weights.shape, -1) * weights.unsqueeze(-1).to(answers.dtype)
        mixed: Tensor = answers.sum(1)
        return mixed.view_as(x)
