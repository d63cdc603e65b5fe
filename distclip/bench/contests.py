"""Which calls are compared, on which gradients."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import AdamW

import distclip
from distclip.bench.case import Call, Contest
from distclip.bench.place import Place
from distclip.bench.subject import FreshDTensors, Subject, gpt, restoring
from distclip.telemetry import JsonLines, Log

SubjectOf: TypeAlias = Callable[[Place], Subject]


def clipping(
    place: Place, subject_of: SubjectOf, *, by: str = "clipper", clips: bool = True, fresh: bool = False
) -> Contest:
    """torch's clip_grad_norm_ and ours, or the Clipper's clip_(); ``fresh``: each after a backward of its own."""
    subject = subject_of(place)
    norm, max_norm = norm_and_bound(subject, clips)
    ours = function(subject, max_norm) if by == "function" else clipper(subject, max_norm)
    calls = {"torch": torch_function(subject, max_norm), "distclip": ours}
    prepare = subject.backward if fresh else restoring(subject.parameters)
    return Contest(calls=calls, prepare=prepare, norm=norm, max_norm=max_norm, group=subject.group)


def functions(place: Place, subject_of: SubjectOf) -> Contest:
    """Our function against our Clipper; torch's function is measured as well."""
    subject = subject_of(place)
    norm, max_norm = norm_and_bound(subject, clips=True)
    calls = {
        "torch": torch_function(subject, max_norm),
        "clipper": clipper(subject, max_norm),
        "distclip": function(subject, max_norm),
    }
    return Contest(calls=calls, prepare=restoring(subject.parameters), norm=norm, max_norm=max_norm)


def finer(place: Place, subject_of: SubjectOf, *, fresh: bool = False, **settings: Any) -> Contest:
    """A Clipper with ``settings``, a policy or ``watch=``, against one that clips to a number and reports no more."""
    subject = subject_of(place)
    norm, max_norm = norm_and_bound(subject, clips=True)
    calls = {"clipper": clipper(subject, max_norm), "distclip": clipper(subject, **{"policy": max_norm, **settings})}
    prepare = subject.backward if fresh else restoring(subject.parameters)
    return Contest(calls=calls, prepare=prepare, norm=norm, max_norm=max_norm, group=subject.group)


@dataclass(frozen=True, slots=True)
class Tenths:
    """A policy that clips each parameter, or each row of one, to a tenth of its norm."""

    per: Literal["parameter", "row"]

    def needs(self) -> Sequence[distclip.Statistic]:
        return [distclip.Statistic(self.per)]

    def init(self, units: distclip.Units, device: torch.device) -> dict[str, Tensor]:
        return {}

    def decide(
        self, statistics: distclip.Statistics, state: dict[str, Tensor]
    ) -> tuple[distclip.Decision, dict[str, Tensor]]:
        bounds = statistics.norm(self.per).mul(0.1).clamp(min=1e-30)  # a bound is above 0
        return distclip.Decision(bounds, per=self.per), state


def memory(place: Place, subject_of: SubjectOf, *, by: str) -> Contest:
    """As `clipping`, with the allowed allocation in KiB: 1 MiB and 64 bytes per parameter."""
    subject = subject_of(place)
    allowed = 1024 + 64 / 1024 * len(subject.parameters)
    return replace(clipping(place, lambda _: subject, by=by), constants={"allowed": allowed})


def cold(place: Place, *, tensors: int) -> Contest:
    """The functions, each on DTensors that are new to both."""
    sets = FreshDTensors(place, tensors)
    calls: dict[str, Call] = {
        "torch": lambda: torch.nn.utils.clip_grad_norm_(sets.parameters, 0.1),
        "distclip": lambda: distclip.clip_grad_norm_(sets.parameters, 0.1),
    }
    return Contest(calls=calls, prepare=sets.renew, norm=1.0, max_norm=0.1)


def optimizer_step(place: Place, subject_of: SubjectOf, *, clips: bool) -> Contest:
    """A step of fused AdamW, bare and with the Clipper."""
    subject = subject_of(place)
    norm, max_norm = norm_and_bound(subject, clips)
    optimizer = still_adamw(subject.model)
    holder = distclip.Clipper(subject.model, max_norm, group=subject.group)
    calls: dict[str, Call] = {"torch": optimizer.step, "distclip": lambda: holder.step(optimizer).norm}
    prepare = restoring(subject.parameters)
    return Contest(calls=calls, prepare=prepare, norm=norm, max_norm=max_norm, group=subject.group)


def training_step(place: Place) -> Contest:
    """A whole training step of a small GPT, without and with clipping, each with its own model."""
    bare, clipped = (gpt(place, layers=4, width=256, time=64, batch=8) for _ in range(2))
    norm, max_norm = norm_and_bound(clipped, clips=True)
    holder = distclip.Clipper(clipped.model, max_norm)
    bare_optimizer, optimizer = still_adamw(bare.model), still_adamw(clipped.model)

    def without_clipping() -> None:
        bare.backward()
        bare_optimizer.step()

    def with_clipping() -> Tensor:
        clipped.backward()
        return holder.step(optimizer).norm

    calls: dict[str, Call] = {"torch": without_clipping, "distclip": with_clipping}
    return Contest(calls=calls, prepare=lambda: None, norm=norm, max_norm=max_norm)


def ten_steps(place: Place, subject_of: SubjectOf) -> Contest:
    """Ten training steps: with a record of the norms of all parameters as a JSON line, with these norms, and without.

    The line is written to nowhere: this measures no disk.
    """
    subject = subject_of(place)
    norm, max_norm = norm_and_bound(subject, clips=True)
    optimizer = still_adamw(subject.model)
    bare = distclip.Clipper(subject.model, max_norm)
    watching, logged = (distclip.Clipper(subject.model, max_norm, watch="parameters") for _ in range(2))
    Log(logged, JsonLines(os.devnull), every=10)

    def steps(holder: distclip.Clipper) -> Tensor:
        for _ in range(10):
            subject.backward()
            report = holder.step(optimizer)
        return report.norm

    calls: dict[str, Call] = {
        "clipper": lambda: steps(bare),
        "watching": lambda: steps(watching),
        "distclip": lambda: steps(logged),
    }
    return Contest(calls=calls, prepare=lambda: None, norm=norm, max_norm=max_norm)


def norm_and_bound(subject: Subject, clips: bool) -> tuple[float, float]:
    """The norm of the gradients after a backward, and a bound that is in force, or finite and far above."""
    subject.backward()
    norm = distclip.clip_grad_norm_(subject.parameters, inf).item()
    return norm, norm / 10 if clips else norm * 1e9


def torch_function(subject: Subject, max_norm: float) -> Call:
    return lambda: torch.nn.utils.clip_grad_norm_(subject.parameters, max_norm)


def function(subject: Subject, max_norm: float) -> Call:
    return lambda: distclip.clip_grad_norm_(subject.parameters, max_norm)


def clipper(subject: Subject, policy: distclip.Policy | float, **settings: Any) -> Call:
    holder = distclip.Clipper(subject.model, policy, group=subject.group, **settings)
    return lambda: holder.clip_().norm


def still_adamw(model: nn.Module) -> AdamW:
    """Fused AdamW with a learning rate of 0, so that every step meets the same gradients."""
    return AdamW(model.parameters(), lr=0.0, fused=True)
