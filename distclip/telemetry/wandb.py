"""Weights & Biases: the numbers over the Clipper's steps, whatever else the run logs. Nothing is imported for it."""

from collections.abc import Mapping
from typing import Any

from . import keys


class Wandb:
    """``run``: what ``wandb.init()`` returned; None on ranks without one, where nothing is written.

    W&B's own step counts calls of ``run.log`` and refuses one that is behind it, so records carry ``clip/step``, which
    charts of ``grad_norm/*`` and ``clip/*`` take for their x axis.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._begun = False

    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        if not self._begun:
            for shown in ("grad_norm/*", "grad_zeros/*", "clip/*"):
                self._run.define_metric(shown, step_metric=keys.STEP)
            self._begun = True
        self._run.log({**numbers, keys.STEP: step})
