"""What each rank runs: versions, device and kernels, compared over ranks before they begin to communicate."""

import os
import platform
import shutil
import socket
import sys
from collections.abc import Sequence

import torch

import distclip
from distclip.bench.machine import cpu_model
from distclip.doctor.finding import Finding
from distclip.doctor.meeting import Record, said_alike
from distclip.doctor.refusals import other_versions, ranks
from distclip.kernels import native
from distclip.kernels.triton.choice import asked, why_not

SAME = {"torch": "torch", "distclip": "distclip", "python": "Python", "device": "runs on"}
"""What ranks must have in common, and what it is called."""


def facts(device: torch.device) -> Record:
    """What this rank runs."""
    cuda = device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": str(torch.__version__),
        "distclip": distclip.__version__,
        "device": device.type,
        "backend": "nccl" if cuda else "gloo",
        "chip": torch.cuda.get_device_name(device) if cuda else cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "gpus": torch.cuda.device_count(),
        "threads": torch.get_num_threads(),
        "host kernel": native.name(),
        "why not compiled": why_not_compiled(),
        "triton": "used" if cuda and asked() and not why_not(device) else "not used",
        "why not triton": why_not(device) or ("" if asked() else "DISTCLIP_TRITON=1 asks for it"),
    }


def why_not_compiled() -> str:
    """Why sums on the CPU are torch's; empty where they are those of the compiled kernel."""
    if native.kernel is not None:
        return ""
    if os.environ.get("DISTCLIP_NATIVE") == "0":
        return "DISTCLIP_NATIVE=0 says so"
    if sys.platform != "linux":
        return "it is compiled on Linux only"
    compilers = [(os.environ.get("CC") or "cc").split()[0], "gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return "no C compiler: install gcc or clang, then distclip again"
    return "it was not built when distclip was installed: install it again, there is a C compiler now"


def judge_versions(name: str, records: Sequence[Record]) -> Finding:
    """Ranks must run the same versions on the same kind of device; nothing else is checked where they do not."""
    wrong = []
    for key, what in SAME.items():
        (usual, _), *others = said_alike(records, key).items()
        wrong += [other_versions(what, who, theirs, usual) for theirs, who in others]
    first = records[0]
    text = (
        f"torch {first['torch']}, distclip {first['distclip']}, Python {first['python']}, "
        f"{first['backend']} on {first['device']}"
    )
    return Finding(
        name=name,
        state="wrong" if wrong else "ok",
        text="; ".join(wrong) or text,
        more=machines(records),
        facts={"ranks": list(records)},
        ends=bool(wrong),
    )


def machines(records: Sequence[Record]) -> list[str]:
    """The machines, and which ranks are on each: one line for those that are alike."""
    lines = [f"{record['host']}: {record['chip']}, {record['cores']} cores{idle(record)}" for record in records]
    alike = said_alike([{"line": line} for line in lines], "line")
    return [f"{ranks(who)} on {line}" for line, who in alike.items()]


def idle(record: Record) -> str:
    """GPUs that are not used, since there are fewer than ranks."""
    if record["device"] == "cuda" or not record["gpus"]:
        return ""
    return f"; {record['gpus']} GPU{'s' if record['gpus'] > 1 else ''} not used: start no more ranks than that"


def judge_kernels(name: str, records: Sequence[Record]) -> Finding:
    """Which kernels are used, and why not others."""
    lines = said_alike([{"line": kernels(record)} for record in records], "line")
    text, *more = [line if len(lines) == 1 else f"{ranks(who)}: {line}" for line, who in lines.items()]
    return Finding(name=name, text=text, more=more, facts={"ranks": list(records)})


def kernels(record: Record) -> str:
    why = f" ({record['why not compiled']})" if record["why not compiled"] else ""
    why_triton = f" ({record['why not triton']})" if record["triton"] != "used" else ""
    return f"sums on the CPU: {record['host kernel']}{why}; Triton: {record['triton']}{why_triton}"
