"""The device that is checked: a GPU, or what stands in for one where a check is rehearsed on a CPU.

* :class:`Gpu`: one NVIDIA GPU.
* :class:`NotThere`: the device of tests/support/accelerator.py, which knows every wait and captures calls.
* :class:`Host`: the CPU, where Triton's interpreter runs kernels; nothing waits, and a capture is a call made again.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import DeviceType

Call = Callable[[], Any]
WORK = ("multi_tensor", "Fused", "fused", "block_sums", "norms_of_rows", "scale_blocks")  # kernels that do the work


class Chip(Protocol):
    device: torch.device
    road: str  # "default", or "triton"
    real: bool
    backend: str
    errors: tuple[type[Exception], ...]  # what a wait raises that is forbidden

    def synchronize(self) -> None: ...
    def no_waits(self) -> AbstractContextManager[Any]: ...
    def captured(self, call: Call) -> tuple[Any, Callable[[], None]]:
        """What ``call`` returns, tensors in a list, while it is captured, and what replays it."""

    def milliseconds(self, calls: dict[str, Call], rounds: int) -> dict[str, float]: ...
    def peak(self, call: Call) -> int:
        """The most bytes allocated at one time during ``call`` beside those before."""

    def launches(self, call: Call) -> tuple[int, int]:
        """Kernels that ``call`` launches: small ones, and those that do the work on tensors."""

    def host(self, tensor: Tensor) -> Tensor:
        """``tensor`` on the CPU."""


class Gpu:
    real, backend, errors = True, "nccl", (RuntimeError,)

    def __init__(self, road: str) -> None:
        self.road, self.device = road, torch.device("cuda", 0)
        torch.cuda.set_device(0)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    @contextmanager
    def no_waits(self) -> Iterator[None]:
        """A wait that torch knows of raises."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def captured(self, call: Call) -> tuple[Any, Callable[[], None]]:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            outputs = call()
        return outputs, graph.replay

    def milliseconds(self, calls: dict[str, Call], rounds: int) -> dict[str, float]:
        """Medians by the GPU's own clock; the calls take turns, so that a clock that drifts hits all alike."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds + 3):
            for name, call in calls.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                if turn >= 3:
                    times[name].append(start.elapsed_time(end))
        return {name: median(values) for name, values in times.items()}

    def peak(self, call: Call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return int(torch.cuda.max_memory_allocated() - before)

    def launches(self, call: Call) -> tuple[int, int]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
        work = sum(any(word in name for word in WORK) for name in names)
        return len(names) - work, work

    def host(self, tensor: Tensor) -> Tensor:
        return tensor.detach().cpu()


class Host:
    real, backend, errors = False, "gloo", (RuntimeError,)

    def __init__(self, road: str) -> None:
        self.road, self.device = road, torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def no_waits(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def captured(self, call: Call) -> tuple[Any, Callable[[], None]]:
        call()
        outputs = call()

        def replay() -> None:
            for output, new in zip(outputs, call(), strict=True):
                output.copy_(new)

        return outputs, replay

    def milliseconds(self, calls: dict[str, Call], rounds: int) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(min(rounds, 2)):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(1000 * (time.perf_counter() - start))
        return {name: median(values) for name, values in times.items()}

    def peak(self, call: Call) -> int:
        call()
        return 0

    def launches(self, call: Call) -> tuple[int, int]:
        call()
        return 0, 1

    def host(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone()


class NotThere(Host):
    """Torch knows of the device for the rest of the process, and the words travel on it."""

    def __init__(self, road: str) -> None:
        from promises.test_accelerator import on_the_accelerator
        from support import accelerator

        super().__init__(road)
        self.errors = (RuntimeError, accelerator.Wait)
        self._accelerator, self._stack = accelerator, ExitStack()
        self._stack.enter_context(on_the_accelerator())
        self.device = torch.device(accelerator.DEVICE, 0)

    def no_waits(self) -> AbstractContextManager[Any]:
        return self._accelerator.no_waits()

    def captured(self, call: Call) -> tuple[Any, Callable[[], None]]:
        call()
        with self._accelerator.capture() as graph:
            outputs = call()
        return outputs, graph.replay

    def launches(self, call: Call) -> tuple[int, int]:
        with self._accelerator.counted_launches() as launches:
            call()
        return len(launches), 1

    def host(self, tensor: Tensor) -> Tensor:
        return self._accelerator.raw(tensor.detach()).clone()
