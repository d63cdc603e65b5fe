"""What a plan takes, keeps and sends grows with the parameters that a rank holds, and not with the number of ranks."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from math import prod
from unittest.mock import patch

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.scale import (
    CASES,
    EXPERT,
    STAGES,
    Figures,
    Model,
    Proof,
    Sent,
    Weight,
    deepseek_v3,
    ep_dtensor,
    ep_plain,
    fsdp,
    fsdp_tp,
    gpt2,
    hsdp,
    kept,
    llama3,
    llama3_8b,
    llama3_70b,
    measure,
    planned,
    pp_fsdp_tp,
    prove,
    ranks,
)
from distclip.layouts.model import held_in
from distclip.ranks.group import ClippingGroup
from support.samples import most

FEW, SOME, MANY = 128, 512, 2048
NOISE = 8 << 10  # bytes: a tuple of all ranks would be 16 KiB


def small(layers: int = 2) -> Model:
    return llama3("small", "", d=64, layers=layers, heads=8, kv_heads=8, ffn=128, vocab=256)


def mixture() -> Model:
    dense = Weight("mlp.gate.weight", (256, 16))
    return Model("mixture", "", [], [[dense, Weight("mlp.experts.up_proj", (256, 64, 16), experts=True)]] * 2, [])


SMALL = {
    **dict.fromkeys((fsdp, hsdp, fsdp_tp), small),
    pp_fsdp_tp: partial(small, layers=16),  # of which this rank holds one
    **dict.fromkeys((ep_dtensor, ep_plain), mixture),
}


def at(world: int, layout: Callable) -> Figures:
    with ranks(world):
        return measure(SMALL[layout](), layout, world)


@pytest.fixture(
    scope="module", params=most([pytest.param(layout, id=layout.__name__) for layout in SMALL], "fsdp", "hsdp")
)
def figures(request) -> tuple[Figures, Figures]:
    """The same model and layout on few and on many ranks."""
    return at(FEW, request.param), at(MANY, request.param)


DIGESTS = 32  # of four numbers


@pytest.mark.parametrize(
    ("model", "tensors", "elements"),
    [
        (gpt2, 148, 124_439_808),
        (llama3_8b, 291, 8_030_261_248),
        (llama3_70b, 723, 70_553_706_496),
        (deepseek_v3, 967, 671_026_404_352),
    ],
)
def test_models_have_the_sizes_that_their_makers_state(model, tensors, elements):
    sizes = [prod(weight.shape) for weight in model().weights()]
    assert model in CASES
    assert (len(sizes), sum(sizes)) == (tensors, elements)


def test_a_plan_keeps_no_more_on_many_ranks(figures):
    few, many = figures
    assert few.parameters == many.parameters > 3
    assert many.elements <= few.elements
    assert many.kept <= few.kept + NOISE


def test_a_step_sends_no_more_on_many_ranks(figures):
    few, many = figures
    asks = few.layout in ("pp_fsdp_tp", "ep_plain")  # split_over and layout= ask two questions more
    assert few.step == many.step == Sent(1, 8 * (4 if asks else 2))


def digests(figures) -> int:
    """Bytes that each rank adds to construction, to tell which ranks hold copies of what not all hold."""
    few, many = figures
    grown = many.construction.bytes - few.construction.bytes
    assert grown in (0, DIGESTS * (MANY - FEW))
    return grown // (MANY - FEW)


def test_construction_sends_at_most_one_word_a_parameter_more_and_digests(figures):
    few, many = figures
    assert few.construction.collectives == many.construction.collectives <= 4
    assert 0 < few.construction.bytes - digests(figures) * FEW <= 8 * (28 + 2 * few.parameters)


def test_norms_of_units_send_one_number_a_unit_and_construction_two_a_rank(figures):
    few, many = figures
    flags = few.step.bytes - 16
    for one, other in [(few.of_parameters, many.of_parameters), (few.of_rows, many.of_rows)]:
        assert one.units == other.units
        assert one.step == other.step == Sent(1, 8 * (one.units + 1) + flags)
        assert one.construction.collectives == other.construction.collectives <= 8
        assert other.construction.bytes - one.construction.bytes == (16 + digests(figures)) * (MANY - FEW)
    assert few.of_rows.units > few.of_parameters.units
    shares = {"pp_fsdp_tp": STAGES, "ep_plain": EXPERT}  # whose parameters are units of their own
    known = 2 if few.layout == "ep_plain" else 0  # the gate of each layer, which all ranks have
    assert few.of_parameters.units == known + (few.parameters - known) * shares.get(few.layout, 1)


def proofs(world: int) -> tuple[Proof, Proof]:
    with ranks(world):
        return prove(world, 8), prove(world, 64)


def test_proving_what_ranks_do_not_share_sends_and_takes_no_more_on_many_ranks():
    (few, few_of_more), (many, many_of_more) = proofs(FEW), proofs(MANY)
    steps = {world: (world - 1).bit_length() for world in (FEW, MANY)}
    assert few.sent.collectives == 2 * steps[FEW] + 1
    assert many.sent.collectives == 2 * steps[MANY] + 1
    row = 24  # bytes, which a rank sends in half of the steps
    for proof in (few, few_of_more, many, many_of_more):
        counts = 8 * (steps[proof.world] + 1)
        assert proof.sent.bytes - counts == pytest.approx(row * proof.experts * steps[proof.world] / 2, rel=0.5)
    lists = 2 * 8 * MANY  # of how much goes to each rank
    assert many_of_more.peak <= few_of_more.peak + 2 * lists + NOISE


def test_the_first_plan_keeps_no_more_than_a_later_one():
    with ranks(MANY):
        placed = fsdp_tp(small(), MANY)
        first = kept(placed)
        assert first <= kept(placed) + NOISE


def test_what_a_plan_keeps_is_measured():
    with ranks(FEW):
        few, many = (kept(fsdp(small(layers), FEW)) for layers in (4, 8))
    more = 4 * 9  # parameters
    assert more * 200 < many - few < more * 2000


@pytest.mark.parametrize(
    ("layout", "replicas"),
    [
        (fsdp, {"norm.weight": 1, "layers.0.attention.wq.weight": 1}),
        (hsdp, {"norm.weight": SOME // 8, "layers.0.attention.wq.weight": SOME // 8}),
        (fsdp_tp, {"norm.weight": 8, "layers.0.attention.wq.weight": 1}),
        (pp_fsdp_tp, {"layers.0.ffn_norm.weight": 8, "layers.0.attention.wo.weight": 1}),
        (ep_dtensor, {"layers.0.mlp.gate.weight": 1, "layers.0.mlp.experts.up_proj": 1}),
        (ep_plain, {"layers.0.mlp.gate.weight": 1, "layers.0.mlp.experts.up_proj.3": SOME // 64}),
    ],
)
def test_replicas_on_hundreds_of_ranks(layout, replicas):
    with ranks(SOME):
        plan = planned(layout(SMALL[layout](), SOME))()
    found = {piece.name: number for piece, number in zip(plan.pieces, plan.replicas, strict=True)}
    assert {name: found[name] for name in replicas} == replicas


def test_meshes_are_compared_once_each_and_not_for_each_parameter():
    compared = Counter()
    equal = DeviceMesh.__eq__

    def counting(one, other):
        compared["meshes"] += one is not other
        return equal(one, other)

    with ranks(FEW):
        placed = fsdp_tp(small(layers=32), FEW)
        pieces = [held.piece for held in held_in([placed.module])]
        plan = planned(placed)
        with patch.object(DeviceMesh, "__eq__", counting):
            plan()
    meshes = {id(piece.spec.mesh) for piece in pieces}
    assert 2 < len(meshes) < len(pieces) / 4, "FSDP2 has equal meshes, so that there is something to compare"
    assert 0 < compared["meshes"] <= len(meshes)


def test_a_group_of_neighbours_is_a_range_and_any_other_is_listed():
    with ranks(8):
        groups = [ClippingGroup.of(group) for group in (None, dist.new_group([0, 1, 2]), dist.new_group([0, 1, 3]))]
    assert [group.ranks for group in groups] == [range(8), range(3), (0, 1, 3)]
    assert [group.size for group in groups] == [8, 3, 3]
