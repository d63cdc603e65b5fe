"""Models to clip and the layouts that cut them up: adding a layout is adding one function."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

ROWS = 12  # of a global batch: divisible by 1, 2, 3 and 4 ranks
WORDS = 37


class Block(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Net(nn.Module):
    """Sizes that no number of ranks divides, a head of two rows (empty shards on three ranks), a scalar-like bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.unused = nn.Linear(3, 5)
        self.head = nn.Linear(12, 2)

    def forward(self, words: Tensor) -> Tensor:  # (rows, 6) int64 -> (rows, 2)
        x = self.embed(words)
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean(1)


class DenseNet(Net):
    """The same without the parameters that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        del self.unused


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step: words (ROWS, 6) and targets (ROWS, 2)."""
    chance = torch.Generator().manual_seed(step)
    return torch.randint(WORDS, (ROWS, 6), generator=chance), torch.randn(ROWS, 2, generator=chance)


def backward(model: nn.Module, step: int = 0, scale: float = 1.0) -> float:
    """Forward and backward of this rank's rows of the global batch; the loss of those rows."""
    words, targets = batch(step)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    loss = scale * (model(words[mine]) - targets[mine]).square().mean()
    loss.backward()
    return loss.item()


def build(kind: type[Net] = DenseNet, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return kind().to(dtype)


def one_process() -> nn.Module:
    return build()


def ddp() -> nn.Module:
    return DistributedDataParallel(build())


def ddp_bucket_view() -> nn.Module:
    return DistributedDataParallel(build(), gradient_as_bucket_view=True)


def ddp_static_graph() -> nn.Module:
    return DistributedDataParallel(build(), static_graph=True)


def ddp_unused() -> nn.Module:
    return DistributedDataParallel(build(Net), find_unused_parameters=True)


def _shard(model: Net, **options) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp2() -> nn.Module:
    return _shard(build())


def fsdp2_keep_unsharded() -> nn.Module:
    return _shard(build(), reshard_after_forward=False)


def fsdp2_unused() -> nn.Module:
    return _shard(build(Net))


def fsdp2_bf16() -> nn.Module:
    return _shard(build(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def fsdp2_bf16_parameters() -> nn.Module:
    return _shard(build(dtype=torch.bfloat16))


def fsdp2_offload() -> nn.Module:
    return _shard(build(), offload_policy=CPUOffloadPolicy(pin_memory=False))


def fsdp2_and_plain() -> nn.Module:
    """Sharded blocks; embedding and head plain and reduced by hand, as the user of ignored parameters must."""
    model = build()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)

    def reduce(gradient: Tensor) -> Tensor:
        dist.all_reduce(gradient)
        return gradient / dist.get_world_size()

    for part in (model.embed, model.head):
        for parameter in part.parameters():
            parameter.register_hook(reduce)
    return model


REPLICATED: list[Callable[[], nn.Module]] = [ddp, ddp_bucket_view, ddp_static_graph, ddp_unused]
SHARDED: list[Callable[[], nn.Module]] = [
    fsdp2,
    fsdp2_keep_unsharded,
    fsdp2_unused,
    fsdp2_bf16,
    fsdp2_bf16_parameters,
    fsdp2_offload,
    fsdp2_and_plain,
]
