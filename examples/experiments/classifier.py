"""configs/classifier.yaml without clipping, by norm, by value and by both, three seeds each: a table and a picture.

    pip install -c constraints.txt ".[train,viz]"
    python examples/experiments/classifier.py [PICTURE]      # PICTURE: docs/classifier.png

Two more runs without clipping are in the table: a tenth of the learning rate, and a GRU with AdamW.
"""

import json
import os
import socket
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from math import isfinite, isnan
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes

from distclip.cli import main

ROOT = Path(__file__).parents[2]
DATA = f"data.path={ROOT / 'configs/data/prose.csv'}"
ALONE = [DATA, "parallel.strategy=none", "parallel.processes=1", "train.eval_every=20"]
CLIPPED = {
    "none": ["clip.policy=none"],
    "norm 2.0": ["clip.max_norm=2.0"],
    "value 1.0": ["clip.policy=value", "clip.clip_value=1.0"],
    "both": ["clip.chain=[{max_norm: 2.0}, {policy: value, clip_value: 1.0}]"],
}
OTHERS = {
    "none, lr 0.01": ["clip.policy=none", "optim.lr=0.01"],
    "none, GRU and AdamW": ["clip.policy=none", "model.cell=gru", "optim.name=adamw", "optim.lr=3e-3"],
}
WORDS = CLIPPED | OTHERS
SEEDS = (0, 1, 2)
Records = list[dict[str, Any]]


def run(name: str, seed: int, more: tuple[str, ...] = ()) -> Records:
    """One training in this process, as the only rank of a launcher."""
    with socket.socket() as taken, tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        taken.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        taken.close()
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", **address}
        words = [*ALONE, *WORDS[name], f"seed={seed}", f"run.dir={folder}", *more]
        with redirect_stdout(nowhere):
            code = main(["train", str(ROOT / "configs/classifier.yaml"), *words])
        assert code == 0, f"{name}, seed {seed}: exit code {code}"
        return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def row(name: str, runs: list[Records]) -> str:
    """The median of the seeds at the end, and in brackets the worst."""
    cells = [middle_and_worst(runs, f"held_out_{key}") for key in ("loss", "accuracy", "f1", "auc")]
    for counts in (lambda r: r["coef"] != 1 and not r["skip"], lambda r: r["skip"]):
        cells.append(f"{median(mean(map(counts, records)) for records in runs):.0%}")
    norms = (float(r["norm"]) for records in runs for r in records)
    return f"| {name} | {' | '.join(cells)} | {max(filter(isfinite, norms)):.2g} |"


def middle_and_worst(runs: list[Records], key: str) -> str:
    """Of a loss the worst is the largest; NaN is worse than all numbers."""
    sign = 1 if key == "held_out_loss" else -1
    ordered = sorted((float(records[-1][key]) for records in runs), key=lambda x: (isnan(x), sign * x))
    return f"{ordered[len(ordered) // 2]:.3g} ({ordered[-1]:.3g})"


def table(found: dict[str, list[Records]]) -> str:
    heads = ("clipping", "loss (worst seed)", "accuracy", "F1", "AUC", "steps scaled", "skipped", "largest norm")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(row(name, runs) for name, runs in found.items())])


def measure() -> dict[str, list[Records]]:
    jobs = [(name, seed) for name in WORDS for seed in SEEDS]
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        records = list(pool.map(run, *zip(*jobs, strict=True)))
    return {name: [r for job, r in zip(jobs, records, strict=True) if job[0] == name] for name in WORDS}


if __name__ == "__main__":
    from classifier_plot import draw

    results = measure()
    print(table(results))
    draw({name: results[name] for name in CLIPPED}, Path(*sys.argv[1:2] or [ROOT / "docs/classifier.png"]))
