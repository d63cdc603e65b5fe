"""One step of training and one look at the held-out part, on one rank."""

import time
from dataclasses import dataclass
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from distclip import Clipper
from distclip.train.config import Config
from distclip.train.dataset import Batches, Split
from distclip.train.optim import learning_rate
from distclip.train.place import Place
from distclip.train.stop import StopSignals, agreed


@dataclass(kw_only=True, slots=True, frozen=True)
class Trainer:
    """Everything a step needs. Steps are counted from 0 here and from 1 in what is shown and written."""

    config: Config
    place: Place
    batches: Batches
    model: nn.Module
    optimizer: Optimizer
    clipper: Clipper
    steps: int
    stop: StopSignals

    def step(self, step: int) -> tuple[dict[str, Any], Signals | None]:
        """Train on one global batch: its record, and the signal to stop for if any rank got one.

        Two collectives beside the wrapper's own: the clipper's and one for loss, accuracy and the wish to stop.
        Reading their results is the step's only wait for the device.
        """
        began = time.perf_counter()
        lr = learning_rate(self.config.optim, step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.seed(step)
        inputs, targets = (t.to(self.place.device) for t in self.batches.at(step))
        logits = self.model(inputs).flatten(0, -2)
        targets = targets.flatten()
        loss = F.cross_entropy(logits, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        report = self.clipper.step(self.optimizer)
        self.optimizer.zero_grad()
        right = (logits.detach().argmax(-1) == targets).double().mean()
        mean_loss, accuracy, *wishes = self.summed([loss.detach(), right, *self.stop.wishes()])
        seconds = time.perf_counter() - began
        record = {
            "step": step + 1,
            "epoch": step // self.batches.epoch_steps + 1,
            "loss": mean_loss / self.place.world,
            "accuracy": accuracy / self.place.world,
            **report.to_dict(),
            "lr": lr,
            "seconds": seconds,
            "per_second": targets.numel() * self.place.world / seconds,
        }
        return record, agreed(wishes)

    def seed(self, step: int) -> None:
        """Draw dropout from (seed, step, rank): no generator has a state that a checkpoint must hold."""
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 10_007 + self.place.rank)

    def summed(self, numbers: list[Tensor | float]) -> list[float]:
        """Numbers added over all ranks, in float64, by one all-reduce."""
        device = self.place.device
        vector = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=device) for n in numbers])
        dist.all_reduce(vector)
        return vector.tolist()

    @torch.no_grad()
    def evaluate(self, split: Split) -> dict[str, float]:
        """Mean loss and accuracy over all of `split`.

        Ranks must call the model equally often (FSDP2 gathers in every call), so the last batch is filled up from
        the beginning and what fills it does not count.
        """
        size, world, rank = self.config.train.batch_size, self.place.world, self.place.rank
        loss = torch.zeros((), dtype=torch.float64, device=self.place.device)
        right, count = torch.zeros_like(loss), torch.zeros_like(loss)
        self.model.eval()
        for first in range(0, len(split), size):
            mine = torch.arange(first, first + size).view(world, -1)[rank]
            counts = (mine < len(split)).to(self.place.device)
            mine = mine % len(split)
            targets = split.targets[mine].to(self.place.device)
            logits = self.model(split.inputs[mine].to(self.place.device))
            each = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
            counts = counts.view(-1, *[1] * (targets.dim() - 1)).expand_as(targets)
            loss += each[counts].double().sum()
            right += (logits.argmax(-1) == targets)[counts].sum()
            count += counts.sum()
        self.model.train()
        all_loss, all_right, all_count = self.summed([loss, right, count])
        return {"held_out_loss": all_loss / all_count, "held_out_accuracy": all_right / all_count}
