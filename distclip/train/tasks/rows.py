"""Rows of a CSV file, each a text and a label of 0 or 1: binary classification."""

import csv
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from distclip.train.dataset import Dataset, Split
from distclip.train.problem import ConfigError, require

WORD = re.compile(r"\w+|[^\w\s]")
LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}  # pandas writes the second form where a column once held a gap


@dataclass(kw_only=True, slots=True, frozen=True)
class RowsData:
    path: str  #: a CSV file
    text_column: str = "text"  #: the column that is read
    label_column: str = "label"  #: the column of labels, 0 or 1
    length: int = 32  #: words read per row
    buckets: int = 4096  #: number of hash buckets for words
    max_rows: int | None = None  #: the most rows read
    held_out: float = 0.2  #: the fraction that is held out

    def __post_init__(self) -> None:
        require(0 < self.length <= 10**5, "data.length", f"must lie between 1 and 1e5, not {self.length}")
        require(0 < self.buckets <= 10**8, "data.buckets", f"must lie between 1 and 1e8, not {self.buckets}")
        require(self.max_rows is None or self.max_rows > 0, "data.max_rows", f"must be at least 1, not {self.max_rows}")
        require(0 < self.held_out < 1, "data.held_out", f"must lie between 0 and 1, not {self.held_out}")


def read_rows(data: RowsData) -> Iterator[tuple[str, int]]:
    """Text and label of each row; a header without the named columns or a label that is not 0 or 1 is an error."""
    path = Path(data.path)
    csv.field_size_limit(2**31 - 1)  # comments can be longer than csv's 128 kB
    try:
        require(path.is_file(), "data.path", f"{path} is not a file")
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            for key in ("text_column", "label_column"):
                column = getattr(data, key)
                require(column in header, f"data.{key}", f"{path} has no column {column!r}, only {', '.join(header)}")
            for row in reader:
                label = LABELS.get((row[data.label_column] or "").strip())
                if label is None:
                    reason = f"{path}, line {reader.line_num}: {row[data.label_column]!r} is not 0 or 1"
                    raise ConfigError("data.label_column", reason)
                yield row[data.text_column] or "", label
    except OSError as error:
        raise ConfigError("data.path", f"cannot read {path}: {error.strerror}") from error
    except csv.Error as error:
        raise ConfigError("data.path", f"{path} is not a CSV file: {error}") from error


def hashed(text: str, length: int, buckets: int) -> list[int]:
    """The first words as numbers 1..buckets, padded with 0. CRC-32, since Python's hash differs by process."""
    words = [zlib.crc32(word.encode()) % buckets + 1 for word in WORD.findall(text.lower())[:length]]
    return words + [0] * (length - len(words))


def load_rows(data: RowsData, seed: int) -> Dataset:
    """Read all rows and hold out a part of them drawn from `seed`."""
    inputs, targets = [], []
    for text, label in read_rows(data):
        inputs.append(hashed(text, data.length, data.buckets))
        targets.append(label)
        if len(targets) == data.max_rows:
            break
    held = int(len(targets) * data.held_out)
    require(0 < held < len(targets), "data.path", f"{data.path} has too few rows ({len(targets)}) to hold some out")
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(inputs)[order], torch.tensor(targets)[order]
    return Dataset(
        train=Split(inputs=x[held:], targets=y[held:]),
        held_out=Split(inputs=x[:held], targets=y[:held]),
        symbols=data.buckets + 1,
        classes=2,
        about=f"{len(y) - held:,} rows of {data.path}, {held:,} held out, {y.double().mean():.1%} labelled 1",
    )
