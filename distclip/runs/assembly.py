"""How what was logged under many names becomes one run, each column by the steps of the norm."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from distclip.errors import counted
from distclip.runs.names import COEF, CULPRIT, LOSS, MAX_NORM, NORM, SKIP, Names, is_norm, known, layer_in, print_in
from distclip.runs.refusals import no_column, no_norm, no_number, no_values, several_norms
from distclip.runs.run import Floats, Layers, Log, Run, Series, Steps
from distclip.telemetry import keys

ByName: TypeAlias = Mapping[str, Series]


def assembled(log: Log, names: Names) -> Run:
    """The run that a log tells of.

    Raises:
        RunError: a column that the user named is not there, or none is known as the norm.
    """
    name = norm_column(log, names)
    series = {name: each.latest() for name, each in log.series.items()}
    norm, steps, given = series[name], series[name].step, names.max_norm
    unknown = np.full(len(steps), np.nan)
    layers = {layer: each for key, each in series.items() if (layer := layer_in(key, names.layers)) is not None}
    called = {
        "loss": loss_column(log, names),
        "norm": name,
        "max_norm": known(series, MAX_NORM),
        "coef": known(series, COEF),
        "skip": known(series, SKIP),
    }

    def column(wanted: str, by: Callable[[Series, Steps], Floats]) -> Floats:
        there = called[wanted]
        return unknown if there is None else by(series[there], steps)

    return Run(
        name=log.name,
        path=log.path,
        program=log.program,
        step=steps,
        norm=norm.value,
        max_norm=column("max_norm", Series.up_to) if given is None else np.full(len(steps), given),
        coef=column("coef", Series.at) if given is None else unknown,
        skip=column("skip", Series.at) > 0,
        loss=column("loss", Series.up_to),
        written={key: series[there] for key, there in called.items() if there is not None}
        | {f"norm/{layer}": each for layer, each in layers.items()},
        layers=layers_of(layers, steps),
        culprits=culprits_of(log),
        prints=prints_of(log),
        notes=(*log.notes, *restarted(len(log.series[name].step) - len(steps)), *between_records(series, norm)),
    )


def restarted(doubled: int) -> list[str]:
    were = f"{counted(doubled, 'step')} {'was' if doubled == 1 else 'were'}"
    said = f"{were} logged more than once (the run was restarted): the latest counts."
    return [said] if doubled else []


def between_records(series: ByName, norm: Series) -> list[str]:
    """Whether a log of some steps tells of a larger norm in one that it left out."""
    largest = series.get(keys.LARGEST)
    if largest is None:
        return []
    top = int(np.argmax(largest.value))
    if not largest.value[top] > np.max(np.where(np.isfinite(norm.value), norm.value, 0)):
        return []
    where = f"largest {largest.value[top]:.3g}, before step {largest.step[top]:,}"
    return [f"The log has some of the steps. Norms in between were higher ({where}): log every step to see them."]


def prints_of(log: Log) -> dict[str, Mapping[int, str]]:
    named = [(print_in(key), each) for key, each in log.texts.items()]
    return {name: each for name, each in named if name is not None}


def culprits_of(log: Log) -> dict[int, str]:
    late = enumerate(log.texts.get(name, {}) for name in CULPRIT)
    return {step - steps: text for steps, texts in late for step, text in texts.items()}


def norm_column(log: Log, names: Names) -> str:
    if names.norm is not None:
        return checked(log, "--norm", names.norm)
    found = known(log.columns, NORM)
    if found is None:
        ends = [name for name in log.columns if is_norm(name)]
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
    if name not in log.series:
        raise no_values(log.path, name)
    return name


def layers_of(named: ByName, steps: Steps) -> Layers:
    """Norms by layer, of the steps that have one of them."""
    if not named:
        return Layers()
    there = np.zeros(len(steps), np.bool_)
    for each in named.values():
        there |= np.isin(steps, each.step, assume_unique=True)
    rows = np.flatnonzero(there)
    return Layers(tuple(named), rows, np.stack([each.at(steps)[rows] for each in named.values()], 1))
