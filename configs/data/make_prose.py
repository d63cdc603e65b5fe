"""Make prose.csv: comments and docstrings (label 1), and seven times as much code (label 0), of the standard library.

A row is what stands together, up to 240 characters: a few rows are long, most are short.

    python configs/data/make_prose.py > configs/data/prose.csv

The committed file was made by Python 3.11.7. Its text is CPython's, under the PSF License.
"""

import csv
import io
import random
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

ROWS = {0: 2800, 1: 400}
LONGEST = 240  # characters
WORDS = re.compile(r"[A-Za-z]{2,}")


def lines_of(source: str) -> Iterator[tuple[str, int]]:
    """Every line of a module with its label: 1 inside a docstring or a comment, 0 outside."""
    prose = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            prose[token.start[0]] = token.string.lstrip("#: ")
        elif token.type == tokenize.STRING and (token.string.endswith('"""') or token.line.strip() == token.string):
            for number, line in enumerate(token.string.splitlines(), token.start[0]):
                prose[number] = line.strip('r" ')
    for number, line in enumerate(source.splitlines(), 1):
        yield (prose[number], 1) if number in prose else (line, 0)


def rows_of(source: str) -> Iterator[tuple[str, int]]:
    """Neighbouring lines of a module with one label, joined."""
    lines = ((" ".join(line.split()), label) for line, label in lines_of(source))
    for label, run in groupby((each for each in lines if each[0]), key=lambda each: each[1]):
        text = ""
        for line, _ in run:
            if len(text) + len(line) >= LONGEST:
                yield text, label
                text = ""
            text = f"{text} {line}".strip()
        yield text, label


def rows() -> list[tuple[str, int]]:
    """Different rows of four words or more, drawn from the whole library but what was made when it was built."""
    found: dict[str, int] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if not path.name.startswith("_sysconfigdata"):  # it has the paths of that machine
            for text, label in rows_of(path.read_text(encoding="utf-8")):
                if len(WORDS.findall(text)) >= 4 and len(text) <= LONGEST and text.isascii() and ">>>" not in text:
                    found.setdefault(text, label)
    draw = random.Random(0)
    parts = [draw.sample([row for row in found.items() if row[1] == label], count) for label, count in ROWS.items()]
    return draw.sample([row for part in parts for row in part], sum(ROWS.values()))


def main() -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["text", "label"])
    writer.writerows(rows())


if __name__ == "__main__":
    main()
