"""Every way to spread the model takes the steps of one process, and goes on from what any other has saved."""

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from distclip.train.job import build, check
from distclip.train.parse import read_config
from distclip.train.stop import StopSignals
from ranks import run_ranks
from train.commands import CONFIGS, TINY, metrics, place_here, train_here

STEPS = 10
SMALL = [*TINY, "model.layers=3", "optim.name=sgd", "optim.fused=false", "optim.momentum=0.9", "optim.lr=0.1"]
ALONE = (1, ["parallel.strategy=none"])
WAYS = {
    "ddp": (2, ["parallel.strategy=ddp"]),
    "fsdp2": (2, ["parallel.strategy=fsdp2"]),
    "hsdp": (4, ["parallel.strategy=fsdp2", "parallel.replicate=2"]),
    "tensor": (2, ["parallel.strategy=none", "parallel.tensor=2"]),
    "ddp x tensor": (4, ["parallel.strategy=ddp", "parallel.tensor=2"]),
    "fsdp2 x tensor": (4, ["parallel.strategy=fsdp2", "parallel.tensor=2"]),
    "pipeline": (3, ["parallel.strategy=none", "parallel.pipeline=3", "parallel.microbatches=4"]),
    "pipeline x ddp": (4, ["parallel.strategy=ddp", "parallel.pipeline=2", "parallel.schedule=gpipe"]),
    "pipeline x fsdp2": (4, ["parallel.strategy=fsdp2", "parallel.pipeline=2"]),
    "pipeline x tensor": (4, ["parallel.strategy=fsdp2", "parallel.pipeline=2", "parallel.tensor=2"]),
}
EXPERTS = {
    "ddp": (2, ["parallel.strategy=ddp"]),
    "fsdp2": (2, ["parallel.strategy=fsdp2"]),
    "expert": (2, ["parallel.strategy=fsdp2", "parallel.expert=2"]),
    "fsdp2 x expert": (4, ["parallel.strategy=fsdp2", "parallel.expert=2"]),
    "hsdp x expert": (4, ["parallel.strategy=fsdp2", "parallel.replicate=2", "parallel.expert=2"]),
    "pipeline x expert": (4, ["parallel.strategy=fsdp2", "parallel.pipeline=2", "parallel.expert=2"]),
}
MODELS = {"dense": (WAYS, []), "experts": (EXPERTS, ["model.experts=4", "model.top_k=2"])}
CASES = [(model, way) for model, (ways, _) in MODELS.items() for way in ways]


def run(folder: Path, way: tuple[int, list[str]], *words: str) -> None:
    ranks, parallel = way
    words = [*SMALL, *parallel, *words, "clip.max_norm=1.0", f"run.dir={folder}", f"parallel.processes={ranks}"]
    # DTensor's cached plans name process groups, of which each run has others
    fresh = any(word.startswith("parallel.tensor") for word in parallel)
    assert run_ranks(train_here, ranks, "quickstart.yaml", words, timeout=200, fresh=fresh) == [0] * ranks


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of one process's run, of each model."""
    folders = {}
    for model, (_, words) in MODELS.items():
        folders[model] = tmp_path_factory.mktemp(model) / "alone"
        run(folders[model], ALONE, *words, f"train.steps={STEPS}", f"train.save_every={STEPS // 2}")
    return folders


def assert_same(folder: Path, reference: Path) -> None:
    records, others = metrics(folder), metrics(reference)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert len({record["coef"] < 1 for record in others}) == 2, "no step above the bound, or none below"
    for record, other in zip(records, others, strict=True):
        for name in ("loss", "norm", "coef"):
            assert record[name] == pytest.approx(other[name], rel=1e-6), (name, record["step"])
        assert abs(record["accuracy"] - other["accuracy"]) < 1e-2
    assert records[-1]["held_out_loss"] == pytest.approx(others[-1]["held_out_loss"], rel=1e-6)


@pytest.mark.parametrize(("model", "name"), CASES, ids=lambda case: case)
def test_a_way_takes_the_steps_of_one_process(model, name, alone, tmp_path: Path):
    ways, words = MODELS[model]
    run(tmp_path / "run", ways[name], *words, f"train.steps={STEPS}", f"train.save_every={STEPS // 2}")
    assert_same(tmp_path / "run", alone[model])
