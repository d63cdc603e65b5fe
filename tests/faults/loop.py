"""A user's training loop on one rank, with a place for a fault, and a note of how it ended.

The loop is what users write: forward, backward, ``clipper.step(optimizer)`` or ``clip_grad_norm_`` and
``optimizer.step()``. It knows nothing of the fault but where to call it. What became of the rank is written to a file,
so that a rank that dies leaves what it had noted.
"""

import json
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from hashlib import blake2b
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor
from torch.optim import SGD

import distclip
from distclip.layouts.piece import local_tensor
from distclip.ranks import name_lost_ranks
from support.layouts import batch, build, ddp, fsdp2
from support.parallel import mesh_of, rows, tensor_parallel

STEPS = 4
FAULTY_STEP = 1  # one before it fills momentum and the policy's window, two after it show what it left behind
MAX_NORM = 0.2
MEETING = timedelta(seconds=100)  # for ranks to find each other, on a machine that does other things


@dataclass(frozen=True, slots=True)
class Case:
    """One run: a fault on rank ``guilty`` of ``size``, in a loop that is built so."""

    fault: str
    layout: str
    size: int
    call: str  # "step": clipper.step(optimizer); "function": clip_grad_norm_
    nonfinite: str  # "skip", "raise" or "propagate"
    timeout: float = 5.0  # of the process groups, in seconds
    named: bool = False  # the loop runs inside `name_lost_ranks()`

    @property
    def guilty(self) -> int:
        """Rank 0 has a part of its own in the agreement word; the others are alike."""
        return 0 if self.call == "function" else self.size // 2

    def __str__(self) -> str:
        named = ", named" if self.named else ""
        return f"{self.fault} ({self.layout}, {self.size} ranks, {self.call}, {self.nonfinite}{named})"


@dataclass(slots=True)
class Notes:
    """What one rank leaves behind. ``fate`` stays empty where it died or hung."""

    fate: str = ""  # "finished", or the name of the exception's type
    message: str = ""
    story: str = ""  # the traceback
    injected: float | None = None  # by the clock that all processes share
    resumed: float | None = None  # when a slow rank went on
    ended: float | None = None
    norms: list[str] = field(default_factory=list)  # of each step, every bit; as text, since JSON has no NaN
    squares: list[float] = field(default_factory=list)  # this rank's share of each step's norm, by torch in float64
    clipped: int = 0  # steps whose gradients were scaled down
    said: list[str] = field(default_factory=list)  # the culprits that reports named, and warnings
    parameters: str = ""  # a hash of what this rank holds at the end


class Injected(Exception):
    """What a fault raises; nothing in the library knows it."""


def _tensor_parallel_net() -> nn.Module:
    return tensor_parallel(build(), mesh_of(("tp", dist.get_world_size())), sequence=False)


LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "tp": _tensor_parallel_net,
}


class Loop:
    """The loop of one rank. A fault may read and change everything here."""

    def __init__(self, case: Case, notes: Notes, at: dict[str, Callable[["Loop"], None]], step: int) -> None:
        """``at``: what happens at the places "build", or in ``step`` at "loss" or "gradients" or in place of "call"."""
        self.case, self.notes, self.at, self.faulty_step = case, notes, at, step
        self.verifies = False
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.index = 0
        self.options: dict[str, Any] = {"nonfinite": case.nonfinite}
        self.policy: Any = distclip.AutoClip(percentile=50, window=8, max_norm=MAX_NORM)
        self.max_norm = MAX_NORM
        self.norm_type = 2.0
        self.loss_scale = 1.0
        self.model = LAYOUTS[case.layout]()
        self.parameters = list(self.model.parameters())
        self.optimizer = SGD(self.parameters, lr=0.1, momentum=0.9)
        self.clipper: distclip.Clipper | None = None

    def run(self) -> None:
        with warnings.catch_warnings(record=True) as warned:
            self._run()
        self.notes.said += [str(warning.message) for warning in warned]

    def _run(self) -> None:
        self.reach("build")
        if self.case.call == "step":
            self.clipper = distclip.Clipper(self.model, self.policy, **self.options)
        for self.index in range(STEPS):
            self.optimizer.zero_grad()
            self.reach("loss")
            self.backward()
            self.reach("gradients")
            self.notes.squares.append(self.share())
            if self.verifies:
                self.clipper.verify()
            if "call" in self.at and self.index == self.faulty_step:
                self.reach("call")
            else:
                self.clip_and_step()

    def reach(self, place: str) -> None:
        """Here the fault happens, if it is time."""
        act = self.at.get(place)
        if act is None or (place != "build" and self.index != self.faulty_step):
            return
        self.notes.injected = time.monotonic()
        act(self)

    def backward(self) -> None:
        words, targets = batch(self.index)
        mine = rows(0, 1) if self.case.layout == "tp" else rows(self.rank, self.size)
        out = self.model(words[mine])
        loss = (out - targets[mine]).square().mean()
        scale, self.loss_scale = self.loss_scale, 1.0
        (loss * scale).backward()

    def clip_and_step(self) -> None:
        if self.clipper is None:
            self._by_function()
            return
        report = self.clipper.step(self.optimizer)
        self._note(report.norm, report.coef.item() < 1.0)
        if report.culprit is not None:
            self.notes.said.append(str(report.culprit))

    def _by_function(self) -> None:
        group = dist.group.WORLD if self.case.layout == "ddp" else None
        strict = self.case.nonfinite == "raise"
        norm = distclip.clip_grad_norm_(self.parameters, self.max_norm, self.norm_type, strict, group=group)
        self._note(norm, norm.item() > self.max_norm)
        if self.case.nonfinite == "propagate" or norm.isfinite():
            self.optimizer.step()

    def _note(self, norm: Tensor, clipped: bool) -> None:
        self.notes.norms.append(norm.item().hex() if norm.isfinite() else str(norm.item()))
        self.notes.clipped += clipped

    def share(self) -> float:
        """This rank's part of the squared norm, where copies share theirs: what distclip must add up."""
        total = 0.0
        for p in self.parameters:
            if p.grad is not None:
                copies = self.size if not isinstance(p, DTensor) else _copies(p)
                total += local_tensor(p.grad).detach().double().square().sum().item() / copies
        return total

    def named(self, name: str) -> Tensor:
        return next(p for n, p in self.model.named_parameters() if n.endswith(name))


def _copies(parameter: DTensor) -> int:
    copies = 1
    for axis, placement in enumerate(parameter.placements):
        copies *= parameter.device_mesh.size(axis) if placement.is_replicate() else 1
    return copies


def play(case: Case, rank: int, port: int, folder: str) -> None:
    """The whole life of a rank: a process's target. Its notes are in ``folder`` when it ends."""
    from faults.catalogue import CONTROLS, FAULTS

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's, who then kills us
    torch.set_num_threads(1)
    sys.stderr.flush()
    fault, notes = (FAULTS | CONTROLS)[case.fault], Notes()
    at = {fault.place: fault.act} if rank == case.guilty else dict(fault.others)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=case.size, timeout=MEETING)
        dist.barrier()
        _set_pg_timeout(timedelta(seconds=case.timeout), dist.group.WORLD)
        torch.manual_seed(0)
        loop = Loop(case, notes, {place: _written(folder, rank, act) for place, act in at.items()}, fault.step)
        loop.verifies = fault.verifies
        with name_lost_ranks() if case.named else nullcontext():
            loop.run()
        notes.fate, notes.parameters = "finished", _hash(loop.parameters)
    except BaseException as error:  # whatever it is, it is this rank's fate
        notes.fate, notes.message = type(error).__name__, str(error)
        notes.story = traceback.format_exc()
    notes.ended = time.monotonic()
    write(Path(folder), rank, notes)


def _written(folder: str, rank: int, act: Callable[[Loop], None]) -> Callable[[Loop], None]:
    """``act``, after the notes were written: it may be the last thing that this rank does."""

    def acts(loop: Loop) -> None:
        write(Path(folder), rank, loop.notes)
        act(loop)

    return acts


def _hash(parameters: list[nn.Parameter]) -> str:
    """Equal where all bits are, but that one NaN is as good as another."""
    digest = blake2b(digest_size=8)
    for p in parameters:
        values = local_tensor(p).detach().contiguous()
        canonical = torch.where(values.isnan(), torch.full_like(values, torch.nan), values)
        digest.update(bytes(canonical.flatten().view(torch.uint8).tolist()))
    return digest.hexdigest()


def write(folder: Path, rank: int, notes: Notes) -> None:
    new = folder / f"rank-{rank}.new"
    new.write_text(json.dumps(asdict(notes)))
    new.rename(folder / f"rank-{rank}")


def read(folder: Path, rank: int) -> Notes:
    with suppress(FileNotFoundError):
        return Notes(**json.loads((folder / f"rank-{rank}").read_text()))
    return Notes()


def finite(norm: str) -> bool:
    return isfinite(float.fromhex(norm))
