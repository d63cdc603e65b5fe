"""Three trainings that need clipping, with none and with each policy: a table, results.json and results.png.

    pip install -c constraints.txt ".[train,viz]"
    python examples/experiments/run.py [FOLDER]         # FOLDER: runs/experiments

Every run is one process on one thread with a seed of its own, as many side by side as there are cores.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes

import digits
import poisoned
import temporal_order
import torch
from catalogue import POLICIES
from plot import draw
from table import as_json, table

COLUMNS = {
    "order": [(temporal_order.run, seed, {}) for seed in range(4)],
    "digits": [(digits.run, seed, {}) for seed in range(3)],
    "clean": [(poisoned.run, 0, {"factor": 1.0})],
    "poisoned": [(poisoned.run, 0, {})],
}
SEEDS = {column: [seed for _, seed, _ in runs] for column, runs in COLUMNS.items()}


@dataclass(frozen=True)
class Job:
    policy: str
    column: str
    index: int

    def __call__(self) -> tuple[float, float]:
        """The result and its CPU seconds."""
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        run, seed, settings = COLUMNS[self.column][self.index]
        started = time.process_time()
        return run(POLICIES[self.policy], seed, **settings), time.process_time() - started


def main(folder: Path) -> None:
    started = time.perf_counter()
    jobs = [Job(name, column, k) for column, runs in COLUMNS.items() for k in range(len(runs)) for name in POLICIES]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        found = list(pool.map(Job.__call__, jobs))
    results = {name: {column: list[float]() for column in COLUMNS} for name in POLICIES}
    for job, (number, _) in zip(jobs, found, strict=True):
        results[job.policy][job.column].append(number)
    seconds = {"wall": time.perf_counter() - started, "cpu": sum(cpu for _, cpu in found)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(as_json(results, SEEDS, seconds), encoding="utf-8")
    draw(results, folder / "results.png")
    print(table(results))
    print(f"{seconds['wall']:.0f} s, {seconds['cpu']:.0f} s of CPU; {folder}/results.json, results.png")


if __name__ == "__main__":
    main(Path(*sys.argv[1:2] or ["runs/experiments"]))
