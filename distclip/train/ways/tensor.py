"""Tensor parallelism: each rank computes some attention heads and some units of each MLP."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from distclip.train.models.gpt import Gpt


def cut_layers(model: Gpt, mesh: DeviceMesh) -> None:
    """Cut the large layers of every block along `mesh`; norms, embeddings and the head stay plain tensors."""
    for block in model.blocks.values():
        plan = {
            "qkv": ColwiseParallel(),
            "project": RowwiseParallel(),
            "mlp.up": ColwiseParallel(),
            "mlp.down": RowwiseParallel(),
        }
        parallelize_module(block, mesh, plan)
