"""Every error of this package: what is wrong, with which parameter or rank, and what to do about it."""

from collections.abc import Sequence

from torch.distributed.tensor import Placement

from ..errors import LayoutError

BY_ITS_PARAMETERS = (
    "model must be a module, got its parameters, which have neither names nor FSDP1's metadata: "
    "write Clipper(model, 1.0), or Clipper(torch.nn.ParameterList(parameters), 1.0) for bare ones"
)


def not_positive(replicas: object) -> ValueError:
    return ValueError(f"replicas must be a positive whole number, got {replicas!r}")


def axes_do_not_tile(sizes: Sequence[int], pieces: int, ranks: int) -> ValueError:
    return ValueError(
        f"over and parts name axes of {list(sizes)} ranks, whose {pieces} pieces do not tile the {ranks} ranks of the "
        "clipping group: name each axis once, and the group they are in"
    )


def axis_outside(argument: str, ranks: Sequence[int]) -> ValueError:
    return ValueError(f"{argument} names ranks {list(ranks)}, not all of which are in the clipping group")


def too_many_replicas(replicas: int, name: str, ranks: int) -> LayoutError:
    return LayoutError(
        f"layout says that {replicas} ranks hold {name}, but the clipping group has {ranks}: return at most "
        f"Layout({ranks})"
    )


def outside_the_group(name: str, ranks: Sequence[int]) -> LayoutError:
    return LayoutError(
        f"{name} lives on ranks {list(ranks)} outside the clipping group: pass a `group` that includes all of its ranks"
    )


def not_on_this_rank(name: str, ranks: int, rank: int) -> LayoutError:
    return LayoutError(
        f"{name} lives on {ranks} ranks, and rank {rank} is none of them: list a parameter only on ranks that hold it, "
        "or pass the `group` of these ranks"
    )


def pieces_do_not_tile(name: str, pieces: int, ranks: int) -> LayoutError:
    return LayoutError(
        f"{name} is cut into {pieces} pieces, which do not tile the {ranks} ranks of the clipping group: pass the "
        "`group` that holds these pieces, or its `layout`"
    )


def unknown_placement(name: str, placement: Placement) -> LayoutError:
    return LayoutError(f"{name} is placed as {placement}, which is neither Shard nor Replicate: redistribute it first")


NO_ROWS = "; ask for statistics per parameter, or choose others by only="


def flattened_across_rows(name: str, dims: tuple[int, ...]) -> LayoutError:
    return LayoutError(
        f"FSDP1 has flattened {name} row by row, and its rows are along dims {dims}, of which a rank has no view: "
        f"use fully_shard, or pass dims={{{name!r}: (0,)}}{NO_ROWS}"
    )


def flattened_in_another_order(name: str) -> LayoutError:
    return LayoutError(
        f"FSDP1 has flattened {name} in another order than row by row, so which rows a rank has cannot be known: make "
        f"it contiguous before FullyShardedDataParallel(...){NO_ROWS}"
    )


def no_such_dim(name: str, shape: tuple[int, ...], dims: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"the rows of {name}, of shape {shape}, cannot be along dims {dims}: name dimensions it has, or ()"
    )


def not_as_placed(name: str) -> LayoutError:
    return LayoutError(
        f"this rank has another number of elements of {name} than its placements say, so which rows they are cannot be "
        f"known: cut it by distribute_tensor, which cuts as torch.chunk does{NO_ROWS}"
    )


def placed_out_of_order(name: str) -> LayoutError:
    return LayoutError(
        f"{name} is cut into rows along a mesh axis whose ranks are not in ascending order, where torch itself places "
        f"rows in one order and reads them in another: list the ranks of its mesh in ascending order{NO_ROWS}"
    )


def placed_two_ways(name: str) -> LayoutError:
    return LayoutError(
        f"{name} is cut unevenly by a _StridedShard, which FSDP2 does in another way than distribute_tensor: pass the "
        f"module that fully_shard returned, or choose a divisible size of dim 0{NO_ROWS}"
    )


def optimizer_as_model(kind: str) -> ValueError:
    return ValueError(
        f"model must be a module, got {kind}: build Clipper(model, 1.0) and call clipper.step(optimizer), or "
        "attach(optimizer, model, 1.0)"
    )


def not_a_module(kind: str, where: str = "") -> ValueError:
    return ValueError(f"model must be a module or a list of modules, got {kind}{where}")


def part_of_flat(name: str) -> LayoutError:
    return LayoutError(
        f"only=... leaves out {name}, which FSDP1 keeps in one flat parameter with others that are clipped: build "
        "FullyShardedDataParallel(use_orig_params=True), or choose all of its parameters"
    )


def parameters_replaced(replaced: str | None) -> LayoutError:
    """``replaced``: the name of one that is new; None where some are gone."""
    what = "lost parameters" if replaced is None else f"has another {replaced}"
    return LayoutError(
        f"the model {what} since the Clipper was built: build it anew, after fully_shard, "
        "load_state_dict(assign=True) and whatever else replaces or adds parameters"
    )
