"""Checkpoints by `torch.distributed.checkpoint`: any number of ranks can read what any other has written.

Torch's format keeps its index and the optimizer's numbers as pickles: load only folders that you trust.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import save as write_state
from torch.optim import Optimizer

from distclip import Clipper


def saved_steps(folder: Path) -> list[int]:
    """The steps with a whole checkpoint in `folder`, in order: only a whole one has its final name."""
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*") if p.name[5:].isdigit())


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def state_of(model: nn.Module, optimizer: Optimizer, clipper: Clipper, step: int) -> dict[str, Any]:
    """All that the next step depends on. Batches, learning rate and dropout follow from the config and `step`."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {
        "model": model_state,
        "optimizer": optimizer_state,
        "clipper": clipper.state_dict(),
        "position": {"step": step},
    }


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, clipper: Clipper, *, keep: int) -> None:
    """Write the state after `step` steps under a temporary name, rename it, and leave the newest `keep`.

    All ranks call. A run that is killed at any moment leaves whole checkpoints and at most one `.tmp` folder.
    """
    final = path_of(folder, step)
    unfinished = final.with_suffix(".tmp")
    if dist.get_rank() == 0 and unfinished.exists():
        shutil.rmtree(unfinished)
    dist.barrier()
    write_state(state_of(model, optimizer, clipper, step), checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        os.rename(unfinished, final)
        for old in saved_steps(folder)[:-keep]:
            shutil.rmtree(path_of(folder, old))
    dist.barrier()  # no rank ends before the checkpoint has its name


def load(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, clipper: Clipper) -> None:
    """Put back what `save` wrote after `step` steps. All ranks call."""
    state = state_of(model, optimizer, clipper, 0)
    read_state(state, checkpoint_id=path_of(folder, step))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    clipper.load_state_dict(state["clipper"])
    assert state["position"]["step"] == step
