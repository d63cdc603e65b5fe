"""The run folder: config.yaml, metrics.jsonl, checkpoints/ and summary.json."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

from distclip.train.config import Config
from distclip.train.contents import check_contents
from distclip.train.metrics import read_records
from distclip.train.parse import document_of, read_config, to_yaml
from distclip.train.place import Place, from_rank_0
from distclip.train.problem import ConfigError, require

# What may differ when a run goes on: how long, how fast, where, what is shown. All else would make other numbers.
FREE = ("resume", "parallel.", "run.", "train.steps", "train.epochs", "train.log_every", "train.eval_every",
        "train.save_every", "optim.fused", "clip.watch", "clip.fingerprint_every", "clip.verify_every",
        "clip.find_source")  # fmt: skip


@dataclass(kw_only=True, slots=True, frozen=True)
class RunFolder:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"


def check_folder(config: Config) -> None:
    """Check that the run can be written there, overwrites no other run, and resumes with the config it began with."""
    path = Path(config.run.dir or config.run.root)
    key = "run.root" if config.run.dir is None else "run.dir"
    try:
        check_path(path, key, config)
    except OSError as error:
        raise ConfigError(key, f"cannot use {path}: {error.strerror}") from error


def check_path(path: Path, key: str, config: Config) -> None:
    there = next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())
    require(there.is_dir(), key, f"cannot write to {there}: it is no folder")
    check_writable(there, key)
    if config.run.dir is None:
        return
    folder = RunFolder(path=path)
    if config.resume:
        check_contents(path)
        read_records(folder.metrics)
    if config.resume and folder.config.exists():
        check_same(read_before(folder.config), config, folder.config)
    elif not config.resume:
        empty = not path.exists() or not any(path.iterdir())
        require(empty, "run.dir", f"{path} is not empty: add resume=true to go on with it, or name another folder")


def check_writable(folder: Path, key: str) -> None:
    """Write a byte to a file without a name: what modes say is not all, for a root user or a disk that is full."""
    try:
        with TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
    except OSError as error:
        raise ConfigError(key, f"cannot write to {folder}: {error.strerror}") from error


def read_before(path: Path) -> Config:
    """The config that the run was started with."""
    try:
        return read_config(path)
    except ConfigError as error:
        raise ConfigError(str(path), f"not the config of a run that can go on: {error}") from error


def check_same(before: Config, now: Config, where: Path) -> None:
    old, new = flat(before), flat(now)
    for key in sorted(old.keys() | new.keys()):
        same = old.get(key) == new.get(key) or key.startswith(FREE)
        require(same, key, f"cannot change in a resumed run: {new.get(key)!r} here, {old.get(key)!r} in {where}")


def flat(config: Config) -> dict[str, object]:
    """Every value of a config under its dotted key."""
    values: dict[str, object] = {}
    for name, section in document_of(config).items():
        if isinstance(section, dict):
            values |= {f"{name}.{key}": value for key, value in section.items()}
        else:
            values[name] = section
    return values


def open_folder(config: Config, place: Place) -> RunFolder:
    """Make the folder on rank 0, and return it on every rank. All ranks call."""
    if config.run.dir is not None:
        path = Path(config.run.dir)
        if place.rank == 0:
            path.mkdir(parents=True, exist_ok=True)
    else:
        # Only the second it was made in travels: the name follows from it.
        path = timestamped(config, from_rank_0(free_second(config) if place.rank == 0 else 0, place))
    folder = RunFolder(path=path)
    if place.rank == 0:
        folder.checkpoints.mkdir(exist_ok=True)
        resolved = replace(config, run=replace(config.run, dir=str(path)))
        folder.config.write_text(to_yaml(resolved), encoding="utf-8")
    return folder


def timestamped(config: Config, second: int) -> Path:
    return Path(config.run.root) / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(second))}"


def free_second(config: Config) -> int:
    """Make the folder for this second, or for the next one that no other run has taken."""
    second = int(time.time())
    while True:
        try:
            timestamped(config, second).mkdir(parents=True)
        except FileExistsError:
            second += 1
        else:
            return second
