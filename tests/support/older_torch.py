"""What torch 2.6 lacks on a CPU and a newer one has: what is tested is distclip, on torch 2.6 too.

Imported by tests and ranks. On a newer torch it changes nothing and excuses nothing.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

OLDER = torch.__version__ < (2, 7)
LACKS = {  # a part of an error of torch's: what torch 2.6 cannot do. A test that meets it is skipped
    "FSDP+TP sharding does not support uneven sharding": "FSDP2 of torch 2.6 takes no uneven tensor parallel",
    "Cannot use ReduceOp.AVG with Gloo": "Gloo of torch 2.6 has no average",
    "ProcessGroupGloo does not support reduce_scatter": "Gloo of torch 2.6 has no reduce_scatter",
    "RuntimeError: Invalid scalar type": "Gloo of torch 2.6 has no complex numbers",
    "plus negative padding": "torch 2.6 cannot distribute a tensor without elements",
    "Graph break due to unsupported builtin torch._C._dynamo": "torch 2.6 warns of functions that are not to be traced",
    "self.mask_buffer.data is not None": "tensor parallel of torch 2.6 loses the mask of a row-wise embedding",
    "_StridedShard currently only allows even sharding": "torch 2.6 cuts strided shards evenly only",
    "get_int1_ty": "the interpreter of Triton 3.2 has no booleans",
}


def cut(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> DTensor:
    """This rank's part of what all ranks have, without a collective."""
    if not OLDER:
        return distribute_tensor(whole, mesh, placements, src_data_rank=None)
    local, placements = whole, [Shard(p.dim % whole.ndim) if type(p) is Shard else p for p in placements]
    for axis, placement in enumerate(placements):
        if placement.is_shard():
            pieces, _ = placement._split_tensor(local, mesh.size(axis), with_padding=False)
            local = pieces[mesh.get_coordinate()[axis]]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def lacking(error: str) -> str | None:
    """What torch lacks, where an error is of that."""
    return next((reason for part, reason in LACKS.items() if OLDER and part in error), None)


class _Works:
    def __init__(self, works: Sequence[Any]) -> None:
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def _batch_p2p(ops: list[dist.P2POp], desc: str | None = None) -> _Works | None:
    """All of them: torch 2.6 keeps and awaits the last, and on Gloo the others end with their objects, unsent."""
    return _Works(dist.batch_isend_irecv(ops)) if ops else None


def _as_one_version(copy_out: Callable[..., None]) -> Callable[..., None]:
    """Gathering parameters once more for a backward is no change of them, on a CPU neither."""

    def copied_out(result: Any, params: Sequence[Any], *others: Any) -> None:
        with ExitStack() as versions:
            for tensor in chain.from_iterable(getattr(param, "all_gather_outputs", ()) for param in params):
                versions.enter_context(torch.autograd._unsafe_preserve_version_counter(tensor))
            copy_out(result, params, *others)

    return copied_out


def _factors(shards: dist.ProcessGroup, copies: dist.ProcessGroup | None, dtype: torch.dtype) -> tuple[float, float]:
    """Before a sum and after it: Gloo's reduce-scatter of torch 2.6 takes an average for a sum, and says nothing."""
    return 1.0, float(shards.size() * (copies.size() if copies else 1))


if OLDER:
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group
    from torch.distributed.pipelining import schedules

    torch.cpu.Stream.record_event = lambda self: torch.cpu.Event()
    torch.cpu.Stream.wait_event = lambda self, event: None
    _fsdp_param_group.foreach_all_gather_copy_out = _as_one_version(_fsdp_param_group.foreach_all_gather_copy_out)
    _fsdp_collectives._get_gradient_divide_factors = _factors
    schedules._batch_p2p = _batch_p2p
