"""clip.verify_every: the layout is proved in the steps of a run that it divides, on the gradients of these steps."""

from pathlib import Path
from unittest.mock import patch

from distclip.step import proofs
from support.ranks import run_ranks
from train.commands import TINY, metrics, train_here

WAYS = {
    "ddp": ["parallel.strategy=ddp"],
    "pipeline": ["parallel.strategy=fsdp2", "parallel.pipeline=2"],
}


def proved(cases: list[list[str]]) -> list[tuple[int, list[bool]]]:
    """Of each run its exit code, and for each of its proofs whether there was a gradient."""
    found, verify = [], proofs.verify

    def seen(plan, holders, storage, *more):
        with_gradients.append(any(g is not None for g in storage.read()))
        verify(plan, holders, storage, *more)

    for words in cases:
        with_gradients: list[bool] = []
        with patch.object(proofs, "verify", seen):
            found.append((train_here("quickstart.yaml", words), with_gradients))
    return found


def test_a_run_proves_its_layout_every_so_many_steps_and_its_records_stay(tmp_path: Path):
    words = [*TINY, "train.steps=5", "parallel.processes=2"]
    cases = [
        [*words, *way, f"run.dir={tmp_path / name}{every}", *([] if every == "" else ["clip.verify_every=2"])]
        for name, way in WAYS.items()
        for every in ("", "-proved")
    ]
    for found in run_ranks(proved, 2, cases, fresh=True):
        assert found == [(0, []), (0, [True] * 2)] * len(WAYS)
    for name in WAYS:
        runs = [[record["norm"] for record in metrics(tmp_path / f"{name}{every}")] for every in ("", "-proved")]
        assert runs[0] == runs[1]
        assert len(runs[0]) == 5
