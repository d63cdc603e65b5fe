"""Windows of a text: predicting the next character."""

import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from distclip.train.dataset import Dataset, Split
from distclip.train.problem import ConfigError, located, require

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what decoding puts for bad bytes, and symbol 0 of every vocabulary
MOST_UNKNOWN = 0.1  # of the characters of a text: latin-1 read as UTF-8 has fewer, noise 4 in 10


@dataclass(kw_only=True, slots=True, frozen=True)
class TextData:
    """A text file, a folder of them, or (None) the sources of the standard library that is running."""

    path: str | None = None  #: a file or folder; null is the standard library
    suffixes: tuple[str, ...] = (".txt", ".md", ".rst", ".py")  #: which files of a folder are read
    length: int = 128  #: characters per window
    max_chars: int = 1_000_000  #: characters read
    held_out: float = 0.05  #: the fraction that is held out

    def __post_init__(self) -> None:
        require(self.length > 0, "data.length", f"must be at least 1, not {self.length}")
        require(self.max_chars > 0, "data.max_chars", f"must be at least 1, not {self.max_chars}")
        require(0 < self.held_out < 1, "data.held_out", f"must lie between 0 and 1, not {self.held_out}")


def text_files(data: TextData) -> list[Path]:
    """The files to read, sorted. Of the standard library only the top level: it has 4 MB and no test data."""
    if data.path is None:
        return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    path = Path(data.path)
    require(path.exists(), "data.path", f"{located(path)} does not exist")
    if path.is_file():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix in data.suffixes and p.is_file())
    require(files != [], "data.path", f"{path} holds no text: no file ends in {', '.join(data.suffixes)}")
    return files


def read_text(data: TextData, seed: int) -> str:
    """At most `max_chars` of the files, in an order drawn from `seed`, so that the held-out end is a fair sample."""

    def characters(files: list[Path]) -> Iterator[str]:
        random.Random(seed).shuffle(files)
        for file in files:
            yield from text_of(file)

    try:
        return "".join(islice(characters(text_files(data)), data.max_chars))
    except OSError as error:
        raise ConfigError("data.path", f"cannot read {error.filename}: {error.strerror}") from error


def text_of(file: Path) -> str:
    """The text of a file, with UNKNOWN where it is not UTF-8; ConfigError if it is no text."""
    text = file.read_text(encoding="utf-8", errors="replace")
    reads = "\0" not in text and text.count(UNKNOWN) <= MOST_UNKNOWN * len(text)
    require(reads, "data.path", f"{file} is no UTF-8 text: convert it, or leave it out")
    return text


def windows(text: str, symbol: dict[str, int], length: int) -> Split:
    """Windows, and the same shifted by one character; both are views of one tensor."""
    codes: Tensor = torch.tensor([symbol.get(c, 0) for c in text])
    cut = codes.unfold(0, length + 1, length)  # (windows, length + 1)
    return Split(inputs=cut[:, :-1], targets=cut[:, 1:])


def load_text(data: TextData, seed: int) -> Dataset:
    """Read, hold the end out, and make the vocabulary from the rest."""
    text = read_text(data, seed)
    kept = len(text) - int(len(text) * data.held_out)
    where = data.path or "the standard library's sources"
    require(
        min(kept, len(text) - kept) > data.length,
        "data.path",
        f"{where}: too little text, {len(text)} characters do not give a window of {data.length} in both parts",
    )
    symbol = {c: i for i, c in enumerate([UNKNOWN, *sorted(set(text[:kept]) - {UNKNOWN})])}
    return Dataset(
        train=windows(text[:kept], symbol, data.length),
        held_out=windows(text[kept:], symbol, data.length),
        symbols=len(symbol),
        classes=len(symbol),
        about=f"{kept:,} characters of {where}, {len(text) - kept:,} held out, {len(symbol)} symbols",
    )
