"""Digits read as 16 steps of 4 pixels by an IRNN, which begins as the identity (Le, Jaitly and Hinton, 2015).

ReLU units that feed themselves have nothing that bounds them: https://arxiv.org/abs/1504.00941.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import train

from distclip import Policy
from distclip.train.tasks.digits import DigitsData, load_digits

BATCH = 50


class Irnn(nn.Module):
    """As distclip.train.models.irnn, with torch's loop over time, which is faster."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(4, 64, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(64, 10)
        nn.init.eye_(self.rnn.weight_hh_l0)
        nn.init.normal_(self.rnn.weight_ih_l0, std=0.1)
        nn.init.zeros_(self.rnn.bias_hh_l0)
        nn.init.zeros_(self.rnn.bias_ih_l0)

    def forward(self, steps: Tensor) -> Tensor:
        states, _ = self.rnn(steps)
        return self.head(states[:, -1])


def run(policy: Policy | None, seed: int, epochs: int = 30) -> float:
    """The share of the 297 held-out digits that are read right."""
    torch.manual_seed(seed)
    data, model = load_digits(DigitsData(), seed=0), Irnn()

    def losses() -> Iterator[Tensor]:
        for _ in range(epochs):
            for batch in torch.randperm(len(data.train.targets)).split(BATCH):
                yield F.cross_entropy(model(data.train.inputs[batch]), data.train.targets[batch])

    train(model, torch.optim.SGD(model.parameters(), lr=0.1), policy, losses())
    with torch.no_grad():
        return (model(data.held_out.inputs).argmax(1) == data.held_out.targets).double().mean().item()
