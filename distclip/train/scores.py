"""F1 and AUC of a yes-or-no classifier, exact, for rows of which few are labelled 1."""

from math import nan

import torch
from torch import Tensor

from distclip.train.dataset import Dataset


def is_binary(dataset: Dataset) -> bool:
    return dataset.classes == 2 and dataset.held_out.targets.dim() == 1


def scores_of(margins: Tensor, targets: Tensor) -> dict[str, float]:
    """``margins`` (samples,): the logit of 1 less that of 0."""
    return {"held_out_f1": f1(margins > 0, targets == 1), "held_out_auc": auc(margins, targets == 1)}


def f1(said: Tensor, positive: Tensor) -> float:
    """The harmonic mean of precision and recall; NaN where nothing is positive, nor said to be."""
    found, counted = int((said & positive).sum()), int(said.sum() + positive.sum())
    return 2 * found / counted if counted else nan


def auc(margins: Tensor, positive: Tensor) -> float:
    """How often a positive sample has a larger margin than a negative one, ties counting half; NaN without either.

    From the ranks of the positive ones (Mann and Whitney, 1947).
    """
    ones = int(positive.sum())
    pairs = ones * (len(positive) - ones)
    if pairs == 0 or bool(margins.isnan().any()):
        return nan
    _, place, count = torch.unique(margins, return_inverse=True, return_counts=True)
    rank = count.cumsum(0) - (count - 1) / 2  # of equal margins the mean, from 1
    return (float(rank.double()[place][positive].sum()) - ones * (ones + 1) / 2) / pairs
