"""Where and how the figures were measured."""

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import distclip
from distclip.bench.place import Place
from distclip.kernels import native


def machine(place: Place, words: Sequence[str]) -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "gpu": torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "distclip": distclip.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sums": native.name(),
        "world": place.world,
        "threads": torch.get_num_threads(),
        "command": shlex.join(["distclip", *words]),
    }


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())
