"""scikit-learn's bundled digits, an image read as 16 steps of 4 pixels: long enough for gradients to explode."""

from dataclasses import dataclass

import torch

from distclip.train.dataset import Dataset, Split
from distclip.train.problem import require


@dataclass(kw_only=True, slots=True, frozen=True)
class DigitsData:
    pixels: int = 4  #: read in one step; an image has 64
    held_out: int = 297  #: images that are held out

    def __post_init__(self) -> None:
        require(self.pixels > 0 and 64 % self.pixels == 0, "data.pixels", f"must divide 64, not {self.pixels}")
        require(0 < self.held_out < 1797, "data.held_out", f"must lie between 1 and 1796, not {self.held_out}")


def load_digits(data: DigitsData, seed: int) -> Dataset:
    # takes a second to import and nothing else needs it
    from sklearn.datasets import load_digits as bundled

    images, labels = bundled(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x = (torch.tensor(images, dtype=torch.float32) / 16).view(len(labels), -1, data.pixels)[order]
    y = torch.tensor(labels, dtype=torch.int64)[order]
    held = data.held_out
    return Dataset(
        train=Split(inputs=x[held:], targets=y[held:]),
        held_out=Split(inputs=x[:held], targets=y[:held]),
        symbols=0,
        classes=10,
        about=f"{len(y) - held:,} digits, {held:,} held out, read {data.pixels} pixels a step",
    )
