"""Change the core one place at a time and see whether a test notices: `bash tests/mutation/run.sh --help`.

Every mutant lives in a copy of the repository. The tests of the file it is in run in a fork that has already imported
torch, those that killed mutants before first, then the fastest, until one fails.
"""

import argparse
import ast
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NORMS = [
    "promises/test_properties.py",
    "clipper/test_functional.py",
    "promises/test_bugs_of_others.py",
    "ranks/test_message.py",
]
MEASURING = [
    *NORMS,
    "gradients/test_runs.py",
    "ranks/test_agreement.py",
    "clipper/test_clipper.py",
    "plan/test_verify.py",
]
LYING = ["gradients/test_runs.py", "promises/test_adversary.py", "plan/test_cache.py", *NORMS]
PROVING = ["promises/test_properties.py", "plan/test_verify.py", "plan/test_copies.py", "ranks/test_agreement.py"]
STEPPING = [
    "clipper/test_clipper.py",
    "optimizers/test_scaler.py",
    "policies/test_policies.py",
    "promises/test_properties.py",
    "ranks/test_agreement.py",
    "promises/test_bugs_of_others.py",
    "plan/test_verify.py",
]
TARGETS = {
    "distclip/layouts/layout.py": [*NORMS, "layouts/test_layout.py", "promises/test_norm.py", "plan/test_verify.py"],
    "distclip/plan/build.py": MEASURING,
    "distclip/plan/measure.py": MEASURING,
    "distclip/plan/disagreement.py": MEASURING,
    "distclip/gradients/memory.py": LYING,
    "distclip/gradients/runs.py": LYING,
    "distclip/gradients/look.py": LYING,
    "distclip/ranks/message.py": [*NORMS, "clipper/test_clipper.py"],
    "distclip/plan/cache.py": ["plan/test_cache.py", "clipper/test_functional.py"],
    "distclip/plan/arguments.py": ["plan/test_cache.py", "clipper/test_functional.py", "layouts/test_layout.py"],
    "distclip/gradients/realign.py": [*NORMS, "gradients/test_realign.py", "promises/test_matrix.py"],
    "distclip/functional.py": [*NORMS, "layouts/test_layout.py"],
    "distclip/step/decision.py": [
        "clipper/test_clipper.py",
        "policies/test_policies.py",
        "optimizers/test_scaler.py",
        "promises/test_properties.py",
    ],
    "distclip/step/engine.py": STEPPING,
    "distclip/step/progress.py": STEPPING,
    "distclip/clipper.py": STEPPING,
    "distclip/plan/construction.py": PROVING,
    "distclip/plan/copies.py": PROVING,
    "distclip/plan/split.py": PROVING,
    "distclip/plan/verify.py": PROVING,
}
SLOWEST = 3.0  # seconds of a single test that is worth its time here
PATIENCE = 60.0  # seconds for the tests of one mutant, beside four times those they took without a change

SWAPS: dict[type, type] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
NAMES = {"max": "min", "min": "max", "any": "all", "all": "any", "MAX": "MIN", "MIN": "MAX", "floor": "ceil"}


# ---- mutants ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    start: int  # byte offsets in the file
    end: int
    old: str
    new: str
    source: bytes  # the whole file

    def changed(self) -> bytes:
        return self.source[: self.start] + self.new.encode() + self.source[self.end :]

    def __str__(self) -> str:
        def short(text: str) -> str:
            return " ".join(text.split())[:70]

        return f"{self.path}:{self.line}: {short(self.old)}  ->  {short(self.new)}"


def mutants_of(path: str) -> list[Mutant]:
    """One change each, as text: annotations, docstrings, error messages and assertions stay as they are."""
    source = (ROOT / path).read_text()
    offsets = [0]
    for line in source.encode().splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    found = []
    for node, new in _changes(ast.parse(source)):
        old = ast.get_source_segment(source, node)
        start = offsets[node.lineno - 1] + node.col_offset
        end = offsets[node.end_lineno - 1] + node.end_col_offset
        found.append(Mutant(path, node.lineno, start, end, old, new, source.encode()))
    return sorted(set(found), key=lambda m: (m.start, m.end, m.new))


def _changes(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    for node in _visible(tree):
        for changed in _changed(node):
            text = ast.unparse(ast.fix_missing_locations(changed))
            yield node, text if isinstance(node, ast.stmt) else f"({text})"


def _visible(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, (ast.Assert, ast.JoinedStr)):
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: an assertion of our own
        return
    if isinstance(node, ast.AnnAssign) and "TypeAlias" in ast.unparse(node.annotation):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _visible(child)


def _changed(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(left, ops, comparators):
            for i, op in enumerate(ops):
                yield ast.Compare(left, [*ops[:i], SWAPS[type(op)](), *ops[i + 1 :]], comparators)
        case ast.BinOp(left, op, right) if type(op) in SWAPS:
            yield ast.BinOp(left, SWAPS[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(SWAPS[type(op)](), values)
        case ast.UnaryOp(_, operand):
            yield operand
        case ast.AugAssign(target, op, value):
            yield ast.AugAssign(target, SWAPS[type(op)](), value)
            yield ast.Pass()
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.IfExp(test, body, orelse) if not _is_swapped(test):
            yield ast.IfExp(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.If(test, body, orelse) if not _is_swapped(test):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.Return(value) if value is not None and not (isinstance(value, ast.Constant) and value.value is None):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(ast.Call()) | ast.Raise() | ast.Assign([ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()
        case ast.Continue():
            yield ast.Break()
        case ast.Name(name, ast.Load()) if name in NAMES:
            yield ast.Name(NAMES[name], ast.Load())
        case ast.Attribute(value, name, ast.Load()) if name in NAMES:
            yield ast.Attribute(value, NAMES[name], ast.Load())


def _is_swapped(test: ast.AST) -> bool:
    """Whether another change of the condition is its negation already."""
    exact = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
    return isinstance(test, ast.UnaryOp) or (isinstance(test, ast.Compare) and isinstance(test.ops[0], exact))


# ---- one run of tests in a fork -----------------------------------------------------------------------------


class Watcher:
    """A pytest plugin: keeps the tests that are wanted, in their order, and writes down how each went."""

    def __init__(self, order: list[str] | None, log: Path) -> None:
        self.order, self.log = order, log

    def pytest_collection_modifyitems(self, config, items) -> None:
        if self.order is not None:
            rank = {name: i for i, name in enumerate(self.order)}
            items[:] = sorted((i for i in items if i.nodeid in rank), key=lambda i: rank[i.nodeid])

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.failed:
            with self.log.open("a") as file:
                file.write(json.dumps([report.nodeid, report.failed, report.duration]) + "\n")


class Run:
    """Tests running in a fork: ``poll()`` is None until it has ended, then "passed", "failed" or "timeout"."""

    def __init__(self, copy: Path, files: list[str], order: list[str] | None, limit: float) -> None:
        self.log, self.scratch = copy / "log.jsonl", Path(tempfile.mkdtemp(dir=copy))
        self.log.write_text("")
        self.deadline = time.monotonic() + limit
        self.child = os.fork()
        self.outcome: str | None = None
        if self.child == 0:
            try:
                os._exit(_pytest(copy, files, order, self.log, self.scratch))
            except BaseException:  # a fork never goes back to our caller
                traceback.print_exc()
                os._exit(9)

    def poll(self) -> str | None:
        if self.outcome is not None:
            return self.outcome
        ended, status = os.waitpid(self.child, os.WNOHANG)
        if not ended and time.monotonic() < self.deadline:
            return None
        with suppress(ProcessLookupError):
            os.killpg(self.child, signal.SIGKILL)  # its ranks too
        if not ended:
            os.waitpid(self.child, 0)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.outcome = "timeout" if not ended else "failed" if status else "passed"
        return self.outcome

    def seen(self) -> list[tuple[str, bool, float]]:
        """(name, failed, seconds) of every test that ran."""
        return [tuple(json.loads(line)) for line in self.log.read_text().splitlines()]


def _pytest(copy: Path, files: list[str], order: list[str] | None, log: Path, scratch: Path) -> int:
    os.setpgid(0, 0)
    os.chdir(copy)
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    output = os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    pytest = importlib.import_module("pytest")
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    options += [] if order is None else ["-x"]
    code = pytest.main([*options, *(f"tests/{name}" for name in files)], plugins=[Watcher(order, log)])
    sys.stdout.flush()
    return int(code)


# ---- all of them --------------------------------------------------------------------------------------------


def copied(number: int) -> Path:
    copy = Path(tempfile.mkdtemp(prefix=f"mutants-{number}-"))
    skip = shutil.ignore_patterns("__pycache__", ".*", "mutation")
    for name in ("distclip", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def measured(copies: list[Path], files: list[str]) -> dict[str, float]:
    """Seconds of every test that passes without a change, and is not slow."""
    runs = [Run(copy, files[i :: len(copies)], None, 1200) for i, copy in enumerate(copies)]
    while any(run.poll() is None for run in runs):
        time.sleep(0.5)
    seen = [entry for run in runs for entry in run.seen()]
    bad = {name for name, failed, _ in seen if failed}
    slow = {name for name, _, seconds in seen if seconds > SLOWEST} - bad
    print(*(f"left out, fails without a change: {name}" for name in sorted(bad)), sep="\n")
    print(f"{len(seen)} tests, {len(slow)} of them left out as slower than {SLOWEST:g} s", flush=True)
    return {name: seconds for name, _, seconds in seen if name not in bad | slow}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N", help="that many mutants, drawn evenly; all without it")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N of them")
    parser.add_argument("--again", type=Path, metavar="FILE", help="first those whose lines stand in FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="PATH", help=f"one of {', '.join(TARGETS)}")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no mutant after so long")
    parser.add_argument("--list", action="store_true", help="list the mutants and run nothing")
    options = parser.parse_args()
    mutants = [m for path in TARGETS if options.only in (None, path) for m in mutants_of(path)]
    total = len(mutants)
    random.Random(options.seed).shuffle(mutants)
    again = set(map(str.strip, options.again.read_text().splitlines())) if options.again else set()
    mutants = [m for m in mutants if str(m) in again] + mutants[options.skip : options.sample]
    if options.list:
        print(*sorted(map(str, mutants)), f"{len(mutants)} of {total} mutants", sep="\n")
        return 0
    started = time.monotonic()
    copies = [copied(number) for number in range(2)]
    try:
        seconds = measured(copies, sorted({name for m in mutants for name in TARGETS[m.path]}))
        if not seconds:
            raise SystemExit("no test passes without a change: a figure would say nothing")
        results = _tried(mutants, copies, seconds, started + 60 * options.minutes)
    finally:
        for copy in copies:
            shutil.rmtree(copy, ignore_errors=True)
    counts = Counter(results.values())
    caught = counts["failed"] + counts["timeout"]
    print("survivors:", *sorted(str(m) for m, end in results.items() if end == "passed"), sep="\n  ")
    print(
        f"{len(results)} of {total} mutants: {caught} killed ({counts['timeout']} of them by the time limit), "
        f"{counts['passed']} survived: {100 * caught / max(1, len(results)):.1f} % killed, "
        f"{(time.monotonic() - started) / 60:.0f} min"
    )
    return 0


def _tried(mutants: list[Mutant], copies: list[Path], seconds: dict[str, float], end: float) -> dict[Mutant, str]:
    kills: dict[str, Counter[str]] = {path: Counter() for path in TARGETS}
    results: dict[Mutant, str] = {}
    waiting, free = mutants[::-1], list(copies)
    running: list[tuple[Run, Path, Mutant]] = []
    while running or (waiting and time.monotonic() < end):
        while free and waiting and time.monotonic() < end:
            copy, mutant = free.pop(), waiting.pop()
            files = TARGETS[mutant.path]
            names = [name for name in seconds if name.split("::")[0].removeprefix("tests/") in files]
            order = sorted(names, key=lambda name: (-kills[mutant.path][name], seconds[name]))
            (copy / mutant.path).write_bytes(mutant.changed())
            limit = PATIENCE + 4 * sum(seconds[name] for name in order)
            running.append((Run(copy, files, order, limit), copy, mutant))
        for entry in list(running):
            run, copy, mutant = entry
            outcome = run.poll()
            if outcome is None:
                continue
            running.remove(entry)
            free.append(copy)
            (copy / mutant.path).write_bytes(mutant.source)
            kills[mutant.path].update(name for name, failed, _ in run.seen() if failed)
            results[mutant] = outcome
            print(f"{len(results):4} {outcome:8} {mutant}", flush=True)
        time.sleep(0.05)
    return results


if __name__ == "__main__":
    # every fork finds these imported; distclip it must import for itself
    for needed in ("pytest", "hypothesis", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"):
        importlib.import_module(needed)
    importlib.import_module("torch").set_num_threads(1)
    assert not any(name.startswith("distclip") for name in sys.modules)
    sys.exit(main())
