"""Faults of the trainer that take too long for CI, on real processes of this machine. What happened goes to stdout.

    python tests/train/faults/suite.py                      # all
    python tests/train/faults/suite.py kill stop --seed 3   # those whose names begin so

A case passes when the run ends as docs/explanation/faults.md says, and, where it goes on, when all records of
metrics.jsonl and the summary are those of a run without the fault, but for times. `disk` needs root: it mounts a small
file system.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from train.commands import CONFIGS, TINY, TORCHRUN, metrics, start  # noqa: E402
from train.victims import PATIENCE, hit, ranks_of, steps_of, still_there, timeless, wait_for_step  # noqa: E402

STEPS, EVERY = 150, 20
AUTOCLIP = ["clip.policy=autoclip", "clip.max_norm=null", "clip.window=20", "clip.percentile=50"]
SETTINGS = [*TINY, *AUTOCLIP, f"train.steps={STEPS}", f"train.save_every={EVERY}", "train.eval_every=30"]
LAUNCHERS = {"distclip": None, "torchrun": [*TORCHRUN, "2", "--max-restarts", "3"]}

Story = dict[str, object]


class Wrong(Exception):
    """The run did not end as it should."""


def need(condition: bool, what: str) -> None:
    if not condition:
        raise Wrong(what)


def begin(folder: Path, *words: str, launcher: str = "distclip") -> subprocess.Popen[str]:
    own = ["parallel.processes=2"] if launcher == "torchrun" else []
    config = CONFIGS / "quickstart.yaml"
    return start("train", config, *SETTINGS, *own, f"run.dir={folder}", *words, launcher=LAUNCHERS[launcher])


def end(job: subprocess.Popen[str], code: int) -> tuple[str, str]:
    output, errors = job.communicate(timeout=2 * PATIENCE)
    need(job.returncode == code, f"exit code {job.returncode}, not {code}:\n{output}\n{errors}")
    need("Traceback" not in errors, errors)
    return output, errors


def uninterrupted(folder: Path, *words: str, launcher: str = "distclip") -> None:
    end(begin(folder, *words, launcher=launcher), 0)


def need_same(folder: Path, straight: Path) -> None:
    need(timeless(folder) == timeless(straight), f"other records: {folder} and {straight}")
    need(summary_of(folder) == summary_of(straight), "another summary")
    need(sums_of(folder) == sums_of(straight), "other bytes in the last checkpoint's tensors")


def summary_of(folder: Path) -> Story:
    summary = json.loads((folder / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in ("seconds", "folder")}


def sums_of(folder: Path) -> Story:
    manifest = json.loads((folder / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())
    return {name: sums for name, sums in manifest["files"].items() if name.endswith(".distcp")}


def kill_three_times(folder: Path, launcher: str, strategy: str) -> Story:
    """Rank 0 or 1 dies at three random steps; the launcher starts both again."""
    way = f"parallel.strategy={strategy}"
    uninterrupted(folder / "straight", way, launcher=launcher)
    words = [way, "resume=true", *(["run.restarts=3"] if launcher == "distclip" else [])]
    job = begin(folder / "killed", *words, launcher=launcher)
    planned = [random.randrange(low, low + 40) for low in (5, 55, 105)]
    victims: set[int] = set()
    killed = []
    for step in planned:
        wait_for_step(folder / "killed", step, job)
        rank = random.randrange(2)
        hit(job, rank, signal.SIGKILL, victims)
        killed.append(f"rank {rank} after step {steps_of(folder / 'killed')}")
    output, errors = end(job, 0)
    need_same(folder / "killed", folder / "straight")
    need(not still_there(victims), "processes are left behind")
    need("no answer from rank" in errors or "the job's store is gone" in errors, errors)
    resumed = [line.split("after step ")[1].split()[0] for line in output.splitlines() if line.startswith("resumed  a")]
    return {"killed": killed, "resumed after": resumed, "named": errors.count("no answer from rank")}


def kill_while_saving(folder: Path) -> Story:
    """Rank 1 dies while a checkpoint is being written."""
    uninterrupted(folder / "straight")
    job = begin(folder / "killed", "resume=true", "run.restarts=3")
    victims: set[int] = set()
    found = []
    for low in (5, 50, 95):
        wait_for_step(folder / "killed", low, job)
        deadline = time.monotonic() + PATIENCE
        while not (writing := sorted((folder / "killed/checkpoints").glob("step-*.tmp"))):
            need(time.monotonic() < deadline and job.poll() is None, "nothing was being written")
        hit(job, 1, signal.SIGKILL, victims)
        found.append(writing[0].name)
    end(job, 0)
    need_same(folder / "killed", folder / "straight")
    need(not still_there(victims), "processes are left behind")
    need(not list((folder / "killed/checkpoints").glob("*.tmp")), "an unfinished checkpoint is left")
    return {"killed while there was": found}


def terminate(folder: Path, launcher: str) -> Story:
    """A batch system's SIGTERM, to the launcher and all ranks, several times; then the run goes on."""
    uninterrupted(folder / "straight", launcher=launcher)
    job = begin(folder / "stopped", "resume=true", launcher=launcher)
    wait_for_step(folder / "stopped", random.randrange(10, 50), job)
    ranks = ranks_of(job)
    began = time.monotonic()
    for _ in range(3):
        for process in (*ranks.values(), job.pid):
            os.kill(process, signal.SIGTERM)
        time.sleep(0.02)
    job.communicate(timeout=PATIENCE)
    seconds = time.monotonic() - began
    need(launcher == "torchrun" or job.returncode == 143, f"exit code {job.returncode}")
    steps = [record["step"] for record in metrics(folder / "stopped")]
    newest = max(path.name for path in (folder / "stopped/checkpoints").iterdir())
    need(newest == f"step-{steps[-1]:08d}", f"{newest} is not of the last step {steps[-1]}")
    need(not still_there(set(ranks.values())), "processes are left behind")
    end(begin(folder / "stopped", "resume=true", launcher=launcher), 0)
    need_same(folder / "stopped", folder / "straight")
    return {"checkpoint": newest, "seconds until the end": round(seconds, 1), "exit code": job.returncode}


def stop(folder: Path) -> Story:
    """SIGSTOP to one rank of four: the others end after parallel.timeout; the launcher kills it 30 s later."""
    timeout = 5
    words = [f"parallel.timeout={timeout}", "parallel.processes=4", "train.steps=100000"]
    job = begin(folder / "stopped", *words)
    wait_for_step(folder / "stopped", 20, job)
    ranks, victims = ranks_of(job), set[int]()
    hit(job, 2, signal.SIGSTOP, victims)
    began = time.monotonic()
    seconds: dict[int, float] = {}
    while len(seconds) < len(ranks):
        need(time.monotonic() - began < PATIENCE, f"ranks {sorted(ranks.keys() - seconds)} are still there")
        for rank, process in ranks.items():
            if rank not in seconds and not still_there_now(process):
                seconds[rank] = round(time.monotonic() - began, 1)
        time.sleep(0.05)
    _, errors = end(job, 1)
    need("no answer from rank 2" in errors, errors)
    need(not still_there(victims), "processes are left behind")
    return {"timeout": timeout, "seconds until each rank ended": dict(sorted(seconds.items()))}


def still_there_now(process: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def disk(folder: Path) -> Story:
    """The disk of the run folder is full when a checkpoint is due, and then when a record is."""
    uninterrupted(folder / "straight")
    mount = folder / "mount"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], check=True)
    try:
        run, filler = mount / "run", mount / "filler"
        end(begin(run, "train.steps=60"), 0)  # where all runs save and look at the held-out part
        free = shutil.disk_usage(mount).free
        filler.write_bytes(bytes(free - 100_000))
        _, errors = end(begin(run, "resume=true"), 1)
        line = only_line(errors)
        need("cannot write" in line and "step-00000080" in line, line)
        kept = sorted(path.name for path in (run / "checkpoints").iterdir())
        need(kept == ["step-00000040", "step-00000060"], f"kept {kept}")

        free = shutil.disk_usage(mount).free
        with filler.open("ab") as file:
            file.write(bytes(free - 8192))
        _, errors = end(begin(run, "resume=true", "train.save_every=null"), 1)
        record = next(text for text in errors.splitlines() if "on rank 0" in text)
        filler.unlink()
        end(begin(run, "resume=true"), 0)
        need_same(run, folder / "straight")
        return {"checkpoint": line, "record": record}
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def only_line(errors: str) -> str:
    """What one rank said, without the launcher's own lines."""
    (line,) = [text for text in errors.splitlines() if text.startswith("distclip: training failed")]
    return line


CASES: dict[str, Callable[[Path], Story]] = {
    "kill-distclip-fsdp2": lambda folder: kill_three_times(folder, "distclip", "fsdp2"),
    "kill-distclip-ddp": lambda folder: kill_three_times(folder, "distclip", "ddp"),
    "kill-torchrun-fsdp2": lambda folder: kill_three_times(folder, "torchrun", "fsdp2"),
    "kill-torchrun-ddp": lambda folder: kill_three_times(folder, "torchrun", "ddp"),
    "kill-while-saving": kill_while_saving,
    "term-distclip": lambda folder: terminate(folder, "distclip"),
    "term-torchrun": lambda folder: terminate(folder, "torchrun"),
    "stop-of-four": stop,
    "disk-full": disk,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults of the trainer, on real processes.")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}, or how they begin")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else torchrun's restarts meet in the old store
    failed = 0
    for name in [c for c in CASES if not arguments.cases or c.startswith(tuple(arguments.cases))]:
        random.seed(f"{arguments.seed} {name}")
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="distclip-") as folder:
            try:
                told: object = CASES[name](Path(folder))
            except Wrong as error:
                failed += 1
                told = f"FAILED: {error}"
        print(f"{name} ({time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.0f}): {told}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
