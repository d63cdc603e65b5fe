"""The command that resumes a run is one that the shell can read, for whatever started the ranks."""

import shlex
import sys
from pathlib import Path

import pytest
import torch

from distclip.ranks.lost_ranks import MEETING_POINT
from distclip.train.folder import RunFolder
from distclip.train.place import Place
from distclip.train.resuming import command_to_resume, program


def command(folder: str, world: int = 4) -> str:
    place = Place(rank=0, world=world, device=torch.device("cpu"), backend="gloo")
    return command_to_resume(RunFolder(path=Path(folder)), place)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "my runs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("distclip.train.resuming.which", lambda name: str(Path(sys.executable).parent / name))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    monkeypatch.delenv(MEETING_POINT, raising=False)
    return folder


def test_what_started_its_own_ranks_does_so_again(here, monkeypatch):
    monkeypatch.setenv(MEETING_POINT, "file:///tmp/ranks")
    words = ["cd", str(here), "&&", "distclip", "train", "it's/config.yaml", "resume=true"]
    assert shlex.split(command("it's")) == words


def test_torchrun_on_one_machine_starts_as_many_ranks(here, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    start = ["torchrun", "--nproc-per-node", "4", "-m", "distclip", "train"]
    assert shlex.split(command("run")) == ["cd", str(here), "&&", *start, "run/config.yaml", "resume=true"]


def test_several_machines_are_started_as_they_were(here, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert command("a b") == "the same command on each machine, and resume=true run.dir='a b'"


def test_a_program_that_the_shell_would_find_elsewhere_is_called_by_its_python(monkeypatch):
    for found in (None, "/somewhere/else/distclip"):
        monkeypatch.setattr("distclip.train.resuming.which", lambda name, found=found: found)
        assert program("distclip", "distclip") == f"{shlex.quote(sys.executable)} -m distclip"
