"""The config of a run: one frozen dataclass per section of the YAML file, each with its own checks."""

import math
from dataclasses import dataclass
from typing import Literal

from distclip import Policy
from distclip.train.models.gpt import GptConfig
from distclip.train.models.irnn import IrnnConfig
from distclip.train.models.recurrent import RecurrentConfig
from distclip.train.problem import require
from distclip.train.tasks.digits import DigitsData
from distclip.train.tasks.rows import RowsData
from distclip.train.tasks.text import TextData


@dataclass(kw_only=True, slots=True, frozen=True)
class Train:
    """Length, batches, and what happens every so many steps."""

    steps: int | None = None  #: the length, in steps or in epochs: give one of them
    epochs: int | None = None  #: see `steps`
    #: samples per step over all processes; a multiple of the data-parallel processes times microbatches
    batch_size: int
    log_every: int = 10  #: steps between lines if stdout is not a terminal
    #: steps between evaluations on the held-out part; null: each epoch, or with `steps` only at the end
    eval_every: int | None = None
    save_every: int | None = None  #: steps between checkpoints; there is always one at the end
    precision: Literal["fp32", "bf16"] = "fp32"  #: of forward and backward; parameters stay in fp32

    def __post_init__(self) -> None:
        require((self.steps is None) != (self.epochs is None), "train.steps", "give either steps or epochs")
        for name in ("steps", "epochs", "batch_size", "log_every", "eval_every", "save_every"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name}", f"must be at least 1, not {value}")


@dataclass(kw_only=True, slots=True, frozen=True)
class Optim:
    """The optimizer and its learning rate as a function of the step."""

    name: Literal["adamw", "sgd"] = "adamw"  #: the optimizer
    lr: float  #: the learning rate, after the warm-up
    weight_decay: float = 0.0  #: decoupled in AdamW, added to the gradient in SGD
    betas: tuple[float, float] = (0.9, 0.95)  #: of AdamW
    momentum: float = 0.0  #: of SGD
    fused: bool = False  #: the optimizer applies the clipping coefficient itself; torch has no fused SGD for FSDP2
    warmup_steps: int = 0  #: steps in which the learning rate rises from 0
    decay: Literal["none", "cosine"] = "none"  #: `cosine`: down to a tenth at the end

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "optim.lr", f"must be a positive finite number, not {self.lr}")
        decays = 0 <= self.weight_decay < math.inf
        require(decays, "optim.weight_decay", f"must be a finite number of at least 0, not {self.weight_decay}")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", f"must lie in [0, 1), not {self.betas}")
        require(0 <= self.momentum < 1, "optim.momentum", f"must lie in [0, 1), not {self.momentum}")
        require(self.warmup_steps >= 0, "optim.warmup_steps", f"must not be negative, not {self.warmup_steps}")


@dataclass(kw_only=True, slots=True, frozen=True)
class ClipOptions:
    """What goes with any policy."""

    nonfinite: Literal["skip", "raise", "propagate"] = "skip"  #: what a non-finite norm does to the step
    max_consecutive_skips: int | None = None  #: fail after this many skipped steps in a row
    #: norms in `metrics.jsonl`: `parameters` for each parameter's, or a list of patterns, `[blocks.*, "*.bias"]`, for
    #: the norm of all that match each
    watch: str | tuple[str, ...] | None = None
    watch_zeros: bool = False  #: `zeros/...` too: the share of zero gradient elements in each of what `watch` names
    #: the norm that is nearest to the true one, with the same bits on any number of processes; not with `watch`
    exact: bool = False
    #: in every so many steps a fingerprint of each gradient, for `distclip diff`; not with ZeRO
    fingerprint_every: int | None = None
    #: prove the layout every so many steps, by `Clipper.verify()`; not with ZeRO
    verify_every: int | None = None
    #: what is done where copies of gradients have other bits than each other; auto: `warn` on CPUs, `ignore` on GPUs
    on_drift: Literal["auto", "raise", "warn", "ignore"] = "auto"
    #: read gradients before DDP or FSDP2 reduces them too, so that the rank of a NaN is named: a pass over them in
    #: every step; not with ZeRO
    find_source: bool = False

    def __post_init__(self) -> None:
        for name in ("max_consecutive_skips", "fingerprint_every", "verify_every"):
            count = getattr(self, name)
            require(count is None or count > 0, f"clip.{name}", f"must be positive, not {count}")
        known = self.watch in (None, "parameters") or (isinstance(self.watch, tuple) and self.watch != ())
        require(known, "clip.watch", f"must be parameters, or a list of patterns of their names, not {self.watch!r}")
        watches = self.watch is not None or not self.watch_zeros
        require(watches, "clip.watch_zeros", "counts in what is watched: say clip.watch=parameters, or patterns")


@dataclass(kw_only=True, slots=True, frozen=True)
class Clip:
    """The clipping policy, which the file describes beside the options: see policies.py."""

    policy: Policy
    options: ClipOptions


@dataclass(kw_only=True, slots=True, frozen=True)
class Parallel:
    """How many processes there are, and how they share the model.

    The processes that `pipeline` and `tensor` leave are data-parallel; `strategy` says how that axis holds the model.
    """

    #: how data-parallel processes hold the model; `none` is for one process
    strategy: Literal["ddp", "fsdp2", "none", "zero1", "zero2", "zero3"] = "ddp"
    #: processes to start on this machine, at most 8, or one per core where it has more. A launcher starts its own
    #: number, which must not be smaller
    processes: int = 1
    #: `cuda`: a GPU for each process, or the run is refused; `auto`: `cuda` where there are so many GPUs, else `cpu`
    device: Literal["auto", "cpu", "cuda"] = "auto"
    replicate: int = 1  #: `fsdp2`: number of replicas, each sharded
    tensor: int = 1  #: processes that share every layer; divides `model.heads`
    pipeline: int = 1  #: stages; at most `model.layers`
    expert: int = 1  #: `fsdp2`: groups of experts; divides `model.experts`
    schedule: Literal["1f1b", "gpipe"] = "1f1b"  #: of the pipeline
    microbatches: int | None = None  #: per process and step in the pipeline; null: as many as stages
    timeout: float = 600.0  #: seconds a rank waits for another; for one that has yet to start, at least 600

    @property
    def copies_by_fsdp2(self) -> bool:
        """DDP can neither save a DTensor nor count microbatches; FSDP2 with shards of one rank replicates as well."""
        return self.strategy == "ddp" and self.tensor * self.pipeline > 1

    @property
    def shards(self) -> bool:
        """Whether parameters are DTensors."""
        return self.strategy == "fsdp2" or self.copies_by_fsdp2 or self.tensor > 1

    def __post_init__(self) -> None:
        for name in ("processes", "replicate", "tensor", "pipeline", "expert"):
            require(getattr(self, name) > 0, f"parallel.{name}", f"must be at least 1, not {getattr(self, name)}")
        require(1 <= self.timeout <= 86400, "parallel.timeout", f"must lie in [1, 86400], not {self.timeout}")
        for name in ("replicate", "expert"):
            alone = getattr(self, name) == 1 or self.strategy == "fsdp2"
            require(alone, f"parallel.{name}", f"needs parallel.strategy=fsdp2, not {self.strategy}")
        require(
            self.expert == 1 or self.tensor == 1, "parallel.expert", "does not go with parallel.tensor: set one to 1"
        )
        for name in ("tensor", "pipeline"):
            alone = getattr(self, name) == 1 or not self.strategy.startswith("zero")
            require(alone, f"parallel.{name}", f"does not go with {self.strategy}: use fsdp2, ddp or none")
        if self.microbatches is not None:
            least = self.pipeline if self.schedule == "1f1b" else 1
            require(self.pipeline > 1, "parallel.microbatches", "needs a pipeline: set parallel.pipeline")
            require(
                self.microbatches >= least,
                "parallel.microbatches",
                f"must be at least {least} with {self.schedule}, not {self.microbatches}",
            )


@dataclass(kw_only=True, slots=True, frozen=True)
class Run:
    """Where the run writes."""

    dir: str | None = None  #: the run folder; null makes a new one in `root`
    root: str = "runs"  #: where new run folders are made
    keep: int = 2  #: checkpoints kept
    restarts: int = 0  #: how often `distclip train` restarts all ranks after one has failed; needs `resume=true`

    def __post_init__(self) -> None:
        require(self.keep > 0, "run.keep", f"must be at least 1, not {self.keep}")
        require(self.restarts >= 0, "run.restarts", f"must not be negative, not {self.restarts}")


@dataclass(kw_only=True, slots=True, frozen=True)
class Config:
    """A whole run. `task` determines the types of `data` and `model`."""

    task: Literal["text", "rows", "digits"]  #: determines the keys of `data` and `model`
    name: str  #: prefix of the run folder
    seed: int = 0  #: of the model, the order of samples, the held-out part and dropout
    resume: bool = False  #: resume from the newest checkpoint in `run.dir`
    data: TextData | RowsData | DigitsData
    model: GptConfig | RecurrentConfig | IrnnConfig
    train: Train
    optim: Optim
    clip: Clip
    parallel: Parallel
    run: Run

    def __post_init__(self) -> None:
        require(0 <= self.seed < 10**8, "seed", f"must lie in [0, 1e8), not {self.seed}")
        require(self.name != "" and "/" not in self.name, "name", f"names a folder: no {self.name!r} and no slashes")
        brief = len(self.name.encode()) <= 200 and self.name.isprintable()
        require(brief, "name", f"names a folder: at most 200 bytes that can be printed, not {self.name!r}")
        require(not self.resume or self.run.dir is not None, "resume", "which run? add run.dir=FOLDER")
        goes_on = self.resume or self.run.restarts == 0
        require(goes_on, "run.restarts", "ranks that start again must go on: add resume=true run.dir=FOLDER")
        self.check_cuts()
        require(
            not (self.parallel.shards and self.optim.name == "sgd" and self.optim.fused),
            "optim.fused",
            "torch has no fused SGD for sharded (DTensor) parameters: set optim.fused=false or use adamw",
        )

    def check_cuts(self) -> None:
        """The model can be cut along the axes that ask for it."""
        p, model = self.parallel, self.model
        for name in ("tensor", "pipeline", "expert"):
            cuttable = getattr(p, name) == 1 or isinstance(model, GptConfig)
            require(
                cuttable, f"parallel.{name}", f"cuts a GPT (task=text), not the model of task={self.task}: set it to 1"
            )
        if isinstance(model, GptConfig):
            heads, layers, experts = model.heads, model.layers, model.experts
            require(heads % p.tensor == 0, "parallel.tensor", f"{p.tensor} does not divide model.heads={heads}")
            require(
                layers >= p.pipeline,
                "parallel.pipeline",
                f"{p.pipeline} stages need as many model.layers, not {layers}",
            )
            require(p.expert == 1 or experts > 0, "parallel.expert", "there are no experts: set model.experts")
            require(p.tensor == 1 or experts == 0, "parallel.tensor", "does not cut experts: set model.experts=0")
            require(experts % p.expert == 0, "parallel.expert", f"{p.expert} does not divide model.experts={experts}")
