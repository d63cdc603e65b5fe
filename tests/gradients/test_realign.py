"""Gradients are brought to the placements of their parameters; one that is in place is left, whatever these are."""

from math import inf

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._ops._math_ops import _NormPartial
from torch.distributed.tensor.placement_types import _MaskPartial, _StridedShard

import distclip
from support.oracle import true_norm
from support.ranks import run_ranks, same_bits

STRIDED = (_StridedShard(0, split_factor=2), Shard(0))
WHOLE = (Replicate(), Replicate())


def on(mesh: DeviceMesh, placements: tuple[Placement, ...], local: torch.Tensor) -> DTensor:
    shape = torch.Size([4, 3])
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=(3, 1))


def outcome(clipper: distclip.Clipper) -> float | str:
    try:
        return clipper.clip_().norm.item()
    except distclip.LayoutError as error:
        return str(error)


def beside_a_pending_sum(bound: float, missing: int | None) -> tuple[float | str, list[torch.Tensor], float]:
    """Four rows, one a rank, strided as FSDP2 over tensor parallel cuts them, and a copy whose sum is pending."""
    mesh, rank = init_device_mesh("cpu", (2, 2)), dist.get_rank()
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    model = nn.Module()
    model.cut = nn.Parameter(on(mesh, STRIDED, torch.zeros(1, 3)))
    model.copy = nn.Parameter(on(mesh, WHOLE, torch.zeros(4, 3)))
    if rank != missing:
        model.cut.grad = on(mesh, STRIDED, rows[rank : rank + 1].clone())
    model.copy.grad = on(mesh, (Partial(), Replicate()), torch.ones(4, 3))
    norm = outcome(distclip.Clipper(model, bound))
    kept = [g.to_local() for g in (model.cut.grad, model.copy.grad) if g is not None]
    return norm, kept, true_norm([*(rows[r] for r in range(4) if r != missing), torch.full((4, 3), 2.0)])


@pytest.mark.parametrize("missing", [None, 2])
@pytest.mark.parametrize("bound", [1.0, 100.0])
def test_a_strided_gradient_in_place_is_summed_beside_one_that_is_not(bound, missing):
    results = run_ranks(beside_a_pending_sum, 4, bound, missing)
    norm, _, oracle = results[0]
    assert same_bits([norm for norm, _, _ in results])
    assert norm == pytest.approx(oracle, rel=2e-7)
    coef = min(1.0, bound / oracle)
    for _, kept, _ in results:
        torch.testing.assert_close(kept[-1], torch.full((4, 3), 2.0 * coef))
    cut = [results[r][1][0] for r in range(4) if r != missing]
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([rows[r] for r in range(4) if r != missing])
    torch.testing.assert_close(torch.cat(cut), expected * coef, rtol=1e-5, atol=0)


def placed_as(placements: tuple[Placement, ...], odd: tuple[Placement, ...], who: int | None) -> list[float | str]:
    """A gradient placed as ``odd`` on rank ``who`` (None: on all), its parameter as ``placements``; then both alike."""
    mesh, said = init_device_mesh("cpu", (2, 2)), []

    def filled(where: tuple[Placement, ...]) -> DTensor:
        return on(mesh, where, torch.ones(1 if where == STRIDED else 4, 3))

    parameter = nn.Parameter(filled(placements))
    clipper = distclip.Clipper(nn.ParameterList([parameter]), inf)
    for step in range(2):
        is_odd = step == 0 and who in (None, dist.get_rank())
        parameter.grad = None
        parameter.grad = filled(odd if is_odd else placements)
        said.append(outcome(clipper))
    return said


@pytest.mark.parametrize("who", [None, 1])
@pytest.mark.parametrize("placements", [STRIDED, WHOLE])
@pytest.mark.parametrize("odd", [_MaskPartial(offset_dim=0), _NormPartial(2), Partial("max")], ids=type)
def test_a_pending_result_that_is_no_sum_is_an_error_on_all_ranks(placements, odd, who):
    for said, norm in run_ranks(placed_as, 4, placements, (odd, Replicate()), who):
        assert ("cannot be summed" if who is None else "in different placements") in said
        assert norm == pytest.approx(12**0.5, rel=2e-7)


@pytest.mark.parametrize("placements", [STRIDED, WHOLE])
def test_a_gradient_in_place_on_some_ranks_alone_is_an_error_on_all_ranks(placements):
    for said, norm in run_ranks(placed_as, 4, placements, (Partial(), Replicate()), 1):
        assert "in different placements" in said
        assert norm == pytest.approx(12**0.5, rel=2e-7)


def pending_on(ranks: list[int], placement: Placement, rows: int) -> tuple[float | str, float]:
    """A sum that waits on a mesh of ``ranks`` in this order, for a parameter that lies as ``placement``."""
    mesh = DeviceMesh("cpu", ranks)
    whole = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
    model = nn.Module()
    model.weight = nn.Parameter(distribute_tensor(torch.zeros(rows, 3), mesh, [placement]))
    here = mesh.get_coordinate()[0]
    half = whole * (0.25 if here == 0 else 0.75)
    model.weight.grad = DTensor.from_local(half, mesh, [Partial()], run_check=False)
    return outcome(distclip.Clipper(model, 0.5)), true_norm([whole])


@pytest.mark.parametrize("rows", [4, 5])
def test_a_pending_sum_is_cut_on_a_mesh_in_the_order_of_ranks(rows):
    for norm, oracle in run_ranks(pending_on, 2, [0, 1], Shard(0), rows):
        assert norm == pytest.approx(oracle, rel=1e-6)


@pytest.mark.parametrize("rows", [4, 5])
def test_a_pending_sum_that_torch_would_cut_in_another_order_is_refused_on_all_ranks(rows):
    """torch 2.13 cuts by the ranks of the group, which are sorted, and takes the parts for those of the mesh."""
    for said, _ in run_ranks(pending_on, 2, [1, 0], Shard(0), rows):
        assert "which torch does not redistribute rightly" in said


def test_a_pending_sum_for_a_copy_needs_no_order():
    for norm, oracle in run_ranks(pending_on, 2, [1, 0], Replicate(), 5):
        assert norm == pytest.approx(oracle, rel=1e-6)
