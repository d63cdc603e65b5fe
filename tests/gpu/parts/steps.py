"""Functions and Clippers in one process: right, and without a wait. Dtypes alone and mixed, inf, ValueClip, NaN."""

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

import distclip
from gpu.chip import Chip
from gpu.readings import Reading, Readings, name_of, reading, right_norm, unlike

from . import part

LARGE = [(257, 511), (511,), (300, 511), (3,), (40, 3), (1, 1), (64, 64, 5)]
SMALL = [(7, 5), (3,), (40, 3), (1, 1), (2, 3, 5), (4,), (9,)]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "fp32": (F32,),
    "bf16": (BF16,),
    "fp16": (F16,),
    "mixed": (BF16, F32, F16),
}
CLIPPERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "MaxNorm": (1.0, {}),
    "MaxNorm(inf)": (inf, {}),
    "ValueClip": (distclip.ValueClip(0.5), {}),
    "AutoClip": (distclip.AutoClip(percentile=50, window=4), {}),
    "p=1": (1.0, {"norm_type": 1.0}),
    "p=3": (1.0, {"norm_type": 3.0}),
    "p=inf": (1.0, {"norm_type": inf}),
    "propagate": (1.0, {"nonfinite": "propagate"}),
}
SCALES = (1.0, 1e-4, 30.0)


def model_of(chip: Chip, dtypes: Sequence[torch.dtype] = (F32,)) -> nn.ParameterList:
    make = torch.Generator().manual_seed(0)
    shapes = LARGE if chip.real else SMALL
    values = [torch.randn(s, generator=make).to(dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)]
    return nn.ParameterList(nn.Parameter(value.to(chip.device)) for value in values)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)


def fill(chip: Chip, model: nn.ParameterList, seed: int, scale: float = 1.0) -> list[Tensor]:
    """Give every parameter a gradient, in place where it has one, so that addresses stay; the same on the host."""
    made = []
    for i, parameter in enumerate(model):
        make = torch.Generator().manual_seed(100 * seed + i)
        made.append((scale * torch.randn(parameter.shape, generator=make)).to(parameter.dtype))
        if parameter.grad is None:
            parameter.grad = made[-1].to(chip.device, copy=True)
        else:
            parameter.grad.copy_(made[-1])
    return made


def gradients(chip: Chip, model: nn.ParameterList) -> list[Tensor]:
    return [chip.host(parameter.grad) for parameter in model]


def weights(chip: Chip, model: nn.ParameterList) -> list[Tensor]:
    return [chip.host(parameter) for parameter in model]


def quietly(chip: Chip, what: str, call: Callable[[], Any]) -> tuple[Any, Reading]:
    """What ``call`` returns, and whether it waited or raised."""
    try:
        with chip.no_waits():
            return call(), reading("silent", f"{what} waits for nothing", "")
    except chip.errors as error:
        return None, reading("silent", f"{what} waits for nothing", f"{type(error).__name__}: {str(error)[:300]}")


def left_over(name: str, got: Sequence[Tensor], right: float, p: float = 2.0) -> Reading:
    """The norm that clipping left."""
    return reading("left", f"{name} leaves", right_norm(got, p), right=right, dtype=name_of(t.dtype for t in got))


def clamped(name: str, got: Sequence[Tensor], before: Sequence[Tensor], bound: float) -> Reading:
    differing = sum(int((g != b.clamp(-bound, bound)).sum()) for g, b in zip(got, before, strict=True))
    return reading("bits", f"{name} clamps", differing, of=sum(t.numel() for t in got))


def clipped(chip: Chip, name: str, model: nn.ParameterList, clipper: distclip.Clipper, p: float) -> Readings:
    """clip_() above and below the bound: its norm, every element, and what is left."""
    for seed, scale in enumerate(SCALES):
        before = fill(chip, model, seed, scale)
        report, silent = quietly(chip, f"{name} clip_()", clipper.clip_)
        yield silent
        if report is None:
            continue
        norm, coef = chip.host(report.norm).item(), chip.host(report.coef).item()
        yield reading("norm", f"{name} clip_() {scale}", norm, right=right_norm(before, p))
        if name.startswith("ValueClip"):
            yield clamped(name, gradients(chip, model), before, 0.5)
            continue
        yield unlike(f"{name} scales {scale}", gradients(chip, model), before, coef)
        bound = chip.host(report.max_norm).item()
        yield left_over(name, gradients(chip, model), min(norm, bound), p)


def stepped(chip: Chip, name: str, model: nn.ParameterList, clipper: distclip.Clipper, p: float) -> Readings:
    optimizer = adamw(model)
    fill(chip, model, 7)
    clipper.step(optimizer)  # makes the optimizer's state
    for seed, scale in enumerate(SCALES):
        before, old = fill(chip, model, seed, scale), weights(chip, model)
        report, silent = quietly(chip, f"{name} step()", lambda: clipper.step(optimizer))
        yield silent
        if report is not None:
            norm = chip.host(report.norm).item()
            yield reading("norm", f"{name} step() {scale}", norm, right=right_norm(before, p))
            moved = not all(map(torch.equal, old, weights(chip, model)))
            yield reading("true", f"{name} step() moves the parameters", moved)


def spoiled(chip: Chip, name: str, model: nn.ParameterList, clipper: distclip.Clipper) -> Readings:
    """A NaN between good steps: nothing changes, nothing waits, and the next call names it."""
    optimizer = adamw(model)
    fill(chip, model, 8)
    clipper.step(optimizer)
    old = weights(chip, model)
    bad = fill(chip, model, 9)
    bad[2].view(-1)[5] = torch.nan
    model[2].grad.copy_(bad[2])
    report, silent = quietly(chip, f"{name} step() with NaN", lambda: clipper.step(optimizer))
    yield silent
    if report is not None:
        yield reading("norm", f"{name} of NaN", chip.host(report.norm).item(), right=right_norm(bad))
        yield reading("true", f"{name} skips a NaN", bool(chip.host(report.skip)))
        yield reading("true", f"{name} leaves parameters", all(map(torch.equal, old, weights(chip, model))))
    known = clipper.culprit  # at once where reading is free, else when the next call begins
    fill(chip, model, 10)
    clipper.clip_()
    said = str(known or clipper.culprit)
    yield reading("true", f"{name} names the culprit ({said})", "2 on rank 0 has NaN" in said)


@part(needs={"silent": 220, "norm": 190, "bits": 90, "left": 80, "true": 150}, seconds=45, stand_in=True)
def clippers(chip: Chip) -> Readings:
    """Every policy and norm in every dtype."""
    for dtype, dtypes in DTYPES.items():
        for policy, (bound, options) in CLIPPERS.items():
            name, p = f"{policy} {dtype}", options.get("norm_type", 2.0)
            model = model_of(chip, dtypes)
            clipper = distclip.Clipper(model, bound, **options)
            fill(chip, model, 6)
            clipper.clip_()  # compiles kernels
            yield from clipped(chip, name, model, clipper, p)
            yield from stepped(chip, name, model, clipper, p)
            if options.get("nonfinite") != "propagate":
                yield from spoiled(chip, name, model, clipper)


@part(needs={"silent": 60, "norm": 60, "bits": 36, "left": 16}, seconds=20, stand_in=True)
def functions(chip: Chip) -> Readings:
    """clip_grad_norm_, get_total_norm, clip_grads_with_norm_ and clip_grad_value_ in every dtype."""
    for dtype, dtypes in DTYPES.items():
        model = model_of(chip, dtypes)
        for p in (2.0, 1.0, 3.0, inf):
            fill(chip, model, 6)
            distclip.clip_grad_norm_(model.parameters(), 1.0, norm_type=p)  # compiles kernels
            for scale in SCALES[:2]:
                yield from of_norms(chip, f"{dtype} p={p}", model, p, scale)
        before = fill(chip, model, 5)
        _, silent = quietly(chip, "clip_grad_value_", lambda m=model: distclip.clip_grad_value_(m.parameters(), 0.5))
        yield silent
        yield clamped(f"clip_grad_value_ {dtype}", gradients(chip, model), before, 0.5)


def of_norms(chip: Chip, name: str, model: nn.ParameterList, p: float, scale: float) -> Readings:
    def by_one() -> Tensor:
        return distclip.clip_grad_norm_(model.parameters(), 1.0, norm_type=p)

    def by_two() -> Tensor:
        norm = distclip.get_total_norm([parameter.grad for parameter in model], norm_type=p)
        distclip.clip_grads_with_norm_(model.parameters(), 1.0, norm)
        return norm

    for what, call in {f"clip_grad_norm_ {name}": by_one, f"get_total_norm {name}": by_two}.items():
        before = fill(chip, model, 4, scale)
        norm, silent = quietly(chip, what, call)
        yield silent
        if norm is None:
            continue
        right = right_norm(before, p)
        yield reading("norm", what, chip.host(norm).item(), right=right)
        coef = min(1.0, 1.0 / (chip.host(norm).double().item() + 1e-6))
        yield unlike(what, gradients(chip, model), before, coef, near=2)
        yield left_over(what, gradients(chip, model), min(1.0, right), p)


@part(needs={"silent": 3, "norm": 4, "true": 8}, seconds=15, stand_in=True)
def scalers(chip: Chip) -> Readings:
    """step(scaler=...): scaled gradients, and an inf that lowers the scale and steps nothing."""
    model = model_of(chip)
    clipper, optimizer, scaler = distclip.Clipper(model, 1.0), adamw(model), torch.amp.GradScaler(chip.device.type)
    scaler.scale(torch.ones(()).to(chip.device))
    for seed in range(4):
        before, old, scale = fill(chip, model, seed), weights(chip, model), scaler.get_scale()
        if seed == 2:
            before[1][0] = inf
            model[1].grad.copy_(before[1])

        def step() -> distclip.Report:
            report = clipper.step(optimizer, scaler=scaler)
            scaler.update()
            return report

        report, silent = (step(), None) if seed == 3 else quietly(chip, f"step(scaler) {seed}", step)
        if silent is not None:  # the call after an inf waits, to name it
            yield silent
        if report is not None:
            got, right = chip.host(report.norm).item(), right_norm(before) / scale
            yield reading("norm", f"step(scaler) {seed}", got, right=right)
            moved = not all(map(torch.equal, old, weights(chip, model)))
            yield reading("true", f"step(scaler) {seed} steps, or skips", moved == (seed != 2))
            yield reading("true", f"step(scaler) {seed} lowers the scale", (scaler.get_scale() < scale) == (seed == 2))
