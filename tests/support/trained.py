"""Models in training, cut up in every way: each a function of the whole weights that it begins with.

So a run can go on in another layout. What one process makes of it, without distclip: :func:`alone`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distclip
from support.layouts import Block, DenseNet, batch
from support.older_torch import OLDER
from support.parallel import mesh_of, rows, tensor_parallel

DTYPE = torch.float64
LR = 0.05
SCALES = (1.0, 4.0, 0.5, 30.0, 2.0, 8.0)  # of the loss, by step: norms rise and fall
Whole = dict[str, Tensor]
OF_A_BLOCK = [name for name, _ in Block().named_parameters()]


@dataclass
class Training:
    """``parts`` go to the Clipper with ``options``; ``backward`` fills the gradients of a step.

    ``whole``: this rank's share of all weights, by their names in the whole model; ``units``: what the units are called
    of those that have other names here, or share theirs.
    """

    parts: list[nn.Module]
    backward: Callable[[int], None]
    whole: Callable[[], Whole]
    options: dict[str, Any] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)


def united(training: Training) -> Whole:
    """All weights, on every rank."""
    shares: list[Whole | None] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, training.whole())
    return {name: tensor for share in shares for name, tensor in share.items()}


def full(model: nn.Module, names: Callable[[str], str] = str) -> Whole:
    return {
        names(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


# ---- a net, and its real gradients ---------------------------------------------------------------------------


def net(weights: Whole | None = None) -> DenseNet:
    torch.manual_seed(0)
    model = DenseNet().to(DTYPE)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def _rows_of(step: int, mine: slice) -> tuple[Tensor, Tensor]:
    words, targets = batch(step)
    return words[mine], targets[mine].to(DTYPE)


def _loss(step: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda out, targets: SCALES[step % len(SCALES)] * (out - targets).square().mean()


def _of_net(model: nn.Module, rank: int, size: int, whole: Callable[[], Whole] | None = None) -> Training:
    def backward(step: int) -> None:
        words, targets = _rows_of(step, rows(rank, size))
        _loss(step)(model(words), targets).backward()

    return Training([model], backward, whole or (lambda: full(model)))


def one(weights=None):
    """On any number of ranks, each of which sees everything."""
    return _of_net(net(weights), 0, 1)


def ddp(weights=None):
    model = DistributedDataParallel(net(weights))
    return _of_net(model, dist.get_rank(), dist.get_world_size(), lambda: full(model.module))


def _sharded(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for block in model.blocks.children():
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp2(weights=None):
    return _of_net(
        _sharded(net(weights), mesh_of(("dp", dist.get_world_size()))), dist.get_rank(), dist.get_world_size()
    )


def hsdp(weights=None):
    mesh = mesh_of(("replicate", 2), ("shard", dist.get_world_size() // 2))
    return _of_net(_sharded(net(weights), mesh), dist.get_rank(), dist.get_world_size())


def _fsdp2_tp(weights, sequence: bool) -> Training:
    mesh = mesh_of(("dp", dist.get_world_size() // 2), ("tp", 2))
    model = _sharded(tensor_parallel(net(weights), mesh["tp"], sequence), mesh["dp"])
    return _of_net(model, mesh.get_local_rank("dp"), mesh.size(0))


def fsdp2_tp(weights=None):
    return _fsdp2_tp(weights, sequence=False)


def fsdp2_tp_sequence(weights=None):
    """Gradients that have to be realigned first."""
    return _fsdp2_tp(weights, sequence=True)


def _fsdp1(weights, orig: bool) -> Training:
    model = net(weights)
    common = {"use_orig_params": orig, "device_id": torch.device("cpu")}
    for i, block in enumerate(model.blocks):
        model.blocks[i] = FullyShardedDataParallel(block, **common)
    model = FullyShardedDataParallel(model, **common)

    def whole() -> Whole:
        with FullyShardedDataParallel.summon_full_params(model):
            found = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in model.named_parameters()}
            return {name: p.detach().clone() for name, p in found.items()}

    return _of_net(model, dist.get_rank(), dist.get_world_size(), whole)


def fsdp1(weights=None):
    return _fsdp1(weights, orig=True)


def fsdp1_flat(weights=None):
    return _fsdp1(weights, orig=False)


class Stage(nn.Module):
    """Some consecutive layers, under the names that they have in the whole net, or counted from 0 in each stage."""

    def __init__(self, whole: DenseNet, index: int, count: int, unique: bool) -> None:
        super().__init__()
        first, end = len(whole.blocks) * index // count, len(whole.blocks) * (index + 1) // count
        self.embed = whole.embed if index == 0 else nn.Identity()
        self.blocks = nn.ModuleDict({str(i if unique else i - first): whole.blocks[i] for i in range(first, end)})
        self.head = whole.head if index == count - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.head is None else self.head(x).mean(1)


def _pipeline(weights, unique: bool) -> Training:
    """Two stages, FSDP2 in each where there are more ranks."""
    world = dist.get_world_size()
    mesh = mesh_of(("pp", 2), ("dp", world // 2))
    me, dp = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    part: nn.Module = Stage(net(weights), me, 2, unique)
    if world > 2:
        _sharded(part, mesh["dp"], reshard_after_forward=False)
    stage = PipelineStage(part, me, 2, torch.device("cpu"), group=mesh.get_group("pp"))
    step_now = [0]
    parts = 2 if OLDER else 1  # torch 2.6 adds the gradients of microbatches, later ones average them
    runner = ScheduleGPipe(stage, 2, loss_fn=lambda out, targets: _loss(step_now[0])(out, targets) / parts)

    def backward(step: int) -> None:
        step_now[0] = step
        words, targets = _rows_of(step, rows(dp, world // 2))
        runner.step(*([words] if me == 0 else []), **({"target": targets} if me == 1 else {}))

    def called(name: str) -> str:
        return name if unique else name.replace("blocks.0.", f"blocks.{me}.")

    units = {} if unique else {f"blocks.{k}.{n}": f"blocks.0.{n}[pp={k}]" for k in (0, 1) for n in OF_A_BLOCK}
    return Training([part], backward, lambda: full(part, called), {"split_over": [mesh["pp"]]}, units)


def stages(weights=None):
    return _pipeline(weights, unique=True)


def stages_of_equal_names(weights=None):
    return _pipeline(weights, unique=False)


# ---- experts, and gradients that are made up of names and weights ---------------------------------------------


def expert_weights() -> Whole:
    chance = torch.Generator().manual_seed(0)
    shapes = {"dense.weight": (6, 4), "dense.bias": (6,), **{f"experts.{k}.w": (5, 3) for k in range(4)}}
    return {name: torch.randn(shape, generator=chance, dtype=DTYPE) for name, shape in shapes.items()}


def made_up(name: str, weight: Tensor, step: int) -> Tensor:
    """The whole gradient of a parameter: of its name, the step and its weights, which thereby matter."""
    chance = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    noise = torch.randn(weight.shape, generator=chance, dtype=DTYPE)
    return SCALES[step % len(SCALES)] * (noise + 0.5 * weight)


class Experts(nn.Module):
    """Dense layers and experts, by their names."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            module: nn.Module = self
            *path, last = name.split(".")
            for step in path:
                if step not in module._modules:
                    module.add_module(step, nn.Module())
                module = module.get_submodule(step)
            module.register_parameter(last, nn.Parameter(weight.clone()))


def _of_experts(model: nn.Module, called: Callable[[str], str] = str, **more: Any) -> Training:
    def backward(step: int) -> None:
        for name, p in model.named_parameters():
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            gradient = made_up(called(name), whole.detach(), step)
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if isinstance(p, DTensor) else gradient

    return Training([model], backward, lambda: full(model, called), **more)


def all_experts(weights=None):
    """On every rank."""
    return _of_experts(Experts(weights or expert_weights()))


def _experts(weights, unique: bool) -> Training:
    """Two of four experts on each rank along "ep", replicated along "edp"."""
    mesh = mesh_of(("edp", dist.get_world_size() // 2), ("ep", 2))
    ep, weights = mesh.get_local_rank("ep"), weights or expert_weights()
    here = {f"experts.{k}.w": f"experts.{2 * ep + k}.w" for k in (0, 1)}  # by their names where these are equal
    dense = {name: w for name, w in weights.items() if name.startswith("dense")}
    model = Experts(dense | {name if unique else own: weights[name] for own, name in here.items()})
    cut = distclip.Layout.cut([mesh["ep"]])
    options = {"layout": lambda name, p: cut if name.startswith("experts") else None}
    if unique:
        return _of_experts(model, options=options)
    units = {f"experts.{2 * e + k}.w": f"experts.{k}.w[ep={e}]" for e in (0, 1) for k in (0, 1)}
    return _of_experts(model, lambda name: here.get(name, name), options=options, units=units)


def experts(weights=None):
    return _experts(weights, unique=True)


def experts_of_equal_names(weights=None):
    return _experts(weights, unique=False)


def experts_by_dtensor(weights=None):
    """Each expert on half of the ranks, cut over those, beside dense layers cut over all."""
    world = dist.get_world_size()
    model, mesh = Experts(weights or expert_weights()), mesh_of(("dp", world))
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    return _of_experts(model)


# ---- one process, without distclip ---------------------------------------------------------------------------


def alone(whole: Training, steps: range, times: float, beta: float) -> tuple[Whole, dict[str, float], int]:
    """Steps of SGD with each gradient bounded by ``times`` the running mean of its clipped norms.

    The weights after them, these means, and how often something was bounded.
    """
    parameters, means, clipped = dict(whole.parts[0].named_parameters()), dict[str, float](), 0
    for step in steps:
        whole.backward(step)
        for name, p in parameters.items():
            norm = p.grad.square().sum().sqrt().item()
            bound = times * means[name] if name in means else inf
            factor = min(1.0, bound / (norm + 1e-6))
            clipped += factor < 1
            means[name] = beta * means[name] + (1 - beta) * min(norm, bound) if name in means else norm
            p.data.sub_(LR * factor * p.grad)
            p.grad = None
    return {name: p.detach() for name, p in parameters.items()}, means, clipped
