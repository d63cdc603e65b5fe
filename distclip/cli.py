"""The command line: `distclip train`, `report`, `diff`, `bench`, `doctor` and `inspect`."""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from distclip import __version__
from distclip.doctor.arguments import add_doctor, add_inspect
from distclip.train.complaint import complain, leave

# modules of the extra `train`, under the names to install them by
EXTRA = {"jsonargparse": "jsonargparse", "rich": "rich", "sklearn": "scikit-learn", "yaml": "PyYAML"}
FOR_REPORTS = {"numpy", "plotly", "rich"}  # the extra `report`
TRAIN = """\
examples:
  distclip train configs/quickstart.yaml
  distclip train configs/quickstart.yaml train.steps=50 clip.max_norm=0.5
  distclip train configs/quickstart.yaml run.dir=runs/mine resume=true
  torchrun --nproc-per-node 2 -m distclip train configs/quickstart.yaml

Without a launcher, `parallel.processes` of the config is the number of local processes to start.
docs/reference/config.md lists every key.

exit codes:
  0    finished
  1    failed in training
  2    something in the config, on the command line or in the data is wrong: one line on stderr
  130  stopped by Ctrl-C (143: by SIGTERM, 129: by SIGHUP), with a checkpoint to resume from
"""
REPORT = """\
examples:
  distclip report runs/quickstart-20261130-120000
  distclip report out/trainer_state.json --max-norm 1.0
  distclip report lightning_logs/version_0 tb/ --out both.html
  distclip report log.csv --step it --norm gnorm --loss train_loss

A run is a folder or a file: of distclip train, distclip.telemetry, Transformers (trainer_state.json), Lightning
(metrics.csv), TensorBoard, a W&B export, or any CSV or JSON lines whose columns you name.
docs/howto/report.md says more.

exit codes:
  0    written
  2    something in a run or on the command line is wrong: one line on stderr, and nothing is written
  130  stopped by Ctrl-C
"""
DIFF = """\
examples:
  distclip diff runs/before runs/after
  distclip diff uninterrupted.jsonl resumed.jsonl --json

Compares the steps that both runs have, by the numbers as they were written: the first step that differs, the parameters
in which it does (by fingerprints, else by norms of layers), and how loss and norm drift from there.
docs/howto/diff.md says more.

exit codes:
  0    the same
  1    they differ
  2    they cannot be compared, or something on the command line is wrong: one line on stderr
  130  stopped by Ctrl-C
"""
BENCH = """\
examples:
  distclip bench
  distclip bench fsdp2-small plain-clipped --rounds 10 --json figures.json
  torchrun --nproc-per-node 8 -m distclip bench --device cuda

docs/explanation/bench.md says how it measures.

exit codes:
  0    measured
  2    something on the command line is wrong: one line on stderr
  130  stopped by Ctrl-C
"""


class Parser(argparse.ArgumentParser):
    """Shows its description as a sentence and its epilog as it stands; reports an error in one line."""

    def __init__(self, *, description: str, **others: Any) -> None:
        sentence = f"{description[0].upper()}{description[1:]}."
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=sentence, formatter_class=formatter, **others)

    def error(self, message: str) -> NoReturn:
        complain(message)
        self.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file)  # argparse's own passes over a disk that is full


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of names that its encoding lacks
    try:
        try:
            return command(words)
        finally:
            if sys.stdout is not None:  # it is None where it was closed
                sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return leave(error)


def command(words: list[str]) -> int:
    parser = parser_of_commands()
    known, others = parser.parse_known_args(words)
    if known.command is None and others:
        parser.error(f"no such option: {others[0]}; see distclip --help")
    if known.command is None:
        parser.error("no command: choose train, report, diff, bench, doctor or inspect; see distclip --help")
    if known.command == "train":
        return train(known.config, [*known.overrides, *others])
    if others:
        parser.error(f"{known.command} does not know {others[0]}: see distclip {known.command} --help")
    match known.command:
        case "report":
            return report(known)
        case "diff":
            return diff(known)
        case "bench":
            return bench(known, words)
    return doctor(known)


def train(config: str, overrides: list[str]) -> int:
    """Train by the config and the `key=value` overrides; `--key=value` is the same."""
    try:
        from distclip.train.start import start  # needs the extra; --help and --version do not

        return start(config, overrides)
    except ModuleNotFoundError as error:
        package = EXTRA.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        complain(f'training needs {package}: pip install "distclip[train]"')
        return 2


def report(known: argparse.Namespace) -> int:
    """Write a report on runs."""
    try:
        from distclip.reporting.command import Options, report as write_report
        from distclip.reporting.terminal import Terminal
        from distclip.runs import Names, RunError
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in FOR_REPORTS:
            raise
        complain(f'a report needs {package}: pip install "distclip[report]"')
        return 2
    names = Names(step=known.step, norm=known.norm, loss=known.loss, layers=known.layers, max_norm=known.max_norm)
    try:
        write_report(Options(runs=known.runs, out=known.out, names=names), Terminal())
    except RunError as error:
        complain(str(error))
        return 2
    return 0


def diff(known: argparse.Namespace) -> int:
    """Say where two runs part."""
    try:
        from distclip.runs import Names, RunError
        from distclip.runs.diff import diff as compare
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        complain('comparing runs needs numpy: pip install "distclip[report]"')
        return 2
    names = Names(step=known.step, norm=known.norm, loss=known.loss, layers=known.layers)
    try:
        return compare(known.one, known.other, names, known.json, print)
    except RunError as error:
        complain(str(error))
        return 2


def bench(known: argparse.Namespace, words: list[str]) -> int:
    """Measure the cases, or list them."""
    from distclip.bench.start import Options, show_cases, start  # FSDP and DTensor: training chooses its own imports

    if known.list:
        return show_cases()
    return start(
        Options(
            cases=known.cases,
            processes=known.processes,
            rounds=known.rounds,
            json=known.json,
            device=known.device,
            words=words,
        )
    )


def doctor(known: argparse.Namespace) -> int:
    """Check this machine's ranks, or look at the plan of a model."""
    from distclip.doctor.options import Options
    from distclip.doctor.start import start

    fields = Options.__dataclass_fields__
    return start(Options(**{name: value for name, value in vars(known).items() if name in fields}))


def parser_of_commands() -> Parser:
    parser = Parser(
        prog="distclip",
        description="gradient clipping by the true global norm: train, report, compare runs, check a machine",
    )
    parser.add_argument("--version", action="version", version=f"distclip {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    add_train(commands)
    add_report(commands)
    add_diff(commands)
    add_bench(commands)
    add_doctor(commands)
    add_inspect(commands)
    return parser


def add_train(commands: "argparse._SubParsersAction[Parser]") -> None:
    about = "train by a YAML config, on local ranks or under torchrun"
    train = commands.add_parser("train", help=about, description=about, epilog=TRAIN)
    train.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml")
    train.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="override values of the file")


def add_report(commands: "argparse._SubParsersAction[Parser]") -> None:
    about = "write an HTML report on the gradient norms of runs, also of other programs"
    report = commands.add_parser("report", help=about, description=about, epilog=REPORT)
    report.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="the folder or the log of a run")
    report.add_argument("--out", type=Path, metavar="FILE", help="write here (report.html in the first run's folder)")
    add_columns(report)
    report.add_argument("--max-norm", type=bound, metavar="BOUND", help="the bound of runs that did not log it")


def add_columns(command: Parser) -> None:
    """How the columns of a run are called, if that cannot be found out."""
    command.add_argument("--step", metavar="COL", help="the column of steps")
    command.add_argument("--norm", metavar="COL", help="the column of gradient norms, before clipping")
    command.add_argument("--loss", metavar="COL", help="the column of losses")
    command.add_argument("--layers", metavar="PREFIX", help="columns whose names begin with it are norms of layers")


def add_diff(commands: "argparse._SubParsersAction[Parser]") -> None:
    about = "find the step, and the parameter, in which two runs part"
    diff = commands.add_parser("diff", help=about, description=about, epilog=DIFF)
    diff.add_argument("one", metavar="RUN_A", type=Path, help="the folder or the log of a run")
    diff.add_argument("other", metavar="RUN_B", type=Path, help="another")
    diff.add_argument("--json", action="store_true", help="one JSON object")
    add_columns(diff)


def bound(text: str) -> float:
    """A number above 0, for argparse."""
    if not float(text) > 0:
        raise ValueError
    return float(text)


def add_bench(commands: "argparse._SubParsersAction[Parser]") -> None:
    about = "measure distclip against torch, on local ranks or under torchrun"
    bench = commands.add_parser("bench", help=about, description=about, epilog=BENCH)
    bench.add_argument("cases", metavar="CASE", nargs="*", help="a case, or a prefix of several (default: all)")
    bench.add_argument("--processes", type=int, default=2, metavar="N", help="local ranks without a launcher (2)")
    bench.add_argument("--rounds", type=int, metavar="N", help="rounds of every case (default: each case's own)")
    bench.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    bench.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="with Gloo or with NCCL (cpu)")
    bench.add_argument("--list", action="store_true", help="list the cases and their goals without measuring")
