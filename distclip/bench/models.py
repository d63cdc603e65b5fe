"""The models whose gradients are clipped."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A pre-norm block of causal attention and an MLP: 12 parameters."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, time, width / heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp(self.norm_mlp(x))  # type: ignore[no-any-return]


class Gpt(nn.Module):
    """Tokens (batch, time) to logits (batch, time, symbols)."""

    def __init__(self, *, layers: int, width: int, time: int, symbols: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(symbols, width)
        self.positions = nn.Embedding(time, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]


class Chain(nn.Module):
    """Many small residual matrices in sequence, whose gradients neither vanish nor explode."""

    def __init__(self, matrices: int, width: int) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(nn.Parameter(0.01 * torch.randn(width, width)) for _ in range(matrices))

    def forward(self, x: Tensor) -> Tensor:
        for matrix in self.matrices:
            x = x + F.linear(x, matrix)
        return x
