"""The manifest of a checkpoint: its files, with sizes and checksums that show whether it is intact.

CRC-32 finds files that were truncated, mixed up or corrupted; it is no signature, and protects against nobody.
"""

import json
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from distclip.train.place import Place

NAME = "manifest.json"
PIECE = 1 << 20  # bytes read at a time
FLAWS = ("", "is missing", "has another size than was written", "has other bytes than were written", "cannot be read")
UNREADABLE = len(FLAWS) - 1


class Sum(NamedTuple):
    size: int
    crc32: int


def sum_of(path: Path) -> Sum:
    size = crc32 = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            size, crc32 = size + len(piece), zlib.crc32(piece, crc32)
    return Sum(size, crc32)


def data_file(rank: int) -> str:
    """The file of a rank, by torch's naming; a rank whose tensors others write has none."""
    return f"__{rank}_0.distcp"


def data_sums(folder: Path, place: Place) -> dict[str, Sum]:
    """The sums of the data files of all ranks, each read by the rank that wrote it. One all-reduce; all ranks call."""
    numbers = torch.zeros(place.world, 2, dtype=torch.int64)
    mine = folder / data_file(place.rank)
    if mine.exists():
        numbers[place.rank] = torch.tensor(sum_of(mine))
    numbers = numbers.to(place.device)
    dist.all_reduce(numbers)
    sums = [Sum(*row) for row in numbers.tolist()]
    return {data_file(rank): sum_ for rank, sum_ in enumerate(sums) if sum_.size}


def write_manifest(folder: Path, step: int, sums: dict[str, Sum]) -> None:
    text = json.dumps({"step": step, "files": {name: list(sum_) for name, sum_ in sums.items()}}, indent=1)
    write_durably(folder / NAME, text + "\n")


def read_manifest(folder: Path, step: int) -> dict[str, Sum]:
    """What `write_manifest` wrote; ValueError if it is malformed, OSError if it is missing."""
    document = json.loads((folder / NAME).read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.get("step") != step or not isinstance(document.get("files"), dict):
        raise ValueError(f"{folder / NAME} is not the manifest of step {step}")
    sums = {}
    for name, numbers in document["files"].items():
        if Path(name).name != name or not (isinstance(numbers, list) and list(map(type, numbers)) == [int, int]):
            raise ValueError(f"{folder / NAME} does not list files of this folder")
        sums[name] = Sum(*numbers)
    return sums


def flaw_in(folder: Path, step: int, place: Place) -> str | None:
    """What is wrong with a checkpoint, or None: every rank reads its share, and all get the same result.

    One all-reduce, whatever a rank finds. All ranks call.
    """
    kind, index, names = UNREADABLE, 0, [NAME]
    try:
        sums = sorted(read_manifest(folder, step).items())
    except (OSError, ValueError):  # also where it is not JSON or not UTF-8
        pass
    else:
        names += [name for name, _ in sums]
        found = ((flaw_of(folder / name, sum_), 1 + i) for i, (name, sum_) in enumerate(sums) if belongs(i, place))
        kind, index = max(found, default=(0, 0))
    worst = torch.tensor(kind << 32 | index, dtype=torch.int64, device=place.device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    kind, index = int(worst) >> 32, int(worst) & 0xFFFFFFFF
    if kind == 0:
        return None
    # a rank that cannot read the manifest has no names
    return f"{names[index] if index < len(names) else 'a file'} {FLAWS[kind]}"


def belongs(index: int, place: Place) -> bool:
    return index % place.world == place.rank


def flaw_of(path: Path, expected: Sum) -> int:
    """An index into FLAWS."""
    try:
        if path.stat().st_size != expected.size:
            return 2
        return 0 if sum_of(path) == expected else 3
    except FileNotFoundError:
        return 1
    except OSError:
        return UNREADABLE


def write_durably(path: Path, text: str) -> None:
    """Write a file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: new files and renames."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
