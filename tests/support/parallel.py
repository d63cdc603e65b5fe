"""Every way to cut up one small model, as functions: each builds this rank's part and says what one process would hold.

A layout returns a :class:`Job`. Its oracle never looks at distclip: every rank names the whole gradients it can put
together (DTensors gathered, FSDP1 asked for full ones), the ranks' dictionaries are united, and the norm of the union
is taken in float64.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import distclip
from support.layouts import ROWS, DenseNet, batch

Whole = dict[str, Tensor]


@dataclass
class Job:
    """``parts`` go to the Clipper with ``options``; ``backward`` fills gradients; ``whole`` is this rank's share."""

    parts: list[nn.Module]
    backward: Callable[[], None]
    whole: Callable[[], Whole]
    options: dict[str, Any] = field(default_factory=dict)
    realigns: bool = False  # whether gradients have to be brought to their parameters' placements by talking
    alone: nn.Module | None = None  # the model of one process whose gradients are `whole`, where they are not these

    @property
    def exact(self) -> bool:
        """Whether ``whole`` are these very gradients."""
        return self.alone is None

    def parameters(self) -> Iterable[nn.Parameter]:
        return (p for part in self.parts for p in part.parameters())


def united(job: Job) -> list[Tensor]:
    """The gradients of the whole model, each once, the same list on every rank."""
    union = by_name(job.whole())
    return [union[name] for name in sorted(union)]


def by_name(share: Whole) -> Whole:
    """The shares of all ranks, the same on every rank."""
    shares: list[Whole | None] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, share)
    return {name: tensor for share in shares for name, tensor in share.items()}


def whole_values(job: Job) -> Whole:
    """This rank's share of the parameters' values: by the road of gradients, in whose place they are put."""
    if job.alone is not None:
        return {name: p.detach().clone() for name, p in job.alone.named_parameters()}
    for p in job.parameters():
        if p.grad is None or isinstance(p, DTensor):
            p.grad = p.detach().clone()
        else:
            p.grad.copy_(p.detach())  # FSDP1's are parts of a flat one
    return job.whole()


def full_gradients(model: nn.Module, prefix: str = "") -> Whole:
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[prefix + name] = (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).detach().clone()
    return found


def mesh_of(*axes: tuple[str, int]) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(size for _, size in axes), mesh_dim_names=tuple(name for name, _ in axes))


def rows(index: int, count: int) -> slice:
    return slice(index * ROWS // count, (index + 1) * ROWS // count)


def mean_square(model: nn.Module, mine: slice, scale: float) -> Callable[[], None]:
    words, targets = batch(0)

    def backward() -> None:
        out = model(words[mine])
        out = out.full_tensor() if isinstance(out, DTensor) else out
        (scale * (out - targets[mine].to(out.dtype)).square().mean()).backward()

    return backward


def net(dtype: torch.dtype) -> DenseNet:
    torch.manual_seed(0)
    return DenseNet().to(dtype)


# ---- FSDP1 -------------------------------------------------------------------------------------------------


def _fsdp1(dtype, scale, strategy, orig, mesh=None, inner=None, index=None, count=None, **options) -> Job:
    model = inner or net(dtype)
    common = {
        "sharding_strategy": strategy,
        "use_orig_params": orig,
        "device_id": torch.device("cpu"),
        "device_mesh": mesh,
        **options,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `NO_SHARD` sharding strategy is deprecated", FutureWarning)
        for i, block in enumerate(model.blocks):
            model.blocks[i] = FullyShardedDataParallel(block, **common)
        model = FullyShardedDataParallel(model, **common)

    def whole() -> Whole:
        if not orig:
            return _flat_gradients(model)
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = full_gradients(model)
        return {name.replace("_fsdp_wrapped_module.", ""): g for name, g in found.items()}

    index = dist.get_rank() if index is None else index
    mine = rows(index, count or dist.get_world_size())
    return Job([model], mean_square(model, mine, scale), whole)


def _flat_gradients(model: nn.Module) -> Whole:
    """What torch does not show: the flat gradients, put together from their shards by hand."""
    found = {}
    for i, module in enumerate(FullyShardedDataParallel.fsdp_modules(model)):
        mine = module._flat_param.grad
        shards = [mine]
        if module.sharding_strategy != ShardingStrategy.NO_SHARD:
            shards = [torch.empty_like(mine) for _ in range(module.process_group.size())]
            dist.all_gather(shards, mine, group=module.process_group)
        found[str(i)] = torch.cat(shards).clone()
    return found


def fsdp1_full(dtype, scale):
    return _fsdp1(dtype, scale, ShardingStrategy.FULL_SHARD, True)


def fsdp1_full_flat(dtype, scale):
    return _fsdp1(dtype, scale, ShardingStrategy.FULL_SHARD, False)


def fsdp1_grad_op(dtype, scale):
    return _fsdp1(dtype, scale, ShardingStrategy.SHARD_GRAD_OP, True)


def fsdp1_grad_op_flat(dtype, scale):
    return _fsdp1(dtype, scale, ShardingStrategy.SHARD_GRAD_OP, False)


def fsdp1_no_shard(dtype, scale):
    return _fsdp1(dtype, scale, ShardingStrategy.NO_SHARD, True)


def fsdp1_no_shard_flat(dtype, scale):
    return _fsdp1(dtype, scale, ShardingStrategy.NO_SHARD, False)


def fsdp1_hybrid(dtype, scale):
    mesh = mesh_of(("replicate", 2), ("shard", dist.get_world_size() // 2))
    return _fsdp1(dtype, scale, ShardingStrategy.HYBRID_SHARD, True, mesh)


def fsdp1_hybrid_flat(dtype, scale):
    mesh = mesh_of(("replicate", 2), ("shard", dist.get_world_size() // 2))
    return _fsdp1(dtype, scale, ShardingStrategy.HYBRID_SHARD, False, mesh)


def fsdp1_hybrid_zero2(dtype, scale):
    mesh = mesh_of(("replicate", 2), ("shard", dist.get_world_size() // 2))
    return _fsdp1(dtype, scale, ShardingStrategy._HYBRID_SHARD_ZERO2, True, mesh)


def fsdp1_mixed_precision(dtype, scale):
    policy = MixedPrecision(torch.bfloat16, torch.bfloat16)
    return _fsdp1(dtype, scale, ShardingStrategy.FULL_SHARD, True, mixed_precision=policy)


def fsdp1_ignored(dtype, scale):
    """The head is left to the user, who reduces it by hand."""
    model = net(dtype)
    for p in model.head.parameters():
        p.register_hook(_averaged)
    return _fsdp1(dtype, scale, ShardingStrategy.FULL_SHARD, True, inner=model, ignored_modules=[model.head])


class Inner(nn.Module):
    """Dense layers around an inner one, which is to be sharded over a group of its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.dense, self.head = nn.Linear(4, 6), nn.Linear(5, 3)
        torch.manual_seed(seed)
        self.inner = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.dense(x)))


def fsdp1_nested(dtype, scale, orig: bool, expert: bool, **options) -> Job:
    """The root over the world, the inner layer over "edp" alone: an expert of each "ep" rank, or copies of one."""
    mesh = mesh_of(("ep", 2), ("edp", dist.get_world_size() // 2))
    ep, edp = mesh.get_local_rank("ep"), mesh.get_local_rank("edp")
    torch.manual_seed(0)
    model = Inner(1 + ep if expert else 1).to(dtype)
    common = {"use_orig_params": orig, "device_id": torch.device("cpu")}
    model.inner = FullyShardedDataParallel(model.inner, process_group=mesh.get_group("edp"), **common)
    model = FullyShardedDataParallel(model, **common)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(dist.get_rank() if expert else edp)).to(dtype)

    def whole() -> Whole:
        """Names as torch has them, with the expert's number where there are several."""
        if orig:
            with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
                found, inner = full_gradients(model), "inner"
        else:
            found, inner = _flat_gradients(model), "1"
        return {f"{ep} {name}" if expert and inner in name else name: g for name, g in found.items()}

    if options.get("split_over"):
        options["split_over"] = [mesh[name] for name in options["split_over"]]
    return Job([model], lambda: (scale * model(x).square().mean()).backward(), whole, options)


def one_rank_holds(name: str, parameter: Tensor) -> distclip.Layout | None:
    return distclip.Layout(1) if name.startswith("inner.") else None


def fsdp1_experts(dtype, scale):
    return fsdp1_nested(dtype, scale, True, True, layout=one_rank_holds)


def fsdp1_experts_flat(dtype, scale):
    return fsdp1_nested(dtype, scale, False, True, split_over=["ep"])


def fsdp1_copies(dtype, scale):
    """What metadata says is right here: the inner layer is the same in every group, and sees the same rows."""
    return fsdp1_nested(dtype, scale, True, False)


def fsdp1_copies_flat(dtype, scale):
    return fsdp1_nested(dtype, scale, False, False)


def _averaged(gradient: Tensor) -> Tensor:
    dist.all_reduce(gradient)
    return gradient / dist.get_world_size()


# ---- FSDP2, tensor parallel and their products --------------------------------------------------------------


def _shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh, sequence: bool) -> nn.Module:
    plan: dict[str, Any] = {}
    for i in range(len(model.blocks)):
        plan[f"blocks.{i}.1"] = ColwiseParallel(input_layouts=Shard(1)) if sequence else ColwiseParallel()
        plan[f"blocks.{i}.3"] = RowwiseParallel(output_layouts=Shard(1)) if sequence else RowwiseParallel()
        if sequence:
            plan[f"blocks.{i}.0"] = SequenceParallel()
    if sequence:
        plan["embed"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        plan["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    for name, style in plan.items():  # one by one: torch 2.6 takes the "1" of "blocks.0.1" for a block too
        parallelize_module(model.get_submodule(name), mesh, style)
    return model


def hsdp(dtype, scale):
    mesh = mesh_of(("replicate", 2), ("shard", dist.get_world_size() // 2))
    model = _shard(net(dtype), mesh)
    mine = rows(dist.get_rank(), dist.get_world_size())
    return Job([model], mean_square(model, mine, scale), lambda: full_gradients(model))


def tp(dtype, scale):
    """Norm layers and embedding outside the tensor-parallel plan, as plain tensors."""
    model = tensor_parallel(net(dtype), mesh_of(("tp", dist.get_world_size())), sequence=False)
    return Job([model], mean_square(model, rows(0, 1), scale), lambda: full_gradients(model))


def tp_sequence(dtype, scale):
    """Norm layers with Partial gradients, a row-wise embedding with a Replicate gradient for a Shard parameter."""
    model = tensor_parallel(net(dtype), mesh_of(("tp", dist.get_world_size())), sequence=True)
    return Job([model], mean_square(model, rows(0, 1), scale), lambda: full_gradients(model), realigns=True)


def _fsdp2_tp(dtype, scale, sequence, dp_axes):
    mesh = mesh_of(*dp_axes, ("tp", 2))
    names = tuple(name for name, _ in dp_axes)
    model = tensor_parallel(net(dtype), mesh["tp"], sequence)
    _shard(model, mesh[names] if len(names) > 1 else mesh[names[0]])
    count = dist.get_world_size() // 2
    mine = rows(dist.get_rank() // 2, count)
    return Job([model], mean_square(model, mine, scale), lambda: full_gradients(model))


def fsdp2_tp(dtype, scale):
    return _fsdp2_tp(dtype, scale, False, [("dp", dist.get_world_size() // 2)])


def fsdp2_tp_sequence(dtype, scale):
    return _fsdp2_tp(dtype, scale, True, [("dp", dist.get_world_size() // 2)])


def hsdp_tp(dtype, scale):
    return _fsdp2_tp(dtype, scale, False, [("replicate", 2), ("shard", 2)])


def hsdp_tp_sequence(dtype, scale):
    return _fsdp2_tp(dtype, scale, True, [("replicate", 2), ("shard", 2)])


def _fsdp1_tp(dtype, scale, orig):
    mesh = mesh_of(("dp", dist.get_world_size() // 2), ("tp", 2))
    inner = tensor_parallel(net(dtype), mesh["tp"], sequence=False)
    job = _fsdp1(
        dtype,
        scale,
        ShardingStrategy.FULL_SHARD,
        orig,
        mesh["dp"],
        inner,
        mesh["dp"].get_local_rank(),
        mesh["dp"].size(),
    )
    return _gathered_by_hand(job, net(dtype), mean_square_of_one(dtype, scale))


def mean_square_of_one(dtype, scale) -> Callable[[nn.Module], None]:
    return lambda model: mean_square(model, rows(0, 1), scale)()


def _gathered_by_hand(job: Job, alone: nn.Module, run: Callable[[nn.Module], None]) -> Job:
    """Where torch cannot show whole gradients: those of one process, which cost a second forward and backward."""

    def whole() -> Whole:
        alone.zero_grad()
        run(alone)
        return full_gradients(alone)

    job.whole, job.alone = whole, alone
    return job


def fsdp1_tp(dtype, scale):
    return _fsdp1_tp(dtype, scale, True)


def fsdp1_tp_flat(dtype, scale):
    return _fsdp1_tp(dtype, scale, False)


def ddp_tp(dtype, scale):
    mesh = mesh_of(("dp", dist.get_world_size() // 2), ("tp", 2))
    inner = tensor_parallel(net(dtype), mesh["tp"], sequence=False)
    model = DistributedDataParallel(inner, device_mesh=mesh["dp"])
    job = Job([model], mean_square(model, rows(mesh["dp"].get_local_rank(), mesh["dp"].size()), scale), dict)
    return _gathered_by_hand(job, net(dtype), mean_square_of_one(dtype, scale))


# ---- pipelines ---------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """One of several consecutive parts; the first embeds, the last has the head, which may be the embedding again."""

    def __init__(self, whole: DenseNet, index: int, count: int, tied: bool) -> None:
        super().__init__()
        self.embed = whole.embed if index == 0 or (tied and index == count - 1) else None
        half = len(whole.blocks) * index // count, len(whole.blocks) * (index + 1) // count
        self.blocks = nn.ModuleList(whole.blocks[half[0] : half[1]])
        self.head = whole.head if index == count - 1 else None
        self.first = index == 0

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        if self.head is None:
            return x
        if self.embed is not None and not self.first:
            x = x + (x @ self.embed.weight.t()) @ self.embed.weight  # uses the tied weight
        return self.head(x).mean(1)


def _pipeline(dtype, scale, schedule, pp: int, chunks: int = 1, wrap=None, tied: bool = False) -> Job:
    """``pp`` ranks hold ``chunks`` stages each; the other ranks of the world are ``wrap``'s."""
    world = dist.get_world_size()
    mesh = mesh_of(("pp", pp), ("dp", world // pp)) if world > pp else mesh_of(("pp", pp))
    group, me = mesh.get_group("pp"), mesh.get_local_rank("pp")
    whole = net(dtype)
    numbers = [me + chunk * pp for chunk in range(chunks)]
    parts: list[nn.Module] = [Stage(whole, number, pp * chunks, tied) for number in numbers]
    if wrap is not None:
        parts = [wrap(part, mesh) for part in parts]
    stages = [
        PipelineStage(part, number, pp * chunks, torch.device("cpu"), group=group)
        for part, number in zip(parts, numbers, strict=True)
    ]
    dp = mesh.get_local_rank("dp") if world > pp else 0
    words, targets = (t[rows(dp, world // pp)] for t in batch(0))

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return scale * (out - target.to(out.dtype)).square().mean()

    runner = schedule(stages[0] if chunks == 1 else stages, n_microbatches=2, loss_fn=loss)
    last = any(number == pp * chunks - 1 for number in numbers)

    def backward() -> None:
        runner.step(*([words] if me == 0 else []), **({"target": targets} if last else {}))
        if tied and me in (0, pp - 1):
            (embed,) = (part.embed for part in parts if part.embed is not None)
            dist.all_reduce(embed.weight.grad, group=group)

    def shares() -> Whole:
        found: Whole = {}
        for part, number in zip(parts, numbers, strict=True):
            for name, gradient in full_gradients(part).items():
                found["embed.weight" if name == "embed.weight" else f"{number}.{name}"] = gradient
        return found

    def layout(name: str, parameter: Tensor) -> distclip.Layout | None:
        return distclip.Layout(2 * world // pp) if tied and name.endswith("embed.weight") else None

    options = {"split_over": [mesh["pp"]]} | ({"layout": layout} if tied else {})
    return Job(parts, backward, shares, options)


def pp_gpipe(dtype, scale):
    return _pipeline(dtype, scale, ScheduleGPipe, 2)


def pp_1f1b_tied(dtype, scale):
    return _pipeline(dtype, scale, Schedule1F1B, 2, tied=True)


def pp_interleaved(dtype, scale):
    return _pipeline(dtype, scale, ScheduleInterleaved1F1B, 2, chunks=2)


def _shard_stage(part: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in part.blocks:
        fully_shard(block, mesh=mesh["dp"], reshard_after_forward=False)
    return fully_shard(part, mesh=mesh["dp"], reshard_after_forward=False)


def pp_fsdp2(dtype, scale):
    return _pipeline(dtype, scale, ScheduleGPipe, 2, wrap=_shard_stage)


def pp_empty(dtype, scale):
    """Fewer stages than pipeline ranks: the first of two has none, the other one, which FSDP2 shards if it can."""
    world = dist.get_world_size()
    mesh = mesh_of(("pp", 2), ("dp", world // 2)) if world > 2 else mesh_of(("pp", world))
    options = {"split_over": [mesh["pp"]]}
    if mesh.get_local_rank("pp") == 0:
        return Job([nn.Module()], lambda: None, dict, options)
    model = _shard(net(dtype), mesh["dp"]) if world > 2 else net(dtype)
    mine = rows(mesh.get_local_rank("dp"), world // 2) if world > 2 else rows(0, 1)
    return Job([model], mean_square(model, mine, scale), lambda: full_gradients(model), options)


# ---- experts -----------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A dense layer and this rank's experts; rows go to expert (row modulo number of experts) by hand."""

    def __init__(self, mine: list[int], count: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(4, 6).to(dtype)
        weights = torch.randn(count, 6, 3).to(dtype)
        self.experts = nn.ParameterDict({str(i): nn.Parameter(weights[i].clone()) for i in mine})


def ep_plain(dtype, scale):
    """EP 2 x expert data parallel: plain experts, the last of which saw no token."""
    world = dist.get_world_size()
    mesh = mesh_of(("edp", world // 2), ("ep", 2))
    ep = mesh.get_local_rank("ep")
    model = Experts([2 * ep, 2 * ep + 1], 4, dtype)

    def backward() -> None:
        for name, p in model.named_parameters():
            if name != "experts.3":  # without tokens
                chance = torch.Generator().manual_seed(sum(map(ord, name)))
                p.grad = (scale * torch.randn(p.shape, generator=chance)).to(dtype)

    copies = distclip.Layout(world // 2)
    options = {"layout": lambda name, p: copies if name.startswith("experts") else None}
    return Job([model], backward, lambda: full_gradients(model), options)


def ep_named(dtype, scale):
    """The same, where the layout says over which axis experts differ, as norms of their own need it."""
    job, mesh = ep_plain(dtype, scale), mesh_of(("edp", dist.get_world_size() // 2), ("ep", 2))
    cut = distclip.Layout.cut(over=[mesh["ep"]])
    job.options["layout"] = lambda name, p: cut if name.startswith("experts") else None
    return job


def ep_dtensor(dtype, scale):
    """Experts as DTensors on (edp, ep) beside dense layers sharded over all ranks: two meshes over the same ranks."""
    world = dist.get_world_size()
    dense_mesh, mesh = mesh_of(("dp", world)), mesh_of(("edp", world // 2), ("ep", 2))
    torch.manual_seed(0)
    model = nn.ParameterDict(
        {
            "dense": nn.Parameter(distribute_tensor(torch.randn(7, 3).to(dtype), dense_mesh, [Shard(0)])),
            "experts": nn.Parameter(distribute_tensor(torch.randn(4, 6, 3).to(dtype), mesh, [Shard(1), Shard(0)])),
            "router": nn.Parameter(distribute_tensor(torch.randn(4, 3).to(dtype), mesh, [Replicate(), Replicate()])),
        }
    )
    return _filled(model, dtype, scale)


def _filled(model: nn.ParameterDict, dtype, scale, **placements) -> Job:
    """Made-up gradients, the same whole tensor on every rank, placed as the parameters or as ``placements`` say."""

    def backward() -> None:
        for name, p in model.items():
            chance = torch.Generator().manual_seed(sum(map(ord, name)))
            whole = (scale * torch.randn(p.shape, generator=chance)).to(dtype)
            p.grad = _placed(whole, p, placements.get(name))

    return Job([model], backward, lambda: full_gradients(model))


def _placed(whole: Tensor, parameter: Tensor, placements) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    if placements is None:
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    kept = [Replicate() if isinstance(p, Partial) else p for p in placements]
    local = distribute_tensor(whole, parameter.device_mesh, kept).to_local()
    for axis, placement in enumerate(placements):
        if isinstance(placement, Partial) and placement.reduce_op == "sum":
            local = local * (1.0 if parameter.device_mesh.get_local_rank(axis) == 0 else 0.0)
    return DTensor.from_local(
        local, parameter.device_mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


# ---- hand-made placements ----------------------------------------------------------------------------------


def by_hand(dtype, scale):
    """All kinds of placements on meshes of one and two axes, beside plain tensors, gradients where parameters are."""
    world = dist.get_world_size()
    one, two = mesh_of(("a", world)), mesh_of(("b", 2), ("c", world // 2))
    made = {
        "plain": torch.randn(5, 3),
        "s0": distribute_tensor(torch.randn(5, 3), one, [Shard(0)]),
        "s1": distribute_tensor(torch.randn(5, 3), one, [Shard(1)]),
        "r": distribute_tensor(torch.randn(5, 3), one, [Replicate()]),
        "rs": distribute_tensor(torch.randn(5, 3), two, [Replicate(), Shard(0)]),
        "sr": distribute_tensor(torch.randn(5, 3), two, [Shard(1), Replicate()]),
        "ss": distribute_tensor(torch.randn(8, 4), two, [Shard(0), Shard(0)]),
        "st": distribute_tensor(torch.randn(5, 3), two, [Shard(0), Shard(1)]),
        "scalar": distribute_tensor(torch.randn(()), two, [Replicate(), Replicate()]),
        "one_row": distribute_tensor(torch.randn(1, 3), one, [Shard(0)]),
    }
    return _filled(nn.ParameterDict({n: nn.Parameter(t.to(dtype)) for n, t in made.items()}), dtype, scale)


def by_hand_realigned(dtype, scale):
    """Gradients that do not lie as their parameters: pending sums, copies of what is cut, cuts of what is copied."""
    world = dist.get_world_size()
    one, two = mesh_of(("a", world)), mesh_of(("b", 2), ("c", world // 2))
    made = {
        "sum": (one, [Replicate()], [Partial()]),
        "copy_of_shard": (one, [Shard(0)], [Replicate()]),
        "cut_of_copy": (one, [Replicate()], [Shard(1)]),
        "other_cut": (one, [Shard(0)], [Shard(1)]),
        "sum_of_shard": (one, [Shard(0)], [Partial()]),
        "two_sums": (two, [Replicate(), Shard(0)], [Partial(), Shard(0)]),
        "half_sum": (two, [Replicate(), Replicate()], [Replicate(), Partial()]),
    }
    model = nn.ParameterDict(
        {n: nn.Parameter(distribute_tensor(torch.randn(8, 4).to(dtype), m, p)) for n, (m, p, _) in made.items()}
    )
    job = _filled(model, dtype, scale, **{n: g for n, (_, _, g) in made.items()})
    job.realigns = True
    return job


def _uneven(dtype, scale, **placements) -> Job:
    """Cuts that leave ranks less than the others, or nothing, as torch's tensor parallel cannot have them."""
    mesh = mesh_of(("a", dist.get_world_size()))
    made = {
        "plain": torch.randn(5, 3),
        "s0": distribute_tensor(torch.randn(5, 3), mesh, [Shard(0)]),
        "s1": distribute_tensor(torch.randn(5, 4), mesh, [Shard(1)]),
        "r": distribute_tensor(torch.randn(5, 3), mesh, [Replicate()]),
        "one_row": distribute_tensor(torch.randn(1, 4), mesh, [Shard(0)]),
    }
    return _filled(
        nn.ParameterDict({n: nn.Parameter(t.to(dtype)) for n, t in made.items()}), dtype, scale, **placements
    )


def uneven(dtype, scale):
    return _uneven(dtype, scale)


def uneven_realigned(dtype, scale):
    job = _uneven(dtype, scale, s0=[Shard(1)], s1=[Partial()], r=[Shard(0)], one_row=[Partial()])
    job.realigns = True
    return job


def three_axes(dtype, scale):
    mesh = mesh_of(("a", 2), ("b", 2), ("c", 2))
    made = {
        "rss": [Replicate(), Shard(0), Shard(1)],
        "srs": [Shard(0), Replicate(), Shard(0)],
        "rrs": [Replicate(), Replicate(), Shard(1)],
        "sss": [Shard(0), Shard(1), Shard(0)],
    }
    model = {n: nn.Parameter(distribute_tensor(torch.randn(9, 7).to(dtype), mesh, p)) for n, p in made.items()}
    return _filled(nn.ParameterDict(model), dtype, scale)


def pp_fsdp2_tp(dtype, scale):
    """Three axes on eight ranks."""
    world = dist.get_world_size()
    mesh = mesh_of(("pp", 2), ("dp", world // 4), ("tp", 2))
    me = mesh.get_local_rank("pp")
    part = Stage(net(dtype), me, 2, tied=False)
    plan = {f"blocks.{i}.1": ColwiseParallel() for i in range(len(part.blocks))}
    plan |= {f"blocks.{i}.3": RowwiseParallel() for i in range(len(part.blocks))}
    parallelize_module(part, mesh["tp"], plan)
    for block in part.blocks:
        fully_shard(block, mesh=mesh["dp"], reshard_after_forward=False)
    fully_shard(part, mesh=mesh["dp"], reshard_after_forward=False)
    stage = PipelineStage(part, me, 2, torch.device("cpu"), group=mesh.get_group("pp"))
    runner = ScheduleGPipe(stage, 2, loss_fn=lambda out, t: scale * (out - t.to(out.dtype)).square().mean())
    dp = mesh["dp"]
    words, targets = (t[rows(dp.get_local_rank(), dp.size())] for t in batch(0))

    def backward() -> None:
        runner.step(*([words] if me == 0 else []), **({"target": targets} if me == 1 else {}))

    return Job([part], backward, lambda: full_gradients(part, f"{me}."), {"split_over": [mesh["pp"]]})


def cp_fsdp2(dtype, scale):
    """Context parallel by hand: each rank sees part of every sequence; FSDP2 shards over the flattened (dp, cp)."""
    world = dist.get_world_size()
    mesh = mesh_of(("dp", 2), ("cp", world // 2))
    model = _shard(net(dtype), mesh["dp", "cp"]._flatten("dp_cp"))
    words, targets = batch(0)
    mine = rows(mesh.get_local_rank("dp"), 2)
    cp, size = mesh.get_local_rank("cp"), world // 2
    cut = slice(cp * words.size(1) // size, (cp + 1) * words.size(1) // size)

    def backward() -> None:
        out = model(words[mine, cut])  # the net averages over the sequence, so its parts average to the whole
        (scale * (out * targets[mine].to(out.dtype)).mean()).backward()

    return Job([model], backward, lambda: full_gradients(model))


TWO = [
    fsdp1_full,
    fsdp1_full_flat,
    fsdp1_grad_op,
    fsdp1_grad_op_flat,
    fsdp1_no_shard,
    fsdp1_no_shard_flat,
    fsdp1_mixed_precision,
    fsdp1_ignored,
    tp,
    tp_sequence,
    pp_gpipe,
    pp_1f1b_tied,
    pp_interleaved,
    pp_empty,
]
THREE = [fsdp1_full, fsdp1_full_flat, uneven, uneven_realigned]
FOUR = [
    fsdp1_full,
    fsdp1_full_flat,
    fsdp1_hybrid,
    fsdp1_hybrid_flat,
    fsdp1_hybrid_zero2,
    fsdp1_tp,
    fsdp1_tp_flat,
    fsdp1_experts,
    fsdp1_experts_flat,
    fsdp1_copies,
    fsdp1_copies_flat,
    hsdp,
    fsdp2_tp,
    fsdp2_tp_sequence,
    ddp_tp,
    pp_fsdp2,
    pp_empty,
    cp_fsdp2,
    ep_plain,
    ep_dtensor,
    by_hand,
    by_hand_realigned,
]
EIGHT = [hsdp_tp, hsdp_tp_sequence, pp_fsdp2_tp, three_axes, by_hand]
