"""A small GPT: pre-norm blocks of causal attention and an MLP, or experts in place of the MLP."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distclip.train.models.moe import Mlp, Moe
from distclip.train.problem import require


@dataclass(kw_only=True, slots=True, frozen=True)
class GptConfig:
    width: int = 128  #: of the residual stream
    layers: int = 4  #: blocks
    heads: int = 4  #: of attention; divides `width`
    experts: int = 0  #: experts in place of each MLP; 0: an MLP
    top_k: int = 1  #: experts per token

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads"):
            value, most = getattr(self, name), 2**16 if name == "width" else 2**10
            require(0 < value <= most, f"model.{name}", f"must lie between 1 and {most}, not {value}")
        require(self.width % self.heads == 0, "model.heads", f"must divide model.width={self.width}")
        require(0 <= self.experts <= 2**10, "model.experts", f"must lie between 0 and 1024, not {self.experts}")
        most = max(1, self.experts)
        require(1 <= self.top_k <= most, "model.top_k", f"must lie between 1 and {most} experts, not {self.top_k}")


class Block(nn.Module):
    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        width = config.width
        self.head_width = width // config.heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Moe(width, config.experts, config.top_k) if config.experts else Mlp(width)

    def attend(self, x: Tensor) -> Tensor:
        """Each row of `qkv` belongs to one head, so that a rank with some of the rows has whole heads."""
        qkv = self.qkv(x).unflatten(-1, (-1, 3, self.head_width))  # (batch, time, heads here, 3, head_width)
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)  # each (batch, heads here, time, head_width)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))  # type: ignore[no-any-return]


class Gpt(nn.Module):
    """Tokens (batch, time) to logits (batch, time, symbols).

    The output layer is not tied to the embedding: FSDP2 shards the root and the blocks apart, and a parameter
    that belongs to two of its groups cannot be sharded.
    """

    def __init__(self, config: GptConfig, *, symbols: int, time: int) -> None:
        super().__init__()
        self.tokens: nn.Embedding | None = nn.Embedding(symbols, config.width)
        self.positions: nn.Embedding | None = nn.Embedding(time, config.width)
        self.blocks = nn.ModuleDict({str(i): Block(config) for i in range(config.layers)})  # a stage keeps the names
        self.norm: nn.LayerNorm | None = nn.LayerNorm(config.width)
        self.head: nn.Linear | None = nn.Linear(config.width, symbols, bias=False)
        self.init_weights(config.layers)

    def init_weights(self, layers: int) -> None:
        """GPT-2's: normal(0.02), and the layers that write into the residual stream scaled down by depth."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)

    def keep_stage(self, index: int, count: int) -> None:
        """Drop what the other `count` - 1 pipeline stages hold: only the first embeds, only the last has the head."""
        first, end = (len(self.blocks) * i // count for i in (index, index + 1))
        for i in range(len(self.blocks)):
            if not first <= i < end:
                del self.blocks[str(i)]
        if index > 0:
            self.tokens = self.positions = None
        if index < count - 1:
            self.norm = self.head = None

    def forward(self, x: Tensor) -> Tensor:
        """From tokens; a pipeline stage after the first gets (batch, time, width), one before the last returns it."""
        if self.tokens is not None and self.positions is not None:
            x = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks.values():
            x = block(x)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))
