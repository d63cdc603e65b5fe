"""Checkpoints by `torch.distributed.checkpoint`: any number of ranks can read what any other number has written.

A checkpoint gets its name, `step-00000050`, once it is complete and on the disk. Its manifest shows later whether it is
intact; one that is not is moved aside, and all ranks resume from the one before.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import save as write_state

from distclip.train.held import Holder
from distclip.train.index import NAME as INDEX, Planner, Reader, write_index
from distclip.train.manifest import Sum, data_sums, flaw_in, sum_of, sync_folder, write_manifest
from distclip.train.place import Place, from_rank_0
from distclip.train.problem import ConfigError


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; raised on every rank."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Found:
    """The step to resume from, 0 without a checkpoint, and what was wrong with newer checkpoints."""

    step: int
    damaged: list[str]


def saved_steps(folder: Path) -> list[int]:
    """The steps with a checkpoint in `folder`, in order; unfinished ones have another name."""
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*") if p.name[5:].isdigit())


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def newest_whole(folder: Path, place: Place) -> Found:
    """Find the newest intact checkpoint; newer ones are renamed to `step-*.damaged`.

    Rank 0 lists them, every rank reads its share of their files, and all ranks get the same result. All ranks call.

    Raises:
        ConfigError: there are checkpoints, and none is intact.
    """
    steps = saved_steps(folder) if place.rank == 0 else []
    flaws: dict[int, str] = {}
    while step := from_rank_0(steps.pop() if steps else 0, place):
        flaw = flaw_in(path_of(folder, step), step, place)
        if flaw is None:
            break
        flaws[step] = f"{path_of(folder, step).name} is damaged: {flaw}"
    damaged = list(flaws.values())
    if step == 0 and damaged:
        raise ConfigError(
            "run.dir",
            f"no checkpoint in {folder} is whole ({'; '.join(damaged)}): restore one, or remove them to start anew",
        )
    if flaws:
        on_rank_0(lambda: put_aside(folder, list(flaws)), place, f"cannot put aside what is damaged in {folder}")
    return Found(step=step, damaged=damaged)


def put_aside(folder: Path, steps: list[int]) -> None:
    for step in steps:
        aside = path_of(folder, step).with_suffix(".damaged")
        if aside.exists():
            shutil.rmtree(aside)
        path_of(folder, step).rename(aside)


def state_of(held: Holder, step: int) -> dict[str, Any]:
    """Everything the next step depends on. Batches, learning rate and dropout follow from the config and `step`."""
    return {**held.state(), "clipper": held.clipper.state_dict(), "position": {"step": step}}


def save(folder: Path, step: int, held: Holder, *, keep: int, place: Place) -> None:
    """Write the state after `step` steps under a temporary name, rename it, and leave the newest `keep`.

    All ranks call. A run killed at any moment leaves complete checkpoints and at most one `.tmp` folder.

    Raises:
        CheckpointError: on every rank, if any could not write its part. Earlier checkpoints are unchanged.
    """
    unfinished = path_of(folder, step).with_suffix(".tmp")
    failed = f"cannot write {path_of(folder, step)}"
    on_rank_0(lambda: remove_unfinished(folder), place, failed)
    try:
        metadata = write_state(state_of(held, step), storage_writer=FileSystemWriter(unfinished))
    except CheckpointException as error:
        reason = reason_of(error)  # it has come to all ranks
        dist.barrier()  # every rank has left its file
        on_rank_0(lambda: remove_unfinished(folder), place, failed)
        raise CheckpointError(f"{failed} ({reason}): earlier ones are whole; make room, then resume=true") from error
    sums = data_sums(unfinished, place)
    on_rank_0(lambda: finish(folder, step, metadata, sums, keep), place, failed)


def finish(folder: Path, step: int, metadata: Metadata, sums: dict[str, Sum], keep: int) -> None:
    """Add index and manifest, name the checkpoint once all of it is on the disk, and delete the oldest."""
    final = path_of(folder, step)
    unfinished = final.with_suffix(".tmp")
    write_index(unfinished, metadata)
    write_manifest(unfinished, step, {**sums, INDEX: sum_of(unfinished / INDEX)})
    sync_folder(unfinished)
    unfinished.rename(final)
    sync_folder(folder)
    for old in saved_steps(folder)[:-keep]:
        shutil.rmtree(path_of(folder, old).rename(path_of(folder, old).with_suffix(".tmp")))


def remove_unfinished(folder: Path) -> None:
    """Remove what a run left that was killed while writing or deleting a checkpoint."""
    for unfinished in folder.glob("step-*.tmp"):
        shutil.rmtree(unfinished)


def load(folder: Path, step: int, held: Holder) -> None:
    """Restore what `save` wrote after `step` steps. All ranks call."""
    state = state_of(held, 0)
    try:
        read_state(state, storage_reader=Reader(path_of(folder, step)), planner=Planner())
    except CheckpointException as error:
        raise CheckpointError(f"cannot read {path_of(folder, step)} ({reason_of(error)})") from error
    held.load({name: state[name] for name in ("model", "optimizer")})
    held.clipper.load_state_dict(state["clipper"])
    assert state["position"]["step"] == step


def on_rank_0(act: Callable[[], None], place: Place, failed: str) -> None:
    """Let rank 0 work on the disk while the others wait; a failure is an error on all ranks. All ranks call."""
    error = None
    if place.rank == 0:
        try:
            act()
        except OSError as caught:
            error = caught
    if from_rank_0(error is not None, place):
        raise CheckpointError(f"{failed} ({error or 'see rank 0'})") from error


def reason_of(error: CheckpointException) -> str:
    """The first failure in one line. torch's file writer reports a failed write only in C++ terms."""
    rank, (failure, _) = min(error.failures.items())
    said = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
    if "inline_container" in said:
        said = "a tensor could not be written to its end, as on a full disk"
    return f"rank {rank}: {said}"
