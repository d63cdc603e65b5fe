"""Pascanu, Mikolov and Bengio's temporal order (ICML 2013): which two symbols stood where, with noise between them.

A tanh RNN whose gradients explode while it learns: https://arxiv.org/abs/1211.5063.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import train

from distclip import Policy

LENGTH = 10


class Order(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(6, 50, batch_first=True)
        self.head = nn.Linear(50, 4)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)

    def forward(self, symbols: Tensor) -> Tensor:
        states, _ = self.rnn(F.one_hot(symbols, 6).float())
        return self.head(states[:, -1])


def sequences(count: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Symbols (count, LENGTH), of which two are 0 or 1 and the others noise, and the class of those two."""

    def drawn(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=chance)

    symbols, rows = drawn(2, 6, count, LENGTH), torch.arange(count)
    early, late = drawn(0, 2, count), drawn(0, 2, count)
    symbols[rows, drawn(LENGTH // 10, LENGTH // 5, count)] = early
    symbols[rows, drawn(LENGTH // 2, LENGTH * 6 // 10, count)] = late
    return symbols, 2 * early + late


def run(policy: Policy | None, seed: int, steps: int = 600) -> float:
    """The share of 1000 new sequences that are wrong after ``steps`` steps; below 0.01 it is solved."""
    torch.manual_seed(seed)
    chance, model = torch.Generator().manual_seed(seed), Order()

    def losses() -> Iterator[Tensor]:
        for _ in range(steps):
            symbols, classes = sequences(20, chance)
            yield F.cross_entropy(model(symbols), classes)

    train(model, torch.optim.SGD(model.parameters(), lr=0.5), policy, losses())
    symbols, classes = sequences(1000, chance)
    with torch.no_grad():
        return (model(symbols).argmax(1) != classes).double().mean().item()
