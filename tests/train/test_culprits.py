"""A NaN that one rank makes is named, with parameter, rank and step, by what the trainer writes, shows and reports."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from distclip.reporting.advice import advice_on
from distclip.reporting.analysis import Analysis
from distclip.runs import open_runs
from distclip.train import job
from distclip.train.parallel import spread
from support.ranks import run_ranks
from train.commands import TINY, metrics, train_here

STEP, RANK, PARAMETER = 3, 1, "blocks.0.qkv.weight"
WAYS = {
    "ddp": ["parallel.strategy=ddp"],
    "fsdp2": ["parallel.strategy=fsdp2"],
    "pipeline": ["parallel.strategy=fsdp2", "parallel.pipeline=2"],
    "fsdp2 x tensor": ["parallel.strategy=fsdp2", "parallel.tensor=2"],
}


class Poison(torch.autograd.Function):
    """Nothing in the forward, NaN for the weight in the backward."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(ctx.saved_tensors[0], torch.nan)


def poisoned(*arguments):
    """`spread`, and a layer whose weight gets a NaN on one rank in one step, before any reduction over ranks."""
    passes, held = spread(*arguments)
    if dist.get_rank() == RANK:
        module, _, name = PARAMETER.rpartition(".")
        owner = getattr(held.model, "module", held.model).get_submodule(module)

        def add(_, __, output):
            weight = getattr(owner, name)
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            return output + Poison.apply(local) if held.clipper.steps == STEP - 1 else output

        owner.register_forward_hook(add)
    return passes, held


def train_poisoned(cases: list[list[str]]) -> list[int]:
    with patch.object(job, "spread", poisoned):
        return [train_here("quickstart.yaml", words) for words in cases]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("poisoned")
    words = [*TINY, "train.steps=5", "clip.find_source=true", "parallel.processes=4"]
    cases = [[*words, *way, f"run.dir={root / name}"] for name, way in WAYS.items()]
    codes = run_ranks(train_poisoned, 4, cases, timeout=300, fresh=True)
    assert codes == [[0] * len(cases)] * 4
    return {name: root / name for name in WAYS}


@pytest.mark.parametrize("way", WAYS)
def test_a_planted_nan_is_named_with_parameter_rank_and_step(way, folders):
    said = f"{PARAMETER} on rank {RANK} has NaN in its gradient"
    records = metrics(folders[way])
    assert {record["step"]: record["culprit"] for record in records if "culprit" in record} == {STEP: said}
    assert [record["skip"] for record in records] == [False, False, True, False, False]
    (run,) = open_runs(folders[way])
    advice = advice_on(Analysis.of(run, lambda done: None))[0]
    assert (advice.kind, advice.reason) == ("nonfinite", f"Step {STEP}: {said}.")
    assert said in (folders[way] / "report.html").read_text()
