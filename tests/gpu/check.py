"""Check the Triton kernels, and the Clipper on top of them, on a machine with one NVIDIA GPU.

    python tests/gpu/check.py                        every part, each in a process of its own
    python tests/gpu/check.py --only cases speed     some parts
    TRITON_INTERPRET=1 python tests/gpu/check.py --device cpu --only cases clipper     what a CPU can do of it

Prints one JSON object: for every part what is wrong (a list, empty if nothing is) and what was measured. Exits with 1
if anything is wrong. Everything is compared with the float64 oracle of tests/oracle.py. Times are CUDA events, medians
of interleaved rounds; bandwidth counts the bytes that must move, and stands beside a copy's in the same process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import distclip  # noqa: E402
from distclip.kernels import triton  # noqa: E402
from gpu.cases import CASES, PROMISE, right_norm, wrong  # noqa: E402

Facts = dict[str, Any]
PARTS: dict[str, Callable[[torch.device], Facts]] = {}
ROUNDS = 15


def part(function: Callable[[torch.device], Facts]) -> Callable[[torch.device], Facts]:
    PARTS[function.__name__] = function
    return function


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """A wait that torch knows of raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def close(got: float, right: float, what: str) -> list[str]:
    return [] if abs(got - right) <= PROMISE * right else [f"{what}: {got!r}, should be {right!r}"]


def gradients_of_a_model(device: torch.device, dtype: torch.dtype, layers: int = 24, width: int = 4096) -> list[Tensor]:
    """The shapes of a transformer, 200 million elements a layer."""
    shapes: list[tuple[int, ...]] = []
    for _ in range(layers):
        shapes += [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (width,), (width,)]
    return [torch.randn(shape, device=device, dtype=dtype).mul_(1e-3) for shape in shapes]


@part
def cases(device: torch.device) -> Facts:
    """Every case of cases.py."""
    faults = {name: found for name in CASES if (found := wrong(name, device.type))}
    return {"wrong": [f"{name}: {line}" for name, found in faults.items() for line in found], "cases": len(CASES)}


@part
def huge(device: torch.device) -> Facts:
    """More than 2**31 elements in one tensor (bf16, 4.3 GB)."""
    if device.type == "cpu":
        return {"wrong": [], "left_out": "needs a GPU"}
    x = torch.ones((1 << 31) + 12345, device=device, dtype=torch.bfloat16)
    found = close(triton.local_norms([x], 2.0).item(), x.numel() ** 0.5, "norm of 2**31 + 12345 ones")
    x[-1] = 300.0
    found += close(triton.local_norms([x], float("inf")).item(), 300.0, "the largest is the last")
    triton.scale_([x], torch.tensor(0.5, device=device))
    if x[0] != 0.5 or x[1 << 31] != 0.5 or x[-1] != 150.0 or (x[:-1] != 0.5).any():
        found.append("not all elements were scaled")
    return {"wrong": found}


def small_model(device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(257, 511), nn.GELU(), nn.LayerNorm(511), nn.Linear(511, 300), nn.GELU(), nn.Linear(300, 3)]
    return nn.Sequential(*layers).to(device, dtype)


def fill(model: nn.Module, scale: float, seed: int) -> None:
    """Give every parameter a gradient, in place where it has one, so that addresses stay."""
    for i, p in enumerate(model.parameters()):
        values = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)).mul_(scale)
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(values)


def norm_of(model: nn.Module) -> float:
    vector = torch.cat([p.grad.detach().flatten().double().cpu() for p in model.parameters() if p.grad is not None])
    return right_norm(vector, 2.0)


def steps(clipper: distclip.Clipper, model: nn.Module, device: torch.device) -> list[str]:
    """clip_() above and below the bound, step() as well, none waiting; a NaN skips."""
    found = []
    rounding = 1e-5 if next(model.parameters()).dtype == torch.float32 else 4e-3  # of scaled elements
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for scale in (1.0, 1e-6):  # the first calls compile kernels and make the optimizer's state
        fill(model, scale, seed=1)
        clipper.clip_()
        clipper.step(optimizer)
    for seed, scale in enumerate((1.0, 1e-6, 1e-2, 1.0)):
        fill(model, scale, seed)
        before = norm_of(model)
        with no_waits(device):
            report = clipper.clip_()
        found += close(report.norm.item(), before, "clip_() reports the norm")
        after = norm_of(model)
        if abs(after - min(before, 1.0)) > rounding * after:
            found.append(f"clip_() left a norm of {after} of {before}, with a bound of 1")
        fill(model, scale, seed)
        weights = [p.detach().clone() for p in model.parameters()]
        with no_waits(device):
            report = clipper.step(optimizer)
        found += close(report.norm.item(), before, "step() reports the norm")
        if all(torch.equal(w, p) for w, p in zip(weights, model.parameters(), strict=True)):
            found.append("step() changed no parameter")
    fill(model, 1.0, seed=9)
    next(iter(model.parameters())).grad.view(-1)[5] = torch.nan
    weights = [p.detach().clone() for p in model.parameters()]
    with no_waits(device):
        report = clipper.step(optimizer)
    if not report.skip or not all(torch.equal(w, p) for w, p in zip(weights, model.parameters(), strict=True)):
        found.append("a NaN was stepped")
    clipper.measure()
    if clipper.culprit is None:
        found.append("no culprit of the NaN was named")
    return found


@part
def clipper(device: torch.device) -> Facts:
    """A whole Clipper on one process, fp32 and bf16, under set_sync_debug_mode("error")."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = small_model(device, dtype)
        found += [f"{dtype}: {line}" for line in steps(distclip.Clipper(model, 1.0), model, device)]
    return {"wrong": found, "triton": triton.available(device)}


@part
def nccl(device: torch.device) -> Facts:
    """The same with a process group of one rank, plain and under FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        model = small_model(device)
        found = [f"plain: {line}" for line in steps(distclip.Clipper(model, 1.0), model, device)]
        sharded = small_model(device)
        fully_shard(sharded, mesh=init_device_mesh(device.type, (1,)))
        clipper = distclip.Clipper(sharded, 1.0)
        for seed, scale in enumerate((1.0, 1.0, 1e-6)):
            x = torch.full((8, 257), scale, device=device)
            sharded(x).square().sum().backward()
            whole = [p.grad.full_tensor().double().flatten().cpu() for p in sharded.parameters()]
            with no_waits(device):
                report = clipper.clip_()
            found += close(report.norm.item(), right_norm(torch.cat(whole), 2.0), f"FSDP2, step {seed}")
            sharded.zero_grad()
        dist.destroy_process_group()
    return {"wrong": found, "backend": backend}


@part
def overlap(device: torch.device) -> Facts:
    """overlap=True under FSDP2 and DDP with one rank: the norms of a Clipper without it, bit for bit, and no wait.

    Layers that differ in size reduce on other streams while the backward goes on: a kernel that reads too early, or
    a slot that is written while a step reads it, gives another norm in some of many steps.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def net() -> nn.Module:
        torch.manual_seed(0)
        sizes = [64, 2048, 128, 4096, 32, 1024, 8] if device.type == "cuda" else [8, 40, 8]
        return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes))).to(device)

    def fsdp2() -> nn.Module:
        model, mesh = net(), init_device_mesh(device.type, (1,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def ddp() -> nn.Module:
        return DistributedDataParallel(net(), gradient_as_bucket_view=True, bucket_cap_mb=1)

    found = []
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        for make in (fsdp2, ddp):
            model = make()
            ours, plain = distclip.Clipper(model, 1.0, overlap=True), distclip.Clipper(model, 1.0)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            width = 64 if device.type == "cuda" else 8
            steps, pairs = 300 if device.type == "cuda" else 6, []
            rows = [torch.randn(32, width, generator=torch.Generator().manual_seed(i)) for i in range(steps)]
            rows = [x.to(device) for x in rows]
            for step, x in enumerate(rows):
                if step == 3:
                    torch.cuda.synchronize() if device.type == "cuda" else None
                with no_waits(device) if step >= 3 else nullcontext():
                    (model(x).square().mean() * (100.0 if step % 2 else 1e-3)).backward()
                    if step % 5 == 4:  # in place and behind all versions
                        for parameter in list(model.parameters())[::3]:
                            gradient = parameter.grad
                            getattr(gradient, "_local_tensor", gradient).data.mul_(2.0)
                    right = plain.measure().norm  # sums everything, after everything
                    got = ours.step(optimizer).norm
                    optimizer.zero_grad()
                pairs.append(torch.stack([got, right]))
            both = torch.stack(pairs)
            unlike = int((both[:, 0] != both[:, 1]).sum())
            if unlike:
                found.append(f"{make.__name__}: {unlike} of {steps} norms differ from those summed after the backward")
            if not both.isfinite().all() or both[:, 1].std() == 0:
                found.append(f"{make.__name__}: the norms prove nothing: {both[:5].tolist()}")
        dist.destroy_process_group()
    return {"wrong": found, "backend": backend}


@part
def launches(device: torch.device) -> Facts:
    """How many kernels 600 tensors of two dtypes take, as the profiler sees them."""
    if device.type == "cpu":
        return {"wrong": [], "left_out": "needs a GPU"}
    halves = [torch.bfloat16, torch.float32]
    tensors = [torch.randn(1000 + i, device=device).to(halves[i % 2]) for i in range(600)]
    coef = torch.tensor(0.5, device=device)

    def count(call: Callable[[], object]) -> dict[str, int]:
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        names: dict[str, int] = {}
        for event in profile.events():
            names[event.name] = names.get(event.name, 0) + 1
        return names

    norms, scaled = count(lambda: triton.local_norms(tensors, 2.0)), count(lambda: triton.scale_(tensors, coef))
    found = []
    for names, kernel in ((norms, "block_sums"), (norms, "norms_of_rows"), (scaled, "scale_blocks")):
        if names.get(kernel) != 2:
            found.append(f"{kernel} was launched {names.get(kernel)} times for two dtypes")
    if any("HtoD" in name or "DtoH" in name for name in (*norms, *scaled)):
        found.append("a warm call copied between host and device")
    with no_waits(device):
        fresh = [t.clone() for t in tensors]  # new addresses: the table is built again
        triton.local_norms(fresh, 2.0)
        triton.scale_(fresh, coef)
    torch_norms = count(lambda: torch._foreach_norm(tensors, 2.0, dtype=torch.float64))
    return {"wrong": found, "local_norms": norms, "scale_": scaled, "_foreach_norm": sum(torch_norms.values())}


@part
def streams(device: torch.device) -> Facts:
    """The same tensors on one stream after the other, and the same bits a hundred times."""
    if device.type == "cpu":
        return {"wrong": [], "left_out": "needs a GPU"}
    tensors = [torch.randn(5000 + i, device=device) for i in range(300)]
    first = triton.local_norms(tensors, 2.0)
    found = [
        line for n, t in zip(first.tolist(), tensors, strict=True) for line in close(n, right_norm(t, 2.0), "norm")
    ]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        other = [triton.local_norms(tensors, 2.0) for _ in range(50)]
    torch.cuda.current_stream().wait_stream(side)
    other += [triton.local_norms(tensors, 2.0) for _ in range(50)]
    if not all(torch.equal(first, norms) for norms in other):
        found.append("the same tensors gave different bits")
    return {"wrong": found}


@part
def graph(device: torch.device) -> Facts:
    """local_norms and scale_ in a CUDA graph: after a warm call with the same addresses, and without one."""
    if device.type == "cpu":
        return {"wrong": [], "left_out": "needs a GPU"}
    found = []
    coef = torch.tensor(0.5, device=device)
    for warm in (True, False):
        kinds = [(n, dtype) for n in (7, 9000, 70_001) for dtype in (torch.float32, torch.bfloat16)]
        tensors = [torch.randn(n, device=device, dtype=dtype) for n, dtype in kinds]
        if warm:
            triton.local_norms(tensors, 2.0)
            triton.scale_(tensors, torch.ones((), device=device))
        recorded = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(recorded):
            norms = triton.local_norms(tensors, 2.0)
            triton.scale_(tensors, coef)
        for seed in range(3):
            for i in range(40):  # tables of other tensors come and go: the graph's must stay
                triton.local_norms([torch.randn(100 + i, device=device)], 2.0)
            for i, t in enumerate(tensors):
                t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(seed + i)))
            right = [right_norm(t, 2.0) for t in tensors]
            halves = [t * 0.5 for t in tensors]
            recorded.replay()
            for norm, want in zip(norms.tolist(), right, strict=True):
                found += close(norm, want, f"warm={warm}, replay {seed}")
            if not all(map(torch.equal, tensors, halves)):
                found.append(f"warm={warm}, replay {seed}: not scaled")
    return {"wrong": found}


@part
def graph_of_a_clipper(device: torch.device) -> Facts:
    """Whether clip_() can be captured, with gradients that stay where they are; says how it fails where it does."""
    if device.type == "cpu":
        return {"wrong": [], "left_out": "needs a GPU"}
    model = small_model(device)
    clipper = distclip.Clipper(model, 1.0, nonfinite="propagate")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for seed in range(3):
            fill(model, 1.0, seed)
            clipper.clip_()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(recorded):
            report = clipper.clip_()
    except RuntimeError as error:
        return {"wrong": [], "captured": False, "error": str(error).splitlines()[0]}
    found = []
    for seed, scale in enumerate((1.0, 1e-6)):
        fill(model, scale, seed)
        before = norm_of(model)
        recorded.replay()
        found += close(report.norm.item(), before, f"replay {seed} reports the norm")
        if abs(norm_of(model) - min(before, 1.0)) > 1e-5:
            found.append(f"replay {seed} left a norm of {norm_of(model)} of {before}")
    return {"wrong": found, "captured": True}


@part
def graph_of_a_step(device: torch.device) -> Facts:
    """step() of a fused, capturable optimizer in a CUDA graph, beside the same steps without one, bit for bit."""
    if device.type == "cpu":
        return {"wrong": [], "left_out": "needs a GPU"}
    models = [small_model(device), small_model(device)]
    clippers = [distclip.Clipper(model, distclip.AutoClip(percentile=50, window=5)) for model in models]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True, capturable=True) for m in models]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for seed in range(3):
            for model, clipper, optimizer in zip(models, clippers, optimizers, strict=True):
                fill(model, 1.0, seed)
                clipper.step(optimizer)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(recorded):
            report = clippers[0].step(optimizers[0])
    except RuntimeError as error:
        return {"wrong": [], "captured": False, "error": str(error).splitlines()[0]}
    found = []
    for seed, scale in enumerate((1.0, 1e-3, 30.0, 1e-5, 2.0)):
        for model in models:
            fill(model, scale, 10 + seed)
        recorded.replay()
        right = clippers[1].step(optimizers[1])
        if report.norm.item() != right.norm.item() or report.coef.item() != right.coef.item():
            found.append(f"replay {seed}: {report}, without a graph {right}")
        if not all(map(torch.equal, models[0].parameters(), models[1].parameters())):
            found.append(f"replay {seed}: other parameters than without a graph")
    return {"wrong": found, "captured": True}


def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median time of each call on the GPU; the calls take turns, so that a clock that drifts hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 3):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn >= 3:
                times[name].append(start.elapsed_time(end))
    return {name: median(values) for name, values in times.items()}


@part
def speed(device: torch.device) -> Facts:
    """Bandwidth of norms and scaling beside a copy's and torch's foreach kernels, on the gradients of a large model."""
    if device.type == "cpu":
        return {"wrong": [], "left_out": "needs a GPU"}
    facts: Facts = {"wrong": []}
    half, one = torch.tensor(0.9999, device=device), torch.ones((), device=device)
    for dtype in (torch.bfloat16, torch.float32):
        tensors = gradients_of_a_model(device, dtype, layers=12 if dtype == torch.float32 else 24)
        numbers = sum(t.numel() for t in tensors)
        size = numbers * dtype.itemsize
        zeros = [torch.zeros_like(t) for t in tensors[:24]]
        zero_size = sum(t.nbytes for t in zeros)
        memory = torch.empty(size // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(memory)
        moved = {
            "copy": 2 * memory.nbytes,
            "norm": size,
            "norm_inf": size,
            "norm_of_zeros": zero_size,
            "torch_norm_float64": size,
            "torch_norm_own_dtype": size,
            "scale": 2 * size,
            "torch_scale": 2 * size,
            "scale_by_one": 0,
        }
        times = milliseconds(
            {
                "copy": lambda memory=memory, target=target: target.copy_(memory),
                "norm": lambda tensors=tensors: triton.local_norms(tensors, 2.0),
                "norm_inf": lambda tensors=tensors: triton.local_norms(tensors, float("inf")),
                "norm_of_zeros": lambda zeros=zeros: triton.local_norms(zeros, 2.0),
                "torch_norm_float64": lambda tensors=tensors: torch._foreach_norm(tensors, 2.0, dtype=torch.float64),
                "torch_norm_own_dtype": lambda tensors=tensors: torch._foreach_norm(tensors, 2.0),
                "scale": lambda tensors=tensors: triton.scale_(tensors, half),
                "torch_scale": lambda tensors=tensors: torch._foreach_mul_(tensors, half),
                "scale_by_one": lambda tensors=tensors: triton.scale_(tensors, one),
            }
        )
        facts[str(dtype)] = {
            "elements": numbers,
            "tensors": len(tensors),
            "milliseconds": times,
            "gigabytes_a_second": {name: moved[name] / times[name] / 1e6 for name in times if moved[name]},
        }
        del tensors, zeros, memory, target
        torch.cuda.empty_cache()
    facts["600_small"] = small(device, half)
    return facts


def small(device: torch.device, coef: Tensor) -> Facts:
    """600 tensors of 4096 elements, where launches and the host count: GPU and host microseconds a call."""
    tensors = [torch.randn(4096, device=device, dtype=torch.bfloat16) for _ in range(600)]
    calls: dict[str, Callable[[], object]] = {
        "norm": lambda: triton.local_norms(tensors, 2.0),
        "torch_norm_float64": lambda: torch.stack(torch._foreach_norm(tensors, 2.0, dtype=torch.float64)),
        "scale": lambda: triton.scale_(tensors, coef),
        "torch_scale": lambda: torch._foreach_mul_(tensors, coef),
    }
    gpu = milliseconds(calls)
    host: dict[str, float] = {}
    for name, call in calls.items():
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            call()
        host[name] = (time.perf_counter() - start) / 20 * 1e6
    return {"with_host_microseconds": {n: t * 1e3 for n, t in gpu.items()}, "host_microseconds": host}


@part
def compiling(device: torch.device) -> Facts:
    """Seconds that the first call for a dtype and p takes, with an empty cache of Triton's."""
    if device.type == "cpu":
        return {"wrong": [], "left_out": "needs a GPU"}
    x = [torch.ones(100_000, device=device, dtype=torch.bfloat16)]
    seconds = {}
    for name, call in {
        "local_norms p=2": lambda: triton.local_norms(x, 2.0),
        "local_norms p=inf": lambda: triton.local_norms(x, float("inf")),
        "scale_": lambda: triton.scale_(x, torch.tensor(0.5, device=device)),
    }.items():
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
    return {"wrong": [], "seconds": seconds}


def machine(device: torch.device) -> Facts:
    facts: Facts = {"torch": torch.__version__, "triton_runs_here": triton.available(device)}
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "sm": torch.cuda.get_device_capability()}
        facts |= {"cuda": torch.version.cuda}
    return facts


def in_a_process(name: str, device: str, limit: int) -> Facts:
    """A part that crashes, or poisons the GPU's context, stops no other. `compiling` finds nothing compiled."""
    command = [sys.executable, __file__, "--device", device, "--here", "--only", name]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | {"DISTCLIP_TRITON": "1"}  # what the library is to take here
        environment |= {"TRITON_CACHE_DIR": empty} if name == "compiling" else {}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        except subprocess.TimeoutExpired:
            return {"wrong": [f"took longer than {limit} s"]}
    begin = done.stdout.find("{\n")
    if done.returncode not in (0, 1) or begin < 0:
        return {"wrong": [f"ended with {done.returncode}: {done.stderr[-1500:]}"]}
    facts: Facts = json.loads(done.stdout[begin:])[name]
    return facts | {"seconds_in_all": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the Triton kernels on a GPU.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu needs TRITON_INTERPRET=1")
    parser.add_argument("--here", action="store_true", help="run the parts in this process")
    parser.add_argument("--limit", type=int, default=240, help="seconds for one part (default: 240)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; TRITON_INTERPRET=1 and --device cpu run what a CPU can")
    if not triton.available(device):
        parser.error(f"the kernels do not run on {device}: no Triton, no C compiler, an old GPU, or TRITON_INTERPRET")
    if arguments.here:
        results: Facts = {name: PARTS[name](device) for name in arguments.only}
    else:
        results = {name: in_a_process(name, arguments.device, arguments.limit) for name in arguments.only}
        results = {"machine": machine(device)} | results
    print(json.dumps(results, indent=1))
    return int(any(facts.get("wrong") for facts in results.values()))


if __name__ == "__main__":
    sys.exit(main())
