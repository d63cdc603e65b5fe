"""The data and the model of each task."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from distclip.train.dataset import Dataset
from distclip.train.models.gpt import Gpt, GptConfig
from distclip.train.models.irnn import Irnn, IrnnConfig
from distclip.train.models.recurrent import Recurrent, RecurrentConfig
from distclip.train.tasks.digits import DigitsData, load_digits
from distclip.train.tasks.rows import RowsData, load_rows
from distclip.train.tasks.text import TextData, load_text


@dataclass(kw_only=True, slots=True, frozen=True)
class Task:
    """The types of the config's `data` and `model`, with their reader and builder."""

    data: type[Any]
    model: type[Any]
    load: Callable[[Any, int], Dataset]
    build: Callable[[Any, Dataset], nn.Module]
    unit: str  # what the speed is counted in: targets


def build_gpt(config: GptConfig, dataset: Dataset) -> Gpt:
    return Gpt(config, symbols=dataset.symbols, time=dataset.train.inputs.shape[1])


def build_recurrent(config: RecurrentConfig, dataset: Dataset) -> Recurrent:
    return Recurrent(config, symbols=dataset.symbols, classes=dataset.classes)


def build_irnn(config: IrnnConfig, dataset: Dataset) -> Irnn:
    return Irnn(config, features=dataset.train.inputs.shape[2], classes=dataset.classes)


TASKS = {
    "text": Task(data=TextData, model=GptConfig, load=load_text, build=build_gpt, unit="tokens"),
    "rows": Task(data=RowsData, model=RecurrentConfig, load=load_rows, build=build_recurrent, unit="rows"),
    "digits": Task(data=DigitsData, model=IrnnConfig, load=load_digits, build=build_irnn, unit="digits"),
}
