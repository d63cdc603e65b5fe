"""The proof for a GPU, without one: its judge is fed wrong results, and its parts run with stand-ins."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from importlib.util import find_spec
from math import inf, nan
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.autograd import DeviceType

from gpu.chip import Gpu
from gpu.judge import BYTES, BYTES_EACH, COPY, LAUNCHES, NOISE, RULES, STEP, fault_of, verdict
from support.accelerator import EXISTS
from support.ranks import LIMIT

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "tests" / "gpu" / "check.py"
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or find_spec("numpy") is None,
    reason="Triton and numpy are not installed (CPU builds of torch bring neither): pip install triton numpy",
)
GOOD: list[dict[str, Any]] = [
    {"kind": "norm", "what": "a norm", "got": 5.0 * (1 + 1e-7), "right": 5.0},
    {"kind": "norm", "what": "of NaN", "got": nan, "right": nan},
    {"kind": "norm", "what": "of inf", "got": inf, "right": inf},
    {"kind": "left", "what": "what bf16 clipping leaves", "got": 1.0005, "right": 1.0, "dtype": "bfloat16"},
    {"kind": "bits", "what": "elements unlike", "got": 0, "of": 1000},
    {"kind": "true", "what": "the step was skipped", "got": True},
    {"kind": "silent", "what": "waits for nothing", "got": ""},
    {"kind": "lines", "what": "a case", "got": []},
    {"kind": "launches", "what": "step()", "got": 20, "right": "step", "work": 6},
    {"kind": "bytes", "what": "clip_()", "got": BYTES + 24 * BYTES_EACH, "parameters": 24},
    {"kind": "bandwidth", "what": "norm", "got": 3600.0, "right": 4300.0},
    {"kind": "times", "what": "plain-clipped", "got": 1.0, "right": 1.0},
    {"kind": "step", "what": "FSDP2", "got": 100.0, "right": 99.0},
    {"kind": "seconds", "what": "compiling", "got": 3.0},
    {"kind": "fact", "what": "elements", "got": 7},
]
NEEDS = {"everything": {reading["kind"]: 1 for reading in GOOD}, "zero": {}}
RUNS = {
    "everything": {"ended": "well", "readings": GOOD},
    "zero": {"ended": "well", "readings": [{"kind": "fact", "what": "DeepSpeed is not installed", "got": "left out"}]},
}


def place_of(kind: str) -> int:
    return next(i for i, reading in enumerate(GOOD) if reading["kind"] == kind)


def changed(kind: str, /, **values: Any) -> Callable[[dict[str, Any]], None]:
    """The first reading of this kind, with other values."""
    return lambda runs: runs["everything"]["readings"][place_of(kind)].update(values)


def without(kind: str) -> Callable[[dict[str, Any]], None]:
    def leave_out(runs: dict[str, Any]) -> None:
        runs["everything"]["readings"] = [r for r in GOOD if r["kind"] != kind]

    return leave_out


WRONG: dict[str, Callable[[dict[str, Any]], None]] = {
    "a norm that is off in the seventh digit": changed("norm", got=5.0 * (1 + 3e-7)),
    "a norm that is NaN where it is 5": changed("norm", got=nan),
    "a norm that is finite where a gradient is not": changed("norm", right=inf),
    "a number where a gradient is NaN": changed("norm", right=nan),
    "a factor cast to bf16, 0.24 % off": changed("left", got=1.0024),
    "gradients of zeros where a norm of 1 should be left": changed("left", got=0.0),
    "a clipped norm that is NaN": changed("left", got=nan),
    "one element unlike": changed("bits", got=1),
    "no element compared": changed("bits", of=0),
    "a NaN that was stepped": changed("true", got=False),
    "an answer that is no bool": changed("true", got=1),
    "a call that waited": changed("silent", got="RuntimeError: called a synchronizing CUDA operation"),
    "a capture that failed": changed("silent", got="RuntimeError: operation not permitted when stream is capturing"),
    "a case with a fault": changed("lines", got=["p=2.0: norm 1.0, should be 2.0"]),
    "a launch too many": changed("launches", got=LAUNCHES["step"] + 1),
    "no launch seen at all": changed("launches", got=0, work=0),
    "a launch limit that nobody set": changed("launches", right="anything"),
    "a byte too many": changed("bytes", got=BYTES + 24 * BYTES_EACH + 1),
    "a whole copy of a gradient, which is more than a part": changed("bytes", got=1 << 27, converts=True),
    "bandwidth below 0.8 of a copy's": changed("bandwidth", got=(COPY - 0.01) * 4300.0),
    "bandwidth that is NaN": changed("bandwidth", got=nan),
    "a copy that took no time": changed("bandwidth", right=0.0),
    "slower than torch": changed("times", got=NOISE + 0.01),
    "a time that is NaN": changed("times", got=nan),
    "a time of zero": changed("times", got=0.0),
    "a training step that takes a tenth more": changed("step", got=STEP * 99.0 + 1),
    "a minute and more of compiling": changed("seconds", got=61.0),
    "a kind that has no rule": changed("fact", kind="facts"),
    "a reading without what it stands beside": lambda runs: runs["everything"]["readings"][0].pop("right"),
    "text in place of a number": changed("norm", got="5.0"),
    "a part that never began": lambda runs: runs.pop("everything"),
    "a part that was cut off": lambda runs: runs["everything"].update(ended="cut off after 60 s"),
    "a part that crashed after its last reading": lambda runs: runs["everything"].update(ended="with exit code 139"),
    "a part that measured nothing": lambda runs: runs["everything"].update(readings=[]),
    "a part that may be left out, and crashed": lambda runs: runs["zero"].update(ended="with exit code 1"),
    **{f"a part without a reading of {kind}": without(kind) for kind in RULES},
}


def test_the_judge_finds_nothing_wrong_with_what_is_right():
    assert verdict(RUNS, NEEDS) == {"everything": [], "zero": []}
    assert {reading["kind"] for reading in GOOD} == set(RULES)


@pytest.mark.parametrize("name", WRONG)
def test_the_judge_fails_what_is_wrong(name):
    runs = deepcopy(RUNS)
    WRONG[name](runs)
    found = verdict(runs, NEEDS)
    assert sum(map(bool, found.values())) == 1, found
    assert verdict(json.loads(json.dumps(runs)), NEEDS) == found  # also after it was written to a file and read


@pytest.mark.parametrize("kind", ["norm", "bits", "true", "silent", "lines"])
def test_a_rehearsal_forgives_times_alone(kind):
    slow = [changed("bandwidth", got=1.0), changed("times", got=9.0), changed("step", got=999.0)]
    runs = deepcopy(RUNS)
    for change in slow:
        change(runs)
    assert verdict(runs, NEEDS, rehearsal=True)["everything"] == []
    changed(kind, got="wrong")(runs)
    assert len(verdict(runs, NEEDS, rehearsal=True)["everything"]) == 1
    assert fault_of({**GOOD[place_of("bandwidth")], "got": nan}, rehearsal=True) is not None


def test_what_a_gpu_is_asked_is_spelled_right():
    """Every method of a Gpu, with a ``torch.cuda`` that is not there."""
    with patch("torch.cuda", autospec=True) as cuda:
        chip = Gpu("default")
        cuda.Event.return_value.elapsed_time.side_effect = [3.0, 5.0, 1.0, 6.0, 2.0, 4.0]
        assert chip.milliseconds({"a": lambda: None, "b": lambda: None}, 3) == {"a": 2.0, "b": 5.0}
        outputs, replay = chip.captured(lambda: ["tensors"])
        assert (outputs, replay) == (["tensors"], cuda.CUDAGraph.return_value.replay)
        cuda.memory_allocated.return_value, cuda.max_memory_allocated.return_value = 100, 164
        assert chip.peak(lambda: None) == 64
        with pytest.raises(RuntimeError, match="a wait"), chip.no_waits():
            raise RuntimeError("a wait")
        assert [call.args for call in cuda.set_sync_debug_mode.mock_calls] == [("error",), ("default",)]


def test_kernels_are_counted_apart_from_the_work_on_tensors():
    names = [
        "void multi_tensor_apply_kernel",
        "block_sums",
        "void elementwise_kernel",
        "Memcpy HtoD",
        "cudaLaunchKernel",
    ]
    kinds = [DeviceType.CUDA] * 4 + [DeviceType.CPU]
    events = [SimpleNamespace(name=name, device_type=kind) for name, kind in zip(names, kinds, strict=True)]
    with patch("torch.cuda", autospec=True), patch("torch.profiler.profile", autospec=True) as profile:
        profile.return_value.__enter__.return_value.events.return_value = events
        assert Gpu("default").launches(lambda: None) == (2, 2)


def command(file: Path, *words: str) -> list[str]:
    return [sys.executable, str(CHECK), "--rehearse", "--side-by-side", "2", "--json", str(file), *words]


def rehearse(file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(file, *words), cwd=file.parent, capture_output=True, text=True, timeout=LIMIT)


def test_a_rehearsal_runs_parts_judges_them_and_writes_what_it_has(tmp_path):
    file = tmp_path / "gpu.json"
    done = rehearse(file, "--roads", "default", "--only", "functions", "graph_of_step", "bandwidth")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    document = json.loads(file.read_text())
    assert document["faults"] == {f"{name} (default)": [] for name in ("functions", "graph_of_step", "bandwidth")}
    assert "ok     functions (default)" in done.stdout
    assert "3 parts hold, 0 do not" in done.stdout
    assert "| bandwidth (default) | bfloat16: norm, GB/s by a copy's |" in done.stdout


def test_a_run_that_is_cut_off_leaves_what_it_has(tmp_path):
    file = tmp_path / "gpu.json"
    words = command(file, "--roads", "default", "--only", "graph_of_kernels", "training")
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as run:
        for _ in range(2000):  # until the first part has ended, and the next begun
            if file.exists():
                break
            time.sleep(0.1)
        run.terminate()
        said, _ = run.communicate(timeout=LIMIT)
    assert run.returncode == 143
    assert said.splitlines()[0].startswith("ok     graph_of_kernels (default)")
    assert json.loads(file.read_text())["faults"] == {"graph_of_kernels (default)": []}


def test_a_run_without_time_fails_and_says_what_it_did_not_measure(tmp_path):
    file = tmp_path / "gpu.json"
    done = rehearse(file, "--roads", "default", "--only", "functions", "--minutes", "0.1")
    assert done.returncode == 1
    assert "ended: never began: no time was left" in done.stdout
    assert json.loads(file.read_text())["faults"]["functions (default)"]


PARTS_OF = {
    "default": ("nccl", "huge", "streams", "launches", "memory", "training"),
    "triton": ("scalers", "graph_of_clip_", "nccl", "huge", "streams", "cases_4", "compiling"),
}


def rehearsed(road: str) -> dict[str, list[str]]:
    """What the judge says of parts that start no processes, one after the other in this one, on the CPU."""
    from gpu.check import PARTS, Host

    runs = {name: {"ended": "well", "readings": list(PARTS[name].measure(Host(road)))} for name in PARTS_OF[road]}
    return verdict(runs, {name: PARTS[name].needs for name in runs}, rehearsal=True)


@needs_triton
@pytest.mark.parametrize("road", PARTS_OF)
def test_parts_hold_on_the_host_and_measure_what_they_must(road, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # numpy warns of the overflows that the kernels are written for
    monkeypatch.setenv("DISTCLIP_TRITON", "1" if road == "triton" else "0")
    if road == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(rehearsed, road).result(timeout=LIMIT) == {name: [] for name in PARTS_OF[road]}


def broken(name: str) -> list[str]:
    """What the check finds wrong with a library that was broken in one place, on the device that is not there."""
    from distclip.kernels import foreach
    from distclip.plan import contribution as plan
    from gpu.check import PARTS, NotThere

    norms = plan.local_norms

    def cast(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
        for tensor in tensors:
            tensor.mul_(factor.to(tensor.dtype))

    def waiting(tensors: list[torch.Tensor], p: float) -> torch.Tensor:
        found = norms(tensors, p)
        found.sum().item()
        return found

    chip, part = NotThere("default"), PARTS["functions"]
    with (
        patch.object(foreach, "multiply_", cast if name == "factor" else foreach.multiply_),
        patch.object(plan, "local_norms", waiting if name == "wait" else norms),
    ):
        return verdict({name: {"ended": "well", "readings": list(part.measure(chip))}}, {name: part.needs}, True)[name]


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
def test_the_check_finds_a_factor_that_is_rounded_and_a_call_that_waits():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        right, rounded, waits = pool.map(broken, ("nothing", "factor", "wait"), timeout=LIMIT)
    assert right == []
    assert rounded
    assert all(line.startswith(("bits: ", "left: ")) for line in rounded)
    assert any("Wait: " in line for line in waits)


def test_without_a_gpu_the_check_says_so():
    done = subprocess.run([sys.executable, str(CHECK)], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 2
    assert "no GPU here: --rehearse runs what a CPU can" in done.stderr
