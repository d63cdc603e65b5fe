"""TensorBoard: a scalar for each number."""

import os
from collections.abc import Mapping

from .extras import missing

try:
    from torch.utils.tensorboard import SummaryWriter
except ModuleNotFoundError as error:
    raise missing("tensorboard", "tensorboard") from error


class TensorBoard:
    """``to``: a ``SummaryWriter``, which stays open, or the folder for one."""

    def __init__(self, to: SummaryWriter | str | os.PathLike[str]) -> None:
        self._to = to
        self._writer = to if isinstance(to, SummaryWriter) else None

    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        if self._writer is None:  # not before: it makes a file, also on ranks that never write
            assert not isinstance(self._to, SummaryWriter)
            self._writer = SummaryWriter(os.fspath(self._to))
        for key, number in numbers.items():
            self._writer.add_scalar(key, number, step)

    def close(self) -> None:
        """A record after this goes on in another file of the folder."""
        if self._writer is not None:
            self._writer.flush()
            if not isinstance(self._to, SummaryWriter):
                self._writer.close()
                self._writer = None
