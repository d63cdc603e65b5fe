"""Shapes, and the one property each model must have."""

import pytest
import torch

from distclip.train.models.gpt import Gpt, GptConfig
from distclip.train.models.irnn import Irnn, IrnnConfig
from distclip.train.models.recurrent import Recurrent, RecurrentConfig


def test_gpt_never_looks_ahead():
    model = Gpt(GptConfig(width=16, layers=2, heads=2), symbols=11, time=8)
    tokens = torch.randint(11, (3, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    logits, other = model(tokens), model(changed)
    assert logits.shape == (3, 8, 11)
    torch.testing.assert_close(logits[:, :5], other[:, :5], rtol=0, atol=0)
    assert not torch.allclose(logits[:, 5:], other[:, 5:])


@pytest.mark.parametrize("cell", ["gru", "irnn"])
def test_a_cell_does_not_read_past_the_end_of_a_row(cell):
    model = Recurrent(RecurrentConfig(cell=cell, width=8), symbols=20, classes=2).eval()
    short = torch.tensor([[3, 4, 5]])
    padded = torch.tensor([[3, 4, 5, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    logits = model(padded)
    assert logits.shape == (2, 2)
    torch.testing.assert_close(logits[:1], model(short))
    assert logits.isfinite().all()  # a row without words too


def test_irnn_starts_by_remembering():
    model = Irnn(IrnnConfig(width=8), features=4, classes=10)
    steps = torch.zeros(2, 5, 4)
    steps[:, 0] = torch.rand(2, 4)
    assert model(steps).shape == (2, 10)
    torch.testing.assert_close(model(steps), model(steps[:, :1]))  # the identity carries the state on unchanged
