"""FSDP2: which parameters its modules manage. Private torch API, read in 2.13, 2.11 and 2.6.

FSDP2 itself reduces the gradient of a sharded parameter to the parameter's placements. Between forward and backward it
exposes unsharded plain tensors in place of the parameters, which never have a gradient.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule

taken_over: Mapping[nn.Module, object] = _module_state_mapping
"""The modules that FSDP2, or another of torch's composable wrappers, has taken over in this process."""


def managed_parameters(module: FSDPModule) -> set[int]:
    """Ids of the sharded parameters that ``module`` itself manages."""
    return {id(entry.sharded_param) for entry in _entries(module)}


def managed_anywhere() -> tuple[set[int], set[int]]:
    """Ids of all sharded parameters in this process, and of the unsharded tensors that replace them now."""
    sharded: set[int] = set()
    copies: set[int] = set()
    for module in list(taken_over):
        if isinstance(module, FSDPModule):
            for entry in _entries(module):
                sharded.add(id(entry.sharded_param))
                copy: Tensor | None = getattr(entry, "_unsharded_param", None)
                if copy is not None:
                    copies.add(id(copy))
    return sharded, copies


def groups_of(module: FSDPModule) -> Iterator[list[Any]]:
    """The parameters that ``module`` itself manages, by groups that are reduced in one collective."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # one group for each module until torch 2.12
        groups = [state._fsdp_param_group]
    return (group.fsdp_params for group in groups if group is not None)


def _entries(module: FSDPModule) -> Iterator[Any]:
    return (entry for group in groups_of(module) for entry in group)
