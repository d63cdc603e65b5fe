"""ZeRO 2 under DeepSpeed, clipped by AutoClip. torchrun --nproc-per-node 2 examples/deepspeed_zero.py"""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # for this example: leave it out on GPUs

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

import distclip
from distclip.integrations.deepspeed import take_over

# On CPUs DeepSpeed compiles an operator for inference when it starts: 48 s, or an error without a compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
config = {
    "train_micro_batch_size_per_gpu": 16,
    "zero_optimization": {"stage": 2},
    "gradient_clipping": 0.0,
}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
clipper = take_over(engine, distclip.AutoClip())

torch.manual_seed(dist.get_rank())  # different rows on every rank
for step in range(20):
    x = torch.randn(16, 8)
    engine.backward((engine(x) - x.sum(1, keepdim=True)).square().mean())
    engine.step()
    if dist.get_rank() == 0 and step % 5 == 0:
        print(step, clipper.report.to_dict())

engine.destroy()
dist.destroy_process_group()
