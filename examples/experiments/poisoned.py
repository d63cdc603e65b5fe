"""A small GPT on the characters of Python's standard library; three of its batches have a loss 1000 times too large.

AdamW divides by what it remembers of gradients, so that three bad ones are felt for a long time after.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import train

from distclip import Policy
from distclip.train.models.gpt import Gpt, GptConfig
from distclip.train.tasks.text import TextData, load_text

STEPS, BATCH = 400, 8
POISONED = {120, 200, 280}
FACTOR = 1000.0


def run(policy: Policy | None, seed: int, factor: float = FACTOR, steps: int = STEPS) -> float:
    """The held-out loss, in nats a character, where the loss of three steps is multiplied by ``factor``."""
    torch.manual_seed(seed)
    data = load_text(TextData(length=64, max_chars=300_000), seed=0)
    model = Gpt(GptConfig(width=64, layers=2), symbols=data.symbols, time=64)

    def losses() -> Iterator[Tensor]:
        for step in range(steps):
            batch = torch.randint(len(data.train.targets), (BATCH,))
            loss = loss_of(model, data.train.inputs[batch], data.train.targets[batch])
            yield loss * factor if step in POISONED else loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.999))
    train(model, optimizer, policy, losses())
    with torch.no_grad():
        return loss_of(model, data.held_out.inputs, data.held_out.targets).item()


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
