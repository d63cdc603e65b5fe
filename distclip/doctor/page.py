"""What rank 0 prints: a line for each finding as soon as it is known, and JSON where it is asked for."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from distclip.doctor.finding import Finding
from distclip.doctor.subjects import LAYOUTS
from distclip.train.complaint import complain, leave, leave_pipe

MARKS = {"ok": "ok", "wrong": "WRONG", "left out": "-"}
LAYOUT = "{:<7}{:<17}{:<12}{:<12}{}"
HEADS = ("", "layout", "one process", "distclip", "torch.nn.utils.clip_grad_norm_")


class Page:
    """Prints findings: on stderr where JSON goes to the standard output.

    ``shown``: names of the findings that are printed where nothing is wrong; None for all.
    """

    def __init__(self, target: Path | None, shown: set[str] | None = None) -> None:
        self.target, self.shown, self.findings = target, shown, list[Finding]()
        self.output: TextIO = sys.stderr if str(target) == "-" else sys.stdout
        self.started, self.in_table = time.monotonic(), False
        self.code = 0  # 2 where something could not be written

    def begin(self, name: str) -> None:
        """Show what is being done, on a terminal."""
        if sys.stderr.isatty():
            print(f"\r\033[K  ... {name}", end="", file=sys.stderr, flush=True)

    def add(self, finding: Finding) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self.findings.append(finding)
        if finding.code == 2:
            complain(finding.text)
        elif finding.wrong or self.shown is None:
            self.print(rows(finding, self.in_table))
            self.in_table = finding.name in LAYOUTS
        elif finding.name in self.shown:
            self.print(finding.more)

    def end(self, concludes: bool) -> None:
        """The last line, where it ``concludes`` anything or something is wrong, and the JSON."""
        wrong = any(finding.wrong for finding in self.findings)
        seconds = time.monotonic() - self.started
        if (concludes or wrong) and self.findings[-1].code != 2:
            self.print(["", conclusion(self.findings, seconds)])
        if self.target is not None:
            found = [finding.to_dict() for finding in self.findings]
            document = json.dumps({"ok": not wrong, "seconds": seconds, "findings": found}, indent=2) + "\n"
            with self.going_on():
                write(self.target, document)

    def print(self, lines: Sequence[str]) -> None:
        with self.going_on():
            for line in lines:
                print(line.rstrip(), file=self.output, flush=True)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Where nobody reads any more, or the disk is full, the checks go on: for other ranks and the exit code."""
        try:
            yield
        except BrokenPipeError:
            leave_pipe()
        except OSError as error:
            self.code = leave(error)


def rows(finding: Finding, in_table: bool) -> list[str]:
    """A finding as lines; ``in_table``: the one before was a layout."""
    mark, is_row = MARKS[finding.state], finding.name in LAYOUTS
    before = ["", LAYOUT.format(*HEADS)] if is_row and not in_table else [""] if in_table and not is_row else []
    if finding.columns:
        line = LAYOUT.format(mark, finding.name, *finding.columns)
        return [*before, line, *([f"       {finding.text}"] if finding.text else [])]
    return [*before, f"{mark:<7}{finding.name:<17}{finding.text}", *(f"{'':<24}{line}" for line in finding.more)]


def conclusion(findings: Sequence[Finding], seconds: float) -> str:
    wrong = [finding.name for finding in findings if finding.wrong]
    out = [finding.name for finding in findings if finding.state == "left out"]
    left = f"; left out: {', '.join(out)}" if out else ""
    if wrong:
        return f"Wrong: {', '.join(wrong)} ({len(findings)} checks in {seconds:.1f} s{left})"
    return f"All is well: {len(findings) - len(out)} checks in {seconds:.1f} s{left}"


def write(target: Path, text: str) -> None:
    if str(target) == "-":
        print(text, end="", flush=True)
    else:
        target.write_text(text)
