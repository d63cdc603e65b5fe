"""Models with gradients, wrapped as users wrap them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from distclip.bench.models import Block, Chain, Gpt
from distclip.bench.place import Place


@dataclass(kw_only=True, slots=True, frozen=True)
class Subject:
    """``backward`` makes new gradients, the same ones every time. ``group``: the ranks that hold the model."""

    model: nn.Module
    parameters: list[nn.Parameter]
    backward: Callable[[], None]
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, model: nn.Module, loss: Callable[[], Tensor]) -> Self:
        def backward() -> None:
            model.zero_grad()
            loss().backward()  # type: ignore[no-untyped-call]

        return cls(model=model, parameters=list(model.parameters()), backward=backward)


def fsdp2(place: Place, *, layers: int, width: int) -> Subject:
    """Blocks of 12 parameters, each one FSDP2 group."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width) for _ in range(layers))).to(place.device)
    for block in model:
        fully_shard(block, mesh=place.mesh)
    fully_shard(model, mesh=place.mesh)
    x = data(place, 1, 16, width)
    return Subject.of(model, lambda: model(x).square().mean())


def ddp(place: Place, *, matrices: int, width: int, views: bool) -> Subject:
    """Small matrices under DDP; with ``views`` gradients are views of its buckets."""
    torch.manual_seed(0)
    chain = Chain(matrices, width).to(place.device)
    model = DistributedDataParallel(chain, gradient_as_bucket_view=views)
    x = data(place, 8, width)
    return Subject.of(model, lambda: model(x).square().mean())


def gpt(place: Place, *, layers: int, width: int, time: int, batch: int) -> Subject:
    """A small GPT under FSDP2 that learns the token before the next one."""
    torch.manual_seed(0)
    symbols = 256
    model = Gpt(layers=layers, width=width, time=time, symbols=symbols).to(place.device)
    for block in model.blocks:
        fully_shard(block, mesh=place.mesh)
    fully_shard(model, mesh=place.mesh)
    tokens = torch.randint(symbols, (batch, time + 1), generator=torch.Generator().manual_seed(place.rank))
    tokens = tokens.to(place.device)
    x, y = tokens[:, :-1], tokens[:, 1:].flatten()
    return Subject.of(model, lambda: F.cross_entropy(model(x).flatten(0, 1), y))


def plain(place: Place, *, tensors: int, elements: int) -> Subject:
    """Parameters of rank 0 only."""
    torch.manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.randn(elements)) for _ in range(tensors)).to(place.device)

    def backward() -> None:
        torch.manual_seed(1)
        for parameter in model:
            parameter.grad = torch.randn_like(parameter)

    return Subject(model=model, parameters=list(model), backward=backward, group=place.alone)


class FreshDTensors:
    """Sets of DTensor parameters, all different in number and shapes.

    torch's caches of one set do not help the next, so a call on each is as slow as the first of a process.
    """

    def __init__(self, place: Place, tensors: int) -> None:
        self.place = place
        self.tensors = tensors
        self.columns = 4
        self.parameters: list[nn.Parameter] = []

    def renew(self) -> None:
        """Make the next set, with gradients whose norm is 1."""
        self.tensors += 1
        self.columns += 1
        value = (self.tensors * self.columns * self.place.world) ** -0.5
        self.parameters = [nn.Parameter(self.filled(0.0)) for _ in range(self.tensors)]
        for parameter in self.parameters:
            parameter.grad = self.filled(value)

    def filled(self, value: float) -> DTensor:
        row = torch.full((1, self.columns), value, device=self.place.device)
        return DTensor.from_local(row, self.place.mesh, [Shard(0)], run_check=False)


def data(place: Place, *shape: int) -> Tensor:
    """Random numbers, different on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(place.rank)).to(place.device)


def restoring(parameters: list[nn.Parameter]) -> Callable[[], None]:
    """A function that writes the present gradients back in place."""
    gradients = [gradient_of(parameter) for parameter in parameters]
    originals = [gradient.clone() for gradient in gradients]

    def restore() -> None:
        for gradient, original in zip(gradients, originals, strict=True):
            gradient.copy_(original)

    return restore


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a gradient."""
    gradient = parameter.grad
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
