"""Whether these kernels are used: if DISTCLIP_TRITON=1 asks for them and they run; if they do not, why."""

import os
import sysconfig
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from subprocess import CalledProcessError

import torch

from ...errors import warn_user

_failed: dict[torch.device, str] = {}  # devices on which a first launch failed, and what was said
_tried: set[torch.device] = set()
_told: set[str] = set()


def asked() -> bool:
    return os.environ.get("DISTCLIP_TRITON") == "1"


def chosen(device: torch.device) -> bool:
    """Whether the library uses these kernels on ``device``: only if DISTCLIP_TRITON=1 asks for them.

    Tested with Triton's interpreter and compiler, not yet on a GPU (tests/gpu/check.py does it).
    """
    return asked() and available(device) and device not in _failed


def available(device: torch.device) -> bool:
    """Whether these kernels run on ``device``: an NVIDIA GPU (sm_80 or newer), or the CPU with TRITON_INTERPRET=1."""
    return not why_not(device)


def why_not(device: torch.device) -> str:
    """Why these kernels cannot run on ``device``; empty if they can. Compiles and launches nothing."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _needs_cpu(device) or _missing_triton()
    return _needs_nvidia(device) or _missing_triton() or _missing_tools() or _too_old(device)


def check_choice(devices: Iterable[torch.device]) -> None:
    """One RuntimeWarning, with the reason, if DISTCLIP_TRITON=1 cannot be honoured for gradients on ``devices``.

    torch's kernels are used instead. The first call for a device launches both kinds of kernels on four numbers, which
    compiles them in some seconds: a later failure would come in the middle of a step.
    """
    wish = os.environ.get("DISTCLIP_TRITON")
    if not wish or wish == "0":
        return
    here = set(devices)
    for device in {d for d in here if d.type not in ("cpu", "meta")} or here:
        reason = "set it to 1" if wish != "1" else why_not(device) or _first_launch(device)
        if reason and reason not in _told:
            _told.add(reason)
            warn_user(f"DISTCLIP_TRITON={wish} has no effect: {reason}; torch's kernels are used")


def _first_launch(device: torch.device) -> str:
    """Launch once, and return what went wrong. Not during the capture of a CUDA graph, which compiling would break."""
    if device.type != "cuda" or device in _tried or torch.cuda.is_current_stream_capturing():
        return _failed.get(device, "")
    _tried.add(device)
    try:
        _launch(device)
    except (ImportError, OSError, CalledProcessError, RuntimeError) as error:
        _failed[device] = f"the first launch failed ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return _failed.get(device, "")


def _launch(device: torch.device) -> None:
    from triton.errors import TritonError

    from . import local_norms, scale_

    tensor = torch.ones(4, device=device)
    try:
        scale_([tensor], local_norms([tensor], 2.0)[0].float())
    except TritonError as error:
        raise RuntimeError(str(error)) from error


def _needs_cpu(device: torch.device) -> str:
    return "" if device.type == "cpu" else f"TRITON_INTERPRET=1 runs kernels on the CPU, and gradients are on {device}"


def _needs_nvidia(device: torch.device) -> str:
    if device.type != "cuda":
        return f"gradients are on {device}, and these kernels run on NVIDIA GPUs"
    return "" if torch.version.cuda else "this torch was not built for CUDA"


@cache
def _missing_triton() -> str:
    return "" if find_spec("triton") else "Triton is not installed (pip install triton)"


@cache
def _missing_tools() -> str:
    """Which are missing of those that Triton builds its launcher with: a C compiler and Python's headers."""
    if not (os.environ.get("CC") or which("gcc") or which("clang")):
        return "Triton needs a C compiler: install gcc or clang, or name one in CC"
    headers = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h")
    return "" if headers.exists() else f"Triton needs Python's headers, and {headers} is not there (python3-dev)"


@cache
def _too_old(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"these kernels need compute capability 8.0, and {device} has {major}.{minor}"
