"""ZeRO by DeepSpeed (the extra `deepspeed`): optimizer state, gradients and parameters are sharded, stage by stage.

DeepSpeed's own checkpoints are pickles for one number of ranks. Here every parameter and its optimizer state are
assembled and saved whole by the names of the model, as with the other ways. That needs private API, read in DeepSpeed
0.19.8: the flat partitions that its optimizer steps, and `_lazy_init_hp_params_optimizer_state`.
"""

import os
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import Optimizer

from distclip import Clipper, Report
from distclip.train.clip import watch_of
from distclip.train.config import Config
from distclip.train.optim import build_optimizer
from distclip.train.passes import Answer, mean_loss
from distclip.train.place import Place
from distclip.train.problem import require


def check_installed(config: Config) -> None:
    strategy = config.parallel.strategy
    there = not strategy.startswith("zero") or find_spec("deepspeed") is not None
    require(there, "parallel.strategy", f'{strategy} needs DeepSpeed: pip install "distclip[deepspeed]"')


@dataclass(kw_only=True, slots=True, frozen=True)
class Zero:
    """A DeepSpeed engine, which holds, runs and steps the model."""

    engine: Any
    clipper: Clipper
    kept: tuple[str, ...]  # what the optimizer keeps of every element
    counts: bool  # whether it counts its steps, too

    @classmethod
    def of(cls, model: nn.Module, config: Config, place: Place) -> "Zero":
        """Let DeepSpeed distribute `model` over all ranks. All ranks call."""
        os.environ.setdefault("DS_ACCELERATOR", place.device.type)
        import deepspeed  # takes seconds, and patches torch

        from distclip.integrations.deepspeed import take_over

        deepspeed.logger.setLevel("WARNING")
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # names it uses that have newer ones
        if place.device.type == "cpu":  # it would be compiled, and is for inference
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(place.backend)
        optimizer = build_optimizer(config.optim, model)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(config, place.world))
        clipper = take_over(
            engine,
            config.clip.policy,
            nonfinite=config.clip.options.nonfinite,
            max_consecutive_skips=config.clip.options.max_consecutive_skips,
            watch=watch_of(config.clip),
            watch_zeros=config.clip.options.watch_zeros,
        )
        momentum = ("momentum_buffer",) if config.optim.momentum else ()
        adam = config.optim.name == "adamw"
        zero = cls(engine=engine, clipper=clipper, kept=("exp_avg", "exp_avg_sq") if adam else momentum, counts=adam)
        zero.fill()
        return zero

    @property
    def model(self) -> nn.Module:
        return self.engine  # type: ignore[no-any-return]

    @property
    def optimizer(self) -> Optimizer:
        return self.engine.optimizer  # type: ignore[no-any-return]

    def forward_backward(self, inputs: Tensor, targets: Tensor) -> Answer | None:
        logits = self.forward(inputs, targets)
        loss = mean_loss(logits, targets)
        self.engine.backward(loss)
        return Answer(loss.detach(), logits.detach())

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        low = inputs.is_floating_point() and self.engine.bfloat16_enabled()
        return self.engine(inputs.bfloat16() if low else inputs)  # type: ignore[no-any-return]

    def step(self, answer: Answer | None) -> Report:
        self.engine.step()
        report = self.clipper.report
        assert report is not None  # engine.step() has made one
        return report

    def state(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        model: dict[str, Tensor] = {}
        optimizer: dict[str, Tensor] = {}
        for name, p in self.engine.module.named_parameters():
            model[name] = safe_get_full_fp32_param(p)
            optimizer |= {f"state.{name}.{key}": safe_get_full_optimizer_state(p, key) for key in self.kept}
            if self.counts:
                optimizer[f"state.{name}.step"] = self.states()[0]["step"]
        return {"model": model, "optimizer": optimizer}

    def load(self, state: dict[str, Any]) -> None:
        optimizer = state["optimizer"]
        for name, p in self.engine.module.named_parameters():
            put(p, state["model"][name], {key: optimizer[f"state.{name}.{key}"] for key in self.kept})
            if self.counts:
                for each in self.states():
                    each["step"].copy_(optimizer[f"state.{name}.step"])

    def states(self) -> list[dict[str, Tensor]]:
        """The torch optimizer's state for every flat tensor that it steps."""
        return [self.engine.optimizer.optimizer.state[flat] for flat in self.flat()]

    def flat(self) -> list[Tensor]:
        """This rank's part of all parameters, in float32."""
        optimizer, stage = self.engine.optimizer, self.engine.zero_optimization_stage()
        return list(optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups)

    def fill(self) -> None:
        """Initialise the optimizer's state with zeros, as its first step would, so that there is one to load into."""
        optimizer = self.engine.optimizer
        fused = any(group["fused"] for group in optimizer.optimizer.param_groups)
        for flat in self.flat():
            zeros = {key: torch.zeros_like(flat.detach()) for key in self.kept}
            step = torch.zeros((), device=flat.device if fused else None)  # where torch's own first step makes it
            optimizer.optimizer.state[flat] = zeros | ({"step": step} if self.counts else {})
        if self.engine.zero_optimization_stage() < 3:
            optimizer._lazy_init_hp_params_optimizer_state()


def put(p: Any, value: Tensor, kept: dict[str, Tensor]) -> None:
    """Set a parameter, its float32 copy and its optimizer state from whole tensors. All ranks call."""
    from deepspeed import utils
    from deepspeed.runtime.zero import GatheredParameters

    if not hasattr(p, "ds_id"):  # stages 1 and 2
        p.data.copy_(value)
        utils.safe_set_full_fp32_param(p, value)
        for key, whole in kept.items():
            utils.safe_set_full_optimizer_state(p, whole, key)
        return
    with GatheredParameters([p], modifier_rank=0):
        p.data.copy_(value)
    utils.safe_set_local_fp32_param(p, own_part(p, value))
    for key, whole in kept.items():
        utils.safe_set_local_optimizer_state(p, own_part(p, whole), key)


def own_part(p: Any, whole: Tensor) -> Tensor:
    """What stage 3 keeps on this rank: equal parts, the last filled up with zeros."""
    size, ranks, rank = p.ds_tensor.numel(), dist.get_world_size(), dist.get_rank()
    return pad(whole.flatten(), (0, size * ranks - whole.numel())).narrow(0, size * rank, size)


def settings(config: Config, world: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": config.train.batch_size // world,
        "zero_optimization": {"stage": int(config.parallel.strategy.removeprefix("zero"))},
        "bf16": {"enabled": config.train.precision == "bf16"},
        "communication_data_type": "fp32",  # of gradients, as in the other ways
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # the Clipper's
        "steps_per_print": 10**9,
    }
