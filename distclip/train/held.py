"""A rank's part of a model: how it steps, and what goes into a checkpoint."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from distclip import Clipper, Report
from distclip.train.passes import Answer

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # by parameter name: ranks may hold different parameters


class Holder(Protocol):
    """A rank's part of the model with its optimizer and clipper."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def optimizer(self) -> Optimizer: ...

    @property
    def clipper(self) -> Clipper: ...

    def step(self, answer: Answer | None) -> Report:
        """Clip, step and drop the gradients of what gave this ``answer``. All ranks call."""

    def state(self) -> dict[str, Any]:
        """Model and optimizer by the names of the whole model, for any number of ranks. All ranks call."""

    def load(self, state: dict[str, Any]) -> None:
        """Load what `state` returned, here or on other ranks. All ranks call."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Held:
    """Plain and DTensor parameters in a torch optimizer.

    ``signals``: which numbers of an answer the policy asks for. ``stages``: so many ranks have one answer, on the last.
    """

    model: nn.Module
    optimizer: Optimizer
    clipper: Clipper
    signals: tuple[str, ...] = ()
    stages: int = 1

    def step(self, answer: Answer | None) -> Report:
        # The mean over ranks is then that of the ranks that have an answer.
        signals = {name: 0.0 if answer is None else getattr(answer, name) * self.stages for name in self.signals}
        report = self.clipper.step(self.optimizer, signals=signals)
        self.optimizer.zero_grad()
        return report

    def state(self) -> dict[str, Any]:
        stepped = bool(self.optimizer.state)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=FLAT)
        if not stepped:  # torch has made a step of zeros, to know what the state will be, and counted it
            for counted in (optimizer, *self.optimizer.state.values()):
                for name, value in counted.items():
                    if name.rpartition(".")[2] == "step":
                        value.zero_()
        # its settings are those of the config, and the learning rate follows from the step
        return {"model": model, "optimizer": {k: v for k, v in optimizer.items() if k.startswith("state.")}}

    def load(self, state: dict[str, Any]) -> None:
        _, optimizer = get_state_dict(self.model, self.optimizer, options=FLAT)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict={**optimizer, **state["optimizer"]},
            options=FLAT,
        )
