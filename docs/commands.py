"""Run every command of README.md, CONTRIBUTING.md and docs/ in a fresh clone, and print pass, FAIL or skip a line.

    python docs/commands.py                        # all that need no cluster and no hour, in a new environment
    python docs/commands.py docs/howto/report.md   # those of some pages
    python docs/commands.py --long --limit 7200    # with those that take more than ten minutes

A command is a line of a ```bash block. It runs by bash in the clone, in the order of the pages, with `python`, `pip`
and `distclip` of a new virtual environment. Files that a page takes for granted (`log.csv`, `mine.py`) are made before.
"""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"\s+#.*$", re.MULTILINE)
SKIPPED = {  # a part of a command: why it cannot run here
    "sbatch": "needs Slurm: tests/launch/slurm.sh runs it",
    "kubectl": "needs a Kubernetes cluster",
    "docker": "needs Docker: tests/launch/image.sh builds and runs the image",
    "RDZV_ENDPOINT": "needs two machines: tests/launch/test_netns.py runs it in two network namespaces",
    "--device cuda": "needs GPUs",
    "tests/gpu/check.py": "needs a GPU",
    "link.py": "needs root and network namespaces",
}
TAKES_LONG = (
    "launch/test.sh",
    "tests/faults/run.sh",
    "tests/fuzz/run.sh",
    "tests/soak/run.sh",
    "suite.py",
    ".venv/bin/",
)  # launch/test.sh makes .venv
BY_ITSELF = re.compile(r"distclip bench$|distclip bench --processes")  # all cases, which takes minutes on idle cores


@dataclass(frozen=True)
class Command:
    place: str
    text: str

    def skipped(self, long: bool) -> str:
        """Why it does not run; empty if it does."""
        reasons = [reason for part, reason in SKIPPED.items() if part in self.text]
        if not long and (any(part in self.text for part in TAKES_LONG) or BY_ITSELF.search(self.text)):
            reasons.append("takes long: --long runs it")
        return reasons[0] if reasons else ""


def pages(chosen: Sequence[Path] = ()) -> list[Path]:
    """Those that are chosen, or all, in the order of a reader."""
    first = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs/start.md"]
    return [page.resolve() for page in chosen] or [*first, *sorted(ROOT.glob("docs/*/*.md"))]


def commands(page: Path) -> Iterator[Command]:
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1)) + 1
        for command in re.split(r"(?<!\\)\n", block[1].rstrip("\n")):
            yield Command(f"{page.relative_to(ROOT)}:{line}", COMMENT.sub("", command).strip())
            line += command.count("\n") + 1


def run(command: str, folder: Path, environment: dict[str, str], limit: float) -> tuple[int, str]:
    """Exit code and output; what takes longer is stopped as by Ctrl-C, so that the ranks it has started end too."""
    with (
        TemporaryFile("w+") as output,  # not a pipe, which ranks that are left would hold open
        subprocess.Popen(
            ["bash", "-euc", command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            code = process.wait() or 124
        output.seek(0)
        return code, output.read()


def prepare(clone: Path) -> None:
    """The files that a reader of the pages has: logs of runs, texts, a table, a model."""
    norms = [{"step": k, "grad_norm": 1 + k % 7 / 10, "loss": 3 - k / 300} for k in range(1, 301)]
    state = clone / "out/checkpoint-500/trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"log_history": norms}))
    metrics = [{"step": r["step"], "grad_2.0_norm_total": r["grad_norm"]} for r in norms]
    write_csv(clone / "lightning_logs/version_0/metrics.csv", metrics)
    write_csv(clone / "log.csv", [{"it": r["step"], "gnorm": r["grad_norm"], "train_loss": r["loss"]} for r in norms])
    comments = [
        {"comment_text": f"{'rude' if k % 9 == 0 else 'kind'} words {k}", "toxic": int(k % 9 == 0)} for k in range(2000)
    ]
    write_csv(clone / "train.csv", comments)
    logged = {"grad_norm/pre_clip": 1.0, "clip/coef": 1.0, "clip/max_norm": "Infinity"}
    (clone / "norms.jsonl").write_text("".join(json.dumps({"step": k, **logged}) + "\n" for k in range(1, 301)))
    records = [
        {"step": k, "norm": 1.0, "max_norm": 1.0, "coef": 1.0, "skip": False, "loss": 2.0} for k in range(1, 301)
    ]
    for name in ("quickstart-20261130-120000", "again"):
        (clone / "runs" / name).mkdir(parents=True)
        (clone / "runs" / name / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    doctor = (ROOT / "docs/howto/doctor.md").read_text(encoding="utf-8")
    (clone / "mine.py").write_text(doctor.partition("```python\n")[2].partition("```")[0])


def write_csv(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def new_environment(folder: Path) -> dict[str, str]:
    venv.create(folder, with_pip=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return kept | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--limit", type=float, default=600, help="seconds of a command (600)")
    words = parser.parse_args()
    counts = {"pass": 0, "FAIL": 0, "skip": 0}
    with TemporaryDirectory() as folder:
        clone = Path(folder, "distclip")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        prepare(clone)
        environment = new_environment(Path(folder, "environment"))
        for command in (command for page in pages(words.pages) for command in commands(page)):
            start, reason = time.monotonic(), command.skipped(words.long)
            code, output = (0, "") if reason else run(command.text, clone, environment, words.limit)
            verdict = "skip" if reason else "FAIL" if code else "pass"
            counts[verdict] += 1
            shown = " ".join(command.text.split())
            print(
                f"{verdict} {time.monotonic() - start:5.0f} s  {command.place}  {shown}{reason and f'  ({reason})'}",
                flush=True,
            )
            if verdict == "FAIL":
                print(f"exit code {code}\n{output[-3000:]}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(counts["FAIL"] > 0)


if __name__ == "__main__":
    sys.exit(main())
