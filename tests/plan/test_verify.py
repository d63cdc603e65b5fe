"""A wrong layout is an error: at construction where values show it, in verify() where only gradients do."""

import gc
import warnings
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import SGD

import distclip
from distclip import Statistic
from distclip.layouts.rows import rows_of
from distclip.plan.units import _groups as groups_of, _slots_of_sums as slots_of_sums
from distclip.policies.units import Gather
from distclip.ranks.compare import bit_sums, checksums
from support.layouts import backward, build, ddp, fsdp2
from support.parallel import mesh_of
from support.ranks import count_collectives, run_ranks


def said_by(use) -> str:
    try:
        use()
    except distclip.LayoutError as error:
        return str(error)
    return "no error"


def filled(model: nn.Module, seed: int) -> nn.Module:
    chance = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=chance)
    return model


def stages_with_equal_names(values: str) -> str:
    """Two pipeline stages whose parameters have the same names and shapes, told to nobody."""
    stage = nn.Linear(3, 3)
    for p in stage.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(dist.get_rank() if values == "other" else 0))

    def use() -> None:
        clipper = distclip.Clipper(stage, 1.0)
        filled(stage, dist.get_rank())
        clipper.verify()

    return said_by(use)


def test_stages_with_equal_names_are_found_by_their_values():
    for said in run_ranks(stages_with_equal_names, 2, "other"):
        assert said.startswith("ranks that should hold copies hold different values of weight, bias: pass layout=")


def test_stages_that_begin_alike_are_found_by_their_gradients():
    for said in run_ranks(stages_with_equal_names, 2, "same"):
        assert said.startswith("ranks that should hold the same gradient do not: weight, bias; ")


def drifted_apart(count: int) -> str:
    """``count`` parameters of other values on each rank, and one that is a copy."""
    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.ones(2)) for i in range(count + 1)})
    chance = torch.Generator().manual_seed(dist.get_rank())
    for name, p in model.items():
        if name != "p0":
            nn.init.normal_(p, generator=chance)
    return said_by(lambda: distclip.Clipper(model, 1.0))


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (1, "p1: "),
        (5, "p1, p2, p3, p4, p5: "),
        (6, "p1, p2, p3, p4, p5 and 1 more: "),
        (9, "p1, p2, p3, p4, p5 and 4 more: "),
    ],
)
def test_an_error_names_five_parameters_and_counts_the_others(count, names):
    for said in run_ranks(drifted_apart, 2, count):
        assert said.startswith(f"ranks that should hold copies hold different values of {names}pass layout=")


CONSTANTS = (0.0, 0.02, 0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0, -0.1, -1.0, -2.0)


@pytest.mark.parametrize("size", [1, 2, 4, 12, 64, 1024])
def test_constant_values_that_differ_have_other_checksums(size):
    """As fresh biases and scales of layers have them: sums of few bits."""
    sums = checksums([torch.full((size,), value) for value in CONSTANTS], torch.device("cpu")).tolist()
    alike = [pair for pair, (a, b) in zip(combinations(CONSTANTS, 2), combinations(sums, 2), strict=True) if a == b]
    assert alike == []


def constant_on_each_rank(values: tuple[float, float]) -> str:
    scale = nn.ParameterList([torch.full((2,), values[dist.get_rank()])])
    return said_by(lambda: distclip.Clipper(scale, 1.0))


@pytest.mark.parametrize("values", [(1.0, 2.0), (0.0, 4.0), (1.0, -1.0), (0.1, 0.2)])
def test_constant_values_that_differ_are_found_at_construction(values):
    for said in run_ranks(constant_on_each_rank, 2, values):
        assert said.startswith("ranks that should hold copies hold different values of 0: ")


def negated(seed: int) -> str:
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(7, generator=torch.Generator().manual_seed(seed)))})
    if dist.get_rank():
        model["w"].data.neg_()
    return said_by(lambda: distclip.Clipper(model, 1.0))


def test_values_of_the_other_sign_are_found_at_construction():
    for said in run_ranks(negated, 2, 3):
        assert said.startswith("ranks that should hold copies hold different values of w: ")


def tied(replicas: int | None) -> str:
    """A weight that the first and the last of two stages share, its gradient already summed."""
    mesh = mesh_of(("pp", 2))
    stage = nn.ParameterDict({"tied": nn.Parameter(torch.ones(4)), "own": nn.Parameter(torch.ones(2))})

    def layout(name: str, parameter: torch.Tensor) -> distclip.Layout | None:
        return distclip.Layout(replicas) if replicas and name == "tied" else None

    def use() -> None:
        clipper = distclip.Clipper(stage, 1.0, split_over=[mesh["pp"]], layout=layout)
        stage["tied"].grad = torch.arange(4.0)
        stage["own"].grad = torch.full((2,), 1.0 + dist.get_rank())
        clipper.verify()

    return said_by(use)


def test_a_tied_weight_on_two_stages_is_counted_and_what_to_write_is_said():
    for said in run_ranks(tied, 2, None):
        assert "gradients are not counted once: on rank 0 tied (2x)" in said
        assert "a tied weight on two stages: Layout(2)" in said
    assert run_ranks(tied, 2, 2) == ["no error"] * 2


AUTOCAST = "autocast"  # float32 that holds what bf16 can
FEW = {  # a gradient that two stages have: its dtype and elements, whether both hold the same values, what is said
    "a number": (torch.float32, 1, True, "(2x)"),
    "a number of autocast": (AUTOCAST, 1, True, "no error"),
    "one number of autocast, twice": (AUTOCAST, 2, True, "no error"),
    "numbers": (torch.float32, 3, True, "(2x)"),
    "short numbers": (torch.bfloat16, 2, True, "(2x)"),
    "a short number": (torch.bfloat16, 1, True, "no error"),
    "a number by chance": (torch.float32, 1, False, "no error"),
    "numbers by chance": (torch.float32, 3, False, "no error"),
    "more numbers": (torch.float32, 4, False, "(2x)"),
}


def few_elements(way: str, replicas: int) -> list[str]:
    """What verify() says of each of ``FEW``: whole on two stages, or as what two ranks of a stage have of it."""
    mesh = mesh_of(("pp", 2), ("dp", dist.get_world_size() // 2))
    stage = mesh["pp"].get_local_rank()
    layout = distclip.Layout(replicas) if way == "whole" else None
    said = []
    for dtype, count, tied, _ in FEW.values():
        kind = torch.float32 if dtype == AUTOCAST else dtype
        value = torch.full((count,), 1.5 if tied else 1.5 + stage).to(kind)
        gradient = torch.rand(count, generator=torch.Generator().manual_seed(stage if replicas > 1 else 0)).to(kind)
        if dtype == AUTOCAST:
            gradient = gradient[:1].bfloat16().to(kind).expand(count).clone()
        if way == "shards":
            value, gradient = (DTensor.from_local(each, mesh["dp"], [Shard(0)]) for each in (value, gradient))
        model = nn.ParameterDict({"few": nn.Parameter(value)})
        clipper = distclip.Clipper(model, 1.0, split_over=[mesh["pp"]], layout=lambda name, p: layout)
        model["few"].grad = gradient
        said.append(said_by(clipper.verify))
    return said


@pytest.mark.parametrize(("way", "ranks"), [("whole", 2), ("shards", 4)])
def test_few_elements_are_told_from_others_by_their_values_and_bits(way, ranks):
    for every in run_ranks(few_elements, ranks, way, 1):
        for (name, (*_, expected)), said in zip(FEW.items(), every, strict=True):
            assert expected in said, name


def test_few_elements_that_are_no_copies_are_counted_half():
    for every in run_ranks(few_elements, 2, "whole", 2):
        for name, said in zip(FEW, every, strict=True):
            assert "few (0.5x)" in said, name


def experts(replicas: int) -> str:
    """Two plain experts, one on each rank, said to be held by ``replicas`` ranks."""
    expert = nn.Linear(3, 3, bias=False)

    def use() -> None:
        clipper = distclip.Clipper(expert, 1.0, layout=lambda name, p: distclip.Layout(replicas))
        filled(expert, dist.get_rank())
        clipper.verify()

    return said_by(use)


def test_experts_said_to_be_copies_are_counted_half():
    for said in run_ranks(experts, 2, 2):
        assert "weight (0.5x)" in said
    assert run_ranks(experts, 2, 1) == ["no error"] * 2


def drifted(where: str) -> str:
    """HSDP on 2 x 2 ranks; the second replica drifts by one bit of one value."""
    mesh = mesh_of(("replicate", 2), ("shard", 2))
    model = build()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def use() -> None:
        if where == "value" and dist.get_rank() == 3:
            with torch.no_grad():
                local = model.head.weight.to_local()
                local[0, 0] = torch.nextafter(local[0, 0], torch.tensor(9.0))
        clipper = distclip.Clipper(model, 1.0)
        backward(model)
        if where == "gradient" and dist.get_rank() == 2:
            model.head.weight.grad.to_local()[0, 0] += 1.0
        clipper.verify()

    return said_by(use)


def test_a_replica_that_drifted_by_one_bit_is_found():
    for said in run_ranks(drifted, 4, "value"):
        assert said.startswith("ranks that should hold copies hold different values of head.weight: ")
    for said in run_ranks(drifted, 4, "gradient"):
        assert said.startswith("ranks that should hold the same gradient do not: head.weight; ")
    assert run_ranks(drifted, 4, "nowhere") == ["no error"] * 4


def of_size(scale: float, drift: float) -> str:
    """One replicated gradient of norm ``scale``, ``drift`` of it off on rank 1."""
    weight = nn.Parameter(torch.zeros(4))
    clipper = distclip.Clipper(nn.ParameterList([weight]), 1.0)
    weight.grad = torch.full((4,), scale / 2) * (1 + drift * dist.get_rank())
    return said_by(clipper.verify)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_drift_is_judged_by_the_size_of_the_gradient(scale):
    assert run_ranks(of_size, 2, scale, 1e-7) == ["no error"] * 2
    for said in run_ranks(of_size, 2, scale, 1e-3):
        assert said.startswith("ranks that should hold the same gradient do not: ")


def one_element_counted(replicas: int) -> str:
    scale = nn.Parameter(torch.ones(1))
    clipper = distclip.Clipper(nn.ParameterList([scale]), 1.0)
    clipper.engine.plan.weights.fill_(1 / replicas)
    scale.grad = torch.ones(1)
    return said_by(clipper.verify)


def test_a_single_element_counted_twice_is_found():
    for said in run_ranks(one_element_counted, 2, 1):
        assert said.startswith("elements are not counted once: 0 (2x)")
    assert run_ranks(one_element_counted, 2, 2) == ["no error"] * 2


def unsynchronised() -> str:
    model = ddp()
    clipper = distclip.Clipper(model, 1.0)
    with model.no_sync():
        backward(model)
    return said_by(clipper.verify)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_gradients_inside_no_sync_are_found(size):
    for said in run_ranks(unsynchronised, size):
        assert "ranks that should hold the same gradient do not: embed.weight" in said
        assert "leave no_sync" in said


def test_a_second_clipper_on_the_same_parameters_is_found():
    model = filled(build(), 0)
    first = distclip.Clipper(model, 1.0)
    first.verify()
    second = distclip.Clipper([model.head], 1.0)
    assert "1 other Clipper(s) hold parameters of this one" in said_by(first.verify)
    assert "1 other Clipper(s) hold parameters of this one" in said_by(second.verify)
    del second
    gc.collect()
    first.verify()


def local_sgd(way: str) -> tuple[list[str], list[str]]:
    """DiLoCo: an inner and an outer optimizer of the same parameters, each with a Clipper; what verify() says."""
    model = ddp() if dist.is_initialized() else build()
    inner, outer = SGD(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.7, momentum=0.9)
    if way == "attach":
        clippers = [distclip.attach(optimizer, model, 1.0) for optimizer in (inner, Lookahead(outer))]
    else:
        clippers = [distclip.Clipper(model, 1.0) for _ in range(2)]
    backward(model)
    first = [said_by(clipper.verify) for clipper in clippers]
    for clipper, optimizer in zip(clippers, (inner, inner if way == "same" else outer), strict=True):
        if way == "clip_":
            clipper.engine.clip_([optimizer])
        if way in ("attach", "clip_"):
            optimizer.step()
        else:
            clipper.step(optimizer)
    return first, [said_by(clipper.verify) for clipper in clippers]


class Lookahead:
    """Holds the outer optimizer, whose step it calls."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.param_groups = base, base.param_groups

    def step(self) -> None:
        self.base.step()


@pytest.mark.parametrize("ranks", [1, 2])
def test_clippers_of_two_optimizers_may_hold_the_same_parameters(ranks):
    rivals = "1 other Clipper(s) hold parameters of this one"
    for way in ("attach", "step", "clip_", "same"):
        results = [local_sgd(way)] if ranks == 1 else run_ranks(local_sgd, ranks, way)
        for first, then in results:
            assert [said.startswith(rivals) for said in first] == [way != "attach"] * 2
            assert [said.startswith(rivals) for said in then] == [way == "same"] * 2
            assert way == "attach" or all("attach() one to each" in said for said in first)


def test_an_owner_that_another_thread_still_reads_keeps_the_addresses_of_its_parameters():
    owner = distclip.Clipper(nn.Linear(3, 1), 1.0).engine.owner  # verify() of any Clipper holds those of all others
    for _ in range(10):
        model = nn.Linear(3, 1)  # in the memory of the last, where that was given back
        assert owner.clipped.isdisjoint(map(id, model.parameters()))
        distclip.Clipper(model, 1.0)


def test_a_new_optimizer_at_the_address_of_the_last_is_known_too():
    model = build()
    inner, outer = (distclip.Clipper(model, 1.0) for _ in range(2))
    held = SGD(model.parameters(), lr=0.7)
    backward(model)
    outer.step(held)
    for _ in range(100):  # until CPython gives the memory of the dropped one to the next
        dropped = SGD(model.parameters(), lr=0.1)
        address = id(dropped)
        inner.step(dropped)
        del dropped
        optimizer = SGD(model.parameters(), lr=0.1)
        if id(optimizer) == address:
            break
    assert id(optimizer) == address
    inner.step(optimizer)
    inner.verify()


def flipped(dtype: torch.dtype, element: int) -> str:
    """One bit of one element of rank 1's copy is another, after the Clipper was built."""
    model = nn.Linear(100, 100, dtype=dtype)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    clipper = distclip.Clipper(model, 1.0)
    clipper.verify()
    if dist.get_rank() == 1:
        words = torch.view_as_real(model.weight.detach()) if dtype.is_complex else model.weight.detach()
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[words.element_size()]
        words.view(-1)[element : element + 1].view(integers).bitwise_xor_(1)
    return said_by(clipper.verify)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("element", [0, 4321, 9999])
def test_one_flipped_bit_in_a_copy_of_a_parameter_is_found(dtype, element):
    for said in run_ranks(flipped, 2, dtype, element):
        assert said.startswith("copies have drifted apart: ranks hold different values of weight; ")


def exchanged() -> str:
    """Two elements of rank 1's copy have changed places, after the Clipper was built: the same sum of bits."""
    model = filled(nn.Linear(100, 100), 0)
    clipper = distclip.Clipper(model, 1.0)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.weight[3, [5, 6]] = model.weight[3, [6, 5]]
    return said_by(clipper.verify)


def test_two_elements_of_a_copy_that_changed_places_are_found():
    for said in run_ranks(exchanged, 2):
        assert said.startswith("copies have drifted apart: ranks hold different values of weight; ")


def test_bits_are_compared_however_a_copy_lies_in_memory():
    x = torch.randn(64, 33, 50, generator=torch.Generator().manual_seed(0))
    apart = torch.zeros(64, 70, 90)
    apart[:, 3:36, 2:52] = x
    permuted = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    bytes_, none = torch.arange(9, dtype=torch.uint8), torch.zeros(3, device="meta")
    first, *others, of_bytes, empty, meta = bit_sums(
        [x, permuted, apart[:, 3:36, 2:52], bytes_, x[:0], none], torch.device("cpu")
    ).tolist()
    assert first > 0
    assert others == [first] * 2
    assert of_bytes > 0 == empty == meta


def cost() -> dict[str, int]:
    model = ddp()
    backward(model)
    with count_collectives() as built:
        clipper = distclip.Clipper(model, 1.0)
    with count_collectives() as verified:
        clipper.verify()
    return {"built": built.total(), "verified": verified.total()}


def test_proofs_cost_what_their_docstrings_say():
    assert run_ranks(cost, 2) == [{"built": 2, "verified": 3}] * 2


def cost_of_experts() -> dict[str, int]:
    """Only rank 0 holds any, so that the others cannot know by themselves that there is something to add."""
    model = filled(nn.ModuleList([nn.Linear(3, 3)] if dist.get_rank() == 0 else []), 0)
    clipper = distclip.Clipper(model, 1.0, layout=lambda name, p: distclip.Layout(1))
    with count_collectives() as counts:
        clipper.verify()
    return dict(counts)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_proving_what_ranks_do_not_share_costs_what_is_said(size):
    steps = (size - 1).bit_length()
    assert run_ranks(cost_of_experts, size) == [{"allreduce": 4, "alltoallbase": 2 * steps}] * size


# ---- norms of groups, parameters and rows --------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """A policy that bounds nothing."""

    asked: tuple[Statistic, ...]

    def needs(self):
        return self.asked

    def init(self, units, device):
        return {}

    def decide(self, statistics, state):
        return distclip.Decision(inf), state


APART = Statistic("group", groups={"norms": "blocks.*.0.*", "heads": "head.*"})
ASKED = {
    "rows": (Statistic("row"), Statistic("parameter")),
    "parameters": (Statistic("parameter"),),
    "groups": (APART,),
    "values": (Statistic("model", "parameter"),),
}


def one_row_further(piece, dims):
    """Rows as they are not: the first of those that a rank has is that of its neighbour."""
    rows = rows_of(piece, dims)
    index = rows.index.clone()
    index[:1] -= int(piece.name == "blocks.0.1.weight" and dist.get_rank() == 1)
    return replace(rows, index=index)


def counted(blocks, places, rows):
    """Slots as they are not: what is in the second parameter, or kind of them, is taken for the first."""
    slots = slots_of_sums(blocks, places, rows)
    starts = [*blocks.starts, blocks.total]
    return torch.where((slots >= starts[1]) & (slots < starts[2]), 0, slots)


def all_but_the_last(table, blocks, level, sizes):
    found = groups_of(table, blocks, level, sizes)
    return replace(found, of_slots=Gather(found.of_slots.order[1:], found.of_slots.lengths - torch.tensor([1, 0])))


WRONG = {
    "rows": ("rows", "table.rows_of", one_row_further),
    "slots of rows": ("rows", "units._slots_of_sums", counted),
    "slots of parameters": ("parameters", "units._slots_of_sums", counted),
    "groups": ("groups", "units._groups", all_but_the_last),
}


def proved_with(asked: str, patched: str = "", wrong: Any = None) -> tuple[str, int]:
    """What verify() says of FSDP2 with norms of ``asked``, and how many collectives it makes."""
    model = fsdp2()
    with pytest.MonkeyPatch.context() as patch:
        if patched:
            patch.setattr(f"distclip.plan.{patched}", wrong)
        clipper = distclip.Clipper(model, Needs(ASKED[asked]))
    backward(model)
    with count_collectives() as counts:
        said = said_by(clipper.verify)
    return said, counts.total()


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_elements_of_every_unit_are_proved_to_count_once(asked, size):
    assert run_ranks(proved_with, size, asked) == [("no error", 4)] * size


@pytest.mark.parametrize("name", WRONG)
def test_a_unit_with_other_elements_is_named(name):
    expected = {
        "rows": "blocks.0.1.weight[9] (2x), blocks.0.1.weight[10] (0x)",
        "slots of rows": "embed.weight[0] (",
        "slots of parameters": "embed.weight (1.03x), blocks.0.0.weight (0x)",
        "groups": "norms (0x);",
    }[name]
    said = run_ranks(proved_with, 2, *WRONG[name])
    assert said == [said[0]] * 2
    assert said[0][0].startswith(f"norms do not count the elements of their units once: {expected}")


# ---- no gradient on any rank ---------------------------------------------------------------------------------


def without_gradients(how: str) -> list[Any]:
    """What verify() says after a backward that left no gradient, and what three steps warn of."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    if how == "fsdp2":
        fully_shard(model, mesh=mesh_of(("dp", dist.get_world_size())))
        model.set_requires_gradient_sync(False)
    elif how == "hsdp":
        fully_shard(model, mesh=mesh_of(("replicate", 2), ("shard", dist.get_world_size() // 2)))
        model.set_requires_all_reduce(False)
    elif how == "used up":
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    clipper = distclip.Clipper(model, 1.0)
    model(torch.ones(2, 4)).square().sum().backward()
    if how == "zeroed too early":
        model.zero_grad()
    with warnings.catch_warnings(record=True, action="always") as warned:
        said = said_by(clipper.verify)
        norms = [clipper.clip_().norm.item() for _ in range(3)]
    return [said, norms, [f"{warning.category.__name__}: {warning.message}" for warning in warned]]


@pytest.mark.parametrize(
    ("how", "size"), [("used up", 1), ("zeroed too early", 1), ("zeroed too early", 2), ("fsdp2", 2), ("hsdp", 4)]
)
def test_no_gradient_on_any_rank_is_no_proof_and_is_told_of_once(how, size):
    for said, norms, warned in run_ranks(without_gradients, size, how):
        assert said.startswith("there is no gradient on any rank: an optimizer in the backward has used them up, ")
        assert norms == [0.0] * 3
        (once,) = warned
        assert once.startswith("RuntimeWarning: no gradient on this rank, and a norm of 0 over all: an optimizer in ")


def with_some_gradients(how: str) -> str:
    """Stages, of which the last alone has a gradient, or gradients of zeros: nothing to warn of."""
    stage = nn.Linear(3, 3)
    clipper = distclip.Clipper(stage, 1.0, layout=lambda name, p: distclip.Layout(1))
    if dist.get_rank() or how == "zeros":
        filled(stage, dist.get_rank())
        stage.weight.grad.mul_(how != "zeros")
        stage.bias.grad.mul_(how != "zeros")
    with warnings.catch_warnings(action="error"):
        clipper.clip_()
    return said_by(clipper.verify)


@pytest.mark.parametrize("how", ["on one rank", "zeros"])
def test_gradients_on_one_rank_or_of_zeros_are_gradients(how):
    assert run_ranks(with_some_gradients, 2, how) == ["no error"] * 2


def test_a_clipper_that_was_detached_is_no_rival_until_it_clips_again():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = distclip.attach(optimizer, model, 1.0)
    first.detach()
    second = distclip.attach(optimizer, model, 2.0)
    model(torch.ones(1, 2)).sum().backward()
    second.verify()
    second.detach()
    first.clip_()
    with pytest.raises(distclip.LayoutError, match="other Clipper"):
        second.verify()
