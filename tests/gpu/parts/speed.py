"""Bandwidth beside a copy's, `distclip bench`, the peak of memory, and how long compiling takes."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import distclip
from distclip.bench.cases import CASES
from distclip.kernels import local_norms, scale_
from gpu.chip import Chip
from gpu.readings import Readings, reading

from . import part

ROOT = Path(__file__).resolve().parents[3]
ROUNDS = 15
BENCH = 150  # seconds for one call of `distclip bench`
QUICK = ["ddp-small-clipper", "memory-fsdp2-small-function"]  # for a rehearsal


def shapes(chip: Chip, layers: int) -> list[tuple[int, ...]]:
    """Those of a transformer, 200 million elements a layer."""
    width = 4096 if chip.real else 8
    matrices: list[tuple[int, ...]] = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [*matrices, (width,), (width,)] * layers


@part(needs={"bandwidth": 9, "fact": 3}, seconds=30, alone=True)
def bandwidth(chip: Chip) -> Readings:
    """Norms and scaling of the gradients of a large model (4.8 billion in bf16, 2.4 in fp32) beside a copy."""
    for dtype, layers in ((torch.bfloat16, 24), (torch.float32, 12), (torch.float16, 12)):
        tensors = [torch.randn(s, device=chip.device, dtype=dtype).mul_(1e-3) for s in shapes(chip, layers)]
        yield from beside_a_copy(chip, str(dtype).removeprefix("torch."), tensors)
        del tensors
        if chip.real:
            torch.cuda.empty_cache()


def beside_a_copy(chip: Chip, name: str, tensors: list[Tensor]) -> Readings:
    size = sum(t.nbytes for t in tensors)
    source = torch.empty(size // 2, dtype=torch.uint8, device=chip.device)
    target, factor = torch.empty_like(source), torch.tensor(0.9999, device=chip.device)
    moved = {"copy": 2 * source.nbytes, "norm": size, "inf-norm": size, "scale": 2 * size, "torch's norm": size}
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "norm": lambda: local_norms(tensors, 2.0),
        "inf-norm": lambda: local_norms(tensors, torch.inf),
        "scale": lambda: scale_(tensors, factor),
        "torch's norm": lambda: torch._foreach_norm(tensors, 2.0),
    }
    times = chip.milliseconds(calls, ROUNDS)
    speeds = {what: moved[what] / milliseconds / 1e6 for what, milliseconds in times.items()}
    for what in ("norm", "inf-norm", "scale"):
        yield reading("bandwidth", f"{name}: {what}, GB/s by a copy's", speeds[what], right=speeds["copy"])
    yield reading("fact", f"{name}: torch's norm in its own dtype, GB/s", speeds["torch's norm"])


@part(needs={"times": 15, "bytes": 4}, rehearsed={"times": 1, "bytes": 1}, seconds=80, alone=True)
def bench(chip: Chip) -> Readings:
    """`distclip bench` with one process: never slower than torch's own clipping, no more memory than allowed."""
    if not chip.real:
        yield from cases(chip, 1, QUICK)
        return
    yield from cases(chip, 9, [case.name for case in CASES if case.name != "cold"])
    yield from cases(chip, 1, ["cold"])  # torch's takes seconds


def cases(chip: Chip, rounds: int, names: list[str]) -> Readings:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "figures.json")
        words = ["bench", *names, "--processes", "1", "--rounds", str(rounds), "--json", str(file)]
        command = [sys.executable, "-m", "distclip", *words, "--device", chip.device.type]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BENCH, cwd=ROOT)
            said = done.stderr[-500:] if done.returncode else ""
        except subprocess.TimeoutExpired:
            said = f"took longer than {BENCH} s"
        yield reading("silent", f"distclip bench {' '.join(names)}", said)
        found = json.loads(file.read_text())["cases"] if file.exists() else []
    for case in found:
        yield from judged(case)


def judged(case: dict[str, Any]) -> Readings:
    """What stands against torch's clipping, or against what may be allocated; a bare step is no rival in `bench`.

    (A whole step of a real size beside one without clipping is a part of its own: training.)
    """
    name, over = case["case"], case["over"]
    if "allowed" in over:
        parameters = (1024 * case["allowed_KiB"] - (1 << 20)) / 64
        yield reading("bytes", name, 1024 * case["distclip_KiB"], parameters=parameters)
    elif case["at_most"]:
        bare = "a Clipper without" if "clipper" in over else "a bare step"
        yield reading("fact", f"{name}: by {bare}", case["ratio"])
    else:
        yield reading("times", f"{name}, ms by torch's", case["distclip_ms"], right=case["torch_ms"])


@part(needs={"bytes": 16}, seconds=25)
def memory(chip: Chip) -> Readings:
    """What a call allocates at one time: no copy of a gradient, whatever its dtype, p and strides."""
    size = 1 << 24 if chip.real else 1 << 8
    f32, bf16 = torch.float32, torch.bfloat16
    for dtypes in ([f32], [bf16], [bf16, f32, torch.float16]):
        for p in (2.0, 1.0, 3.0, torch.inf):
            model = nn.ParameterList(
                nn.Parameter(torch.zeros(size, dtype=dtypes[i % len(dtypes)], device=chip.device)) for i in range(24)
            )
            for parameter in model:
                parameter.grad = torch.ones_like(parameter)
            name = f"{len(dtypes)} dtypes, {dtypes[0]}, p={p}"
            yield from allocated(chip, name, model, distclip.Clipper(model, 1.0, norm_type=p), p)


def allocated(chip: Chip, name: str, model: nn.ParameterList, clipper: distclip.Clipper, p: float) -> Readings:
    calls: dict[str, Callable[[], object]] = {
        "clip_()": clipper.clip_,
        "clip_grad_norm_": lambda: distclip.clip_grad_norm_(model.parameters(), 1.0, norm_type=p),
    }
    for what, call in calls.items():
        call()
        call()
        converts = p == 3 and chip.road == "default"
        yield reading("bytes", f"{what}: {name}", chip.peak(call), parameters=len(model), converts=converts)


@part(roads=("triton",), needs={"seconds": 3}, seconds=30, alone=True)
def compiling(chip: Chip) -> Readings:
    """Seconds until the first call for a dtype and p returns, with an empty cache of Triton's."""
    x = [torch.ones(100_000, device=chip.device, dtype=torch.bfloat16)]
    half = torch.tensor(0.5, device=chip.device)
    calls: dict[str, Callable[[], object]] = {
        "local_norms p=2": lambda: local_norms(x, 2.0),
        "local_norms p=inf": lambda: local_norms(x, torch.inf),
        "scale_": lambda: scale_(x, half),
    }
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        chip.synchronize()
        yield reading("seconds", name, time.perf_counter() - start)
