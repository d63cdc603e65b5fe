"""The three tasks learn, every rank agrees, and a run that was cut in two is the run in one piece."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distclip.train.models.irnn import Irnn, IrnnConfig
from distclip.train.tasks.digits import DigitsData, load_digits
from support.ranks import run_ranks
from train.commands import TINY, metrics, numbers, train_here

# the checkpoint of a distributed run is read by one process, on purpose
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ALONE = "parallel.strategy=none"
AUTOCLIP = ["clip.policy=autoclip", "clip.max_norm=null", "clip.window=7", "clip.percentile=50"]


def saved_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, read by one process."""
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def run(folder: Path, ranks: int, config: str, *words: str) -> None:
    words = (*words, f"run.dir={folder}", f"parallel.processes={ranks}")
    codes = run_ranks(train_here, ranks, config, list(words))
    assert codes == [0] * ranks


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_resumed_run_is_the_uninterrupted_one(strategy, tmp_path: Path):
    words = [*TINY, *AUTOCLIP, f"parallel.strategy={strategy}"]
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    run(straight, 2, "quickstart.yaml", *words, "train.steps=20")
    run(halves, 2, "quickstart.yaml", *words, "train.steps=10")
    run(halves, 2, "quickstart.yaml", *words, "train.steps=20", "resume=true")
    assert numbers(halves) == numbers(straight)
    assert 0 < sum(record["coef"] < 1 for record in metrics(straight)[10:]) < 10  # clipped and not, after the cut
    assert len({record["max_norm"] for record in metrics(straight)}) > 10  # the bound moves: a state to keep
    one, two = (saved_tensors(path / "checkpoints" / "step-00000020") for path in (straight, halves))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {"model.head.weight", "optimizer.state.head.weight.exp_avg"} <= one.keys()


def test_dropout_goes_on_where_it_was(tmp_path: Path):
    words = [
        "train.epochs=null",
        "model.width=8",
        "model.dropout=0.5",
        "data.max_rows=200",
        "data.length=10",
        "optim.decay=none",
    ]
    run(tmp_path / "straight", 2, "classifier.yaml", *words, "train.steps=6")
    run(tmp_path / "halves", 2, "classifier.yaml", *words, "train.steps=3")
    run(tmp_path / "halves", 2, "classifier.yaml", *words, "train.steps=6", "resume=true")
    assert numbers(tmp_path / "halves") == numbers(tmp_path / "straight")


def test_a_run_goes_on_with_other_ranks_and_another_wrapper(tmp_path: Path):
    words = [*TINY, *AUTOCLIP]
    run(tmp_path / "straight", 1, "quickstart.yaml", *words, "train.steps=12", "parallel.strategy=none")
    moved = tmp_path / "moved"
    run(moved, 2, "quickstart.yaml", *words, "train.steps=4", "parallel.strategy=fsdp2")
    run(moved, 3, "quickstart.yaml", *words, "train.steps=8", "parallel.strategy=ddp", "resume=true")
    run(moved, 1, "quickstart.yaml", *words, "train.steps=12", "parallel.strategy=none", "resume=true")
    assert [record["step"] for record in metrics(moved)] == list(range(1, 13))
    for there, here in zip(metrics(moved), metrics(tmp_path / "straight"), strict=True):
        for name in ("loss", "norm", "max_norm", "coef"):
            assert there[name] == pytest.approx(here[name], rel=1e-4), (name, here["step"])
    assert metrics(moved)[-1]["held_out_loss"] == pytest.approx(
        metrics(tmp_path / "straight")[-1]["held_out_loss"], rel=1e-4
    )


def test_the_newest_checkpoints_are_kept_and_only_whole_ones(tmp_path: Path):
    words = [*TINY, "train.save_every=2", "run.keep=2"]
    run(tmp_path / "run", 2, "quickstart.yaml", *words, "train.steps=7")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000006", "step-00000007"]
    (checkpoints / "step-00000009.tmp").mkdir()  # left by a run that was killed while saving
    run(tmp_path / "run", 2, "quickstart.yaml", *words, "train.steps=9", "resume=true")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000008", "step-00000009"]


def test_other_norms_may_be_watched_when_a_run_goes_on(tmp_path: Path):
    words = [*TINY, "train.steps=1"]
    run(tmp_path / "run", 1, "quickstart.yaml", *words, "parallel.strategy=none")
    words = [*words, "train.steps=2", "resume=true", "clip.watch=[blocks.*, '*']"]
    run(tmp_path / "run", 2, "quickstart.yaml", *words)
    first, second = metrics(tmp_path / "run")
    assert second.keys() - first.keys() == {"norm/blocks.*", "norm/*"}
    assert second["norm/*"] == pytest.approx(second["norm"], rel=2e-7)
    assert 0 < second["norm/blocks.*"] < second["norm"]


def test_resuming_an_empty_folder_is_starting(tmp_path: Path):
    run(tmp_path / "run", 2, "quickstart.yaml", *TINY, "train.steps=2", "resume=true")
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2]


def test_a_nonfinite_step_is_skipped_by_every_rank_and_written_as_json(tmp_path: Path):
    words = ["train.epochs=null", "train.steps=4", "optim.lr=1.0e+30", "optim.decay=none", "clip.policy=none"]
    run(tmp_path / "run", 2, "digits.yaml", *words)
    records = metrics(tmp_path / "run")
    assert [record["skip"] for record in records] == [False, True, True, True]
    assert float(records[0]["norm"]) < math.inf
    assert not math.isfinite(float(records[1]["norm"]))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["skipped"] == 0.75


def test_digits_need_clipping(tmp_path: Path):
    run(tmp_path / "clipped", 1, "digits.yaml", ALONE, "train.epochs=24")
    run(tmp_path / "unclipped", 1, "digits.yaml", ALONE, "train.epochs=24", "clip.policy=none")
    clipped, unclipped = (metrics(tmp_path / name)[-1] for name in ("clipped", "unclipped"))
    assert clipped["held_out_accuracy"] > 0.85
    assert not unclipped["held_out_accuracy"] > 0.7  # or NaN
    assert sum(record["coef"] < 1 for record in metrics(tmp_path / "clipped")) > 400
    assert all(record["coef"] == 1 for record in metrics(tmp_path / "unclipped"))


def test_the_classifier_needs_clipping_by_norm_by_value_or_both(tmp_path: Path):
    words = ["train.epochs=null", "train.steps=60", "data.length=40", "train.eval_every=60"]
    policies = {
        "none": ["clip.policy=none"],
        "norm": [],
        "value": ["clip.policy=value", "clip.clip_value=1.0"],
        "both": ["clip.chain=[{max_norm: 2.0}, {policy: value, clip_value: 1.0}]"],
    }
    for name, policy in policies.items():
        run(tmp_path / name, 1, "classifier.yaml", ALONE, *words, *policy)
    last = {name: metrics(tmp_path / name)[-1] for name in policies}
    entropy = json.loads((tmp_path / "norm" / "summary.json").read_text())["entropy"]
    assert not float(last["none"]["held_out_loss"]) < 1000 * entropy  # or NaN
    for name in ("norm", "value", "both"):
        assert last[name]["held_out_loss"] < entropy, name
        assert last[name]["held_out_auc"] > 0.8, name
    assert sum(record["coef"] < 1 for record in metrics(tmp_path / "norm")) > 15


def test_scores_are_those_of_every_row_once_on_any_number_of_ranks(tmp_path: Path):
    """128 rows held out are no multiple of the batch of 50."""
    words = ["train.epochs=null", "train.steps=4", "train.batch_size=50", "data.max_rows=640", "model.dropout=0"]
    words += ["data.length=20", "optim.lr=0.01"]
    run(tmp_path / "two", 2, "classifier.yaml", *words)
    run(tmp_path / "one", 1, "classifier.yaml", *words, "parallel.strategy=none")
    one, two = (metrics(tmp_path / name)[-1] for name in ("one", "two"))
    assert 0 < one["held_out_auc"] < 1
    for name in ("held_out_auc", "held_out_f1", "held_out_accuracy"):
        assert two[name] == pytest.approx(one[name], abs=1e-3), name


def test_the_language_model_beats_what_ignores_its_input(tmp_path: Path):
    words = ["train.steps=120", "data.length=32", "train.batch_size=64", "model.layers=1", "optim.lr=0.01"]
    run(tmp_path / "run", 1, "quickstart.yaml", ALONE, *words, "data.max_chars=300000")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["held_out_loss"] < summary["entropy"] - 0.5


def test_the_held_out_loss_is_that_of_every_sample_once(tmp_path: Path):
    """287 is no multiple of the batch: what fills the last one must not count."""
    run(tmp_path / "run", 2, "digits.yaml", "train.epochs=null", "train.steps=1", "data.held_out=287")
    model = Irnn(IrnnConfig(), features=4, classes=10)
    state = saved_tensors(tmp_path / "run" / "checkpoints" / "step-00000001")
    model.load_state_dict({name: state[f"model.{name}"] for name in model.state_dict()})
    held_out = load_digits(DigitsData(held_out=287), seed=0).held_out
    with torch.no_grad():
        logits = model(held_out.inputs)
    look = metrics(tmp_path / "run")[-1]
    loss = torch.nn.functional.cross_entropy(logits, held_out.targets).item()
    assert look["held_out_loss"] == pytest.approx(loss, rel=1e-5)
    assert look["held_out_accuracy"] == (logits.argmax(-1) == held_out.targets).double().mean().item()
