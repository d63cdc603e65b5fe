"""Capture in a CUDA graph: of the kernels, of clip_() and of step(); replays beside calls that were not captured."""

import torch

import distclip
from distclip.kernels import local_norms, scale_
from gpu.chip import Chip
from gpu.readings import Reading, Readings, reading, right_norm, unlike

from . import part
from .steps import adamw, fill, gradients, left_over, model_of, weights

SCALES = (1.0, 1e-3, 30.0, 1e-5, 2.0)


@part(needs={"silent": 1, "norm": 24, "bits": 3}, seconds=20, stand_in=True)
def graph_of_kernels(chip: Chip) -> Readings:
    """Norms and scaling of tensors that stay where they are."""
    kinds = [(n, dtype) for n in (7, 9000, 70_001 if chip.real else 77) for dtype in (torch.float32, torch.bfloat16)]
    kinds += [(33, torch.float16), (40, torch.float64)]
    tensors = [torch.ones(n, dtype=dtype).to(chip.device) for n, dtype in kinds]
    coef = torch.tensor(0.3).to(chip.device)

    def work() -> list[torch.Tensor]:
        norms = local_norms(tensors, 2.0)
        scale_(tensors, coef)
        return [norms]

    work()
    try:
        (norms,), replay = chip.captured(work)
    except chip.errors as error:
        yield refused("kernels", error)
        return
    yield reading("silent", "kernels are captured", "")
    for seed in range(3):
        for i in range(40):  # what is kept of other tensors comes and goes: the graph's must stay
            local_norms([torch.ones(100 + i).to(chip.device)], 2.0)
        made = [torch.randn(n, generator=torch.Generator().manual_seed(seed + n)).to(dtype) for n, dtype in kinds]
        for tensor, values in zip(tensors, made, strict=True):
            tensor.copy_(values)
        replay()
        for norm, values in zip(chip.host(norms).tolist(), made, strict=True):
            yield reading("norm", f"replay {seed}, {values.dtype} of {len(values)}", norm, right=right_norm([values]))
        yield unlike(f"replay {seed} scales", [chip.host(t) for t in tensors], made, 0.3)


def refused(what: str, error: Exception) -> Reading:
    return reading("silent", f"{what} is captured", f"{type(error).__name__}: {str(error)[:300]}")


@part(needs={"silent": 3, "norm": 15, "left": 15}, seconds=20, stand_in=True)
def graph_of_clip_(chip: Chip) -> Readings:
    for name, options in {
        "p=2": {},
        "p=inf": {"norm_type": torch.inf},
        "propagate": {"nonfinite": "propagate"},
    }.items():
        model, p = model_of(chip, (torch.float32, torch.bfloat16)), options.get("norm_type", 2.0)
        clipper = distclip.Clipper(model, 1.0, **options)

        def call(clipper: distclip.Clipper = clipper) -> list[torch.Tensor]:
            report = clipper.clip_()
            return [report.norm, report.coef]

        for seed in range(2):
            fill(chip, model, seed)
            call()
        try:
            (norm, _), replay = chip.captured(call)
        except chip.errors as error:
            yield refused(f"clip_() {name}", error)
            continue
        yield reading("silent", f"clip_() {name} is captured", "")
        for seed, scale in enumerate(SCALES):
            before = fill(chip, model, seed, scale)
            replay()
            right = right_norm(before, p)
            yield reading("norm", f"{name}, replay {seed}", chip.host(norm).item(), right=right)
            yield left_over(f"{name}, replay {seed}", gradients(chip, model), min(1.0, right), p)


@part(needs={"silent": 1, "true": 10}, seconds=20, stand_in=True)
def graph_of_step(chip: Chip) -> Readings:
    """step() of a fused, capturable optimizer, beside the same steps without a graph, bit for bit."""
    models = [model_of(chip), model_of(chip)]
    clippers = [distclip.Clipper(model, distclip.AutoClip(percentile=50, window=5)) for model in models]
    optimizers = [adamw(model) for model in models]

    def call(which: int = 0) -> list[torch.Tensor]:
        report = clippers[which].step(optimizers[which])
        return [report.norm, report.coef]

    for model in models:
        fill(chip, model, 0)
    call(0)
    call(1)
    calls = []

    def counted() -> list[torch.Tensor]:
        calls.append(None)
        return call(0)

    try:
        outputs, replay = chip.captured(counted)
    except chip.errors as error:
        yield refused("step()", error)
        return
    yield reading("silent", "step() is captured", "")
    for _ in range(len(calls) - chip.real):  # the calls before the capture, and the capture where it makes them
        call(1)
    for seed, scale in enumerate(SCALES):
        for model in models:
            fill(chip, model, 10 + seed, scale)
        replay()
        right = call(1)
        same = all(torch.equal(chip.host(a), chip.host(b)) for a, b in zip(outputs, right, strict=True))
        yield reading("true", f"replay {seed} has the norm and factor of a call", same)
        same = all(map(torch.equal, weights(chip, models[0]), weights(chip, models[1])))
        yield reading("true", f"replay {seed} leaves the parameters of a call", same)
