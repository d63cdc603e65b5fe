"""Each format is recognised by itself, and what a run logged is what is read."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from distclip.runs import Names, Run, open_runs

NORMS = [2.0, 0.5, math.inf, 4.0, 1.0]
LOSSES = [3.0, 2.5, 2.4, 2.2, 2.0]


def only(path: Path, **names) -> Run:
    (run,) = open_runs(path, Names(**names))
    return run


def lines(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def of_trainer(folder: Path) -> Path:
    records = []
    for step, (norm, loss) in enumerate(zip(NORMS, LOSSES, strict=True), 1):
        finite = math.isfinite(norm)
        record = {"step": step, "loss": loss, "norm": norm if finite else "Infinity", "max_norm": 1.0}
        record |= {"coef": min(1.0, 1 / norm) if finite else "NaN", "skip": not finite, "norm/a.weight": norm / 2}
        records.append(record if finite else record | {"norm/a.weight": "NaN", "culprit": "a.weight on rank 1 has inf"})
    return lines(folder / "run7" / "metrics.jsonl", records).parent


def of_telemetry(folder: Path) -> Path:
    records = [
        {
            "step": step,
            "grad_norm/pre_clip": norm if math.isfinite(norm) else "Infinity",
            "grad_norm/post_clip": 1.0,
            "clip/max_norm": 1.0,
            "clip/skipped": float(not math.isfinite(norm)),
            "clip/clipped": 1.0,
            "grad_norm/layer/a.weight": norm / 2,
            "loss": loss,
        }
        for step, (norm, loss) in enumerate(zip(NORMS, LOSSES, strict=True), 1)
    ]
    return lines(folder / "log.jsonl", records)


def of_transformers(folder: Path) -> Path:
    history = [
        {"epoch": 0.1, "step": step, "grad_norm": norm, "loss": loss, "learning_rate": 1e-3}
        for step, (norm, loss) in enumerate(zip(NORMS, LOSSES, strict=True), 1)
    ]
    state = {"log_history": [*history, {"eval_loss": 2.0, "step": 5}, {"train_runtime": 3.0, "step": 5}]}
    for name, whole in (("checkpoint-2", {"log_history": history[:2]}), ("checkpoint-10", state)):
        (folder / "out" / name).mkdir(parents=True)
        (folder / "out" / name / "trainer_state.json").write_text(json.dumps(whole, indent=2))
    return folder / "out"


def of_lightning(folder: Path) -> Path:
    version = folder / "lightning_logs" / "version_3"
    version.mkdir(parents=True)
    with (version / "metrics.csv").open("w", newline="") as file:
        rows = csv.DictWriter(
            file, ["epoch", "grad_2.0_norm/a.weight", "grad_2.0_norm_total", "step", "train_loss", "val"]
        )
        rows.writeheader()
        for step, (norm, loss) in enumerate(zip(NORMS, LOSSES, strict=True), 1):
            rows.writerow({"epoch": 0, "step": step, "grad_2.0_norm_total": norm, "grad_2.0_norm/a.weight": norm / 2})
            rows.writerow({"epoch": 0, "step": step, "train_loss": loss})
        rows.writerow({"epoch": 0, "step": 5, "val": 2.0})
    return folder / "lightning_logs"


def of_tensorboard(folder: Path, norm="grad_norm", loss="loss_metrics/global_avg_loss") -> Path:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / "tb" / "20261130-1200") as writer:
        for step, values in enumerate(zip(NORMS, LOSSES, strict=True), 1):
            writer.add_scalar(norm, values[0], step)
            writer.add_scalar(loss, values[1], step)
            writer.add_text("note", "no number", step)
    return folder / "tb"


def of_nanotron(folder: Path) -> Path:
    return of_tensorboard(folder, "grad_norm", "lm_loss")


def of_a_chart_of_wandb(folder: Path) -> Path:
    path = folder / "wandb_export.csv"
    heads = ["Step", "sunny-7 - train/grad_norm", "sunny-7 - train/grad_norm__MIN", "sunny-7 - train/grad_norm__MAX"]
    rows = [[step, norm, norm, norm] for step, norm in enumerate(NORMS, 1)]
    with path.open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([heads, *rows])
    return path


def of_a_history_of_wandb(folder: Path) -> Path:
    path = folder / "history.json"
    rows = [
        {
            "_step": step,
            "_timestamp": 1e9,
            "train/grad_norm": norm if math.isfinite(norm) else "Infinity",
            "train/loss": loss,
        }
        for step, (norm, loss) in enumerate(zip(NORMS, LOSSES, strict=True), 1)
    ]
    path.write_text(json.dumps(rows))
    return path


FORMATS = {
    of_trainer: "distclip train",
    of_telemetry: "distclip telemetry",
    of_transformers: "Transformers",
    of_lightning: "Lightning",
    of_tensorboard: "TensorBoard",
    of_nanotron: "TensorBoard",
    of_a_chart_of_wandb: "W&B",
    of_a_history_of_wandb: "W&B",
}


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_a_format_is_recognised_and_read(make, tmp_path: Path):
    run = only(make(tmp_path))
    assert run.program == FORMATS[make]
    assert run.step.tolist() == [1, 2, 3, 4, 5]
    assert run.norm.tolist() == NORMS
    if make is not of_a_chart_of_wandb:
        assert run.loss.tolist() == pytest.approx(LOSSES)
    if make in (of_trainer, of_telemetry):
        assert run.skip.tolist() == [False, False, True, False, False]
        assert run.clipped.tolist() == [True, False, False, True, False]
    if make in (of_trainer, of_telemetry, of_lightning):
        assert run.layers.names == ("a.weight",)
        assert run.layers.norms[[0, 1, 3], 0].tolist() == [1.0, 0.25, 2.0]
        assert not np.isfinite(run.layers.norms[2, 0])


def test_what_telemetry_tells_of_steps_between_records_is_noted(tmp_path: Path):
    largest = {10: 1.1, 20: 7.5}
    records = [{"step": step, "grad_norm/pre_clip": 1.0, "grad_norm/max": norm} for step, norm in largest.items()]
    (note,) = only(lines(tmp_path / "log.jsonl", records)).notes
    assert "largest 7.5, before step 20" in note


def test_our_culprits_come_with_their_steps(tmp_path: Path):
    assert dict(only(of_trainer(tmp_path)).culprits) == {3: "a.weight on rank 1 has inf"}


def test_a_run_is_named_by_its_folder_where_files_have_one_name(tmp_path: Path):
    assert only(of_trainer(tmp_path)).name == "run7"
    assert only(of_a_chart_of_wandb(tmp_path)).name == "sunny-7"
