"""ZeRO by DeepSpeed takes the steps of one process, and shares checkpoints with the other ways.

Three launches run everything: importing DeepSpeed is what costs. Stage 3 patches torch for the rest of a process, so it
comes last.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest

from support.ranks import run_ranks
from train.commands import TINY, metrics, train_with_deepspeed

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs the extra: pip install 'distclip[deepspeed]'"
)
CONFIGS = ["zero1.yaml", "zero2.yaml", "zero3.yaml"]
SGD = ["optim.name=sgd", "optim.momentum=0.9", "optim.lr=0.1", "clip.max_norm=1.0", "train.steps=10"]
SGD.append("clip.watch=parameters")
AUTOCLIP = ["clip.policy=autoclip", "clip.max_norm=null", "clip.window=5", "clip.percentile=50"]  # and AdamW


def train_all(runs: list[tuple[str, list[str]]]) -> list[int]:
    return [train_with_deepspeed(config, words) for config, words in runs]


def launch(ranks: int, *runs: tuple[str, Path, list[str]]) -> None:
    """Each run is a config, its folder and words."""
    same = [*TINY, "optim.fused=false", f"parallel.processes={ranks}"]
    words = [(config, [*same, f"run.dir={folder}", *words]) for config, folder, words in runs]
    assert run_ranks(train_all, ranks, words, fresh=True) == [[0] * len(runs)] * ranks


def turn(folder: Path, number: int, strategy: str) -> tuple[str, Path, list[str]]:
    """Two more steps of the run in ``folder``, in another way."""
    resume = [] if number == 1 else ["resume=true"]
    return "zero1.yaml", folder, [*AUTOCLIP, f"parallel.strategy={strategy}", f"train.steps={2 * number}", *resume]


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


def test_every_stage_takes_the_steps_of_one_process_and_shares_checkpoints_with_the_other_ways(tmp_path: Path):
    """AdamW: its count of steps travels too. It amplifies rounding, hence the wider bound."""
    mixed, alone = tmp_path / "mixed", "parallel.strategy=none"
    turns = [turn(mixed, 1, "zero1"), turn(mixed, 2, "ddp"), turn(mixed, 3, "zero2")]
    launch(2, *turns, *((name, tmp_path / name, SGD) for name in CONFIGS))
    launch(3, turn(mixed, 4, "zero3"))
    straight = "zero1.yaml", tmp_path / "straight", [*AUTOCLIP, alone, "train.steps=10"]
    launch(1, turn(mixed, 5, "none"), straight, ("zero1.yaml", tmp_path / "alone", [*SGD, alone]))
    for name in CONFIGS:
        assert_same(tmp_path / name, tmp_path / "alone", rel=1e-6)
    assert_same(mixed, tmp_path / "straight", rel=1e-4)
