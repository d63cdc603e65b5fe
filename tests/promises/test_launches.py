"""What norms of units cost on an accelerator: so many kernels a call, however many tensors there are, and no wait."""

import pytest

import distclip
from distclip.bench.contests import Tenths
from promises.test_accelerator import fill, model_of, on_the_accelerator
from support.accelerator import EXISTS, counted_launches, no_waits
from support.ranks import run_ranks

pytestmark = pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")

ASKED = {
    "nothing": (1.0, None),
    "watch": (1.0, "parameters"),
    "parameters": (Tenths("parameter"), None),
    "rows": (Tenths("row"), None),
}
# Of kernels on one tensor. A decision by unit takes some 20 to find what a device can find wrong in it, and 14 to
# report by what the norm of the model is multiplied.
MOST = {
    1: {"nothing": 16, "watch": 23, "parameters": 74, "rows": 77},
    2: {"nothing": 17, "watch": 25, "parameters": 76, "rows": 79},  # of copies, whose sums have weights
}


def launches(tensors: int) -> dict[str, int]:
    """How many kernels a call launches on gradients of two lengths, none of which waits."""
    counts = {}
    with on_the_accelerator():
        for name, (policy, watch) in ASKED.items():
            model = model_of(*[(4, 3)] * tensors, *[(5,)] * tensors)
            clipper = distclip.Clipper(model, policy, watch=watch)
            for step in range(2):  # in which copies are compared
                fill(model, step)
                clipper.clip_()
            fill(model, 2)
            with no_waits(), counted_launches() as seen:
                clipper.clip_()
            counts[name] = len(seen)
    return counts


@pytest.mark.parametrize("size", MOST)
def test_launches_do_not_grow_with_the_number_of_tensors(size):
    few, many = (run_ranks(launches, size, tensors, fresh=True)[0] for tensors in (20, 40))
    assert few == many
    assert all(few[name] <= most for name, most in MOST[size].items()), few
    assert few["watch"] > few["nothing"] > 0
