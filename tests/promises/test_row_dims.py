"""Rows along dims that a policy names: what they are called, what is refused, and rows of sparse gradients."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

import distclip
from distclip import Decision, Statistic
from support.oracle import rows_in, true_norm
from support.ranks import run_ranks


@dataclass
class Halved:
    """Halves every second row, and keeps what it was shown."""

    asked: tuple[Statistic, ...]
    norms: Tensor | None = None
    names: tuple[str, ...] = ()

    def needs(self):
        return self.asked

    def init(self, units, device):
        self.names = tuple(units.names(self.asked[0]))
        return {}

    def decide(self, statistics, state):
        self.norms = statistics.norm(self.asked[0]).clone()
        coefs = torch.ones_like(self.norms)
        coefs[1::2] = 0.5
        return Decision(1.0, coef=coefs, per=self.asked[0]), state


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.ConvTranspose1d(2, 3, 2), nn.Linear(2, 2)
        self.w1, self.w2 = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(2, 2, 3))


def test_rows_are_called_by_their_indices():
    policy = Halved((Statistic("row", dims={"w2": (0, 2), "head.*": ()}),))
    distclip.Clipper(Layers(), policy)
    assert policy.names == (
        *[f"w1[{e}, {k}]" for e in (0, 1) for k in range(3)],
        *[f"w2[{e}, :, {k}]" for e in (0, 1) for k in range(3)],
        *[f"up.weight[:, {k}]" for k in range(3)],
        "up.bias",
        "head.weight",
        "head.bias",
    )


def test_the_first_pattern_that_matches_counts():
    policy = Halved((Statistic("row", dims={"w2": (), "*": 0}),))
    distclip.Clipper(Layers(), policy)
    assert policy.names == ("w1[0]", "w1[1]", "w2", "up.weight[0]", "up.weight[1]", "up.bias", *HEAD)


HEAD = ("head.weight[0]", "head.weight[1]", "head.bias")


# ---- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dims", [{"w": (0, 0)}, {"w": -1}, {"w": True}, {"w": (0.5,)}, {"w": {0}}, {3: 0}, {"w": None}]
)
def test_what_names_no_dimensions_is_refused(dims):
    with pytest.raises(ValueError, match="dims must be different dimensions from 0 by pattern, such as"):
        Statistic("row", dims=dims)


@pytest.mark.parametrize("per", ["model", "parameter"])
def test_only_rows_have_dims(per):
    with pytest.raises(ValueError, match=f"dims may be given for per='row' and for nothing else, got per='{per}'"):
        Statistic(per, dims={"w": 0})


def test_statistics_of_rows_are_equal_where_their_dims_are():
    assert Statistic("row", dims={"w": (2, 0)}) == Statistic("row", dims=(("w", (0, 2)),))
    assert len({Statistic("row", dims={"w": 1}), Statistic("row", dims={"w": (1,)}), Statistic("row")}) == 2
    assert Statistic("row", of="parameter", dims={"w": 1}).level == Statistic("row", dims={"w": 1})


REFUSED = {
    "no match": ((Statistic("row", dims={"w3": 0}),), "no parameter matches 'w3' in dims: choose among w1, w2"),
    "no such dim": (
        (Statistic("row", dims={"head*": (0, 2)}),),
        r"the rows of head.weight, of shape \(2, 2\), cannot be along dims \(0, 2\)",
    ),
    "two kinds": (
        (Statistic("row"), Statistic("row", "parameter", dims={"w1": 1})),
        r"two statistics want rows along different dimensions: \{\} and \{'w1': \(1,\)\}",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_cannot_be_are_refused_when_a_clipper_is_built(name):
    asked, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        distclip.Clipper(Layers(), Halved(asked))


def test_a_name_with_brackets_is_itself_and_no_wildcard():
    model = nn.ParameterDict({"a[0]": nn.Parameter(torch.zeros(2, 3))})
    statistic = Statistic("row", dims={"a[0]": 1})
    clipper = distclip.Clipper(model, Halved((statistic,)), watch={"own": "a[0]"})
    assert list(clipper.engine.plan.slots.units.names(statistic)) == [f"a[0][:, {k}]" for k in range(3)]


def of_other_dims() -> str:
    """Ranks that name other dims are told at once."""
    dims = {"w1": 1} if dist.get_rank() else {"w1": 2}
    try:
        distclip.Clipper(Layers(), Halved((Statistic("row", dims=dims),)))
    except (ValueError, distclip.LayoutError) as error:
        return str(error)
    return ""


def test_other_dims_on_one_rank_are_refused_on_all():
    assert all(said for said in run_ranks(of_other_dims, 2))


def under_fsdp1(dims) -> str:
    model = FullyShardedDataParallel(Layers(), device_id=torch.device("cpu"), use_orig_params=True)
    try:
        distclip.Clipper(model, Halved((Statistic("row", dims=dims),)))
    except distclip.LayoutError as error:
        return str(error)
    return "built"


def test_a_transposed_convolution_under_fsdp1_needs_other_dims():
    for said in run_ranks(under_fsdp1, 2, {}):
        assert "FSDP1 has flattened up.weight row by row, and its rows are along dims (1,)" in said
    assert run_ranks(under_fsdp1, 2, {"up.weight": ()}) == ["built"] * 2


# ---- sparse gradients ---------------------------------------------------------------------------------------


SHAPES = [((6,), 1), ((6, 4), 1), ((6, 4), 2), ((5, 3, 4), 1), ((5, 3, 4), 2), ((5, 3, 4), 3)]
DIMS = [None, (), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize(
    ("shape", "sparse", "dims"),
    [(shape, sparse, dims) for shape, sparse in SHAPES for dims in DIMS if len(shape) > max(dims or (0,))],
)
def test_rows_of_a_sparse_gradient_are_those_of_the_dense_one(shape, sparse, dims, p):
    torch.manual_seed(0)
    dense = torch.randn(shape) * (torch.rand(shape[:sparse]) < 0.6).view(*shape[:sparse], *[1] * (len(shape) - sparse))
    model = nn.ParameterList([nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(3))])
    model[0].grad, model[1].grad = dense.to_sparse(sparse), torch.ones(3)
    policy = Halved((Statistic("row", dims={} if dims is None else {"0": dims}),))
    distclip.Clipper(model, policy, norm_type=p).clip_()
    rows = rows_in(dense, dims)
    assert policy.norms.tolist() == pytest.approx([true_norm([row], p) for row in rows] + [3 ** (1 / p)], rel=1e-6)
    for row in rows[1::2]:
        row.mul_(0.5)
    assert torch.equal(model[0].grad.to_dense(), dense)
