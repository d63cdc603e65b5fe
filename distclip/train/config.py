"""What a run is made of: one frozen dataclass a section of the YAML file, each with its own checks."""

import math
from dataclasses import dataclass
from typing import Literal

from distclip.train.models.gpt import GptConfig
from distclip.train.models.gru import GruConfig
from distclip.train.models.irnn import IrnnConfig
from distclip.train.problem import ConfigError, require
from distclip.train.tasks.digits import DigitsData
from distclip.train.tasks.rows import RowsData
from distclip.train.tasks.text import TextData


@dataclass(kw_only=True, slots=True, frozen=True)
class Train:
    """How long, in which batches, and what happens every so many steps."""

    steps: int | None = None  # either steps or epochs
    epochs: int | None = None
    batch_size: int  # of the whole job, not of a rank
    log_every: int = 10
    eval_every: int | None = None  # None: after each epoch, or only at the end when `steps` is given
    save_every: int | None = None  # None: only at the end and when stopped

    def __post_init__(self) -> None:
        require((self.steps is None) != (self.epochs is None), "train.steps", "give either steps or epochs")
        for name in ("steps", "epochs", "batch_size", "log_every", "eval_every", "save_every"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name}", f"must be at least 1, not {value}")


@dataclass(kw_only=True, slots=True, frozen=True)
class Optim:
    """The optimizer and its learning rate as a function of the step."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)  # adamw
    momentum: float = 0.0  # sgd
    fused: bool = False
    warmup_steps: int = 0
    decay: Literal["none", "cosine"] = "none"

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "optim.lr", f"must be a positive number, not {self.lr}")
        require(self.weight_decay >= 0, "optim.weight_decay", f"must not be negative, not {self.weight_decay}")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", f"must lie in [0, 1), not {self.betas}")
        require(0 <= self.momentum < 1, "optim.momentum", f"must lie in [0, 1), not {self.momentum}")
        require(self.warmup_steps >= 0, "optim.warmup_steps", f"must not be negative, not {self.warmup_steps}")


@dataclass(kw_only=True, slots=True, frozen=True)
class Clip:
    """The clipping policy and what it needs. `none` measures the norm and scales nothing."""

    policy: Literal["max_norm", "value", "autoclip", "none"] = "max_norm"
    max_norm: float | None = None  # max_norm: the bound; autoclip: a ceiling on it
    clip_value: float | None = None  # value
    percentile: float = 10.0  # autoclip
    window: int = 1000  # autoclip
    nonfinite: Literal["skip", "raise", "propagate"] = "skip"
    max_consecutive_skips: int | None = None

    def __post_init__(self) -> None:
        needed = {"max_norm": "max_norm", "value": "clip_value"}.get(self.policy)
        if needed is not None and getattr(self, needed) is None:
            raise ConfigError(f"clip.{needed}", f"clip.policy={self.policy} needs it: add clip.{needed}=1.0")
        for name in ("max_norm", "clip_value", "window", "max_consecutive_skips"):
            value = getattr(self, name)
            require(value is None or value > 0, f"clip.{name}", f"must be positive, not {value}")
        require(0 <= self.percentile <= 100, "clip.percentile", f"must lie in [0, 100], not {self.percentile}")


@dataclass(kw_only=True, slots=True, frozen=True)
class Parallel:
    """How the model is spread over processes, and how many `distclip train` starts by itself."""

    strategy: Literal["ddp", "fsdp2", "none"] = "ddp"
    processes: int = 1

    def __post_init__(self) -> None:
        require(self.processes > 0, "parallel.processes", f"must be at least 1, not {self.processes}")


@dataclass(kw_only=True, slots=True, frozen=True)
class Run:
    """Where the run writes."""

    dir: str | None = None  # None: a new folder `root`/<name>-<timestamp>
    root: str = "runs"
    keep: int = 2  # checkpoints

    def __post_init__(self) -> None:
        require(self.keep > 0, "run.keep", f"must be at least 1, not {self.keep}")


@dataclass(kw_only=True, slots=True, frozen=True)
class Config:
    """A whole run. `task` decides which sections `data` and `model` are."""

    task: Literal["text", "rows", "digits"]
    name: str
    seed: int = 0
    resume: bool = False
    data: TextData | RowsData | DigitsData
    model: GptConfig | GruConfig | IrnnConfig
    train: Train
    optim: Optim
    clip: Clip
    parallel: Parallel
    run: Run

    def __post_init__(self) -> None:
        require(0 <= self.seed < 10**8, "seed", f"must lie in [0, 1e8), not {self.seed}")
        require(self.name != "" and "/" not in self.name, "name", f"names a folder: no {self.name!r} and no slashes")
        require(not self.resume or self.run.dir is not None, "resume", "which run? add run.dir=FOLDER")
        fused_sgd = self.optim.name == "sgd" and self.optim.fused
        require(
            not (fused_sgd and self.parallel.strategy == "fsdp2"),
            "optim.fused",
            "torch has no fused SGD for sharded (DTensor) parameters: set optim.fused=false or use adamw",
        )
