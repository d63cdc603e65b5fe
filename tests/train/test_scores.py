"""F1 and AUC are those of every pair counted, and are there for tasks of two classes on any number of ranks."""

from math import isnan

import pytest
import torch

from distclip.train.dataset import Dataset, Split
from distclip.train.scores import auc, f1, is_binary


def counted(margins: list[float], positive: list[bool]) -> float:
    """The definition: every pair of a positive and a negative sample."""
    pairs = [(a, b) for a, p in zip(margins, positive, strict=True) if p
             for b, n in zip(margins, positive, strict=True) if not n]  # fmt: skip
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(20))
def test_auc_is_the_share_of_pairs_in_the_right_order(seed):
    draw = torch.Generator().manual_seed(seed)
    margins = torch.randint(-3, 4, (41,), generator=draw).double()  # with many ties
    margins[0] = float("inf")
    positive = torch.rand(41, generator=draw) < 0.2
    positive[:2] = torch.tensor([True, False])
    assert auc(margins, positive) == pytest.approx(counted(margins.tolist(), positive.tolist()), rel=1e-14)


def test_auc_of_one_class_or_of_nan_is_none():
    margins = torch.tensor([1.0, 2.0])
    assert isnan(auc(margins, torch.tensor([True, True])))
    assert isnan(auc(margins, torch.tensor([False, False])))
    assert isnan(auc(torch.tensor([1.0, float("nan")]), torch.tensor([True, False])))


def test_f1_is_of_class_1_alone():
    said, positive = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    assert f1(said, positive) == 0.5  # precision and recall are a half
    assert f1(~said | said, positive) == pytest.approx(2 / 3)
    assert f1(said & ~said, positive) == 0
    assert isnan(f1(said & ~said, positive & ~positive))


def test_only_a_task_of_two_classes_has_them():
    def dataset(classes: int, targets: torch.Tensor) -> Dataset:
        split = Split(inputs=targets, targets=targets)
        return Dataset(train=split, held_out=split, symbols=2, classes=classes, about="")

    assert is_binary(dataset(2, torch.zeros(4, dtype=torch.int64)))
    assert not is_binary(dataset(3, torch.zeros(4, dtype=torch.int64)))
    assert not is_binary(dataset(2, torch.zeros(4, 5, dtype=torch.int64)))  # a text of two characters
