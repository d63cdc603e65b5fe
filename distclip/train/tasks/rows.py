"""Rows of a CSV file, each a text and a label of 0 or 1: binary classification."""

import csv
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from distclip.train.dataset import Dataset, Split
from distclip.train.problem import ConfigError, located, require

MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"  # the byte order mark that Excel begins UTF-8 with
SURROGATE = re.compile("[\udc80-\udcff]")  # a byte that cannot be decoded, by surrogateescape
WORD = re.compile(r"\w+|[^\w\s]")
LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}  # pandas writes the second form where a column once held a gap


@dataclass(kw_only=True, slots=True, frozen=True)
class RowsData:
    path: str  #: a CSV file
    text_column: str = "text"  #: the column that is read
    label_column: str = "label"  #: the column of labels, 0 or 1
    encoding: str = "utf-8"  #: of the file; a byte order mark in front is skipped
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
        require(path.is_file(), "data.path", f"{located(path)} is not a file")
        with path.open(encoding=data.encoding, errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(lines_of(file, path, data.encoding))
            check_header(list(reader.fieldnames or []), path, data)
            for row in reader:
                label = LABELS.get((row[data.label_column] or "").strip())
                if label is None:
                    reason = f"{path}, line {reader.line_num}: {row[data.label_column]!r} is not 0 or 1"
                    raise ConfigError("data.label_column", reason)
                yield row[data.text_column] or "", label
    except LookupError as error:
        raise ConfigError("data.encoding", f"{data.encoding!r} is not one that Python knows") from error
    except UnicodeError as error:
        raise ConfigError("data.encoding", f"{path} is not {data.encoding}: {error}") from error
    except OSError as error:
        raise ConfigError("data.path", f"cannot read {path}: {error.strerror}") from error
    except csv.Error as error:
        raise ConfigError("data.path", f"{path} is not a CSV file: {error}") from error


def lines_of(file: TextIO, path: Path, encoding: str) -> Iterator[str]:
    """The lines of a file that is opened with `surrogateescape`, without a byte order mark.

    Raises:
        ConfigError: names the first line that is not in this encoding, or is no text.
    """
    for number, line in enumerate(file, 1):
        bad = SURROGATE.search(line)
        where = f"{path}, line {number}"
        require("\0" not in line, "data.path", f"{where}: a NUL character: this is no CSV file in {encoding}")
        if bad is not None:
            byte = f"byte 0x{ord(bad[0]) - 0xDC00:02x}"
            reason = f"{where}: {byte} is not {encoding}: say which encoding it is, such as latin-1 or cp1252"
            raise ConfigError("data.encoding", reason)
        yield line.removeprefix(MARK) if number == 1 else line


def check_header(header: list[str], path: Path, data: RowsData) -> None:
    require(header != [], "data.path", f"{path} is empty")
    for key in ("text_column", "label_column"):
        column = getattr(data, key)
        require(column in header, f"data.{key}", f"{path} has no column {column!r}, only {', '.join(header)}")
        require(header.count(column) == 1, f"data.{key}", f"{path} has several columns {column!r}")


def hashed(text: str, length: int, buckets: int) -> list[int]:
    """The first words as numbers 1..buckets, padded with 0. CRC-32, since Python's hash differs by process."""
    words = [
        zlib.crc32(word.encode(errors="surrogatepass")) % buckets + 1 for word in WORD.findall(text.lower())[:length]
    ]
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
    reason = (
        f"{data.path}: all {len(y) - held} rows to train on are labelled {int(y[held])}, and both labels are needed"
    )
    require(0 < int(y[held:].sum()) < len(y) - held, "data.label_column", reason)
    return Dataset(
        train=Split(inputs=x[held:], targets=y[held:]),
        held_out=Split(inputs=x[:held], targets=y[:held]),
        symbols=data.buckets + 1,
        classes=2,
        about=f"{len(y) - held:,} rows of {data.path}, {held:,} held out, {y.double().mean():.1%} labelled 1",
    )
