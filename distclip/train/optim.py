"""The optimizer, and its learning rate as a function of the step: nothing to save, nothing to restore."""

import math
from collections import defaultdict

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from distclip.train.config import Optim


def build_optimizer(config: Optim, model: nn.Module) -> Optimizer:
    """One parameter group per mesh: torch's fused and foreach kernels cannot mix them."""
    by_mesh: defaultdict[DeviceMesh | None, list[nn.Parameter]] = defaultdict(list)
    for p in model.parameters():
        by_mesh[p.device_mesh if isinstance(p, DTensor) else None].append(p)
    parameters = [{"params": group} for group in by_mesh.values()]
    if config.name == "sgd":
        return SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=config.fused,
        )
    return AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=config.fused)


def learning_rate(config: Optim, step: int, steps: int) -> float:
    """A linear warm-up, then constant or half a cosine down to a tenth, for `step` counted from 0."""
    lr = config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.decay == "cosine":
        lr *= 0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2
    return lr
