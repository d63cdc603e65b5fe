"""What cannot be read as a run: one clear line each."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from distclip.runs.run import Run

SHOWN = 12  # columns in a message


class RunError(ValueError):
    """A run, or a column of it, cannot be used."""


def missing(path: Path) -> RunError:
    return RunError(f"{path}: there is no such file or folder")


def no_file(path: Path) -> RunError:
    return RunError(f"{path}: is a pipe or a device, which can be read only once: save what it gives as a file")


def unreadable(path: Path, reason: str | None) -> RunError:
    return RunError(f"{path}: cannot be read: {reason or 'the system gives no reason'}")


def empty(path: Path) -> RunError:
    return RunError(f"{path}: is empty: no step is logged in it yet")


def no_run(folder: Path) -> RunError:
    return RunError(
        f"{folder}: holds no run: none of metrics.jsonl, trainer_state.json, metrics.csv, *.jsonl, *.csv and "
        "TensorBoard's events.out.tfevents.* is in it"
    )


def several(folder: Path, found: Sequence[Path]) -> RunError:
    return RunError(f"{folder}: holds several logs ({first_of(p.name for p in found)}): name one of them")


def no_text(path: Path) -> RunError:
    return RunError(f"{path}: is neither text nor a file of TensorBoard's: no format of a run")


def no_json(path: Path, where: str, why: str) -> RunError:
    return RunError(f"{path}, {where}: is no JSON object: {why}")


def no_history(path: Path) -> RunError:
    return RunError(f"{path}: holds no steps: neither a log_history, nor a list of records, nor columns")


def no_table(path: Path, line: int, why: object) -> RunError:
    return RunError(f"{path}, line {line}: is no CSV: {why}")


def needs_tensorboard(path: Path) -> RunError:
    return RunError(f'{path}: reading it needs tensorboard: pip install "distclip[tensorboard]"')


def no_column(path: Path, option: str, given: str, columns: Iterable[str]) -> RunError:
    columns = list(columns)
    near = difflib.get_close_matches(given, columns, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {first_of(columns)}"
    return RunError(f"{path}: no column is called {given!r} ({option}): {hint}")


def no_norm(path: Path, columns: Iterable[str]) -> RunError:
    return RunError(f"{path}: no column is known as a gradient norm: say which by --norm (it has {first_of(columns)})")


def several_norms(path: Path, columns: Iterable[str]) -> RunError:
    return RunError(f"{path}: several columns may be the gradient norm: say which by --norm ({first_of(columns)})")


def no_number(path: Path, column: str, text: str) -> RunError:
    return RunError(f"{path}: column {column!r} holds {text!r}, which is no number")


def no_values(path: Path, column: str) -> RunError:
    return RunError(f"{path}: column {column!r} holds no number in any step")


def no_step(path: Path, column: str, value: object) -> RunError:
    return RunError(f"{path}: column {column!r} holds {value!r}, which is no step: name another by --step")


def several_runs(path: Path, names: Sequence[str]) -> RunError:
    return RunError(f"{path}: holds several runs ({first_of(names)}): name the log of one of them")


def no_step_in_common(one: Run, other: Run) -> RunError:
    spans = [f"{run.path} has steps {run.logged[0]} to {run.logged[-1]}" for run in (one, other)]
    return RunError(f"the runs have no step in common: {', '.join(spans)}")


def nothing_to_compare(one: Run, other: Run) -> RunError:
    return RunError(f"{one.path} and {other.path} have no loss, norm or fingerprint in the same step")


def first_of(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(str, names[:SHOWN])) + more if names else "nothing"
