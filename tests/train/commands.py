"""The command as a user runs it, and the trainer on ranks that are already there."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distclip.train.job import check, train
from distclip.train.parse import read_config
from distclip.train.place import Place
from distclip.train.stop import StopSignals

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

# the quickstart, small enough to take a step in a few milliseconds
TINY = [
    "data.max_chars=20000",
    "data.length=16",
    "data.held_out=0.1",
    "model.width=16",
    "model.layers=2",
    "model.heads=2",
    "train.batch_size=12",
    "train.eval_every=null",
    "train.save_every=null",
    "optim.decay=none",
]
NUMBERS = ("step", "loss", "accuracy", "norm", "max_norm", "coef", "skip", "lr")  # those that time does not change


def start(*words: str | Path, launcher: list[str] | None = None) -> subprocess.Popen[str]:
    """`distclip <words>` in a session of its own, so that its whole process group can be sent a signal."""
    command = [*(launcher or [sys.executable]), "-m", "distclip", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def train_here(config: str, words: list[str]) -> int:
    """On each rank of a test: what a rank of `distclip train` does once it has joined the others."""
    settings, place = read_config(CONFIGS / config, words), place_here()
    with StopSignals() as stop:
        dataset = check(settings, place.world)
        dist.barrier()  # as joining does: no rank makes the folder before all have checked it
        return train(settings, dataset, place, stop)


def train_with_deepspeed(config: str, words: list[str]) -> int:
    """The same in a fresh process with an environment that DeepSpeed can read; its warnings pass."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "PATH": "/nowhere"}  # and no compiler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_here(config, words)


def place_here() -> Place:
    rank, world, backend = dist.get_rank(), dist.get_world_size(), dist.get_backend()
    return Place(rank=rank, world=world, device=torch.device("cpu"), backend=backend)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> list[list[Any]]:
    return [[record[name] for name in NUMBERS] for record in metrics(folder)]
