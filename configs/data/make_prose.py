"""Make prose.csv: lines of comments and docstrings (label 1) and lines of code (label 0) from the standard library.

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
from pathlib import Path

ROWS = 2500  # per label
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


def rows() -> list[tuple[str, int]]:
    """The same number of different lines of each label, of four words or more, drawn from the whole library."""
    found: dict[str, int] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for line, label in lines_of(path.read_text(encoding="utf-8")):
            text = " ".join(line.split())
            if len(WORDS.findall(text)) >= 4 and len(text) <= 80 and text.isascii() and ">>>" not in text:
                found.setdefault(text, label)
    draw = random.Random(0)
    both = [draw.sample([row for row in found.items() if row[1] == label], ROWS) for label in (0, 1)]
    return draw.sample([row for part in both for row in part], 2 * ROWS)


def main() -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["text", "label"])
    writer.writerows(rows())


if __name__ == "__main__":
    main()
