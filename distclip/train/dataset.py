"""Samples in memory, their batches for any number of ranks, and the loss without a model."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from distclip.train.problem import require


@dataclass(kw_only=True, slots=True, frozen=True)
class Split:
    """Inputs (samples, ...) and integer targets (samples, ...)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return self.inputs.shape[0]


@dataclass(kw_only=True, slots=True, frozen=True)
class Dataset:
    """The data of a task: `symbols` different inputs (0: real numbers), `classes` different targets."""

    train: Split
    held_out: Split
    symbols: int
    classes: int
    about: str

    def entropy(self) -> float:
        """The least held-out loss, in nats, of a constant prediction."""
        counts = torch.bincount(self.held_out.targets.flatten(), minlength=self.classes).double()
        p = counts[counts > 0] / counts.sum()
        return float(-(p * p.log()).sum())


@lru_cache(maxsize=1)
def permutation(samples: int, seed: int, epoch: int) -> Tensor:
    # the factor keeps (seed 0, epoch 1) and (seed 1, epoch 0) apart
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(samples, generator=generator)


@dataclass(kw_only=True, slots=True, frozen=True)
class Batches:
    """The training batches of one rank, as a function of the step alone.

    Every epoch is a new permutation drawn from (seed, epoch), every step takes the next `batch_size` of it, and rank r
    of n takes the r-th of n equal parts. So any number of ranks sees the same global batches, and resuming is asking
    for another step. Samples that do not fill a batch are left out of that epoch.
    """

    split: Split
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        require(
            self.batch_size % self.world == 0,
            "train.batch_size",
            f"{self.batch_size} cannot be cut into equal parts for {self.world} processes: use a multiple",
        )
        require(
            self.batch_size <= len(self.split),
            "train.batch_size",
            f"{self.batch_size} is more than the {len(self.split)} training samples",
        )

    @property
    def epoch_steps(self) -> int:
        return len(self.split) // self.batch_size

    def indices(self, step: int) -> Tensor:
        """This rank's part of the global batch of `step`, counted from 0."""
        epoch, position = divmod(step, self.epoch_steps)
        batch = permutation(len(self.split), self.seed, epoch)[position * self.batch_size :][: self.batch_size]
        return batch.view(self.world, -1)[self.rank]

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        indices = self.indices(step)
        return self.split.inputs[indices], self.split.targets[indices]
