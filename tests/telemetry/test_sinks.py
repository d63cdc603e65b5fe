"""The sinks: what is written is read back by the readers of each library."""

import json
import os
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from importlib import import_module
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distclip import Clipper
from distclip.telemetry import JsonLines, Log
from support.listening import LOOPBACK, listening
from support.ranks import run_ranks

NUMBERS = {"grad_norm/pre_clip": 2.5, "clip/coef": 0.4, "grad_norm/layer/0.weight": 1.5}
BAD = NUMBERS | {"grad_norm/pre_clip": nan, "clip/coef": 1.0, "grad_norm/layer/0.weight": inf}
WHOLE = {"grad_norm/post_clip": 1.0, "clip/max_norm": 1.0, "clip/clipped": 1.0, "clip/skipped": 0.0}


def same(found: float, wanted: float) -> bool:
    return found == wanted or (isnan(found) and isnan(wanted))


# ---- JSON lines -------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_json_lines_are_on_disk_at_once_with_numbers_that_json_lacks_as_texts(tmp_path):
    path = tmp_path / "runs" / "clip.jsonl"
    sink = JsonLines(path)
    assert not path.parent.exists()  # other ranks make it too, and write nothing
    sink(NUMBERS, 10)
    sink(BAD | {"clip/max_norm": -inf}, 11)
    first, second = lines(path)  # before it is closed
    sink.close()
    assert first == {"step": 10, **NUMBERS}
    assert (second["grad_norm/pre_clip"], second["clip/max_norm"]) == ("NaN", "-Infinity")
    assert float(second["grad_norm/layer/0.weight"]) == inf


def test_fingerprints_have_lines_of_their_own_in_json_lines_alone(tmp_path):
    model, others = nn.Linear(2, 1), []
    model.weight.grad, model.bias.grad = torch.ones(1, 2), torch.ones(1)
    clipper, path = Clipper(model, 1.0, fingerprint_every=2), tmp_path / "clip.jsonl"
    with Log(clipper, JsonLines(path), lambda numbers, step: others.append(numbers), every=4):
        for _ in range(4):
            clipper.clip_()
    found = lines(path)
    assert [line["step"] for line in found] == [2, 4, 4]
    latest = clipper.report.fingerprint
    assert {name: int(found[1][f"fingerprint/{name}"], 0) for name in ("weight", "bias")} == latest.parameters
    assert int(found[1]["fingerprint"], 0) == latest.total
    assert "fingerprint" not in others[0]
    assert all(isinstance(number, float) for number in others[0].values())


@pytest.mark.parametrize("whole", ["", '{"step": 1}\n', '{"step": 1}\n' * 2000], ids=["none", "one", "many"])
@pytest.mark.parametrize("cut", ["", '{"step"', '{"step": ' * 2000], ids=["none", "short", "long"])
def test_a_line_that_a_crash_has_cut_is_not_joined_to_the_next(tmp_path, whole, cut):
    path = tmp_path / "clip.jsonl"
    path.write_text(whole + cut, encoding="utf-8")
    sink = JsonLines(path)
    sink(NUMBERS, 2)
    sink.close()
    sink(NUMBERS, 3)
    sink.close()
    assert [line["step"] for line in lines(path)] == [1] * whole.count("\n") + [2, 3]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    model = nn.Linear(2, 1, bias=False)
    clipper = Clipper(model, 1.0)
    Log(clipper, JsonLines(tmp_path / "file" / "clip.jsonl"), every=1)
    model.weight.grad = torch.ones(1, 2)
    with pytest.warns(RuntimeWarning, match=r"JsonLines failed.*Error"):
        clipper.clip_()
    assert clipper.steps == 1


# ---- TensorBoard ------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_reads_back_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    from distclip.telemetry.tensorboard import TensorBoard

    ours, theirs = tmp_path / "ours", SummaryWriter(str(tmp_path / "theirs"))
    for sink in (TensorBoard(ours), TensorBoard(theirs)):
        sink(NUMBERS, 10)
        sink(BAD, 11)
        sink.close()
    theirs.add_scalar("loss", 1.0, 12)  # it was not closed
    theirs.close()
    for found in (scalars(ours), scalars(tmp_path / "theirs")):
        assert set(NUMBERS) <= set(found)
        for key in NUMBERS:
            (tenth, number), (eleventh, bad) = found[key]
            assert (tenth, eleventh) == (10, 11)
            assert number == pytest.approx(NUMBERS[key], rel=1e-7)
            assert same(bad, BAD[key])


# ---- Weights & Biases -------------------------------------------------------------------------------------------


def transaction_log(path: Path) -> Iterator[bytes]:
    """The records of a ``.wandb`` file: LevelDB's log format after a header of 7 bytes. wandb itself reads it in Go."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_offline_keeps_every_record_over_steps_of_ours(tmp_path):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    from distclip.telemetry.wandb import Wandb

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        run = wandb.init(mode="offline", dir=str(tmp_path), project="distclip", settings={"silent": True})
        sink = Wandb(run)
        for _ in range(50):
            run.log({"loss": 1.0})  # so that W&B's own step is far ahead
        sink(NUMBERS, 10)
        sink(BAD, 11)
        run.finish()
        wandb.teardown()  # its service has written all when it has ended
    records = [Record.FromString(each) for each in transaction_log(next(tmp_path.glob("wandb/offline-*/*.wandb")))]
    rows = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in records]
    ours = [row for row in rows if "clip/step" in row]
    assert [row["clip/step"] for row in ours] == [10, 11]
    assert {key: ours[0][key] for key in NUMBERS} == NUMBERS
    assert isnan(float(ours[1]["grad_norm/pre_clip"]))
    axes = {record.metric.glob_name or record.metric.name: record.metric.step_metric for record in records}
    assert axes["grad_norm/*"] == axes["clip/*"] == "clip/step"


# ---- MLflow -----------------------------------------------------------------------------------------------------


def test_mlflow_reads_back_what_was_written(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    from distclip.telemetry.mlflow import MLflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, of a store in files
        mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
        with mlflow.start_run() as run:
            many = {f"grad_norm/layer/w[{row}, :]": float(row) for row in range(1500)}
            sink = MLflow(run)
            sink(NUMBERS | many, 10)
            sink(BAD, 11)
            sink.close()
        client = mlflow.MlflowClient()
        for key in NUMBERS:
            (first, second) = client.get_metric_history(run.info.run_id, key)
            assert (first.step, first.value, second.step) == (10, NUMBERS[key], 11)
            assert same(second.value, BAD[key])
        (row,) = client.get_metric_history(run.info.run_id, "grad_norm/layer/w_1499_ :_")
        assert row.value == 1499.0
        by_id = MLflow(run.info.run_id)
        by_id(NUMBERS, 12)
        by_id.close()
        assert [each.step for each in client.get_metric_history(run.info.run_id, "clip/coef")] == [10, 11, 12]


def test_what_an_mlflow_server_refuses_is_raised_with_a_later_record(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    from distclip.telemetry.mlflow import MLflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
        sink = MLflow("0" * 32)
        sink(NUMBERS, 10)
        with pytest.raises(mlflow.exceptions.MlflowException, match="not found"):
            sink.close()
        sink(NUMBERS, 20)
        while not sink._waiting[0].done():
            time.sleep(0.01)
        with pytest.raises(mlflow.exceptions.MlflowException, match="not found"):
            sink(NUMBERS, 30)
        sink._waiting.clear()


# ---- Prometheus -------------------------------------------------------------------------------------------------


def scraped(url: str) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(url, timeout=10) as page:
        text = page.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name + "".join(sample.labels.values()): sample.value for sample in samples}


def test_prometheus_is_scraped_over_http_and_cannot_be_written():
    pytest.importorskip("prometheus_client")
    from distclip.telemetry.prometheus import Prometheus

    sink = Prometheus(0)
    assert (sink.port, sink.addr) == (0, "127.0.0.1")
    for numbers, step in [(BAD | WHOLE | {"clip/skipped": 1.0}, 9), (NUMBERS | WHOLE, 10)]:
        sink(numbers, step)
    url = f"http://127.0.0.1:{sink.port}/metrics"
    try:
        addresses = listening({os.getpid()})
        assert addresses
        assert addresses <= LOOPBACK
        found = scraped(url)
        assert found["distclip_grad_norm_pre_clip"] == 2.5
        assert found["distclip_grad_norm_layer0.weight"] == 1.5
        assert found["distclip_clip_step"] == 10
        assert (found["distclip_skipped_steps_total"], found["distclip_nonfinite_steps_total"]) == (1, 1)
        sink(BAD | WHOLE, 11)
        found = scraped(url)
        assert isnan(found["distclip_grad_norm_pre_clip"])
        assert found["distclip_grad_norm_layer0.weight"] == inf
        for method in ("POST", "PUT", "DELETE"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(url, b"x", method=method), timeout=10)
            refused.value.close()
            assert refused.value.code in (405, 501)
        busy = Prometheus(sink.port)
        with pytest.raises(OSError, match="in use"):
            busy(NUMBERS | WHOLE, 1)
    finally:
        sink.close()
    busy(NUMBERS | WHOLE, 2)  # the port is free now
    assert scraped(url)["distclip_clip_step"] == 2
    busy.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=10)


def test_names_that_prometheus_cannot_tell_apart_share_a_gauge():
    pytest.importorskip("prometheus_client")
    from distclip.telemetry.prometheus import Prometheus

    sink = Prometheus(0)
    sink(NUMBERS | WHOLE | {"clip/z.score": 1.0, "clip/z_score": 2.0}, 1)
    try:
        assert scraped(f"http://127.0.0.1:{sink.port}/metrics")["distclip_clip_z_score"] == 2.0
    finally:
        sink.close()


def served_on_a_rank() -> tuple[int, float]:
    from distclip.telemetry.prometheus import Prometheus

    model, sink = nn.Linear(2, 1, bias=False), Prometheus(0)
    clipper = Clipper(model, 1.0)
    with Log(clipper, sink, every=1):
        model.weight.grad = torch.ones(1, 2)
        clipper.clip_()
        found = scraped(f"http://127.0.0.1:{sink.port}/metrics") if sink.port else {}
        return sink.port, found.get("distclip_grad_norm_pre_clip", 0.0)


def test_only_the_first_rank_serves():
    pytest.importorskip("prometheus_client")
    (port, norm), other = run_ranks(served_on_a_rank, 2)
    assert port > 0
    assert norm == pytest.approx(2**0.5)
    assert other == (0, 0.0)


# ---- OpenTelemetry ----------------------------------------------------------------------------------------------


def test_opentelemetry_collects_gauges(monkeypatch):
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    from distclip.telemetry import opentelemetry

    reader = InMemoryMetricReader()
    monkeypatch.setattr(opentelemetry, "get_meter", MeterProvider([reader]).get_meter)
    sink = opentelemetry.OpenTelemetry()
    sink(BAD, 9)
    sink(NUMBERS, 10)
    (found,) = reader.get_metrics_data().resource_metrics[0].scope_metrics
    points = {
        metric.name: [(dict(point.attributes), point.value) for point in metric.data.data_points]
        for metric in found.metrics
    }
    assert points == {
        "distclip/grad_norm/pre_clip": [({}, 2.5)],
        "distclip/clip/coef": [({}, 0.4)],
        "distclip/grad_norm/layer": [({"layer": "0.weight"}, 1.5)],
        "distclip/clip/step": [({}, 10)],
    }


# ---- what is not installed --------------------------------------------------------------------------------------

NEEDED = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "mlflow": ("mlflow", "mlflow"),
    "prometheus": ("prometheus_client", "prometheus"),
    "opentelemetry": ("opentelemetry.metrics", "opentelemetry"),
}


@pytest.mark.parametrize("sink", NEEDED)
def test_a_sink_whose_library_is_missing_says_what_to_install(sink, monkeypatch):
    package, extra = NEEDED[sink]
    for name in [f"distclip.telemetry.{sink}", "torch.utils.tensorboard", "torch.utils.tensorboard.writer"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'is not installed: pip install "distclip\[{extra}\]"'):
        import_module(f"distclip.telemetry.{sink}")


def loaded_by(*programs: str) -> list[set[str]]:
    """The top-level packages, and the modules of ours, after each of them in a process of its own."""
    shown = "; ".join(["import sys", *(f"{program}; print(*sys.modules)" for program in programs)])
    found = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    return [
        {name if name.startswith("distclip") else name.partition(".")[0] for name in line.split()}
        for line in found.stdout.splitlines()
    ]


def test_a_log_imports_no_library_of_a_sink_and_distclip_no_log():
    alone, names = loaded_by("import distclip", "import distclip.telemetry")
    assert not [name for name in alone if name.startswith("distclip.telemetry")]
    assert "distclip.telemetry.log" in names
    assert not names & {"tensorboard", "wandb", "mlflow", "prometheus_client", "opentelemetry"}
