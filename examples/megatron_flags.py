"""Plain tensors cut by hand, with Megatron's flags: torchrun --nproc-per-node 4 examples/megatron_flags.py"""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import distclip

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))


def layout(name, p):  # no duplicates to filter out: it only says how many ranks hold each element
    pieces = mesh["pp"].size() * (mesh["tp"].size() if p.tensor_model_parallel else 1)
    stages = 2 if getattr(p, "shared_embedding", False) else 1  # tied: on the first and the last stage
    return distclip.Layout(stages * dist.get_world_size() // pieces)  # with a distributed optimizer: pieces *= dp


def clip_grad_norm(self, clip_grad):  # MegatronOptimizer.clip_grad_norm = clip_grad_norm
    return distclip.clip_grad_norm_(self.get_parameters(), clip_grad, layout=layout).item()


torch.manual_seed(0)  # the same whole gradients everywhere; each rank takes its part of its stage's
whole = {"embedding": torch.randn(8, 4), "0.norm": torch.randn(4), "1.linear": torch.randn(4, 4)}
mine = []
for name, gradient in whole.items():
    if name in ("embedding", f"{mesh['pp'].get_local_rank()}.norm", f"{mesh['pp'].get_local_rank()}.linear"):
        cut = gradient.chunk(2)[mesh["tp"].get_local_rank()] if gradient.ndim == 2 else gradient
        p = torch.nn.Parameter(torch.zeros_like(cut))
        p.grad, p.tensor_model_parallel, p.shared_embedding = cut.clone(), gradient.ndim == 2, name == "embedding"
        mine.append(p)

norm = clip_grad_norm(SimpleNamespace(get_parameters=lambda: mine), 1.0)
expected = torch.cat([gradient.flatten().double() for gradient in whole.values()]).norm().item()
assert abs(norm / expected - 1) < 1e-6, (norm, expected)
print(f"rank {dist.get_rank()}: norm {norm:.6f}, of the whole gradients {expected:.6f}")
dist.destroy_process_group()
