"""The job with Ray Train: `python launch/ray_train.py WORKERS CONFIG [key=value ...]` from the root of this repository.

Needs `pip install "ray[train]"` besides distclip[train]. On several machines: the repository at the same path, a Ray
cluster (RAY_ADDRESS=auto), and a run.dir on a shared disk. Each Ray worker is the parent of one rank, because the
trainer needs the main thread, for signals, and a process group of its own.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer

ROOT = Path(__file__).resolve().parent.parent


def work(job: dict[str, Any]) -> None:
    """Run one rank on a Ray worker."""
    here = ray.train.get_context()
    rank = {
        "RANK": here.get_world_rank(),
        "WORLD_SIZE": here.get_world_size(),
        "LOCAL_RANK": here.get_local_rank(),
        "LOCAL_WORLD_SIZE": here.get_local_world_size(),
    }
    meeting = broadcast_from_rank_zero(free_address())
    environment = os.environ | {name: str(value) for name, value in (rank | meeting).items()}
    environment["PYTHONPATH"] = str(ROOT)
    environment.setdefault("OMP_NUM_THREADS", "1")
    subprocess.run([sys.executable, "-m", "distclip", "train", *job["words"]], cwd=ROOT, env=environment, check=True)


def free_address() -> dict[str, Any]:
    """Where the ranks can meet, if this worker has rank 0."""
    address = ray.util.get_node_ip_address()
    with socket.socket() as listener:
        listener.bind((address, 0))
        return {"MASTER_ADDR": address, "MASTER_PORT": listener.getsockname()[1]}


def main(workers: int, config: str, *words: str) -> None:
    run = [f"run.dir={ROOT / 'runs' / Path(config).stem}", "resume=true"]  # a restarted worker resumes
    TorchTrainer(
        work,
        train_loop_config={"words": [config, *run, *words]},
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu="GPU" in ray.cluster_resources()),
        run_config=ray.train.RunConfig(failure_config=ray.train.FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    ray.init()
    main(int(sys.argv[1]), *sys.argv[2:])
