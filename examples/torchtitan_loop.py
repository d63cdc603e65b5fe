"""Pipeline stages of FSDP2 modules, torchtitan's call: torchrun --nproc-per-node 4 examples/torchtitan_loop.py"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import mse_loss

import distclip


def clip_grad_norm_(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False, foreach=None, pp_mesh=None, **_):
    """Replaces torchtitan.distributed.utils.clip_grad_norm_; experts need no flag, they have meshes of their own."""
    split_over = [] if pp_mesh is None else [pp_mesh]
    return distclip.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, split_over=split_over)


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
stage = mesh["pp"].get_local_rank()
torch.manual_seed(stage)
part = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
fully_shard(part, mesh=mesh["dp"], reshard_after_forward=False)
pipeline = PipelineStage(part, stage, 2, torch.device("cpu"), group=mesh["pp"].get_group())
schedule = Schedule1F1B(pipeline, n_microbatches=2, loss_fn=mse_loss)
optimizer = torch.optim.AdamW(part.parameters(), lr=1e-2)

torch.manual_seed(mesh["dp"].get_local_rank())  # different rows on every data-parallel rank
for step in range(10):
    x = torch.randn(8, 8)
    schedule.step(x) if stage == 0 else schedule.step(target=x.flip(1))
    norm = clip_grad_norm_(part.parameters(), 1.0, foreach=True, pp_mesh=mesh["pp"], ep_enabled=False)
    optimizer.step()
    optimizer.zero_grad()
    if step % 3 == 0:
        print(f"step {step}, rank {dist.get_rank()}: {norm.item():.6f}")  # the same on every rank of every stage

dist.destroy_process_group()
