"""One training step and one evaluation on the held-out part, on one rank."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distclip import Report
from distclip.plan.source import Source
from distclip.telemetry.record import texts_of
from distclip.train.config import Config
from distclip.train.dataset import Batches, Dataset, Split
from distclip.train.held import Holder
from distclip.train.optim import learning_rate
from distclip.train.passes import Passes, losses_of
from distclip.train.place import Place
from distclip.train.scores import is_binary, scores_of
from distclip.train.stop import StopSignals, agreed


@dataclass(kw_only=True, slots=True, frozen=True)
class Trainer:
    """Everything a step needs. Steps are counted from 0 here and from 1 in what is shown and written."""

    config: Config
    place: Place
    batches: Batches
    passes: Passes
    held: Holder
    parameters: int  # of the whole model
    steps: int
    stop: StopSignals
    source: Source | None = None

    def step(self, step: int) -> tuple[dict[str, Any], Signals | None]:
        """Train on one global batch: its record, and the signal to stop for if any rank got one.

        Two collectives besides those of the parallelism: the clipper's, and one for loss, accuracy and stop requests.
        Reading their results is the step's only host sync.
        """
        began = time.perf_counter()
        lr = learning_rate(self.config.optim, step, self.steps)
        for group in self.held.optimizer.param_groups:
            group["lr"] = lr
        self.seed(step)
        inputs, targets = (t.to(self.place.device, non_blocking=True) for t in self.batches.at(step))
        answer = self.passes.forward_backward(inputs, targets)
        report = self.held.step(answer)
        seen = [0.0, 0.0, 0.0] if answer is None else [answer.loss, right(answer.logits, targets).double().mean(), 1.0]
        loss, accuracy, ranks, *wishes = self.summed([*seen, *self.stop.wishes()])
        seconds, numbers = time.perf_counter() - began, report.to_dict()
        record = {
            "step": step + 1,
            "epoch": step // self.batches.epoch_steps + 1,
            "loss": loss / ranks,
            "accuracy": accuracy / ranks,
            **numbers,
            **self.blamed(report, isfinite(numbers["norm"])),
            **texts_of(report.fingerprint),
            "lr": lr,
            "seconds": seconds,
            "per_second": targets.numel() * self.batches.world / seconds,
        }
        return record, agreed(wishes)

    def blamed(self, report: Report, finite: bool) -> dict[str, str]:
        """What to write of a norm that is not finite: the step's `culprit`, or where the decision is on an accelerator,
        which has it one call late, `culprit_before`, that of the step before. All ranks call.
        """
        found = None if finite or self.source is None else self.source.culprit()
        found = found or report.culprit
        if found is not None or self.source is not None or report.norm.device.type == "cpu":
            return {} if found is None else {"culprit": str(found)}
        before = self.held.clipper.culprit
        return {} if before is None else {"culprit_before": str(before)}

    def seed(self, step: int) -> None:
        """Draw dropout from (seed, step, part of the batch), so that a checkpoint needs no generator state."""
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 10_007 + self.batches.rank)

    def summed(self, numbers: list[Tensor | float]) -> list[float]:
        """Numbers added over all ranks, in float64, by one all-reduce."""
        known = [0.0 if isinstance(n, Tensor) else n for n in numbers]  # which travel to the device at once
        sent = torch.tensor(known, dtype=torch.float64).to(self.place.device, non_blocking=True).unbind()
        vector = torch.stack([n.double() if isinstance(n, Tensor) else k for n, k in zip(numbers, sent, strict=True)])
        dist.all_reduce(vector)
        return vector.tolist()

    @torch.no_grad()
    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """Mean loss and accuracy over all that is held out; of two classes also the F1 and the AUC of class 1."""
        split, binary, device = dataset.held_out, is_binary(dataset), self.place.device
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right answers, targets
        margins = torch.zeros(len(split), dtype=torch.float64, device=device)
        self.held.model.eval()
        for mine, counts, targets, logits in self.held_out(split):
            losses, hits = losses_of(logits, targets)[counts].double(), right(logits, targets)[counts].double()
            sums += torch.stack([losses.sum(), hits.sum(), torch.ones_like(hits).sum()])
            if binary:
                margins[mine[counts]] = (logits[:, 1] - logits[:, 0])[counts].double()
        self.held.model.train()
        all_losses, all_hits, count = self.summed(list(sums))
        found = {"held_out_loss": all_losses / count, "held_out_accuracy": all_hits / count}
        if binary:
            dist.all_reduce(margins)  # each has been written by one rank
            found |= scores_of(margins.cpu(), split.targets)
        return found

    def held_out(self, split: Split) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """This rank's part of each batch: indices, which of them count, targets and logits, if this rank has logits.

        Ranks must call the model equally often (FSDP2 gathers in every call), so the last batch is filled up from the
        beginning, and the filling does not count.
        """
        size, world, rank, device = self.batches.batch_size, self.batches.world, self.batches.rank, self.place.device
        for first in range(0, len(split), size):
            mine = torch.arange(first, first + size).view(world, -1)[rank]
            counts = (mine < len(split)).to(device)
            mine = mine % len(split)
            targets = split.targets[mine].to(device)
            logits = self.passes.forward(split.inputs[mine].to(device), targets)
            if logits is not None:
                yield mine.to(device), counts, targets, logits


def right(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.argmax(-1) == targets
