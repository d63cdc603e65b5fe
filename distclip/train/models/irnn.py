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
        self.cell = identity_cell(features, config.width)
        self.head = nn.Linear(config.width, classes)

    def forward(self, steps: Tensor) -> Tensor:
        state = steps.new_zeros(steps.shape[0], self.cell.hidden_size)
        for t in range(steps.shape[1]):
            state = self.cell(steps[:, t], state)
        return self.head(state)  # type: ignore[no-any-return]


def identity_cell(features: int, width: int) -> nn.RNNCell:
    """A ReLU cell that begins by adding up what it reads."""
    cell = nn.RNNCell(features, width, nonlinearity="relu")
    nn.init.eye_(cell.weight_hh)
    nn.init.normal_(cell.weight_ih, std=0.1)
    nn.init.zeros_(cell.bias_hh)
    nn.init.zeros_(cell.bias_ih)
    return cell
