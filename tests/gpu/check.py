"""Prove distclip on a machine with one NVIDIA GPU, in ten minutes: torch's kernels, and Triton's.

    python tests/gpu/check.py                              every part on both roads
    python tests/gpu/check.py --only bandwidth bench       some parts; --roads triton: one road
    python tests/gpu/check.py --rehearse                   the same on a CPU, with stand-ins and small sizes

Needs torch, and Triton for its road; nothing else. Parts run in processes of their own, side by side but for those
that measure times. As each part ends its verdict is printed and everything so far is written to --json, so that a run
that is cut off leaves what it has. Exits with 1 if anything is wrong or was not measured: judge.py decides, README.md
says what is asked for and how long it takes.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

gc.disable()  # imports leave no garbage, and all that is here stays: see distclip/__main__.py
import torch  # noqa: E402

import distclip  # noqa: E402
from distclip.kernels.triton.choice import why_not  # noqa: E402
from gpu.chip import Chip, Gpu, Host, NotThere  # noqa: E402
from gpu.judge import fault_of, verdict  # noqa: E402
from gpu.parts import BOTH, PARTS, Part, graphs, groups, kernels, speed, steps, training  # noqa: E402
from gpu.readings import Readings, reading  # noqa: E402

MARK = "READING "  # of the lines of a part's output that are its own
SPARE = 5.0  # seconds at the end for what is written
gc.freeze()
gc.enable()
FIGURES = ("bandwidth", "times", "step", "seconds", "launches")
assert all((graphs, groups, kernels, speed, steps, training)), "imported for their parts"


@dataclass(frozen=True, slots=True)
class Job:
    """One part on one road."""

    name: str
    road: str

    @property
    def part(self) -> Part:
        return PARTS[self.name]

    def __str__(self) -> str:
        return f"{self.name} ({self.road})"


class Session:
    """What was measured so far, and how long it may still go on."""

    def __init__(self, options: argparse.Namespace, jobs: Sequence[Job]) -> None:
        self.rehearsal, self.file = options.rehearse, options.json
        self.end = time.monotonic() + 60 * options.minutes - SPARE
        self.asked = {str(job): needs_of(job, self.rehearsal) for job in jobs}
        self.document: dict[str, Any] = {"machine": machine(self.rehearsal), "faults": {}, "runs": {}}
        self.alive: set[subprocess.Popen[str]] = set()

    def run(self, job: Job) -> dict[str, Any]:
        """Run a part in a process of its own; one that crashes, or poisons the GPU's context, stops no other."""
        limit = min(3 * job.part.seconds + 60, self.end - time.monotonic())
        if limit < 5:
            return {"ended": "never began: no time was left", "readings": []}
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, open(f"{folder}/output", "w+") as output:
            command = [sys.executable, __file__, "--part", job.name, "--roads", job.road]
            process = subprocess.Popen(
                command + ["--rehearse"] * self.rehearsal,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env=self.environment(job, folder),
                cwd=ROOT,
                start_new_session=True,  # so that ranks that it has started end with it
            )
            ended = self.waited_for(process, limit)
            text = Path(folder, "output").read_text(errors="replace")
        readings = [json.loads(line.removeprefix(MARK)) for line in text.splitlines() if line.startswith(MARK)]
        run = {"ended": ended, "seconds": round(time.monotonic() - start, 1), "readings": readings}
        return run if ended == "well" else run | {"output": text[-3000:]}

    def environment(self, job: Job, folder: str) -> dict[str, str]:
        wanted = {"DISTCLIP_TRITON": "1" if job.road == "triton" else "0"}
        if job.name == "compiling":
            wanted["TRITON_CACHE_DIR"] = folder
        if self.rehearsal:
            wanted |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            wanted |= {"TRITON_INTERPRET": "1"} if job.road == "triton" else {}
        return {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **wanted}

    def waited_for(self, process: subprocess.Popen[str], limit: float) -> str:
        self.alive.add(process)
        try:
            code = process.wait(limit)
            return "well" if code == 0 else f"with exit code {code}"
        except subprocess.TimeoutExpired:
            return f"cut off after {limit:.0f} s"
        finally:
            self.stop(process)

    def stop(self, process: subprocess.Popen[str]) -> None:
        """End what is left of a part, its own ranks too."""
        self.alive.discard(process)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def record(self, job: Job, run: dict[str, Any]) -> None:
        """Judge, print and write what came of a part."""
        name = str(job)
        faults = verdict({name: run}, {name: self.asked[name]}, self.rehearsal)[name]
        self.document["runs"][name], self.document["faults"][name] = run, faults
        print(f"{'WRONG' if faults else 'ok':<6} {name:<28} {run.get('seconds', 0):>6} s", flush=True)
        for fault in faults[:8]:
            print(f"       {fault[:400]}", flush=True)
        if len(faults) > 8:
            print(f"       and {len(faults) - 8} more", flush=True)
        self.write()

    def write(self) -> None:
        """In one move: whoever cuts us off finds the file before, or the file after."""
        beside = self.file.with_name(self.file.name + ".new")
        beside.write_text(json.dumps(self.document, indent=1))
        beside.replace(self.file)


def needs_of(job: Job, rehearsal: bool) -> dict[str, int]:
    part = job.part
    return part.needs if not rehearsal or part.rehearsed is None else part.rehearsed


def machine(rehearsal: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"torch": torch.__version__, "distclip": distclip.__version__, "command": sys.argv}
    facts |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "rehearsal": rehearsal}
    if not rehearsal:
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        facts |= {"capability": f"{properties.major}.{properties.minor}"}
    return facts


def chip_of(job: Job, rehearsal: bool) -> Chip:
    if not rehearsal:
        return Gpu(job.road)
    return NotThere(job.road) if job.part.stand_in and job.road == "default" else Host(job.road)


def measured(job: Job, rehearsal: bool) -> Readings:
    """The readings of one part; first whether its kernels are those that the library takes."""
    chip = chip_of(job, rehearsal)
    if job.road == "triton":
        yield reading("silent", "Triton's kernels are taken", why_not(chip.device))
    yield from job.part.measure(chip)


def run_one(job: Job, rehearsal: bool) -> int:
    for found in measured(job, rehearsal):
        print(MARK + json.dumps(found), flush=True)
    return 0


def run_all(session: Session, jobs: Sequence[Job], side_by_side: int) -> int:
    """Parts that measure no times side by side, then the others one by one; 1 if anything is wrong."""
    pool = ThreadPoolExecutor(side_by_side)
    try:
        futures = {pool.submit(session.run, job): job for job in jobs if not job.part.alone}
        for future in as_completed(futures):
            session.record(futures[future], future.result())
        for job in jobs:
            if job.part.alone:
                session.record(job, session.run(job))
    finally:  # also where somebody ends us: nothing goes on without us
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(session.alive):
            session.stop(process)
    return conclude(session)


def conclude(session: Session) -> int:
    faults = verdict(session.document["runs"], session.asked, session.rehearsal)
    session.document["faults"] = faults
    session.write()
    for line in figures(session.document["runs"], session.rehearsal):
        print(line)
    wrong = [name for name, found in faults.items() if found]
    print(f"{len(faults) - len(wrong)} parts hold, {len(wrong)} do not{': ' if wrong else ''}{', '.join(wrong)}")
    return int(bool(wrong))


def figures(runs: dict[str, Any], rehearsal: bool) -> list[str]:
    """The measured numbers, as a table for a document; in a rehearsal they decide nothing."""
    rows = ["| part | what | got | beside | |", "|---|---|---|---|---|"]
    for name, run in runs.items():
        for one in run["readings"]:
            if one["kind"] in FIGURES:
                got, right = (f"{x:.4g}" if isinstance(x, float) else x for x in (one["got"], one.get("right", "")))
                met = "rehearsed" if rehearsal else "missed" if fault_of(one) else "met"
                rows.append(f"| {name} | {one['what']} | {got} | {right} | {met} |")
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prove distclip on one NVIDIA GPU.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--roads", nargs="+", choices=BOTH, default=list(BOTH), help="torch's kernels, Triton's, or both"
    )
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="where results go (default: gpu.json)")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it (default: 9.5)")
    parser.add_argument("--side-by-side", type=int, default=6, help="processes at a time (default: 6)")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with stand-ins; times decide nothing")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # run this one here, and print its readings
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no GPU here: --rehearse runs what a CPU can")
    return options


def main() -> int:
    options = arguments()
    if options.part is not None:
        return run_one(Job(options.part, options.roads[0]), options.rehearse)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    jobs = [Job(name, road) for name in options.only for road in PARTS[name].roads if road in options.roads]
    return run_all(Session(options, jobs), jobs, options.side_by_side)


if __name__ == "__main__":
    sys.exit(main())
