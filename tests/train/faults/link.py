"""Two network namespaces as two hosts, one rank in each, and a link between them that is cut while they train.

    python tests/train/faults/link.py        # as root, with iproute2; nothing of it stays

1. Down for 5 seconds, then up: the run goes on and is the uninterrupted one.
2. Down for good: both ranks end by themselves, soon after `parallel.timeout`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from train.commands import CONFIGS, TINY  # noqa: E402
from train.victims import steps_of, timeless, wait_for_step  # noqa: E402

HOSTS = {"dcTrain0": "10.77.9.1", "dcTrain1": "10.77.9.2"}
TIMEOUT, MARGIN = 10, 30  # seconds: of parallel.timeout, and what ranks may take from then to their end


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def connect() -> None:
    one, other = HOSTS
    for host in HOSTS:
        ip("netns", "add", host)
    ip("link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", other)
    for host, address in HOSTS.items():
        ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
        ip("-n", host, "link", "set", "lo", "up")
        ip("-n", host, "link", "set", "eth0", "up")


def link(state: str) -> None:
    ip("-n", list(HOSTS)[1], "link", "set", "eth0", state)


def start(folder: Path, *words: str) -> list[subprocess.Popen[str]]:
    return [start_rank(rank, host, [*TINY, f"run.dir={folder}", *words]) for rank, host in enumerate(HOSTS)]


def start_rank(rank: int, host: str, words: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": next(iter(HOSTS.values())),
        "MASTER_PORT": "29555",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "distclip", "train", str(CONFIGS / "quickstart.yaml"), *words]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(ranks: list[subprocess.Popen[str]], limit: float) -> list[tuple[int | None, float, str]]:
    """Exit code, seconds until the end and stderr of each rank; those that outlive `limit` are killed: None."""
    began = time.monotonic()
    seconds = [limit] * len(ranks)
    while any(rank.poll() is None for rank in ranks) and time.monotonic() - began < limit:
        time.sleep(0.05)
        seconds = [
            time.monotonic() - began if rank.poll() is None else took for rank, took in zip(ranks, seconds, strict=True)
        ]
    codes = [rank.poll() for rank in ranks]
    for rank in ranks:
        rank.kill()
    return [(code, took, rank.communicate()[1]) for code, took, rank in zip(codes, seconds, ranks, strict=True)]


def cut_and_restored(folder: Path) -> dict[str, object]:
    words = ["train.steps=400", "parallel.timeout=60"]
    straight = ends(start(folder / "straight", *words), 200)
    ranks = start(folder / "cut", *words)
    wait_for_step(folder / "cut", 50, ranks[0])
    link("down")
    at = steps_of(folder / "cut")
    time.sleep(5)
    stood_still = steps_of(folder / "cut") - at
    link("up")
    cut = ends(ranks, 200)
    assert [code for code, _, _ in [*straight, *cut]] == [0, 0, 0, 0], (straight, cut)
    longest = max(record["seconds"] for record in map(json.loads, (folder / "cut/metrics.jsonl").open()))
    return {
        "cut at step": at,
        "steps while it was down": stood_still,
        "longest step, seconds": round(longest, 1),
        "same records": timeless(folder / "cut") == timeless(folder / "straight"),
    }


def cut_for_good(folder: Path) -> dict[str, object]:
    ranks = start(folder / "gone", "train.steps=100000", f"parallel.timeout={TIMEOUT}")
    wait_for_step(folder / "gone", 50, ranks[0])
    link("down")
    found = ends(ranks, 300)
    link("up")
    return {
        "exit codes": [code for code, _, _ in found],
        "seconds": [round(took, 1) for _, took, _ in found],
        "in time": all(took <= TIMEOUT + MARGIN for _, took, _ in found),
        "said": [errors.strip() for _, _, errors in found],
    }


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="distclip-") as name:
        try:
            connect()
            restored, gone = cut_and_restored(Path(name)), cut_for_good(Path(name))
        finally:
            for host in HOSTS:
                subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)
    print(json.dumps({"down for 5 s": restored, "down for good": gone}, indent=2))
    right = restored["same records"] and gone["exit codes"] == [1, 1] and gone["in time"]
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
