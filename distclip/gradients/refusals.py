"""Every error of this package: what is wrong, with which gradient, and what to do about it."""

from ..errors import LayoutError
from ..kernels.dtypes import REAL

NOT_REDUCED = "it is not reduced yet (leave no_sync for the last backward)"


def unusable(name: str, problem: LayoutError) -> LayoutError:
    """``problem``: one of those below that begin with a verb, of the gradient of the parameter of this ``name``."""
    return LayoutError(f"the gradient of {name} {problem}")


def other_kind(is_dtensor: bool) -> LayoutError:
    kinds = ["a plain tensor", "a DTensor"]
    return LayoutError(f"is {kinds[is_dtensor]}, its parameter {kinds[not is_dtensor]}: give both the same kind")


def other_mesh(mesh: object, wanted: object) -> LayoutError:
    return LayoutError(
        f"lies on {mesh}, its parameter on {wanted}: redistribute the gradient to the parameter's mesh and placements"
    )


def other_placements(placements: object, wanted: object) -> LayoutError:
    return LayoutError(
        f"is placed as {placements}, its parameter as {wanted}: redistribute the gradient to the parameter's placements"
    )


def on_meta() -> LayoutError:
    return LayoutError("is on the meta device, where it has no values: move the model with to_empty()")


def neither_strided_nor_coo(layout: object) -> LayoutError:
    return LayoutError(f"has layout {layout}, which is not supported: use strided or sparse_coo")


def no_number(dtype: object) -> LayoutError:
    return LayoutError(f"has dtype {dtype}, which has no norm: use {', '.join(map(str, REAL))}")


def flat_of_other_size(elements: int, wanted: int) -> LayoutError:
    return LayoutError(
        f"lies in a flat gradient of {elements} elements beside a flat parameter of {wanted}: {NOT_REDUCED}"
    )


def part_of_other_size(elements: int, wanted: int) -> LayoutError:
    return LayoutError(f"has {elements} elements where this rank's part of its parameter has {wanted}: {NOT_REDUCED}")


def cannot_be_summed() -> LayoutError:
    return LayoutError(
        "the gradient of a DTensor is a plain tensor, on another mesh, or in a placement that cannot be summed: "
        "redistribute it"
    )


def placements_differ() -> LayoutError:
    return LayoutError(
        "the ranks of one mesh hold the gradient of one parameter in different placements: let every rank run the same "
        "backward"
    )


def out_of_order(mesh: object) -> LayoutError:
    return LayoutError(
        f"a gradient waits to be cut along an axis of {mesh} whose ranks are not in ascending order, which torch does "
        "not redistribute rightly: redistribute the gradient to Replicate and then to its parameter's placements"
    )


def shared_memory(first: str, second: str) -> LayoutError:
    return LayoutError(
        f"the gradients of {first} and {second} share memory, whose elements would be scaled twice: give each its own "
        "(p.grad = p.grad.clone())"
    )


def nowhere(attribute: str) -> LayoutError:
    return LayoutError(
        f"no parameter has the attribute {attribute} that gradients= names: give its right name, and set it to None "
        "where a rank has no gradients yet"
    )


def no_tensor(kind: str, name: str) -> LayoutError:
    return LayoutError(f"gradients= has a {kind} for {name}: a tensor or None must be there")


def other_size(elements: int, name: str, wanted: int) -> LayoutError:
    return LayoutError(
        f"gradients= has {elements} elements for {name} of {wanted}: where each rank has the gradient of a part, pass "
        "layout=lambda name, p: distclip.Layout(1)"
    )


def not_replaceable(name: str) -> LayoutError:
    return LayoutError(
        f"the gradient that gradients= returned for {name} would have to be replaced by another tensor (its placements "
        "or memory are not those of its parameter): return one that lies as its parameter does"
    )


def pending_sum(placements: object) -> LayoutError:
    return LayoutError(
        f"a gradient is placed as {placements}, a pending sum, whose terms must not be clamped: use Clipper(model, "
        "ValueClip(...)), or redistribute it"
    )
