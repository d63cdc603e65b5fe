"""What rank 0 shows: a live line on a terminal, a plain line every so many steps elsewhere, a table at the end."""

import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from distclip.train.complaint import leave_pipe


class Tally:
    """Counts over the whole run, including the part before a resume.

    ``scales``: whether the policy clips by a coefficient, by which clipped steps are counted; clamping values does not.
    """

    def __init__(self, records: list[dict[str, Any]], *, scales: bool = True) -> None:
        self.scales = scales
        self.steps = self.clipped = self.skipped = 0
        for record in records:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        self.steps += 1
        self.clipped += not record["skip"] and record["coef"] != 1
        self.skipped += record["skip"]

    def share(self, count: int) -> float:
        return count / self.steps if self.steps else 0.0


class Screen(Console):
    """A console that calls ``closed`` once its reader has gone, and is then quiet: rich would end the process."""

    def __init__(self, closed: Callable[[], None], *, quiet: bool) -> None:
        super().__init__(quiet=quiet)
        self.closed = closed

    def on_broken_pipe(self) -> None:
        leave_pipe()
        self.quiet = True
        self.closed()


class Display:
    """Shows one run. On ranks other than 0 the console is quiet."""

    def __init__(self, console: Console, *, start: int, steps: int, unit: str, log_every: int) -> None:
        self.console, self.unit, self.log_every = console, unit, log_every
        self.start, self.steps, self.began = start, steps, time.perf_counter()
        self.bar: Progress | None = None
        self.recent: list[dict[str, Any]] = []  # since the last look at the held-out part
        self.blaming = False  # whether the step before had a culprit: of steps in a row the first is shown
        if console.is_terminal and not console.quiet:
            bar = [BarColumn(bar_width=16)] if console.width >= 100 else []  # the numbers need 80 columns
            self.bar = Progress(*bar, TextColumn("{task.description}"), console=console)
            self.task = self.bar.add_task("", total=steps, completed=start)

    def __enter__(self) -> "Display":
        if self.bar is not None:
            self.bar.start()
        self.began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def step(self, record: dict[str, Any], tally: Tally) -> None:
        step = record["step"]
        self.recent.append(record)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=self.line(record, tally).removeprefix("step "))
        elif step % self.log_every == 0 or step == self.start + 1:
            self.say(self.line(record, tally))
        self.blame(record)
        if "held_out_loss" in record:
            self.say(self.look(record))
            self.recent.clear()

    def blame(self, record: dict[str, Any]) -> None:
        """Where the norm of this step, or of the one before, became not finite, in one line."""
        late = "culprit_before" in record
        culprit = record.get("culprit_before" if late else "culprit")
        if culprit is not None and not self.blaming:
            self.say(f"step {record['step'] - late}: {culprit}")
        self.blaming = culprit is not None

    def line(self, record: dict[str, Any], tally: Tally) -> str:
        clipped = f" coef {record['coef']:.3g} clipped {tally.share(tally.clipped):.0%}" if tally.scales else ""
        skipped = f" skipped {tally.skipped}" if tally.skipped else ""
        return (
            f"step {record['step']}/{self.steps} loss {record['loss']:.4f} norm {record['norm']:.3g}"
            f"{clipped}{skipped} {record['per_second']:,.0f} {self.unit}/s eta {self.eta(record['step'])}"
        )

    def eta(self, step: int) -> str:
        a_step = (time.perf_counter() - self.began) / (step - self.start)
        left = min(a_step * (self.steps - step), 1e9)  # 31 years: timedelta ends at 2.7 million
        return str(timedelta(seconds=round(left)))

    def look(self, record: dict[str, Any]) -> str:
        """The held-out loss beside the mean over the steps since the last evaluation."""
        loss, accuracy = (sum(r[key] for r in self.recent) / len(self.recent) for key in ("loss", "accuracy"))
        binary = "held_out_f1" in record
        scores = f" F1 {record['held_out_f1']:.3f} AUC {record['held_out_auc']:.3f}" if binary else ""
        return (
            f"epoch {record['epoch']}, step {record['step']}: training loss {loss:.4f} accuracy {accuracy:.1%}, "
            f"held-out loss {record['held_out_loss']:.4f} accuracy {record['held_out_accuracy']:.1%}{scores}"
        )

    def table(self, rows: dict[str, str]) -> None:
        table = Table("", "", show_header=False)
        table.columns[1].overflow = "fold"  # a path cut short could not be copied
        for name, value in rows.items():
            table.add_row(name, value)
        self.console.print(table)
