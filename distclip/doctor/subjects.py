"""A small model on every layout that these ranks can build, with a real backward, and its norm in one process.

Every rank can compute the whole model's gradients by itself: that is the oracle, which no collective touches.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from distclip import Layout
from distclip.doctor.finding import Unfit
from distclip.doctor.place import Site

WIDTH = 16
ROWS = 4  # of the batch, for each rank
Backward: TypeAlias = Callable[[], None]


@dataclass(kw_only=True, slots=True, frozen=True)
class Subject:
    """``parts`` and ``options`` go to the Clipper; ``alone`` holds the gradients of one process."""

    parts: Sequence[nn.Module]
    backward: Backward
    alone: nn.Module
    options: dict[str, Any] = field(default_factory=dict)

    def parameters(self) -> list[nn.Parameter]:
        return [p for part in self.parts for p in part.parameters()]

    def oracle(self) -> float:
        """The norm of all gradients in one process, in float64."""
        squares = [p.grad.double().square().sum() for p in self.alone.parameters() if p.grad is not None]
        return torch.stack(squares).sum().sqrt().item()


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())  # type: ignore[no-any-return]


class Experts(nn.Module):
    """A dense layer, and those of ``count`` experts that are ``mine``; row k goes to expert k modulo ``count``."""

    def __init__(self, count: int, mine: Iterable[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(WIDTH, WIDTH)
        layers = [nn.Linear(WIDTH, 3) for _ in range(count)]
        self.count, self.experts = count, nn.ModuleDict({str(k): layers[k] for k in mine})

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """What my experts add to the loss."""
        z = self.dense(x).relu()
        errors = [(e(z[int(k) :: self.count]) - y[int(k) :: self.count]) for k, e in self.experts.items()]
        return 30 * torch.stack([error.square().mean() for error in errors]).sum() / self.count


def ddp(site: Site) -> Subject:
    model, ids = net(site), [site.device] if site.device.type == "cuda" else None
    return on_rows(site, DistributedDataParallel(model, device_ids=ids))


def fsdp1(site: Site) -> Subject:
    need(site, 2, multiple=1)  # alone it warns
    model = net(site)
    for k in (0, 1):
        model[k] = FullyShardedDataParallel(model[k], device_id=site.device, use_orig_params=True)
    return on_rows(site, FullyShardedDataParallel(model, device_id=site.device, use_orig_params=True))


def fsdp2(site: Site) -> Subject:
    return on_rows(site, sharded(net(site), site.place.mesh))


def hsdp(site: Site) -> Subject:
    need(site, 4)
    return on_rows(site, sharded(net(site), site.mesh(replicate=2, shard=site.world // 2)))


def tp(site: Site) -> Subject:
    model = cut(net(site), site.mesh(tp=site.world))
    return on_rows(site, model, index=0, count=1)


def fsdp2_tp(site: Site) -> Subject:
    need(site, 4)
    mesh = site.mesh(dp=site.world // 2, tp=2)
    model = sharded(cut(net(site), mesh["tp"]), mesh["dp"])
    return on_rows(site, model, mesh["dp"].get_local_rank(), mesh["dp"].size())


def pipeline(site: Site) -> Subject:
    """Two stages, each sharded over half of the ranks if there are more than two."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe  # imports torch._dynamo: 0.6 s

    need(site, 2)
    mesh = site.mesh(pp=2, dp=site.world // 2)
    index, whole = mesh.get_local_rank("pp"), net(site)
    part = nn.Sequential(*list(whole)[index : 1 + 2 * index])
    if mesh["dp"].size() > 1:
        fully_shard(part, mesh=mesh["dp"], reshard_after_forward=False)
    stage = PipelineStage(part, index, 2, site.device, group=mesh.get_group("pp"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=loss_of)
    x, y = rows_of(site, mesh.get_local_rank("dp"), mesh["dp"].size())

    def backward() -> None:
        schedule.step(*((x,) if index == 0 else ()), target=y if index == 1 else None)

    return Subject(parts=[part], backward=backward, alone=alone(site), options={"split_over": [mesh["pp"]]})


def experts(site: Site) -> Subject:
    """A plain expert on every rank, beside a dense layer whose gradient the ranks add up by themselves."""
    model = Experts(site.world, [site.place.rank]).to(site.device)
    for p in model.dense.parameters():
        p.register_hook(added_up)  # type: ignore[no-untyped-call]
    x, y = rows_of(site, 0, 1)
    whole = Experts(site.world, range(site.world)).to(site.device)
    whole.loss(x, y).backward()  # type: ignore[no-untyped-call]

    def backward() -> None:
        model.loss(x, y).backward()  # type: ignore[no-untyped-call]

    options = {"layout": lambda name, p: Layout(1) if name.startswith("experts.") else None}
    return Subject(parts=[model], backward=backward, alone=whole, options=options)


LAYOUTS: dict[str, Callable[[Site], Subject]] = {
    "DDP": ddp,
    "FSDP1": fsdp1,
    "FSDP2": fsdp2,
    "HSDP": hsdp,
    "tensor parallel": tp,
    "FSDP2 x TP": fsdp2_tp,
    "pipeline stages": pipeline,
    "experts": experts,
}


def need(site: Site, ranks: int, multiple: int = 2) -> None:
    if site.world < ranks or site.world % multiple:
        raise Unfit(f"needs {ranks} ranks or more{', an even number' if multiple == 2 else ''}")


def net(site: Site) -> nn.Sequential:
    """Two blocks and a head, the same on every rank; layers of any number of ranks can be cut."""
    torch.manual_seed(0)
    blocks = [Block(8 * site.world) for _ in range(2)]
    return nn.Sequential(*blocks, nn.Linear(WIDTH, 3)).to(site.device)


def sharded(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    for block in list(model)[:2]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # in place
    return model


def cut(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    """``model`` with the layers of its blocks cut along ``mesh``; norms and head stay plain tensors."""
    for block in list(model)[:2]:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def rows_of(site: Site, index: int, count: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets: part ``index`` of ``count`` of the batch."""
    chance, rows = torch.Generator().manual_seed(1), ROWS * site.world
    x, y = torch.randn(rows, WIDTH, generator=chance), torch.randn(rows, 3, generator=chance)
    mine = slice(index * rows // count, (index + 1) * rows // count)
    return x[mine].to(site.device), y[mine].to(site.device)


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return 30 * mse_loss(out, target)


def alone(site: Site) -> nn.Sequential:
    """The model of one process, with its gradients."""
    model, (x, y) = net(site), rows_of(site, 0, 1)
    loss_of(model(x), y).backward()  # type: ignore[no-untyped-call]
    return model


def on_rows(site: Site, model: nn.Module, index: int | None = None, count: int | None = None) -> Subject:
    """``model``, whose backward is that of this rank's rows."""
    x, y = rows_of(site, site.place.rank if index is None else index, count or site.world)

    def backward() -> None:
        loss_of(model(x), y).backward()  # type: ignore[no-untyped-call]

    return Subject(parts=[model], backward=backward, alone=alone(site))


def added_up(gradient: Tensor) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total)
    return total
