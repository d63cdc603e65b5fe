"""What programs call the columns that a report needs, and how a log becomes a run."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from distclip.runs.refusals import no_column, no_norm, no_number, no_values, several_norms
from distclip.runs.run import Floats, Layers, Log, Run, Series, Steps
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
LAYER = re.compile(r"(?:grad_norm/layer/|norm/|grad_[\d.]+_norm/|l2_norm/grad/|grad/norm/)(?P<name>.+)")
KNOWN = {keys.LARGEST, *STEP, *NORM, *LOSS, *MAX_NORM, *COEF, *SKIP, *CULPRIT}
TOTALS = {"global", "total"}


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
    return mine or is_norm(name) or layer_in(name, names.layers) is not None


def is_norm(name: str) -> bool:
    return plain(name).rpartition("/")[2] == "grad_norm"


def known(columns: Iterable[str], wanted: tuple[str, ...]) -> str | None:
    """The column that goes by one of these names, the most preferred."""
    by_name = {plain(column): column for column in columns}
    return next((by_name[name] for name in wanted if name in by_name), None)


def assembled(log: Log, names: Names) -> Run:
    """The run that a log tells of.

    Raises:
        RunError: a column that the user named is not there, or none is known as the norm.
    """
    series = {name: each.latest() for name, each in log.series.items() if len(each.step)}
    norm = series[norm_column(log, names)]
    steps, unknown = norm.step, np.full(len(norm.step), np.nan)
    doubled = len(log.series[norm_column(log, names)].step) - len(steps)
    notes = [*log.notes]
    if doubled:
        notes.append(f"{doubled:,} steps were logged more than once (the run was restarted): the latest counts.")

    if keys.LARGEST in series:
        notes += between_records(series[keys.LARGEST], norm)

    def column(wanted: tuple[str, ...]) -> Series | None:
        name = known(series, wanted)
        return None if name is None else series[name]

    loss = series.get(loss_column(log, names) or "")
    bound, coef, skip = column(MAX_NORM), column(COEF), column(SKIP)
    max_norm = unknown if bound is None else bound.up_to(steps)
    return Run(
        name=log.name,
        path=log.path,
        program=log.program,
        step=steps,
        norm=norm.value,
        max_norm=max_norm if names.max_norm is None else np.full(len(steps), names.max_norm),
        coef=unknown if coef is None or names.max_norm is not None else coef.at(steps),
        skip=np.zeros(len(steps), np.bool_) if skip is None else skip.at(steps) > 0,
        loss=unknown if loss is None else loss.up_to(steps),
        layers=layers_of(series, steps, names.layers),
        culprits=culprits_of(log),
        notes=tuple(notes),
    )


def between_records(largest: Series, norm: Series) -> list[str]:
    """Whether a log of some steps tells of a larger norm in one that it left out."""
    top = int(np.argmax(largest.value))
    if not largest.value[top] > np.nanmax(np.where(np.isfinite(norm.value), norm.value, 0)):
        return []
    where = f"largest {largest.value[top]:.3g}, before step {largest.step[top]:,}"
    return [f"The log has some of the steps. Norms in between were higher ({where}): log every step to see them."]


def culprits_of(log: Log) -> dict[int, str]:
    late = enumerate(log.texts.get(name, {}) for name in CULPRIT)
    return {step - steps: text for steps, texts in late for step, text in texts.items()}


def norm_column(log: Log, names: Names) -> str:
    if names.norm is not None:
        return checked(log, "--norm", names.norm)
    found = known((*log.texts, *log.series), NORM)
    if found is None:
        ends = [name for name in dict.fromkeys((*log.texts, *log.series)) if is_norm(name)]
        if not ends:
            raise no_norm(log.path, log.columns)
        if len(ends) > 1:
            raise several_norms(log.path, ends)
        found = ends[0]
    return checked(log, "--norm", found)


def loss_column(log: Log, names: Names) -> str | None:
    return known(log.series, LOSS) if names.loss is None else checked(log, "--loss", names.loss)


def checked(log: Log, option: str, name: str) -> str:
    """The name of a column that is there and holds numbers alone."""
    for text in log.texts.get(name, {}).values():
        raise no_number(log.path, name, str(text)[:80])
    if name not in log.columns:
        raise no_column(log.path, option, name, log.columns)
    if name not in log.series or not len(log.series[name].step):
        raise no_values(log.path, name)
    return name


def layers_of(series: dict[str, Series], steps: Steps, prefix: str | None) -> Layers:
    """Norms by name, of the steps that have one of them."""
    named = {layer: name for name in series if (layer := layer_in(name, prefix)) is not None}
    columns: list[Floats] = [series[name].at(steps) for name in named.values()]
    if not columns:
        return Layers()
    there = np.zeros(len(steps), np.bool_)
    for name in named.values():
        there |= np.isin(steps, series[name].step, assume_unique=True)
    rows = np.flatnonzero(there)
    return Layers(tuple(named), rows, np.stack([column[rows] for column in columns], 1).astype(np.float32))


def layer_in(name: str, prefix: str | None) -> str | None:
    """The layer that a column is about, or None."""
    if prefix is not None:
        return name.removeprefix(prefix) if name.startswith(prefix) and name != prefix else None
    found = LAYER.fullmatch(name)
    return found["name"] if found and found["name"] not in TOTALS else None
