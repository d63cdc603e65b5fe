"""What a device can do, and what it is doing: facts that several packages ask for."""

from operator import attrgetter

import torch

WITHOUT_FLOAT64 = {"mps"}

device_of = attrgetter("device")


def has_float64(device: torch.device) -> bool:
    """Whether ``device`` computes in float64: not MPS, nor XPU whose ``has_fp64`` says no."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type not in WITHOUT_FLOAT64


def reads_are_free(device: torch.device) -> bool:
    """Whether the host reads a number on ``device`` without a host sync: true on the CPU, false on accelerators."""
    return device.type == "cpu"


def in_capture(device: torch.device) -> bool:
    """Whether the work of ``device`` is being captured in a CUDA graph, in which the host can read nothing."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
