"""What programs call the columns that a report needs."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from distclip.telemetry import keys

# In order of preference, in lower case with `_` for `-` and blanks.
STEP = ("step", "_step", "global_step", "train/global_step", "trainer/global_step", "iteration", "iter", "iterations")
NORM = (
    keys.PRE_CLIP,
    "norm",  # distclip train
    "grad_norm",  # Transformers, torchtitan, nanotron, NeMo
    "train/grad_norm",  # Transformers by a tracker
    "grad/norm",
    "optim/grad_norm",  # prime-rl
    "optim/total_grad_norm",  # OLMo-core
    "actor/grad_norm",  # verl
    "grad_2.0_norm_total",  # Lightning's utilities.grad_norm
    "l2_norm/grad/global",  # Composer
    "global_grad_norm",
    "total_norm",
    "gradient_norm",
)
LOSS = (
    "loss",
    "train/loss",
    "train_loss",
    "train_loss_step",
    "train/loss_step",
    "loss_metrics/global_avg_loss",  # torchtitan
    "lm_loss",  # nanotron, Megatron
    "train/ce_loss",  # OLMo-core
    "loss/train/total",  # Composer
    "training_loss",
)
MAX_NORM = (keys.MAX_NORM, "max_norm", "max_grad_norm", "grad/threshold", "gradient_clip_val")
COEF = (keys.COEF, "coef", "clip_coef", "grad/clip_coef")
SKIP = (keys.SKIPPED, "skip", "skipped", "optim/step_skipped", "grad/skipped")
CULPRIT = ("culprit", "culprit_before")  # the second: of the step before, which accelerators tell late
LAYER = re.compile(r"(?:grad_norm/layer/|norm/|grad_[\d.]+_norm/|l2_norm/grad/|grad/norm/)(?P<name>.+)", re.DOTALL)
KNOWN = {keys.LARGEST, *STEP, *NORM, *LOSS, *MAX_NORM, *COEF, *SKIP, *CULPRIT}
TOTALS = {"global", "total"}
PRINT = keys.FINGERPRINT_OF.format("")  # what names of fingerprints of parameters begin with


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What the user says columns are called, and the bound of a run that logged none. None: find it out."""

    step: str | None = None
    norm: str | None = None
    loss: str | None = None
    layers: str | None = None  # what the names of layers begin with
    max_norm: float | None = None


def plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def matters(name: str, names: Names) -> bool:
    """Whether a report has a use for this column."""
    mine = name in (names.step, names.norm, names.loss) or plain(name) in KNOWN
    return mine or is_norm(name) or layer_in(name, names.layers) is not None or print_in(name) is not None


def print_in(name: str) -> str | None:
    """The parameter that a column has fingerprints of, "" of all; None of another column."""
    if name == keys.FINGERPRINT:
        return ""
    return name.removeprefix(PRINT) if name.startswith(PRINT) and name != PRINT else None


def is_norm(name: str) -> bool:
    return plain(name).rpartition("/")[2] == "grad_norm"


def known(columns: Iterable[str], wanted: tuple[str, ...]) -> str | None:
    """The column that goes by one of these names, the most preferred."""
    by_name = {plain(column): column for column in columns}
    return next((by_name[name] for name in wanted if name in by_name), None)


def layer_in(name: str, prefix: str | None) -> str | None:
    """The layer that a column is about, or None."""
    if prefix is not None:
        return name.removeprefix(prefix) if name.startswith(prefix) and name != prefix else None
    found = LAYER.fullmatch(name)
    return found["name"] if found and found["name"] not in TOTALS else None
