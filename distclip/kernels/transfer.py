"""Copying numbers from an accelerator to the host, to be read one call later."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


def sent(number: Tensor, device: torch.device) -> Tensor:
    """``number`` on ``device``: a host sync only if it comes from an accelerator to the host.

    Copied there without a sync, it might be read before it has arrived.
    """
    return number.to(device, non_blocking=device.type != "cpu")


def pinned_like(numbers: Tensor) -> Tensor:
    """Pinned host memory, for a copy without a host sync."""
    return torch.empty_like(numbers, device="cpu", pin_memory=True)


@dataclass(frozen=True, slots=True)
class Transfer:
    """An asynchronous copy of a few numbers."""

    numbers: Tensor
    arrived: torch.Event | None  # None where they already are on the host

    @classmethod
    def begin(cls, row: Tensor, *more: Tensor) -> Self:
        """Start copying ``row``, 1-D float64, and then 0-d numbers; no host sync."""
        numbers = torch.cat([row, *(number.double().view(1) for number in more)]) if more else row
        if numbers.device.type == "cpu":
            return cls(numbers, None)
        host = pinned_like(numbers)
        host.copy_(numbers, non_blocking=True)
        arrived = torch.Event(numbers.device.type)
        arrived.record(torch.accelerator.current_stream(numbers.device))  # by itself it takes the current device's
        return cls(host, arrived)

    def read(self) -> list[float]:
        """Wait for them and return them. Waiting, never polling, keeps ranks in step."""
        if self.arrived is not None:
            self.arrived.synchronize()
        numbers: list[float] = self.numbers.tolist()
        return numbers
