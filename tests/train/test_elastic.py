"""Ranks that die, stop or come back in another number, and disks that fail: what a run says, and where it goes on.

tests/train/faults/ has what takes longer: kills at many steps, under torchrun too, a full file system, a cut link.
"""

import json
import os
import pickle
import resource
import shutil
import signal
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distclip.cli import main
from distclip.train.checkpoint import CheckpointError
from distclip.train.folder import open_folder
from distclip.train.job import Job, build, check
from distclip.train.manifest import sum_of
from distclip.train.parse import read_config
from distclip.train.place import Place
from distclip.train.problem import ConfigError
from distclip.train.stop import StopSignals
from support.programs import play
from support.ranks import run_ranks
from train.commands import CONFIGS, ROOT, TINY, metrics, start, train_here
from train.victims import PATIENCE, hit, still_there, timeless, wait_for_step

AUTOCLIP = ["clip.policy=autoclip", "clip.max_norm=null", "clip.window=7", "clip.percentile=50"]
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")


def words_of(folder: Path, *words: str) -> list[str]:
    return [*TINY, *AUTOCLIP, *words, f"run.dir={folder}", "parallel.processes=1"]


# ---- other numbers of ranks --------------------------------------------------------------------------------


def train_with_bad_steps(bad: set[int], words: list[str]) -> int:
    """As `train_here`; in the steps `bad`, counted from 0, the last rank's gradients are not finite."""
    settings = read_config(CONFIGS / "quickstart.yaml", words)
    place = Place(rank=dist.get_rank(), world=dist.get_world_size(), device=torch.device("cpu"), backend="gloo")
    with StopSignals() as stop:
        dataset = check(settings, place.world)
        dist.barrier()
        trainer = build(settings, dataset, place, stop)

        def spoil(module: torch.nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
            step = trainer.held.clipper.state_dict()["steps"]
            hurts = module.training and step in bad and place.rank == place.world - 1
            return logits * float("inf") if hurts else logits

        trainer.held.model.register_forward_hook(spoil)
        return Job(settings, dataset, trainer, open_folder(settings, place)).run()


def test_the_clipper_decides_the_same_on_four_two_and_one_ranks(tmp_path: Path):
    """Sums over other ranks round otherwise: norms agree to a few fp32 roundings, skips and what is clipped exactly."""
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    train = partial(train_with_bad_steps, {3, 9, 13})
    fsdp2, ddp, alone = (f"parallel.strategy={name}" for name in ("fsdp2", "ddp", "none"))
    run_ranks(train, 4, words_of(straight, fsdp2, "train.steps=18"))
    run_ranks(train, 4, words_of(moved, fsdp2, "train.steps=6"))
    run_ranks(train, 2, words_of(moved, ddp, "train.steps=12", "resume=true"))
    run_ranks(train, 1, words_of(moved, alone, "train.steps=18", "resume=true"))
    one, other = metrics(straight), metrics(moved)
    assert [r["step"] for r in other] == [r["step"] for r in one] == list(range(1, 19))
    assert [r["skip"] for r in other] == [r["skip"] for r in one]
    assert [r["step"] for r in one if r["skip"]] == [4, 10, 14]
    assert [r["coef"] < 1 for r in other if not r["skip"]] == [r["coef"] < 1 for r in one if not r["skip"]]
    for there, here in zip(other, one, strict=True):
        for name in ("norm", "max_norm", "coef"):
            assert float(there[name]) == pytest.approx(float(here[name]), rel=1e-6, nan_ok=True), (name, here["step"])
    assert 2 < sum(r["coef"] < 1 for r in one if not r["skip"]) < 14  # above the bound and below
    assert len({r["max_norm"] for r in one}) >= 8  # the bound moves


# ---- killed and stopped ------------------------------------------------------------------------------------


@linux
def test_a_killed_rank_is_named_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    settings = [*TINY, *AUTOCLIP, "train.steps=60", "train.save_every=10", "train.eval_every=25"]
    settings.append("clip.fingerprint_every=7")
    run_ranks(train_here, 2, "quickstart.yaml", [*settings, f"run.dir={straight}"])
    words = [*settings, "train.log_every=1", f"run.dir={killed}", "resume=true", "run.restarts=1"]
    job = start("train", CONFIGS / "quickstart.yaml", *words)
    wait_for_step(killed, 23, job)
    victims: set[int] = set()
    hit(job, 1, signal.SIGKILL, victims)
    output, errors = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, errors
    assert "distclip: training failed: " in errors
    assert "no answer from rank 1: dead, stopped or out of reach" in errors
    assert "Traceback" not in errors
    assert "resumed  after step " in output
    assert timeless(killed) == timeless(straight)
    assert main(["diff", str(straight), str(killed)]) == 0
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (straight, killed)]
    one, other = ({k: v for k, v in s.items() if k not in ("seconds", "folder")} for s in summaries)
    assert one == other
    assert still_there(victims) == set()


STOPPING = """
import os, signal, sys, threading, time
from distclip.cli import main
from train.victims import steps_of
from pathlib import Path

os.environ["DISTCLIP_MEETING_POINT"] = "file://{folder}/ranks"

def stop():
    while steps_of(Path("{folder}/run")) < 5:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGSTOP)

if os.environ["RANK"] == "1":
    threading.Thread(target=stop, daemon=True).start()
sys.exit(main({words!r}))
"""


@linux
def test_a_stopped_rank_is_named_once_the_others_have_waited_long_enough(tmp_path: Path):
    """No launcher would tell: the one here ends a rank only after the other."""
    words = [*TINY, "train.steps=100000", "parallel.timeout=4", f"run.dir={tmp_path / 'run'}"]
    program = tmp_path / "program.py"
    program.write_text(STOPPING.format(folder=tmp_path, words=["train", str(CONFIGS / "quickstart.yaml"), *words]))
    codes, said = play(program, 2, [str(ROOT), str(ROOT / "tests")], PATIENCE)
    assert codes == [1, -signal.SIGKILL], said
    (line,) = (line for line in said.splitlines() if line.startswith("distclip: "))
    assert line.startswith("distclip: training failed: no answer from rank 1: dead, stopped or out of reach")
    assert "Traceback" not in said


# ---- disks -------------------------------------------------------------------------------------------------


def train_on_a_small_disk(words: list[str], limit: int) -> str:
    """What rank 1 cannot write past `limit` bytes of a file costs the run."""
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        train_here("quickstart.yaml", words)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "no error"


def test_a_disk_that_is_full_ends_the_run_and_leaves_the_checkpoints_before(tmp_path: Path):
    words = [*TINY, "train.save_every=2", f"run.dir={tmp_path}"]
    run_ranks(train_here, 2, "quickstart.yaml", [*words, "train.steps=4"])
    before = sorted(tmp_path.glob("checkpoints/*"))
    assert [path.name for path in before] == ["step-00000002", "step-00000004"]
    said = run_ranks(train_on_a_small_disk, 2, [*words, "train.steps=9", "resume=true"], 20_000)
    assert said[0] == said[1]
    assert said[0].startswith(f"cannot write {tmp_path}/checkpoints/step-00000006 (rank 1: ")
    assert sorted(tmp_path.glob("checkpoints/*")) == before
    run_ranks(train_here, 2, "quickstart.yaml", [*words, "train.steps=9", "resume=true"])
    assert [record["step"] for record in metrics(tmp_path)] == list(range(1, 10))


def cut_short(checkpoint: Path) -> str:
    data = (checkpoint / "__1_0.distcp").read_bytes()
    (checkpoint / "__1_0.distcp").write_bytes(data[: len(data) // 2])
    return "__1_0.distcp has another size than was written"


def flip_a_bit(checkpoint: Path) -> str:
    data = bytearray((checkpoint / "__1_0.distcp").read_bytes())
    data[len(data) // 2] ^= 16
    (checkpoint / "__1_0.distcp").write_bytes(data)
    return "__1_0.distcp has other bytes than were written"


def lose_the_index(checkpoint: Path) -> str:
    (checkpoint / "index.json").unlink()
    return "index.json is missing"


def lose_the_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").unlink()
    return "manifest.json cannot be read"


def garble_the_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").write_bytes(b'{"step": 6, "files": {"../../config.yaml": [1, 2]}}')
    return "manifest.json cannot be read"


DAMAGES = [cut_short, flip_a_bit, lose_the_index, lose_the_manifest, garble_the_manifest]


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of six steps with checkpoints after 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("saved")
    words = [*TINY, "train.save_every=2", "run.keep=3"]
    run_ranks(train_here, 2, "quickstart.yaml", [*words, "train.steps=6", f"run.dir={folder}"])
    return folder, words


def shown(words: list[str]) -> str:
    with redirect_stdout(StringIO()) as output:
        train_here("quickstart.yaml", words)
    return output.getvalue()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(damage, saved_run, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(saved_run[0], folder)
    straight = timeless(folder)
    flaw = damage(folder / "checkpoints" / "step-00000006")
    words = [*saved_run[1], "train.steps=6", f"run.dir={folder}", "resume=true"]
    output, _ = run_ranks(shown, 2, words)
    assert f"warning  step-00000006 is damaged: {flaw}; put aside" in output
    assert "resumed  after step 4 of 6" in output
    assert timeless(folder) == straight
    names = [f"step-0000000{name}" for name in ("2", "4", "6", "6.damaged")]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == names


def refused(words: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        train_here("quickstart.yaml", words)
    return str(error.value)


def test_when_no_checkpoint_is_whole_all_ranks_say_so(saved_run, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(saved_run[0], folder)
    flaws = [
        damage(folder / "checkpoints" / f"step-0000000{step}")
        for damage, step in zip(DAMAGES[1:4], (2, 4, 6), strict=True)
    ]
    words = [*saved_run[1], "train.steps=6", f"run.dir={folder}", "resume=true"]
    before = sorted(folder.rglob("*"))
    said = run_ranks(refused, 2, words)
    assert said[0] == said[1]
    assert said[0].startswith("run.dir: no checkpoint in ")
    assert all(flaw in said[0] for flaw in flaws)
    assert sorted(folder.rglob("*")) == before


class Evil:
    """Unpickled without restriction, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_nothing_in_a_checkpoint_is_run(saved_run, tmp_path: Path):
    """Not torch's pickled index, and not a number that is not one."""
    folder, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(saved_run[0], folder)
    checkpoint = folder / "checkpoints" / "step-00000006"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    torch.save(Evil(mark), checkpoint / "__2_0.distcp")
    words = [*saved_run[1], f"run.dir={folder}", "resume=true"]
    run_ranks(train_here, 2, "quickstart.yaml", [*words, "train.steps=7"])
    assert not mark.exists()

    index = json.loads((checkpoint / "index.json").read_text())
    size = (checkpoint / "__2_0.distcp").stat().st_size
    index["position.step"] = {"file": "__2_0.distcp", "offset": 0, "length": size}
    (checkpoint / "index.json").write_text(json.dumps(index))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] |= {name: list(sum_of(checkpoint / name)) for name in ("index.json", "__2_0.distcp")}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(folder / "checkpoints" / "step-00000007")
    for said in run_ranks(unreadable, 2, [*words, "train.steps=7"]):
        assert said.startswith(f"cannot read {checkpoint} (rank 0: Weights only load failed")
    assert not mark.exists()


def unreadable(words: list[str]) -> str:
    with pytest.raises(CheckpointError) as error:
        train_here("quickstart.yaml", words)
    return str(error.value)
