"""FSDP2: which parameters a module manages. Private torch API, read in 2.13 (``_fsdp_param_groups``) and 2.6."""

from torch.distributed.fsdp import FSDPModule


def managed_parameters(module: FSDPModule) -> set[int]:
    """Ids of the sharded parameters of ``module`` itself: FSDP2 brings their gradients to the right placements."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # one group for each module until torch 2.12
        groups = [state._fsdp_param_group]
    return {id(entry.sharded_param) for group in groups if group is not None for entry in group.fsdp_params}
