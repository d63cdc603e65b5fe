"""A text classifier: embedded words, a recurrent cell, the mean of its states, a linear layer."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distclip.train.models.irnn import identity_cell
from distclip.train.problem import require


@dataclass(kw_only=True, slots=True, frozen=True)
class RecurrentConfig:
    #: `irnn`: ReLU units whose recurrence begins as the identity, which need clipping; gates seldom do
    cell: Literal["gru", "irnn"] = "gru"
    width: int = 64  #: of the recurrent state
    dropout: float = 0.1  #: of the embedded words, and before the last layer

    def __post_init__(self) -> None:
        require(0 < self.width <= 2**16, "model.width", f"must lie between 1 and 65536, not {self.width}")
        require(0 <= self.dropout < 1, "model.dropout", f"must lie in [0, 1), not {self.dropout}")


class Recurrent(nn.Module):
    """Words (batch, time), 0 where a row has ended, to logits (batch, classes).

    Cells, not `nn.GRU` and `nn.RNN`: FSDP2 replaces parameters, and these keep a list of their own.
    """

    def __init__(self, config: RecurrentConfig, *, symbols: int, classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(symbols, config.width, padding_idx=0)
        cell = nn.GRUCell if config.cell == "gru" else identity_cell
        self.cell: nn.Module = cell(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, classes)

    def forward(self, words: Tensor) -> Tensor:
        present = (words != 0).unsqueeze(-1)  # (batch, time, 1)
        x = self.dropout(self.words(words))
        state = x.new_zeros(x.shape[0], x.shape[2])
        total = torch.zeros_like(state)
        for t in range(x.shape[1]):
            state = torch.where(present[:, t], self.cell(x[:, t], state), state)
            total = total + state * present[:, t]
        mean = total / present.sum(1).clamp(min=1)
        return self.head(self.dropout(F.relu(mean)))  # type: ignore[no-any-return]
