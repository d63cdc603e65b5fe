"""Capture in a CUDA graph: of the kernels, of clip_() and of step(); replays beside calls that were not captured."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import distclip
from distclip.kernels import local_norms, scale_
from gpu.chip import Call, Chip
from gpu.readings import Reading, Readings, reading, right_norm, unlike

from . import part
from .steps import adamw, fill, gradients, left_over, model_of, weights

SCALES = (1.0, 1e-3, 30.0, 1e-5, 2.0)


KINDS = [
    *((n, dtype) for n in (7, 9000, 70_001) for dtype in (torch.float32, torch.bfloat16)),
    *((33, torch.float16), (40, torch.float64)),
]


def captured(chip: Chip, what: str, call: Call) -> tuple[Any, Callable[[], None] | None, Reading]:
    """What a captured call returned, what replays it, and whether it was captured."""
    try:
        outputs, replay = chip.captured(call)
    except chip.errors as error:
        said = f"{type(error).__name__}: {str(error)[:300]}"
        return None, None, reading("silent", f"{what} is captured", said)
    return outputs, replay, reading("silent", f"{what} is captured", "")


@part(needs={"silent": 1, "norm": 24, "bits": 3}, seconds=20, stand_in=True)
def graph_of_kernels(chip: Chip) -> Readings:
    """Norms and scaling of tensors that stay where they are."""
    tensors = [torch.ones(n, dtype=dtype).to(chip.device) for n, dtype in KINDS]
    coef = torch.tensor(0.3).to(chip.device)

    def work() -> list[Tensor]:
        norms = local_norms(tensors, 2.0)
        scale_(tensors, coef)
        return [norms]

    work()
    outputs, replay, silent = captured(chip, "kernels", work)
    yield silent
    if replay is not None:
        for seed in range(3):
            yield from replayed(chip, seed, tensors, outputs[0], replay)


def replayed(chip: Chip, seed: int, tensors: list[Tensor], norms: Tensor, replay: Callable[[], None]) -> Readings:
    for i in range(40):  # what is kept of other tensors comes and goes: the graph's must stay
        local_norms([torch.ones(100 + i).to(chip.device)], 2.0)
    made = [torch.randn(n, generator=torch.Generator().manual_seed(seed + n)).to(dtype) for n, dtype in KINDS]
    for tensor, values in zip(tensors, made, strict=True):
        tensor.copy_(values)
    replay()
    for norm, values in zip(chip.host(norms).tolist(), made, strict=True):
        yield reading("norm", f"replay {seed}, {values.dtype} of {len(values)}", norm, right=right_norm([values]))
    yield unlike(f"replay {seed} scales", [chip.host(t) for t in tensors], made, 0.3)


@part(needs={"silent": 3, "norm": 15, "left": 15}, seconds=20, stand_in=True)
def graph_of_clip_(chip: Chip) -> Readings:
    """clip_() for p = 2, inf, and where norms that are not finite go on."""
    kinds: dict[str, dict[str, Any]] = {
        "p=2": {},
        "p=inf": {"norm_type": torch.inf},
        "propagate": {"nonfinite": "propagate"},
    }
    for name, options in kinds.items():
        model, p = model_of(chip, (torch.float32, torch.bfloat16)), options.get("norm_type", 2.0)
        call = calling(distclip.Clipper(model, 1.0, **options).clip_)
        for seed in range(2):
            fill(chip, model, seed)
            call()
        outputs, replay, silent = captured(chip, f"clip_() {name}", call)
        yield silent
        for seed, scale in enumerate(SCALES if replay is not None else ()):
            before = fill(chip, model, seed, scale)
            replay()
            right = right_norm(before, p)
            yield reading("norm", f"{name}, replay {seed}", chip.host(outputs[0]).item(), right=right)
            yield left_over(f"{name}, replay {seed}", gradients(chip, model), min(1.0, right), p)


def calling(clip: Callable[[], distclip.Report]) -> Callable[[], list[Tensor]]:
    """``clip`` with norm and factor as a list."""

    def call() -> list[Tensor]:
        report = clip()
        return [report.norm, report.coef]

    return call


@part(needs={"silent": 1, "true": 10}, seconds=20, stand_in=True)
def graph_of_step(chip: Chip) -> Readings:
    """step() of a fused, capturable optimizer, beside the same steps without a graph, bit for bit."""
    models = [model_of(chip), model_of(chip)]
    ours, plain = (stepping(model) for model in models)
    for model in models:
        fill(chip, model, 0)
    made: list[None] = []

    def counted() -> list[Tensor]:
        made.append(None)
        return ours()

    outputs, replay, silent = captured(chip, "step()", counted)
    yield silent
    for _ in range(len(made) - chip.real):  # a GPU does not make the call that it captures
        plain()
    for seed, scale in enumerate(SCALES if replay is not None else ()):
        for model in models:
            fill(chip, model, 10 + seed, scale)
        replay()
        same = all(torch.equal(chip.host(a), chip.host(b)) for a, b in zip(outputs, plain(), strict=True))
        yield reading("true", f"replay {seed} has the norm and factor of a call", same)
        same = all(map(torch.equal, weights(chip, models[0]), weights(chip, models[1])))
        yield reading("true", f"replay {seed} leaves the parameters of a call", same)


def stepping(model: nn.ParameterList) -> Callable[[], list[Tensor]]:
    clipper, optimizer = distclip.Clipper(model, distclip.AutoClip(percentile=50, window=5)), adamw(model)
    return calling(lambda: clipper.step(optimizer))
