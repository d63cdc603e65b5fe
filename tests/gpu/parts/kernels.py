"""Norms and scaling of tensors, by the library's own choice of kernels; Triton's with every case of cases.py."""

from collections.abc import Callable
from functools import partial

import torch

import distclip
from distclip.kernels import local_norms, scale_
from gpu.cases import CASES, wrong
from gpu.chip import Chip
from gpu.readings import Readings, reading, right_norm

from . import PARTS, Part, part
from .steps import adamw, fill, model_of

FEW = ("sizes-float32-2.0", "bad_elements-bfloat16-inf", "scaling-float16", "scaling_by_one-float32", "tables")
QUARTERS = 4


def cases(quarter: int, chip: Chip) -> Readings:
    """A quarter of the cases of cases.py, each of which says what is wrong."""
    for name in list(CASES)[quarter::QUARTERS] if chip.real else FEW[quarter::QUARTERS]:
        yield reading("lines", name, wrong(name, chip.device.type))


for quarter in range(QUARTERS):  # each compiles for itself, and together they would take a minute and more
    needs = {"lines": 1}
    PARTS[f"cases_{quarter + 1}"] = Part(partial(cases, quarter), roads=("triton",), needs=needs, seconds=60)


@part(needs={"norm": 3, "true": 2}, seconds=25)
def huge(chip: Chip) -> Readings:
    """More than 2**31 elements in one tensor (bf16, 4.3 GB)."""
    numel = (1 << 31) + 12345 if chip.real else (1 << 16) + 12345
    x = torch.ones(numel, device=chip.device, dtype=torch.bfloat16)
    yield reading("norm", "ones", local_norms([x], 2.0).item(), right=numel**0.5)
    x[-1] = 300.0
    yield reading("norm", "the largest is the last", local_norms([x], torch.inf).item(), right=300.0)
    scale_([x], torch.tensor(0.5, device=chip.device))
    yield reading("true", "the last is scaled", x[-1].item() == 150.0)
    yield reading("true", "all others are scaled", bool((x[:-1] == 0.5).all()))
    yield reading("norm", "halves", local_norms([x[:-1]], 2.0).item(), right=0.5 * (numel - 1) ** 0.5)


@part(needs={"norm": 20, "true": 2}, seconds=20)
def streams(chip: Chip) -> Readings:
    """The same tensors on one stream after the other, and the same bits a hundred times."""
    make = torch.Generator().manual_seed(0)
    count, size = (300, 5000) if chip.real else (20, 50)
    made = [torch.randn(size + i, generator=make) for i in range(count)]
    tensors = [x.to(chip.device) for x in made]
    first = local_norms(tensors, 2.0)
    for norm, x in zip(first.tolist(), made, strict=True):
        yield reading("norm", f"{len(x)} elements", norm, right=right_norm([x]))
    again = [local_norms(tensors, 2.0) for _ in range(50 if chip.real else 2)]
    yield reading("true", "the same bits again", all(torch.equal(first, norms) for norms in again))
    if chip.real:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            again = [local_norms(tensors, 2.0) for _ in range(50)]
        torch.cuda.current_stream().wait_stream(side)
    yield reading("true", "the same bits on another stream", all(torch.equal(first, norms) for norms in again))


@part(needs={"launches": 8, "silent": 1}, seconds=30, stand_in=True)
def launches(chip: Chip) -> Readings:
    """Small kernels a call beside those that work on tensors, as the profiler counts them."""
    model = model_of(chip, (torch.bfloat16, torch.float32))
    optimizer = adamw(model)
    calls: dict[str, tuple[str, Callable[[], object]]] = {}
    for name, policy in {"MaxNorm": 1.0, "ValueClip": distclip.ValueClip(0.5), "AutoClip": distclip.AutoClip()}.items():
        limit = {"AutoClip": "autoclip", "ValueClip": "values"}.get(name)  # which clamps large tensors one by one
        clipper = distclip.Clipper(model, policy)
        calls[f"clip_() {name}"] = limit or "clip_", clipper.clip_
        calls[f"step() {name}"] = limit or "step", lambda clipper=clipper: clipper.step(optimizer)
    calls["clip_grad_norm_"] = "function", lambda: distclip.clip_grad_norm_(model.parameters(), 1.0)
    calls["clip_grad_value_"] = "function", lambda: distclip.clip_grad_value_(model.parameters(), 0.5)
    for name, (limit, call) in calls.items():
        for seed in range(3):
            fill(chip, model, seed)
            call()
        fill(chip, model, 3)
        small, work = chip.launches(call)
        yield reading("launches", name, small, right=limit, work=work)
    yield from fresh_addresses(chip)


def fresh_addresses(chip: Chip) -> Readings:
    """Tensors at new addresses, which tables have to be made of, cost no wait."""
    tensors = [torch.ones(1000 + i).to(chip.device) for i in range(100)]
    coef = torch.tensor(0.5).to(chip.device)
    local_norms(tensors, 2.0)
    scale_(tensors, coef)
    fresh = [t.clone() for t in tensors]
    try:
        with chip.no_waits():
            local_norms(fresh, 2.0)
            scale_(fresh, coef)
    except chip.errors as error:
        yield reading("silent", "new addresses wait for nothing", str(error)[:300])
        return
    yield reading("silent", "new addresses wait for nothing", "")
