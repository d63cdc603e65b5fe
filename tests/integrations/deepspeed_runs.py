"""What the ranks of test_deepspeed.py run: DeepSpeed training in fresh processes that have no compiler on the PATH."""

import gc
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import distclip
from support.own_policy import OwnRunningMean
from support.ranks import count_collectives

STEPS = 10
NAN_AT = 4  # the step in which one rank's batch is spoiled
ROWS = 8  # of the global batch of a step
LR, LR_OF_REST = 0.01, 0.005
BOUND = 12.0  # between the norms of the run

BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": 0.0,
    "steps_per_print": 10**9,
}
BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
UNMANAGED = {"managed_gradient_accumulation": False}
CPU = {"device": "cpu"}


def zero(stage: int, **options: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **options}}


@dataclass(frozen=True)
class Case:
    config: dict[str, Any]
    accumulate: int = 1
    bf16: bool = False


CASES = {
    "0": Case(zero(0)),
    "0 accumulating": Case(zero(0), 2),
    "0 unmanaged": Case(zero(0) | UNMANAGED, 2),
    "0 bf16": Case(zero(0) | BF16, bf16=True),
    "1": Case(zero(1)),
    "1 accumulating": Case(zero(1), 2),
    "1 unmanaged": Case(zero(1) | UNMANAGED, 2),
    "1 offloaded": Case(zero(1, offload_optimizer=CPU)),
    "1 bf16": Case(zero(1) | BF16, bf16=True),
    "1 bf16, fp32 sums": Case(zero(1) | BF16 | FP32_SUMS, 2, bf16=True),
    "2": Case(zero(2)),
    "2 accumulating": Case(zero(2), 2),
    "2 unmanaged": Case(zero(2) | UNMANAGED, 2),
    "2 small buckets": Case(zero(2, overlap_comm=True, reduce_bucket_size=100)),
    "2 round robin": Case(zero(2, round_robin_gradients=True)),
    "2 offloaded": Case(zero(2, offload_optimizer=CPU)),
    "2 offloaded, accumulating": Case(zero(2, offload_optimizer=CPU), 2),
    "2 offloaded, unmanaged": Case(zero(2, offload_optimizer=CPU) | UNMANAGED, 2),
    "2 bf16": Case(zero(2) | BF16, bf16=True),
    "2 bf16, fp32 sums": Case(zero(2) | BF16 | FP32_SUMS, 2, bf16=True),
    "2 bf16, fp32 sums, offloaded": Case(zero(2, offload_optimizer=CPU) | BF16 | FP32_SUMS, 2, bf16=True),
    "3": Case(zero(3)),
    "3 accumulating": Case(zero(3), 2),
    "3 unmanaged": Case(zero(3) | UNMANAGED, 2),
    "3 sub-groups": Case(zero(3, sub_group_size=100)),
    "3 offloaded": Case(zero(3, offload_optimizer=CPU)),
    "3 all offloaded, accumulating": Case(zero(3, offload_optimizer=CPU, offload_param=CPU), 2),
    "3 offloaded, unmanaged": Case(zero(3, offload_optimizer=CPU) | UNMANAGED, 2),
    "3 bf16": Case(zero(3) | BF16, bf16=True),
}
ON_FOUR = (
    "0",
    "0 bf16",
    "1",
    "1 bf16, fp32 sums",
    "2 accumulating",
    "2 round robin",
    "2 offloaded",
    "3",
    "3 offloaded",
)
THOROUGH = (  # on two ranks: each has what others show
    "0 accumulating",
    "1 unmanaged",
    "1 offloaded",
    "1 bf16",
    "2 accumulating",
    "2 unmanaged",
    "2 offloaded",
    "2 offloaded, accumulating",
    "2 bf16, fp32 sums",
    "2 bf16, fp32 sums, offloaded",
    "3 accumulating",
    "3 unmanaged",
    "3 offloaded",
    "3 offloaded, unmanaged",
)
SAMPLE_ON_FOUR = ("1 bf16, fp32 sums", "2 round robin", "3 offloaded")


class Net(nn.Module):
    """Uneven sizes and a frozen layer: no partition ends where a parameter does. ``branch`` may go unused."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 13)
        self.frozen = nn.Linear(13, 13, bias=False).requires_grad_(False)
        self.norm = nn.LayerNorm(13)
        self.blocks = nn.ModuleList([nn.Linear(13, 13), nn.Linear(13, 9)])
        self.head = nn.Linear(9, 3)
        self.branch = nn.Linear(6, 3)
        self.branches = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).tanh()
        h = self.norm(h + self.frozen(h))
        for block in self.blocks:
            h = block(h).tanh()
        return self.head(h) + self.branch(x) if self.branches else self.head(h)


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def sgd(model: nn.Module) -> Optimizer:
    some = [p for p in model.parameters() if p.requires_grad]
    rest = {"params": [p for p in some if p.ndim < 2], "lr": LR_OF_REST}
    return SGD([{"params": [p for p in some if p.ndim > 1]}, rest], lr=LR, momentum=0.5)


def rows(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of one step; errors are now large, now small, so that the norms differ."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 6, generator=generator)
    return x, (1.0 + 3.0 * (step % 3)) * torch.randn(ROWS, 3, generator=generator)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    dtype = next(model.parameters()).dtype
    return (model(x.to(dtype)) - y.to(dtype)).square().sum(1).mean()


# ---- one process -------------------------------------------------------------------------------------------


def alone(
    policy: Any, nan_at: int | None = None, branches: Callable[[int], bool] = bool, watch: Any = None
) -> dict[str, Any]:
    """The same global batches in one process, clipped by a plain Clipper."""
    model = build()
    optimizer = sgd(model)
    clipper = distclip.Clipper(model, policy, watch=watch)
    reports = []
    for step in range(STEPS):
        model.branches = branches is bool or branches(step)
        x, y = rows(step)
        loss_of(model, x, y * torch.nan if step == nan_at else y).backward()
        for p in model.branch.parameters():  # ZeRO steps parameters that had no gradient with zeros
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        reports.append(clipper.step(optimizer).to_dict())
        optimizer.zero_grad()
    return {"reports": reports, "parameters": {name: p.detach() for name, p in model.named_parameters()}}


def alone_by_halves() -> dict[str, Any]:
    """The same with a branch that sees the second half of a batch alone."""
    model = build()
    optimizer = sgd(model)
    clipper = distclip.Clipper(model, BOUND)
    norms = []
    for step in range(STEPS):
        x, y = rows(step)
        for half in (slice(0, ROWS // 2), slice(ROWS // 2, None)):
            model.branches = half.start > 0
            (loss_of(model, x[half], (y * torch.nan if step == NAN_AT else y)[half]) / 2).backward()
        norms.append(clipper.step(optimizer).norm.item())
        optimizer.zero_grad()
    return {"norms": norms, "parameters": {name: p.detach() for name, p in model.named_parameters()}}


def by_hand(scale: Callable[[list[Tensor], float], None]) -> dict[str, Any]:
    """The same, clipped by ``scale(gradients, norm)``, without distclip."""
    model = build()
    optimizer = sgd(model)
    norms = []
    for step in range(STEPS):
        loss_of(model, *rows(step)).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(torch.cat([g.flatten().double() for g in gradients]).norm().item())
        scale(gradients, norms[-1])
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": norms, "parameters": {name: p.detach() for name, p in model.named_parameters()}}


# ---- engines -----------------------------------------------------------------------------------------------


@contextmanager
def deepspeed_without_a_compiler():
    """DeepSpeed's warnings pass; ours do not."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"DS_ACCELERATOR": "cpu", "PATH": "/nowhere", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops
        from deepspeed.runtime import bf16_optimizer

        deepspeed.logger.setLevel("ERROR")
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None  # prints, and takes 0.1 s each time
        deepspeed.init_distributed("gloo")
        gc.freeze()  # stage 3 collects garbage in every engine: 1.5 s beside what the server has imported
        yield


def engine_of(config: dict[str, Any], make: Callable[[], nn.Module] = build, accumulate: int = 1, **more: Any) -> Any:
    import deepspeed

    model = make()
    config = {**BASE, "gradient_accumulation_steps": accumulate, **config}
    return deepspeed.initialize(model=model, optimizer=sgd(model), config=config, **more)[0]


def taken(engine: Any, policy: Any = BOUND, **options: Any) -> Any:
    from distclip.integrations.deepspeed import take_over

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return take_over(engine, policy, **options)


def feed(engine: Any, step: int, accumulate: int = 1, spoil: bool = False, halves: bool = False) -> None:
    """The backwards of one optimizer step, and every engine.step() of it but the last."""
    x, y = rows(step)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    batches = list(zip(x[mine].chunk(accumulate), y[mine].chunk(accumulate), strict=True))
    for k, (x, y) in enumerate(batches):
        if halves:
            engine.module.branches = k > 0
        bad = spoil and k == halves and dist.get_rank() == dist.get_world_size() - 1
        engine.backward(loss_of(engine, x, y * torch.nan if bad else y))
        if k < len(batches) - 1 and engine.managed_gradient_accumulation():
            engine.step()


def parameters_of(engine: Any) -> dict[str, Tensor]:
    """Whole parameters, in fp32."""
    import deepspeed

    found = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p]):
            found[name] = p.detach().float().clone()
    return found


def true_norm(engine: Any) -> float:
    """From whole gradients, as DeepSpeed shows them to users; experts' gradients differ from rank to rank."""
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.utils import groups, safe_get_full_grad

    total = torch.zeros((), dtype=torch.float64)
    for p in engine.module.parameters():
        whole = engine.zero_optimization_stage() == 0
        gradient = p.grad if whole else safe_get_full_grad(p) if p.requires_grad else None
        if gradient is not None:
            group = groups._get_expert_data_parallel_group(p.group_name) if is_moe_param(p) else None
            total += gradient.double().square().sum() / dist.get_world_size(group)
    dist.all_reduce(total)
    return total.sqrt().item()


def masters_of(engine: Any) -> list[Tensor]:
    """The fp32 copies that are stepped, whole."""
    from deepspeed.utils import safe_get_full_fp32_param

    copies = getattr(engine.optimizer, "fp32_groups", None)
    if copies is not None:
        return [p.detach().clone() for group in copies for p in group]
    return [safe_get_full_fp32_param(p).clone() for p in engine.module.parameters() if p.requires_grad]


class OfRows(OwnRunningMean):
    def needs(self) -> tuple[distclip.Statistic]:
        return (distclip.Statistic("row"),)


# ---- cases -------------------------------------------------------------------------------------------------


def train(case: Case, policy: Any, nan_at: int | None = None, watch: Any = None) -> dict[str, Any]:
    engine = engine_of(case.config, accumulate=case.accumulate)
    clipper = taken(engine, policy, watch=watch)
    reports, norms, true, unchanged, culprit = [], [], [], None, None
    for step in range(STEPS):
        feed(engine, step, case.accumulate, spoil=step == nan_at)
        if case.bf16 and engine.managed_gradient_accumulation():
            true.append(true_norm(engine))
        before = parameters_of(engine) if step == nan_at else {}
        engine.step()
        if before:
            unchanged = all(torch.equal(p, before[name]) for name, p in parameters_of(engine).items())
        reports.append(clipper.report.to_dict())
        norms.append(float(engine.get_global_grad_norm()))
        culprit = clipper.culprit or culprit
    return {
        "reports": reports,
        "norms": norms,
        "true": true,
        "parameters": parameters_of(engine),
        "unchanged": unchanged,
        "skipped": engine.skipped_steps,
        "culprit": str(culprit),
    }


def scaled_in_fp32(config: dict[str, Any]) -> float:
    """How far the first step of bf16 masters is from clipping in fp32, relative to the step."""
    from deepspeed.utils import safe_get_full_grad

    engine = engine_of(config)
    clipper = taken(engine, 0.5)
    feed(engine, 0)
    whole = engine.zero_optimization_stage() == 0
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    if whole:
        trained = [p for group in engine.optimizer.fp16_groups for p in group]
    gradients = [(p.grad if whole else safe_get_full_grad(p)).float().clone() for p in trained]
    before = masters_of(engine)
    engine.step()
    error = size = 0.0
    for old, new, gradient in zip(before, masters_of(engine), gradients, strict=True):
        lr = LR if gradient.ndim > 1 else LR_OF_REST
        change = lr * gradient * clipper.report.coef
        error = max(error, (old - change.view_as(old) - new).abs().max().item())
        size = max(size, change.abs().max().item())
    return error / size


def branching(config: dict[str, Any], nan_at: int | None = None) -> dict[str, Any]:
    """A layer has no gradient in every other step."""
    engine = engine_of(config)
    clipper = taken(engine)
    norms = []
    for step in range(STEPS):
        engine.module.branches = step % 2 == 0
        feed(engine, step, spoil=step == nan_at)
        engine.step()
        norms.append(clipper.report.norm.item())
    return {"norms": norms, "parameters": parameters_of(engine)}


def by_halves(config: dict[str, Any]) -> dict[str, Any]:
    """A layer has no gradient in the first backward of every step."""
    engine = engine_of(config, accumulate=2)
    clipper = taken(engine)
    norms = []
    for step in range(STEPS):
        feed(engine, step, 2, spoil=step == NAN_AT, halves=True)
        engine.step()
        norms.append(clipper.report.norm.item())
    return {"norms": norms, "parameters": parameters_of(engine)}


def scaled_loss(config: dict[str, Any], dynamic: bool) -> dict[str, Any]:
    """fp32 with the loss scale of fp16, which DeepSpeed refuses on a CPU."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    engine = engine_of(config)
    optimizer = engine.optimizer
    if dynamic:
        optimizer.loss_scaler = DynamicLossScaler(1024.0, 3, 1.0, 1, False)
        optimizer.dynamic_loss_scale = True
    else:
        optimizer.override_loss_scale(1024.0)
    clipper = taken(engine)
    norms, scales = [], []
    for step in range(STEPS):
        feed(engine, step)
        engine.step()
        norms.append(clipper.report.norm.item())
        scales.append(optimizer.loss_scale)
    return {"norms": norms, "scales": scales, "parameters": parameters_of(engine)}


@dataclass(frozen=True)
class SkipAbove:
    """A policy of a user: leave out steps of a finite norm above the bound."""

    bound: float

    def needs(self) -> tuple[()]:
        return ()

    def init(self, units: distclip.Units, device: torch.device) -> dict[str, Tensor]:
        return {"skipped": torch.zeros((), dtype=torch.int64, device=device)}

    def decide(
        self, statistics: distclip.Statistics, state: dict[str, Tensor]
    ) -> tuple[distclip.Decision, dict[str, Tensor]]:
        norm = statistics.norm()
        skip = norm > self.bound
        return distclip.Decision(torch.full_like(norm, inf), skip=skip), {"skipped": state["skipped"] + skip}


def skipping(config: dict[str, Any]) -> dict[str, Any]:
    """A policy's own skips, with an LR scheduler, and with a loss scale that must not be lowered."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    engine = engine_of(config, lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10**6))
    scaler = DynamicLossScaler(1024.0, 10**6, 1.0, 1, False)
    if hasattr(engine.optimizer, "loss_scaler"):
        engine.optimizer.loss_scaler, engine.optimizer.dynamic_loss_scale = scaler, True
    clipper = taken(engine, SkipAbove(BOUND))
    reports = []
    for step in range(STEPS):
        feed(engine, step)
        engine.step()
        reports.append(clipper.report.to_dict())
    return {
        "reports": reports,
        "parameters": parameters_of(engine),
        "counts": (
            engine.skipped_steps,
            engine.lr_scheduler.last_epoch,
            int(clipper.state_dict()["policy"]["skipped"]),
        ),
        "scale": scaler.cur_scale,
    }


def collectives(config: dict[str, Any]) -> list[dict[str, int]]:
    """Of one engine.step(): DeepSpeed's own clipping, and ours."""
    counted = []
    for ours in (False, True):
        engine = engine_of({**config, "gradient_clipping": 0.0 if ours else BOUND})
        if ours:
            taken(engine)
        for step in range(3):  # copies are compared in the first two
            feed(engine, step)
            with count_collectives() as counts:
                engine.step()
        counted.append(dict(counts))
    return counted


def resumed(config: dict[str, Any], folder: str) -> bool:
    """Whether a run that is saved and loaded in the middle goes on as one that is not."""

    def run(engine: Any, clipper: Any, steps: Sequence[int]) -> list[Any]:
        found = []
        for step in steps:
            feed(engine, step, spoil=step == NAN_AT)
            engine.step()
            found.append(clipper.report.to_dict())
        return found

    policy = distclip.AutoClip(30)
    whole = engine_of(config)
    reports = run(whole, taken(whole, policy), range(STEPS))
    engine = engine_of(config)
    clipper = taken(engine, policy)
    first = run(engine, clipper, range(5))
    engine.save_checkpoint(folder, client_state={"clipper": clipper.state_dict()})

    engine = engine_of(config)
    clipper = taken(engine, policy)
    _, client_state = engine.load_checkpoint(folder)
    clipper.load_state_dict(client_state["clipper"])
    second = run(engine, clipper, range(5, STEPS))
    ends = parameters_of(whole)
    same = all(torch.equal(p, ends[name]) for name, p in parameters_of(engine).items())
    return same and repr(first + second) == repr(reports)


class Experts(nn.Module):
    def __init__(self, split: int) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        torch.manual_seed(1 + dist.get_rank())
        expert = nn.Sequential(nn.Linear(8, 8))
        room = {"capacity_factor": 8.0, "eval_capacity_factor": 8.0, "min_capacity": 0}
        self.moe = MoE(8, expert, num_experts=4, ep_size=split, k=1, **room)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.moe(self.first(x).tanh().unsqueeze(0))[0].squeeze(0))


def engine_of_experts(config: dict[str, Any], split: int) -> Any:
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    model = Experts(split)
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    return deepspeed.initialize(model=model, optimizer=SGD(groups, lr=0.05), config={**BASE, **config})[0]


def experts(config: dict[str, Any], split: int) -> list[tuple[float, float, float]]:
    """Norm, true norm and coefficient of a few steps."""
    engine = engine_of_experts(config, split)
    clipper = taken(engine, 2.0, **({"verify_every": 2} if engine.zero_optimization_stage() == 0 else {}))
    found = []
    for step in range(4):
        feed(engine, step)
        expected = true_norm(engine)
        if engine.zero_optimization_stage() == 0:
            clipper.verify()
        engine.step()
        found.append((clipper.report.norm.item(), expected, clipper.report.coef.item()))
    return found


def where_experts_are(config: dict[str, Any], split: int) -> dict[str, tuple[str | None, bool]]:
    """Where each parameter is of which this rank has elements, and whether these are a part of it."""
    from distclip.integrations.deepspeed_optimizers import KINDS, layout_of, parts_of_torch
    from distclip.layouts.layout import LayoutReader
    from distclip.layouts.piece import held_parameter
    from distclip.ranks.group import ClippingGroup

    engine = engine_of_experts(config, split)
    optimizer = engine.optimizer
    parts_of = KINDS.get(type(optimizer), (parts_of_torch, None))[0]
    held = [parameter for parameters, _ in parts_of(optimizer) for parameter in parameters]
    reader = LayoutReader(ClippingGroup.of(None), (), layout_of(optimizer, held))
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    read = {names[p]: reader.read(held_parameter(p), i) for i, p in enumerate(held)}
    return {name: (each.where, each.parts) for name, each in read.items()}


# ---- what is refused ---------------------------------------------------------------------------------------


def told(fn: Callable[[], Any]) -> str:
    """The error or the warning that ``fn`` ends in, with its kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*gradient_clipping")
        try:
            fn()
        except (ValueError, NotImplementedError, RuntimeError, UserWarning) as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


class AllModelParallel:
    """An mpu of a user: every rank holds a part of the model."""

    def __init__(self) -> None:
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        self.alone, self.all = groups[dist.get_rank()], dist.new_group(list(range(dist.get_world_size())))
        self.get_model_parallel_rank = dist.get_rank
        self.get_model_parallel_world_size = dist.get_world_size
        self.get_model_parallel_group = self.get_tensor_model_parallel_group = lambda: self.all
        self.get_data_parallel_rank = lambda: 0
        self.get_data_parallel_world_size = lambda: 1
        self.get_data_parallel_group = lambda: self.alone


def caught(config: dict[str, Any]) -> dict[str, Any]:
    """Accumulation where a step raises and the loop goes on: norms, parameters, and what was counted."""
    engine = engine_of(config, accumulate=2)
    clipper = taken(engine, nonfinite="raise")
    norms = []
    for step in range(STEPS):
        feed(engine, step, 2, spoil=step == NAN_AT)
        try:
            engine.step()
            norms.append(clipper.report.norm.item())
        except distclip.NonFiniteError:
            norms.append(float(engine.get_global_grad_norm()))
    counts = (engine.global_steps, engine.micro_steps, engine.skipped_steps)
    return {"norms": norms, "parameters": parameters_of(engine), "counts": counts}


def refusals() -> dict[str, str]:
    """The last case of a process: some of these leave DeepSpeed in a state that no other case could use."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    from distclip.integrations.deepspeed import clipper_of, take_over

    def unsupported(config: dict[str, Any], **more: Any) -> str:
        return told(lambda: take_over(engine_of({**zero(1), **config}, **more), BOUND))

    def muon() -> Any:
        config = {**BASE, **zero(2, reduce_scatter=False)}
        config["optimizer"] = {"type": "Muon", "params": {"lr": 0.01, "torch_adam": True}}
        model = build()
        return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]

    def pipeline() -> Any:
        net = PipelineModule([nn.Linear(6, 6), nn.Linear(6, 3)], num_stages=2, loss_fn=nn.MSELoss())
        return deepspeed.initialize(model=net, optimizer=sgd(net), config=BASE)[0]

    engine = engine_of(zero(1), accumulate=2)
    clipper = taken(engine)
    feed(engine, 0, 2)
    engine.step()
    found = {
        "twice": told(lambda: take_over(engine, BOUND)),
        "no engine": told(lambda: take_over(build(), BOUND)),
        "two callers": told(clipper.clip_),
        "detach": told(clipper.detach),
        "inside accumulation": told(clipper.measure),
        "verify": told(clipper.verify),
        "verify_every": told(lambda: take_over(engine_of(zero(2)), BOUND, verify_every=2)),
        "nothing reduced": told(lambda: taken(engine_of(zero(2))).measure()),
        "explicit": told(lambda: take_over(engine_of(zero(1) | {"gradient_clipping": 0.7}), BOUND)),
        "propagate": told(lambda: take_over(engine_of(zero(0) | BF16), BOUND, nonfinite="propagate")),
        "muon": told(lambda: take_over(muon(), BOUND)),
        "deepcompile": unsupported({"compile": {"deepcompile": True}}),
        "rows": told(lambda: taken(engine_of(zero(2)), OfRows())),
        "patterns": told(lambda: taken(engine_of(zero(2)), watch={"a": "nowhere.*"})),
    }
    silent = {name: value for name, value in BASE.items() if name != "gradient_clipping"}
    model = build()
    engine = deepspeed.initialize(model=model, optimizer=sgd(model), config=silent | zero(0))[0]
    written = engine.gradient_clipping()
    found["default"] = f"{written}, {told(lambda: take_over(engine, BOUND))}, {engine.gradient_clipping()}"
    gc.collect()
    found["not kept"] = f"{clipper_of(engine)}, {clipper_of(engine_of(zero(0)))}"
    for stage in (0, 1):
        engine = engine_of(zero(stage))
        taken(engine, nonfinite="raise")
        feed(engine, 0, spoil=True)
        found[f"nonfinite {stage}"] = told(engine.step)
    found["autocast"] = unsupported({"torch_autocast": {"enabled": True, "dtype": "float16"}})
    found["mpu"] = unsupported({}, mpu=AllModelParallel())
    found["pipeline"] = told(lambda: take_over(pipeline(), BOUND))
    return found


# ---- launches ----------------------------------------------------------------------------------------------


def launch(names: Sequence[str], places: Sequence[str], folder: str) -> dict[Any, Any]:
    """Everything that one set of processes runs, stage 3 last because it patches F.linear for good.

    ``names``: the cases to train; ``places``: where to try all else, as in "2 offloaded".
    """
    found: dict[Any, Any] = {}

    def attempt(key: Any, fn: Callable[..., Any], *args: Any) -> None:
        try:
            found[key] = fn(*args)
        except Exception:  # of whatever kind, it is the result of this case
            found[key] = traceback.format_exc()

    with deepspeed_without_a_compiler():
        for stage in range(4):
            for name in names:
                if name.startswith(str(stage)):
                    attempt((name, "MaxNorm"), train, CASES[name], distclip.MaxNorm(BOUND))
                    attempt((name, "AutoClip"), train, CASES[name], distclip.AutoClip(30), NAN_AT)
            for key in places:
                if not key.startswith(str(stage)):
                    continue
                config = zero(stage, **({"offload_optimizer": CPU} if "offloaded" in key else {}))
                attempt((key, "ValueClip"), train, Case(config), distclip.ValueClip(0.1))
                attempt((key, "by unit"), train, Case(config), OwnRunningMean(), None, "parameters")
                attempt((key, "branching"), branching, config)
                attempt((key, "branching, NaN"), branching, config, NAN_AT)
                attempt((key, "by halves"), by_halves, config)
                attempt((key, "resumed"), resumed, config, f"{folder}/{key}")
                attempt((key, "skipping"), skipping, config)
                attempt((key, "caught"), caught, config)
                attempt((key, "collectives"), collectives, config)
            if str(stage) not in places:
                continue
            attempt((f"{stage} bf16", "by unit"), train, Case(zero(stage) | BF16), OwnRunningMean(), None, "parameters")
            attempt((str(stage), "scaled in fp32"), scaled_in_fp32, zero(stage) | BF16)
            if stage == 1:
                attempt(("1, fp32 sums", "scaled in fp32"), scaled_in_fp32, zero(1) | BF16 | FP32_SUMS)
            if stage > 0:
                for dynamic in (False, True):
                    attempt((str(stage), "scaled loss", dynamic), scaled_loss, zero(stage), dynamic)
            if stage < 3:
                for split in (1, 2):
                    attempt((str(stage), "experts", split), experts, zero(stage), split)
                    attempt((str(stage), "where", split), where_experts_are, zero(stage), split)
        if "0" in places:
            attempt("refusals", refusals)
    with suppress(FileNotFoundError):
        os.chdir("/")
    return found
