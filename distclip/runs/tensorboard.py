"""A folder of TensorBoard's event files, as torchtitan, nanotron and most others write.

TensorBoard's own reader takes 26 us a number, nearly all of it for checksums and plots: a million steps half a minute.
The frame of its records is 16 bytes, so that only their content is left to its protocol buffers: 3 us.
"""

import struct
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distclip.runs.refusals import empty, needs_tensorboard
from distclip.runs.run import Log, Series

EVENTS = "events.out.tfevents.*"
BEFORE, AFTER = 12, 4  # bytes around a record: its length and a checksum of it; a checksum of the record


def read_events(folder: Path, advance: Callable[[int], None]) -> list[Log]:
    """Read the scalars of a folder, of all its files in order. A file may end within a record.

    Raises:
        RunError: tensorboard is not installed, or there is no scalar.
        OSError: a file cannot be read.
    """
    files = sorted(folder.glob(EVENTS)) if folder.is_dir() else [folder]
    steps: dict[str, array[int]] = {}
    values: dict[str, array[float]] = {}
    for file in files:
        for event in events_in(file, folder, advance):
            for scalar in event.summary.value:
                number = number_in(scalar)
                if number is not None:
                    steps.setdefault(scalar.tag, array("q")).append(event.step)
                    values.setdefault(scalar.tag, array("d")).append(number)
    if not steps:
        raise empty(folder)
    series = {tag: Series(np.frombuffer(steps[tag], np.int64), np.frombuffer(values[tag], np.float64)) for tag in steps}
    where = folder if folder.is_dir() else folder.parent
    return [Log(where.resolve().name, folder, "TensorBoard", tuple(series), series)]


def events_in(file: Path, folder: Path, advance: Callable[[int], None]) -> Iterator[Any]:
    try:
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto.event_pb2 import Event
    except ModuleNotFoundError:
        raise needs_tensorboard(folder) from None
    content, at = file.read_bytes(), 0
    advance(len(content))
    while at + BEFORE <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        end = at + BEFORE + length
        if end + AFTER > len(content):
            return  # cut short, as a crash leaves it
        try:
            yield Event.FromString(content[at + BEFORE : end])
        except DecodeError:
            return
        at = end + AFTER


def number_in(scalar: Any) -> float | None:
    """The number of a scalar, as torch writes it or as TensorFlow does; None for an image, a histogram, a text."""
    kind = scalar.WhichOneof("value")
    if kind == "simple_value":
        return float(scalar.simple_value)
    if kind != "tensor" or scalar.tensor.tensor_shape.dim or scalar.tensor.dtype not in (1, 2):
        return None
    tensor = scalar.tensor
    if tensor.tensor_content:
        return float(np.frombuffer(tensor.tensor_content, "<f4" if tensor.dtype == 1 else "<f8")[0])
    numbers = tensor.float_val if tensor.dtype == 1 else tensor.double_val
    return float(numbers[0]) if numbers else 0.0
