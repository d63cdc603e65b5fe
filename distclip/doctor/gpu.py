"""On a GPU: norms of every dtype, no wait for the device in a step, and a call captured in a CUDA graph.

In short what tests/gpu/check.py of the repository proves at length.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import isclose
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from distclip import Clipper, clip_grad_norm_
from distclip.doctor.finding import Finding
from distclip.doctor.meeting import Record
from distclip.doctor.place import Site
from distclip.doctor.refusals import ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((257, 511), (3,), (40, 33), (1, 1))
NEAR = 1e-6  # of the norm in float64 on the host
Call = Callable[[], Tensor]


class Chip(Protocol):
    """What is asked of the device."""

    errors: tuple[type[Exception], ...]  # of a wait that is forbidden, or a capture that fails

    def no_waits(self) -> AbstractContextManager[Any]: ...
    def captured(self, call: Call) -> tuple[Tensor, Callable[[], None]]:
        """What ``call`` returns while it is captured, and what replays it."""

    def host(self, tensor: Tensor) -> Tensor: ...


class Gpu:
    errors: tuple[type[Exception], ...] = (RuntimeError,)

    @contextmanager
    def no_waits(self) -> Iterator[None]:
        """A wait that torch knows of raises."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def captured(self, call: Call) -> tuple[Tensor, Callable[[], None]]:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog looks at its own events
            output = call()
        return output, graph.replay

    def host(self, tensor: Tensor) -> Tensor:
        return tensor.detach().cpu()


def run(site: Site, chip: Chip) -> Record:
    """What this rank's device does wrong, by what it was to do."""
    model = nn.ParameterList(
        nn.Parameter(torch.zeros(shape, dtype=dtype).to(site.device)) for dtype in DTYPES for shape in SHAPES
    )
    clipper, optimizer = Clipper(model, 1.0), AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)
    for seed in range(2):  # these calls compile kernels, make the optimizer's state, and compare replicas
        fill(model, seed)
        clipper.step(optimizer)
    wrong = {"norms": norms(chip, model, clipper), "no waits": waits(chip, model, clipper, optimizer)}
    wrong["CUDA graphs"] = graphs(chip, model)
    return {"wrong": {what: said for what, said in wrong.items() if said}, "held": list(wrong)}


def fill(model: nn.ParameterList, seed: int) -> float:
    """New gradients in place, the same on every rank; returns their norm, of the host's float64."""
    chance, squares = torch.Generator().manual_seed(seed), 0.0
    for parameter in model:
        values = torch.randn(parameter.shape, generator=chance).to(parameter.dtype)
        squares += values.double().square().sum().item()
        if parameter.grad is None:
            parameter.grad = values.to(parameter.device, copy=True)
        else:
            parameter.grad.copy_(values)
    return float(squares**0.5)


def norms(chip: Chip, model: nn.ParameterList, clipper: Clipper) -> str:
    right = fill(model, 2)
    return unlike(chip.host(clipper.measure().norm).item(), right)


def waits(chip: Chip, model: nn.ParameterList, clipper: Clipper, optimizer: AdamW) -> str:
    right = fill(model, 3)
    try:
        with chip.no_waits():
            report = clipper.step(optimizer)
    except chip.errors as error:
        return f"a step waits for the device: {str(error).splitlines()[0]}"
    return unlike(chip.host(report.norm).item(), right)


def graphs(chip: Chip, model: nn.ParameterList) -> str:
    fill(model, 4)
    try:
        norm, replay = chip.captured(lambda: clip_grad_norm_(model, 1.0))
    except chip.errors as error:
        return f"a call cannot be captured: {str(error).splitlines()[0]}"
    right = fill(model, 5)
    replay()
    return unlike(chip.host(norm).item(), right)


def unlike(norm: float, right: float) -> str:
    return "" if isclose(norm, right, rel_tol=NEAR) else f"the norm is {norm:.9g}, and in float64 {right:.9g}"


def judge(name: str, records: Sequence[Record]) -> Finding:
    wrong: dict[str, list[int]] = {}
    for rank, record in enumerate(records):
        for what, said in record["wrong"].items():
            wrong.setdefault(f"{what}: {said}", []).append(rank)
    if wrong:
        text = "; ".join(f"{said} ({ranks(who)})" for said, who in wrong.items())
        return Finding(name=name, state="wrong", text=text, facts={"wrong": wrong})
    return Finding(name=name, text=f"right: {', '.join(records[0]['held'])}")
