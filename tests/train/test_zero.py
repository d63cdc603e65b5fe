"""ZeRO by DeepSpeed takes the steps of one process, and shares checkpoints with the other ways."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from ranks import run_ranks
from train.commands import TINY, metrics, train_with_deepspeed

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs the extra: pip install 'distclip[deepspeed]'"
)
ALONE = (1, "none")
SGD = ["optim.name=sgd", "optim.momentum=0.9", "optim.lr=0.1", "clip.max_norm=1.0"]


def run(folder: Path, way: tuple[int, str], *words: str) -> None:
    ranks, strategy = way
    parallel = [f"run.dir={folder}", f"parallel.processes={ranks}", f"parallel.strategy={strategy}"]
    words = [*TINY, "optim.fused=false", *words, *parallel]
    codes = run_ranks(train_with_deepspeed, ranks, "quickstart.yaml", words, timeout=300, fresh=True)
    assert codes == [0] * ranks


def assert_same(folder: Path, reference: Path, rel: float) -> None:
    records, others = metrics(folder), metrics(reference)
    assert len(records) == len(others)
    assert {record["coef"] < 1 for record in others} == {True, False}
    for record, other in zip(records, others, strict=True):
        for name in ("loss", "norm", "max_norm", "coef"):
            assert record[name] == pytest.approx(other[name], rel=rel), (name, record["step"])
    assert records[-1]["held_out_loss"] == pytest.approx(others[-1]["held_out_loss"], rel=rel)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(folder, ALONE, *SGD, "train.steps=10")
    return folder


@pytest.mark.parametrize(("ranks", "strategy"), [(2, "zero1"), (2, "zero2"), (2, "zero3"), (4, "zero3")])
def test_zero_takes_the_steps_of_one_process(ranks, strategy, alone, tmp_path: Path):
    run(tmp_path / "run", (ranks, strategy), *SGD, "train.steps=10")
    assert_same(tmp_path / "run", alone, rel=1e-6)


def test_zero_shares_checkpoints_with_the_other_ways(tmp_path: Path):
    """AdamW: its count of steps travels too. It amplifies rounding, hence the wider bound."""
    words = ["clip.policy=autoclip", "clip.max_norm=null", "clip.window=5", "clip.percentile=50"]
    turns = [(2, "zero1"), (3, "zero3"), (2, "fsdp2"), (3, "zero2"), (2, "zero3"), ALONE]
    for turn, way in enumerate(turns, start=1):
        run(tmp_path / "run", way, *words, f"train.steps={2 * turn}", *["resume=true"][: turn - 1])
    run(tmp_path / "straight", ALONE, *words, f"train.steps={2 * len(turns)}")
    assert_same(tmp_path / "run", tmp_path / "straight", rel=1e-4)
