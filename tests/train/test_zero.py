"""ZeRO by DeepSpeed takes the steps of one process, and shares checkpoints with the other ways."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from support.ranks import run_ranks
from train.commands import TINY, metrics, train_here, train_with_deepspeed

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs the extra: pip install 'distclip[deepspeed]'"
)
ALONE = (1, "none")
CONFIGS = ["zero1.yaml", "zero2.yaml", "zero3.yaml"]  # stage 3 patches torch for the rest of the process
SGD = ["optim.name=sgd", "optim.momentum=0.9", "optim.lr=0.1", "clip.max_norm=1.0", "train.steps=10"]
WATCH = "clip.watch=parameters"


def run(folder: Path, way: tuple[int, str], *words: str) -> None:
    ranks, strategy = way
    words = [*TINY, "optim.fused=false", *words, *where(folder, ranks), f"parallel.strategy={strategy}"]
    train = train_with_deepspeed if strategy.startswith("zero") else train_here
    assert run_ranks(train, ranks, "zero1.yaml", words, fresh=True) == [0] * ranks


def where(folder: Path, ranks: int) -> list[str]:
    return [f"run.dir={folder}", f"parallel.processes={ranks}"]


def train_all(folder: Path) -> list[int]:
    return [
        train_with_deepspeed(name, [*TINY, "optim.fused=false", *SGD, WATCH, *where(folder / name, 2)])
        for name in CONFIGS
    ]


def assert_same(folder: Path, reference: Path, rel: float) -> None:
    records, others = metrics(folder), metrics(reference)
    assert len(records) == len(others)
    assert {record["coef"] < 1 for record in others} == {True, False}
    for record, other in zip(records, others, strict=True):
        watched = {name for name in other if name.startswith("norm/")}
        assert {name for name in record if name.startswith("norm/")} == watched
        for name in ("loss", "norm", "max_norm", "coef", *watched):
            assert record[name] == pytest.approx(other[name], rel=rel, abs=1e-7), (name, record["step"])
    assert records[-1]["held_out_loss"] == pytest.approx(others[-1]["held_out_loss"], rel=rel)


def test_every_stage_takes_the_steps_of_one_process(tmp_path: Path):
    assert run_ranks(train_all, 2, tmp_path, fresh=True) == [[0] * len(CONFIGS)] * 2
    run(tmp_path / "alone", ALONE, *SGD, WATCH)
    for name in CONFIGS:
        assert_same(tmp_path / name, tmp_path / "alone", rel=1e-6)


def test_zero_shares_checkpoints_with_the_other_ways(tmp_path: Path):
    """AdamW: its count of steps travels too. It amplifies rounding, hence the wider bound."""
    words = ["clip.policy=autoclip", "clip.max_norm=null", "clip.window=5", "clip.percentile=50"]
    turns = [(2, "zero1"), (3, "zero3"), (2, "ddp"), (2, "zero2"), ALONE]
    for turn, way in enumerate(turns, start=1):
        run(tmp_path / "run", way, *words, f"train.steps={2 * turn}", *["resume=true"][: turn - 1])
    run(tmp_path / "straight", ALONE, *words, f"train.steps={2 * len(turns)}")
    assert_same(tmp_path / "run", tmp_path / "straight", rel=1e-4)
