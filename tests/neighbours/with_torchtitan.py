"""torchtitan's own Trainer, models and parallelize functions on four CPU ranks, clipped by distclip in every layout.

``run.sh torchtitan`` installs torchtitan and runs this, which starts torchrun for each layout, since a Trainer leaves
its meshes to the next. `Trainer.train_step` is torchtitan's source with one call changed, THEIRS to OURS. In each step
the norm that it returns is compared with

* "gathered": the gradients before clipping, gathered whole, their norm in float64;
* "one process": the same weights and batch in the same model without any parallelism, on rank 0.

Fails where one is off by more than LIMITS, where ranks got different bits, or where gradients were not scaled by the
coefficient of that norm. "torchtitan's own" is its function on the same gradients, to compare.
"""

import inspect
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import distclip

torch._utils._get_available_device_type = lambda: "cpu"  # torchtitan takes a machine without a GPU for one with CUDA

from torchtitan import trainer as titan  # noqa: E402
from torchtitan.components import metrics  # noqa: E402
from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.optimizer import default_adamw  # noqa: E402
from torchtitan.config import CommConfig, DebugConfig, ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.distributed import utils as dist_utils  # noqa: E402
from torchtitan.models import llama3, qwen3  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402

THEIRS = """\
            grad_norm = dist_utils.clip_grad_norm_(
                [p for m in self.model_parts for p in m.parameters()],
                self.config.training.max_norm,
                foreach=True,
                pp_mesh=parallel_dims.get_optional_mesh("pp"),
                ep_enabled=parallel_dims.ep_enabled,
            )
"""
OURS = """\
            grad_norm = distclip.clip_grad_norm_(
                [p for m in self.model_parts for p in m.parameters()],
                self.config.training.max_norm,
                split_over=[parallel_dims.get_mesh("pp")] if parallel_dims.pp_enabled else [],
            )
"""
VOCABULARY, LENGTH, ROWS = 2048, 32, 8  # of the debug models; tokens a row; rows a step, of all ranks
BOUNDS = (0.1, 1e3, 0.1)  # one step below the bound between two above it
LIMITS = {"gathered": 1e-6, "one process": 5e-6, "scaled by": 1e-6}  # layouts round logits, and so gradients, otherwise

DTENSOR = {"spmd_backend": "partial_dtensor"}  # spmd_types exchanges tokens by a call that Gloo has for even shares
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "FSDP2": ("llama3", {}),
    "HSDP": ("llama3", {"data_parallel_replicate_degree": 2}),
    "TP + SP": ("llama3", {"tensor_parallel_degree": 4}),
    "FSDP2 x TP": ("llama3", {"tensor_parallel_degree": 2}),
    "PP x FSDP2": ("llama3", {"pipeline_parallel_degree": 2}),
    "PP x TP": ("llama3", {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2}),
    "EP": ("qwen3", {"expert_parallel_degree": 4}),
    "EP x FSDP2": ("qwen3", {"expert_parallel_degree": 2}),
    "EP x FSDP2 x TP": ("qwen3", {"expert_parallel_degree": 2, "tensor_parallel_degree": 2}),
    "PP x EP": ("qwen3", {"pipeline_parallel_degree": 2, "expert_parallel_degree": 2} | DTENSOR),
}


class Rows:
    """Random rows, the same for every layout: each data-parallel rank takes its share of every step's."""

    def __init__(self, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: Any) -> None:
        share = ROWS // dp_world_size
        self.mine, self.size = slice(dp_rank * share, (dp_rank + 1) * share), local_batch_size

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for step in range(len(BOUNDS)):
            for part in rows(step)[self.mine].split(self.size):  # a pipeline takes its micro-batches one by one
                yield {"input": part[:, :-1]}, part[:, 1:]


@dataclass(frozen=True, slots=True)
class Step:
    """What one call returned, and what it should have."""

    norm: float
    theirs: float
    gathered: float
    alone: float
    scaled_by: float
    max_norm: float

    def errors(self) -> dict[str, float]:
        coef = min(1.0, self.max_norm / (self.gathered + 1e-6))
        pairs = {
            "gathered": (self.norm, self.gathered),
            "one process": (self.norm, self.alone),
            "scaled by": (self.scaled_by, coef),
            "torchtitan's own": (self.theirs, self.gathered),
        }
        return {name: abs(got / true - 1) for name, (got, true) in pairs.items()}


def rows(step: int) -> Tensor:
    return torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def specification(name: str) -> Any:
    """A debug model, four or two layers deep, with the one attention that computes gradients on a CPU."""
    spec = llama3.model_registry("debugmodel") if name == "llama3" else qwen3.model_registry("debugmodel_moe")
    spec.model.layers = spec.model.layers[: 4 if name == "llama3" else 2]
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return spec


def configuration(name: str, backend: str, degrees: dict[str, int]) -> titan.Trainer.Config:
    pipeline, tensor = (degrees.get(f"{axis}_parallel_degree", 1) for axis in ("pipeline", "tensor"))
    shares = dist.get_world_size() // (pipeline * tensor)
    return titan.Trainer.Config(
        model_spec=specification(name),
        loss=CrossEntropyLoss.Config(global_vocab_size=VOCABULARY),
        tokenizer=SimpleNamespace(build=lambda **_: None),
        dataloader=SimpleNamespace(build=Rows),
        optimizer=default_adamw(lr=1e-3),
        training=TrainingConfig(
            local_batch_size=ROWS // shares,
            seq_len=LENGTH,
            steps=len(BOUNDS),
            disable_cuda_graphs=True,
            mixed_precision_param="float32",
        ),
        parallelism=ParallelismConfig(**{"spmd_backend": backend} | degrees),
        activation_checkpoint=None,
        comm=CommConfig(trace_buf_size=0),
        debug=DebugConfig(seed=1, enable_structured_logging=False),
    )


def without_parallelism(name: str, backend: str) -> nn.Module:
    config = configuration(name, backend, {})
    config.model_spec.model.update_from_config(config=config)
    return config.model_spec.model.build()


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def gathered(trainer: titan.Trainer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by name, of all pipeline stages."""
    mine = {name: whole(tensor).clone() for name, tensor in tensors.items()}
    if not trainer.parallel_dims.pp_enabled:
        return mine
    stages: list[Any] = [None] * trainer.parallel_dims.pp
    dist.all_gather_object(stages, mine, group=trainer.parallel_dims.get_mesh("pp").get_group())
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def gradients(trainer: titan.Trainer) -> dict[str, Tensor]:
    named = [pair for part in trainer.model_parts for pair in part.named_parameters()]
    return gathered(trainer, {name: p.grad for name, p in named if p.grad is not None})


def float64_norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors.values()))


def norm_alone(model: nn.Module, weights: dict[str, Tensor], step: int) -> float:
    model.to_empty(device="cpu") if any(p.is_meta for p in model.parameters()) else None
    model.load_state_dict(weights)
    model.zero_grad()
    batch = rows(step)
    logits = model(batch[:, :-1])
    nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten()).backward()
    return float64_norm({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def our_step(record: Any) -> Any:
    """torchtitan's `train_step` with our call in it, which `record` makes."""
    source = inspect.getsource(titan.Trainer.train_step)
    assert source.count(THEIRS) == 1, "torchtitan's call looks different in this version"
    space = {**vars(titan), "distclip": SimpleNamespace(clip_grad_norm_=record)}
    exec(textwrap.dedent(source.replace(THEIRS, OURS)), space)
    return space["train_step"]


def train(name: str, backend: str, degrees: dict[str, int]) -> list[Step]:
    trainer = configuration(name, backend, degrees).build()
    for module in (m for part in trainer.model_parts for m in part.modules()):
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # Gloo has no PREMUL_SUM
    alone = without_parallelism(name, backend) if dist.get_rank() == 0 else None
    steps: list[Step] = []

    def record(parameters: list[Tensor], max_norm: float, **options: Any) -> Tensor:
        before = gradients(trainer)
        theirs = dist_utils.clip_grad_norm_(
            parameters,
            math.inf,
            foreach=True,
            pp_mesh=trainer.parallel_dims.get_optional_mesh("pp"),
            ep_enabled=trainer.parallel_dims.ep_enabled,
        )
        norm = distclip.clip_grad_norm_(parameters, max_norm, **options)
        true, scaled = float64_norm(before), float64_norm(gradients(trainer))
        single = norm_alone(alone, weights, len(steps)) if alone is not None else math.nan
        steps.append(Step(norm.item(), theirs.item(), true, single, scaled / true, max_norm))
        return norm

    step, data = our_step(record), trainer.batch_generator(trainer.dataloader)
    for max_norm in BOUNDS:
        trainer.config.training.max_norm = max_norm
        states = [part.state_dict() for part in trainer.model_parts]
        weights = gathered(trainer, {key: value for state in states for key, value in state.items()})
        step(trainer, data)
    return steps


def report(steps: list[Step], backend: str, layout: str) -> bool:
    """Print a row on rank 0; whether all is well there, and norms have the same bits on all ranks."""
    norms: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(norms, [step.norm for step in steps])
    assert min(step.scaled_by for step in steps) < 0.9, "never clipped"
    assert max(step.scaled_by for step in steps) == 1, "always clipped"
    if dist.get_rank():
        return True
    off = {name: max(step.errors()[name] for step in steps) for name in steps[0].errors()}
    good = all(each == norms[0] for each in norms) and all(off[name] <= limit for name, limit in LIMITS.items())
    row = "  ".join(f"{name} {error:.1e}" for name, error in off.items())
    print(f"{backend:15}  {layout:15}  {steps[0].norm:.6f}  {row}{'' if good else '  WRONG'}", flush=True)
    return good


def on_this_rank(backend: str, layout: str) -> None:
    metrics.build_device_memory_monitor = lambda: SimpleNamespace(  # asks a GPU for its name and memory
        device_name="cpu",
        get_peak_stats=lambda: metrics.DeviceMemStats(0, 0, 0, 0, 0, 0),
        reset_peak_stats=lambda: None,
    )
    dist.init_process_group("gloo")
    name, degrees = LAYOUTS[layout]
    backend = degrees.get("spmd_backend", backend)
    good = report(train(name, backend, degrees), backend, layout)
    dist.barrier()
    os._exit(not good)  # an ordinary exit sometimes aborts in a thread of Gloo (torch 2.14.1)


def main() -> None:
    backend, layouts = [*sys.argv[1:], *("spmd_types", ",".join(LAYOUTS))[len(sys.argv) - 1 :]]
    if "RANK" in os.environ:
        on_this_rank(backend, layouts)
    failed = []
    for layout in layouts.split(","):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
        done = subprocess.run([sys.executable, *torchrun, __file__, backend, layout], capture_output=True, text=True)
        print(*[line for line in done.stdout.splitlines() if "  gathered " in line], sep="\n", flush=True)
        if done.returncode:
            failed.append(layout)
            print(layout, "failed:", done.stderr[-5000:], flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
