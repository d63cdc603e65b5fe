"""Two network namespaces are two machines to torch: launch/multinode.sh trains over the wire between them.

Needs root and iproute2. The machines have addresses and no names: their common hostname leads to neither.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from support.ranks import run_ranks
from support.samples import rare
from train.commands import ROOT, TINY, numbers, train_here

LIMIT = 200  # seconds; about 10 on two quiet cores
ADDRESSES = ["10.77.0.1", "10.77.0.2"]
WORDS = [*TINY, "train.steps=6", "train.log_every=1"]
GRADIENTS = 6 * 4 * 9_376 // 2  # bytes: of six steps in fp32, the half that is the other rank's


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)


def reason_against() -> str | None:
    """Why there can be no namespaces here, if so."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux, to make network namespaces"
    if shutil.which("ip") is None:
        return "needs `ip`, of the package iproute2"
    name = f"distclip-try-{os.getpid()}"
    made = ip("netns", "add", name)
    ip("netns", "delete", name)
    return f"cannot make network namespaces: {made.stderr.strip()}" if made.returncode else None


@pytest.fixture(scope="module")
def machines() -> Iterator[list[str]]:
    """The names of two network namespaces with a cable between them."""
    if reason := reason_against():
        pytest.skip(reason)
    names = [f"distclip-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            assert ip("netns", "add", name).returncode == 0
        cable = ["link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1]]
        assert ip(*cable).returncode == 0
        for name, address in zip(names, ADDRESSES, strict=True):
            assert ip("-n", name, "link", "set", "lo", "up").returncode == 0
            assert ip("-n", name, "link", "set", "eth0", "up").returncode == 0
            assert ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0").returncode == 0
        yield names
    finally:
        for name in names:
            for left in ip("netns", "pids", name).stdout.split():
                os.kill(int(left), 9)
            ip("netns", "delete", name)


def start(machine: str, folder: Path, settings: Mapping[str, str]) -> subprocess.Popen[str]:
    ours = {"PYTHON": sys.executable, "RUN_DIR": str(folder), "JOIN_TIMEOUT": "60", "DEADLINE": f"{LIMIT}"}
    own = {"PET_", "GLOO_", "NCCL_", "TORCH", "RDZV", "NNODES", "NPROC"}  # nothing of the test's own environment
    clean = {name: value for name, value in os.environ.items() if not name.startswith(tuple(own))}
    return subprocess.Popen(
        ["ip", "netns", "exec", machine, "bash", str(ROOT / "launch/multinode.sh"), "configs/quickstart.yaml", *WORDS],
        cwd=ROOT,
        env=clean | ours | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def sent(machine: str) -> int:
    """Bytes that have left the machine."""
    (link,) = json.loads(ip("-n", machine, "-json", "-statistics", "link", "show", "eth0").stdout)
    return int(link["stats64"]["tx"]["bytes"])


def settings_of(launcher: str, rank: int) -> dict[str, str]:
    if launcher == "c10d":
        return {"RDZV_ENDPOINT": f"{ADDRESSES[0]}:29500", "NNODES": "2", "NPROC_PER_NODE": "1"}
    return {  # all that Kubeflow Trainer v2 gives to a pod
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "1",
        "PET_NODE_RANK": str(rank),
        "PET_MASTER_ADDR": ADDRESSES[0],
        "PET_MASTER_PORT": "29400",
    }


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two ranks that are processes of this machine."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    words = [*WORDS, f"run.dir={folder}", "resume=true"]
    assert run_ranks(train_here, 2, "quickstart.yaml", words) == [0, 0]
    return folder


@pytest.mark.parametrize("launcher", ["c10d", rare("kubeflow")])
def test_two_machines_train_as_two_ranks_of_one(launcher, machines, one_machine: Path, tmp_path: Path):
    before = [sent(machine) for machine in machines]
    jobs = [start(machine, tmp_path / "two", settings_of(launcher, i)) for i, machine in enumerate(machines)]
    try:
        outputs = [job.communicate(timeout=LIMIT + 60)[0] for job in jobs]
    finally:
        for job in jobs:
            job.terminate()
            job.wait()
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(outputs)
    assert "ranks    2 (fsdp2) on cpu, collectives by gloo" in outputs[0] + outputs[1]
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["status"] == "finished"
    assert numbers(tmp_path / "two") == numbers(one_machine)
    assert all(sent(machine) - early > GRADIENTS for machine, early in zip(machines, before, strict=True))
