"""A recurrent net that needs clipping: ReLU units, recurrence initialised to the identity (Le et al. 2015)."""

from dataclasses import dataclass

from torch import Tensor, nn

from distclip.train.problem import require


@dataclass(kw_only=True, slots=True, frozen=True)
class IrnnConfig:
    width: int = 64  #: of the recurrent state

    def __post_init__(self) -> None:
        require(0 < self.width <= 2**16, "model.width", f"must lie between 1 and 65536, not {self.width}")


class Irnn(nn.Module):
    """Steps (batch, time, features) to logits (batch, classes), read from the last state."""

    def __init__(self, config: IrnnConfig, *, features: int, classes: int) -> None:
        super().__init__()
        self.cell = nn.RNNCell(features, config.width, nonlinearity="relu")
        self.head = nn.Linear(config.width, classes)
        nn.init.eye_(self.cell.weight_hh)
        nn.init.normal_(self.cell.weight_ih, std=0.1)
        nn.init.zeros_(self.cell.bias_hh)
        nn.init.zeros_(self.cell.bias_ih)

    def forward(self, steps: Tensor) -> Tensor:
        state = steps.new_zeros(steps.shape[0], self.cell.hidden_size)
        for t in range(steps.shape[1]):
            state = self.cell(steps[:, t], state)
        return self.head(state)  # type: ignore[no-any-return]
