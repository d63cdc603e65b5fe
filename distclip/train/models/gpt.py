"""A small GPT: pre-norm blocks of causal attention and an MLP."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distclip.train.problem import require


@dataclass(kw_only=True, slots=True, frozen=True)
class GptConfig:
    width: int = 128
    layers: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads"):
            require(getattr(self, name) > 0, f"model.{name}", f"must be at least 1, not {getattr(self, name)}")
        require(self.width % self.heads == 0, "model.heads", f"must divide model.width={self.width}")


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, time, width / heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project(y.transpose(1, 2).reshape(batch, time, width))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm_attention(x))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))  # type: ignore[no-any-return]


class Gpt(nn.Module):
    """Tokens (batch, time) to logits (batch, time, symbols).

    The output layer is not tied to the embedding: FSDP2 shards the root and the blocks apart, and a parameter
    that belongs to two of its groups cannot be sharded.
    """

    def __init__(self, config: GptConfig, *, symbols: int, time: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(symbols, config.width)
        self.positions = nn.Embedding(time, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, symbols, bias=False)
        self.init_weights(config.layers)

    def init_weights(self, layers: int) -> None:
        """GPT-2's: normal(0.02), and the two layers that write into the residual stream scaled down by depth."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]
