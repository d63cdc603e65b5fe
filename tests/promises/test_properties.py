"""Laws of the norm, over random layouts of 1 to 64 ranks that one process simulates."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, nan
from random import Random
from unittest.mock import patch

import numpy
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings, strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from distclip.gradients.storage import in_grad
from distclip.layouts.piece import held_parameter
from distclip.plan.build import Plan
from distclip.plan.measure import TAG_STEP, measure
from distclip.plan.measured import Measured
from distclip.plan.verify import verify
from distclip.policies.coefficient import clip_coef
from distclip.ranks.message import CODES, reduce_norm
from support.oracle import same_tensors, true_norm
from support.parallel import mesh_of
from support.ranks import count_collectives, run_ranks, same_bits
from support.roads import clipper_on_device
from support.simulated import SimulatedGroup, Waits, simulate

P = (0.5, 1.0, 2.0, 3.0, inf)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
EXAMPLES = int(os.environ.get("LAW_EXAMPLES", "30"))
law = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
costly = settings(law, max_examples=-(-EXAMPLES // 3))  # a Clipper on each of up to 64 ranks


@dataclass(frozen=True)
class Cut:
    """One whole gradient in pieces: rank r holds piece ``held[r]``, and ``missing`` pieces have no gradient."""

    whole: Tensor
    pieces: tuple[slice, ...]
    held: tuple[int, ...]
    missing: frozenset[int]

    @property
    def replicas(self) -> int:
        return len(self.held) // len(self.pieces)


@dataclass(frozen=True)
class Rank:
    """What one rank holds: tensors with gradients, and the number of ranks that hold each of them."""

    tensors: list[Tensor]
    replicas: list[int]

    def layout(self, name: str, tensor: Tensor) -> distclip.Layout:
        (index,) = (i for i, own in enumerate(self.tensors) if own is tensor)
        return distclip.Layout(self.replicas[index])

    def plan(self, p: float, group: SimulatedGroup) -> Plan:
        return Plan.of([held_parameter(t) for t in self.tensors], p, group, layout=self.layout)

    def measured(self, p: float, group: SimulatedGroup) -> Measured:
        return measure(self.plan(p, group), [t.grad for t in self.tensors])


@dataclass(frozen=True)
class World:
    """``size`` ranks, and what of each gradient they hold."""

    size: int
    cuts: tuple[Cut, ...]

    def ranks(self) -> list[Rank]:
        """Fresh copies. A rank may hold an empty piece, or not know the parameter at all."""
        made = [Rank([], []) for _ in range(self.size)]
        for cut in self.cuts:
            for rank, index in zip(made, cut.held, strict=True):
                gradient = cut.whole[cut.pieces[index]].clone()
                if not gradient.numel() and index % 2:
                    continue
                tensor = torch.empty_like(gradient)
                tensor.grad = None if index in cut.missing else gradient
                rank.tensors.append(tensor)
                rank.replicas.append(cut.replicas)
        return made

    def whole(self) -> list[Tensor]:
        """Every element that has a gradient, once."""
        found = [c.whole[s] for c in self.cuts for i, s in enumerate(c.pieces) if i not in c.missing]
        return found or [torch.zeros(0)]


def cut_up(wholes: Sequence[Tensor], size: int, chance: Random, missing: float = 0.0) -> World:
    """Uneven pieces, empty ones among them, of each gradient for itself, on ranks in any order."""
    cuts = []
    for whole in wholes:
        count = size // chance.choice([k for k in range(1, size + 1) if size % k == 0])
        edges = [0, *sorted(chance.choices(range(len(whole) + 1), k=count - 1)), len(whole)]
        held = [i for i in range(count) for _ in range(size // count)]
        chance.shuffle(held)
        pieces = tuple(map(slice, edges, edges[1:]))
        cuts.append(Cut(whole, pieces, tuple(held), frozenset(i for i in range(count) if chance.random() < missing)))
    return World(size, tuple(cuts))


sizes = st.integers(1, 64)
chances = st.integers(0, 2**32 - 1).map(Random)


@st.composite
def gradients(draw, dtypes: Sequence[torch.dtype] = DTYPES, least: int = 0) -> list[Tensor]:
    """Up to five vectors of random numbers between 2**-8 and 2**8 or so; of one dtype, or of several."""
    kinds = st.tuples(st.integers(least, 40), st.sampled_from(dtypes), st.integers(-8, 8))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return [
        torch.randn(numel, generator=seed, dtype=torch.float64).mul(2.0**exponent).to(dtype)
        for numel, dtype, exponent in draw(st.lists(kinds, min_size=1, max_size=5))
    ]


def norm64(world: World, p: float) -> Tensor:
    """The float64 norm that every rank sees, before it is rounded; one all-reduce."""
    ranks = world.ranks()
    norms = simulate(lambda group: ranks[group.rank].measured(p, group).reduced.norm, world.size, collectives=1)
    assert same_bits(norms)
    return torch.tensor(norms[0], dtype=torch.float64)


def clip(world: World, ranks: list[Rank], bound: float, p: float) -> float:
    """Clip the gradients of ``ranks``; the norm before."""

    def use(group: SimulatedGroup) -> Tensor:
        mine = ranks[group.rank]
        return distclip.clip_grad_norm_(mine.tensors, bound, p, group=group, layout=mine.layout)

    return simulate(use, world.size, collectives=1)[0].item()


def coefficient(norm: Tensor, bound: float) -> float:
    return clip_coef(norm.item(), bound).item()


# ---- the norm -----------------------------------------------------------------------------------------------


@law
@given(gradients(), sizes, chances, st.sampled_from(P))
def test_the_road_of_accelerators_has_the_same_norm(wholes, size, chance, p):
    """There every gradient's own norm is taken, and the sums are tensors until the words are reduced."""
    ranks = cut_up(wholes, size, chance, missing=0.2).ranks()

    def use(group: SimulatedGroup, on_host: bool) -> float:
        rank = ranks[group.rank]
        plan = replace(rank.plan(p, group), on_host=on_host)
        return measure(plan, [t.grad for t in rank.tensors]).reduced.norm

    (expected, *_), (norm, *_) = (simulate(partial(use, on_host=on_host), size) for on_host in (True, False))
    assert norm == pytest.approx(expected, rel=2e-7, abs=0)


@law
@given(gradients(), sizes, chances, st.sampled_from(P))
def test_any_layout_has_the_norm_of_one_process(wholes, size, chance, p):
    world = cut_up(wholes, size, chance, missing=0.2)
    assert norm64(world, p).item() == pytest.approx(true_norm(world.whole(), p), rel=2e-7, abs=0)


@law
@given(gradients(), sizes, sizes, chances, st.sampled_from(P))
def test_two_layouts_of_the_same_gradients_have_one_norm_and_one_coefficient(wholes, size, other, chance, p):
    left, right = (norm64(cut_up(wholes, n, chance), p) for n in (size, other))
    assert left.item() == pytest.approx(right.item(), rel=1e-12, abs=0)
    assert coefficient(left, 0.7) == coefficient(right, 0.7)


@law
@given(gradients(), sizes, chances, st.sampled_from(P))
def test_the_order_of_ranks_and_of_parameters_does_not_matter(wholes, size, chance, p):
    world = cut_up(wholes, size, chance)
    order = chance.sample(range(size), size)
    cuts = [Cut(c.whole, c.pieces, tuple(c.held[r] for r in order), c.missing) for c in world.cuts]
    chance.shuffle(cuts)
    left, right = norm64(world, p), norm64(World(size, tuple(cuts)), p)
    assert left.item() == pytest.approx(right.item(), rel=1e-12, abs=0)
    assert coefficient(left, 0.7) == coefficient(right, 0.7)


@law
@given(gradients(), sizes, chances, st.sampled_from([1.0, 2.0, inf]), st.integers(-40, 40))
def test_a_power_of_two_comes_out_of_the_norm_exactly(wholes, size, chance, p, exponent):
    world, factor = cut_up(wholes, size, chance), 2.0**exponent
    scaled = World(size, tuple(Cut(c.whole * factor, c.pieces, c.held, c.missing) for c in world.cuts))
    assert norm64(scaled, p) == factor * norm64(world, p)


@law
@given(gradients([torch.float64], least=1), sizes, chances, st.sampled_from(P), st.floats(1.0, 1e6))
def test_the_norm_never_falls_when_an_element_grows(wholes, size, chance, p, factor):
    world = cut_up(wholes, size, chance)
    before = norm64(world, p)
    grown = chance.choice(wholes)
    grown[chance.randrange(len(grown))] *= factor
    assert norm64(world, p) >= before * (1 if p in (1.0, 2.0, inf) else 1 - 1e-15)  # pow() is not monotone to the bit


# ---- clipping -----------------------------------------------------------------------------------------------


@law
@given(gradients([torch.float32, torch.float64], least=1), sizes, chances, st.sampled_from(P), st.floats(1.5, 1e3))
def test_clipping_reaches_the_bound_and_a_second_time_changes_next_to_nothing(wholes, size, chance, p, ratio):
    world = cut_up([w * 2.0**20 for w in wholes], size, chance)
    ranks, oracle = world.ranks(), true_norm(world.whole(), p)
    bound = max(1.0, oracle / ratio)  # a smaller one is not large beside the formula's 1e-6
    tensors = [t for rank in ranks for t in rank.tensors]
    clip(world, ranks, bound, p)
    once = [t.grad.clone() for t in tensors]
    left = clip(world, ranks, bound, p)
    assert left == pytest.approx(min(bound, oracle), rel=2e-6)
    assert all(((t.grad - before).abs() <= 2e-6 * before.abs()).all() for t, before in zip(tensors, once, strict=True))


@law
@given(gradients(), sizes, chances, st.sampled_from(P))
def test_under_the_bound_every_bit_stays(wholes, size, chance, p):
    world = cut_up(wholes, size, chance, missing=0.2)
    ranks = world.ranks()
    found = [t.grad for rank in ranks for t in rank.tensors if t.grad is not None]
    before = [g.clone() for g in found]
    clip(world, ranks, 2 * true_norm(world.whole(), p) + 1e-5, p)
    assert same_tensors(before, found)


def other_kinds() -> str:
    mesh = mesh_of(("dp", 2))
    kinds = distribute_tensor(torch.ones(4), mesh, [Shard(0)]), torch.ones(4)
    try:
        distclip.clip_grad_norm_([kinds[dist.get_rank()]], 1.0, group=dist.group.WORLD)
    except distclip.LayoutError as error:
        return str(error)
    return "no error"


def test_other_kinds_of_parameters_on_one_rank_are_an_error_on_all():
    """How many words travel may not hang on what this rank holds: rank 0 sent three, rank 1 two."""
    for said in run_ranks(other_kinds, 2):
        assert "the ranks of the clipping group passed other parameters" in said


@law
@given(gradients(), sizes, chances, st.sampled_from(P), st.sampled_from([1.0, nan, inf]))
def test_the_returned_norm_has_the_same_bits_on_every_rank(wholes, size, chance, p, factor):
    world = cut_up([w * factor for w in wholes], size, chance)
    ranks = world.ranks()

    def use(group: SimulatedGroup) -> Tensor:
        mine = ranks[group.rank]
        return distclip.clip_grad_norm_(mine.tensors, 1.0, p, group=group, layout=mine.layout)

    assert same_bits(simulate(use, size))


@law
@given(gradients([torch.float32], least=1), sizes, chances, st.sampled_from(P), st.sampled_from([nan, inf, -inf]))
def test_one_bad_number_is_seen_by_all_and_named_by_all(wholes, size, chance, p, bad):
    chance.choice(wholes)[0] = bad
    world = cut_up(wholes, size, chance)
    ranks = world.ranks()
    holders = [n for n, rank in enumerate(ranks) if not all(t.grad.isfinite().all() for t in rank.tensors)]

    def use(group: SimulatedGroup) -> Tensor:
        mine = ranks[group.rank]
        return distclip.clip_grad_norm_(mine.tensors, 1.0, p, error_if_nonfinite=True, group=group, layout=mine.layout)

    said = [str(end) for end in simulate(use, size)]
    kind = "NaN" if bad != bad else "inf"
    assert len(set(said)) == 1
    if "reduced" in said[0]:  # several ranks have it
        assert f"has {kind} in its reduced gradient, held by ranks {holders[0]}, " in said[0]
    else:
        assert f"on rank {holders[0]} has {kind} in its gradient" in said[0]


@costly
@given(gradients([torch.float32, torch.float64], least=2), sizes, chances, st.booleans())
def test_a_right_layout_is_proved_and_a_wrong_one_is_not(wholes, size, chance, wrong):
    world = cut_up(wholes, size, chance)
    ranks = world.ranks()
    if wrong := wrong and size > 1:
        number = chance.choice([n for n, rank in enumerate(ranks) if any(len(t) for t in rank.tensors)])
        index = chance.choice([i for i, t in enumerate(ranks[number].tensors) if len(t)])
        said = ranks[number].replicas
        said[index] = said[index] % size + 1

    def verified(group: SimulatedGroup) -> None:
        rank = ranks[group.rank]
        verify(rank.plan(2.0, group), rank.tensors, in_grad(rank.tensors))

    ends = simulate(verified, size)
    if wrong:
        assert len({str(end) for end in ends}) == 1
        assert "gradients are not counted once" in str(ends[0])
    else:
        assert ends == [None] * size


# ---- the agreement word -------------------------------------------------------------------------------------


def verdicts(size: int, p: float, codes: Sequence[int], faulty: Sequence[bool]) -> list[tuple[float, bool]]:
    """(norm, disagree) on every rank, each of which holds the number 1."""
    one = torch.ones((), dtype=torch.float64)

    def use(group: SimulatedGroup) -> tuple[float, bool]:
        reduced = reduce_norm(group, one, p, codes[group.rank], faulty[group.rank], ())
        return reduced.norm.item(), reduced.disagree.item()

    return simulate(use, size, collectives=1)


both = pytest.mark.parametrize("p", [2.0, inf])


@both
@law
@given(sizes, st.integers(0, 2**60))
def test_equal_codes_agree(p, size, code):
    norm = pytest.approx(1.0 if p == inf else size**0.5, rel=1e-15)
    assert verdicts(size, p, [code] * size, [False] * size) == [(norm, False)] * size


@both
@law
@given(sizes.filter(lambda n: n > 1), st.integers(0, 2**60), st.integers(1, CODES - 1), chances)
def test_two_camps_never_agree(p, size, code, difference, chance):
    camp = set(chance.sample(range(size), chance.randrange(1, size)))
    codes = [code + difference * (rank in camp) for rank in range(size)]
    assert [disagree for _, disagree in verdicts(size, p, codes, [False] * size)] == [True] * size


@both
@law
@given(st.integers(3, 64), st.integers(0, 2**60), st.integers(1, 50), chances)
@example(size=3, code=CODES // 2, steps=1, chance=Random(0))
def test_a_rank_ahead_and_one_as_far_behind_do_not_cancel(p, size, code, steps, chance):
    ahead, behind = chance.sample(range(size), 2)
    codes = [code + TAG_STEP * steps * ((rank == ahead) - (rank == behind)) for rank in range(size)]
    assert [disagree for _, disagree in verdicts(size, p, codes, [False] * size)] == [True] * size


@both
@law
@given(sizes, st.integers(0, 2**60), chances)
def test_faulty_ranks_are_always_seen(p, size, code, chance):
    faulty = [chance.random() < 0.3 for _ in range(size)]
    faulty[chance.randrange(size)] = True
    assert [disagree for _, disagree in verdicts(size, p, [code] * size, faulty)] == [True] * size


@both
@law
@given(sizes, st.integers(0, 2**60), st.integers(-2, 2) | st.integers(1 - CODES, CODES - 1), st.integers(0, 63))
@example(size=33, code=1, difference=CODES // 2, odd=0)  # measure() on rank 0, clip_() on the others
@example(size=2, code=1, difference=-1, odd=1)
def test_a_faulty_rank_is_seen_whatever_its_code_is(p, size, code, difference, odd):
    codes = [code + difference * (rank == odd % size) for rank in range(size)]
    faulty = [rank == odd % size for rank in range(size)]
    assert [disagree for _, disagree in verdicts(size, p, codes, faulty)] == [True] * size


@pytest.mark.parametrize("size", [48, 49, 98, 103])
def test_equal_copies_are_equal_on_any_number_of_ranks(size):
    """1 / (1 / 49) is not 49 in float64: nothing may be multiplied by it and then be compared with 0."""
    model = nn.Linear(2, 1)
    ends = simulate(lambda group: distclip.Clipper(model, 1.0, group=group), size, collectives=2)
    assert {type(end) for end in ends} == {distclip.Clipper}


# ---- AutoClip -----------------------------------------------------------------------------------------------


@law
@given(
    st.lists(st.floats(0, 1e30) | st.sampled_from([nan, inf]), min_size=1, max_size=40),
    st.floats(0, 100),
    st.integers(1, 20),
)
def test_autoclip_bounds_by_numpys_percentile_of_the_window(norms, percentile, window):
    policy = distclip.AutoClip(percentile, window)
    state, kept = policy.init(distclip.Units(), torch.device("cpu")), []
    for norm in norms:
        seen = distclip.Statistics(torch.tensor(norm, dtype=torch.float64), distclip.Units())
        decision, state = policy.decide(seen, state)
        kept = [*kept, norm][-window:] if 0 < norm < inf else kept
        wanted = numpy.percentile(kept, percentile) if kept else inf
        assert decision.max_norm.item() == pytest.approx(wanted, rel=1e-12)


# ---- what mutants showed to be missing ----------------------------------------------------------------------


@costly
@given(sizes.filter(lambda n: n > 1), st.permutations(P), st.integers(0, 63))
def test_two_norm_types_are_refused_on_all_ranks(size, types, odd):
    model = nn.Linear(2, 1)

    def use(group: SimulatedGroup) -> distclip.Clipper:
        return distclip.Clipper(model, 1.0, group=group, norm_type=types[group.rank == odd % size])

    (said,) = {str(end) for end in simulate(use, size)}
    assert said.startswith("norm_type must be the same on every rank: build every Clipper alike; rank ")
    assert f"; rank {odd % size}: norm_type {types[True]}" in said


def call(clippers: list[distclip.Clipper], group: SimulatedGroup, name: str) -> object:
    """Call a method of a Clipper whose group was another run's."""
    clipper = clippers[group.rank]
    engine = clipper.engine
    progress, calls, streak = engine.progress, replace(engine.progress.calls), replace(engine.progress.streak)
    before = dict(vars(progress))
    with patch.object(engine.plan.group, "backend", group.backend):
        try:
            return getattr(clipper, name)()
        except Waits:  # it is called again from the beginning, and counts once
            vars(progress).update({**before, "calls": calls, "streak": streak})
            engine.interruption.forget()
            raise


@both
@costly
@given(sizes.filter(lambda n: n > 1), st.permutations(["measure", "clip_", "verify"]), st.integers(0, 63))
def test_two_kinds_of_calls_never_pair(p, size, calls, odd):
    model = nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    clippers = simulate(lambda group: distclip.Clipper(model, 1.0, group=group, norm_type=p, on_drift="warn"), size)
    ends = simulate(lambda group: call(clippers, group, calls[group.rank == odd % size]), size, collectives=4)
    assert {type(end) for end in ends} == {distclip.LayoutError}


@both
@pytest.mark.parametrize("by", [(0, 1, -1), (1, 0, -1), (0, 1, -1, 0), (1, -1, 2, -2)])
@costly
@given(st.integers(100, 2**20), st.integers(1, 50))
def test_clippers_as_many_steps_ahead_as_others_are_behind_disagree(p, by, step, apart):
    model = nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    clippers = simulate(lambda group: distclip.Clipper(model, 1.0, group=group, norm_type=p), len(by))
    for clipper, sign in zip(clippers, by, strict=True):
        clipper.load_state_dict(clipper.state_dict() | {"steps": step + sign * apart})
    ends = simulate(lambda group: call(clippers, group, "clip_"), len(by), collectives=4)
    assert {type(end) for end in ends} == {distclip.LayoutError}


@both
def test_a_disagreement_that_nothing_waited_for_is_raised_by_the_next_call(p):
    model = nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    clippers = simulate(lambda group: clipper_on_device(model, 1.0, group=group, norm_type=p), 3)
    clippers[1].load_state_dict(clippers[1].state_dict() | {"steps": 7})
    reports = simulate(lambda group: call(clippers, group, "clip_"), 3, collectives=4)  # the host asks who it is
    assert [report.skip.item() for report in reports] == [True] * 3
    ends = simulate(lambda group: call(clippers, group, "clip_"), 3, collectives=0)
    assert {type(end) for end in ends} == {distclip.LayoutError}


def test_the_culprit_is_not_waited_for_where_waiting_costs():
    model = nn.Linear(2, 1)
    model.weight.grad = torch.full((1, 2), nan)
    clipper = clipper_on_device(model, 1.0)
    assert clipper.clip_().culprit is None
    assert clipper.culprit is None
    clipper.measure()
    assert str(clipper.culprit) == "weight on rank 0 has NaN in its gradient"


@pytest.mark.parametrize(("p", "words"), [(2.0, 2), (inf, 3)])
def test_as_few_words_travel_as_the_docstring_says(p, words):
    model = nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    clippers = simulate(lambda group: distclip.Clipper(model, 1.0, group=group, norm_type=p), 3)

    def use(group: SimulatedGroup) -> int:
        call(clippers, group, "measure")
        return group.backend.past[0].got[group.rank].numel()

    assert simulate(use, 3, collectives=1) == [words] * 3


def test_a_layer_without_gradients_is_no_reason_to_doubt_a_layout():
    models = [nn.Linear(2, 1) for _ in range(3)]
    for model in models:
        model.load_state_dict(models[0].state_dict())
        model.weight.grad = torch.ones(1, 2)
    clippers = simulate(lambda group: distclip.Clipper(models[group.rank], 1.0, group=group), 3)
    assert simulate(lambda group: call(clippers, group, "verify"), 3) == [None] * 3


def half_cut_otherwise() -> float:
    """The norm where rank 0 holds columns of a gradient whose parameter is cut into rows, and rank 1 has none."""
    mesh = mesh_of(("tp", 2))
    weight = nn.Parameter(distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)]))
    gradient = distribute_tensor(torch.tensor([[1.0, 7.0], [2.0, 7.0], [2.0, 7.0], [4.0, 7.0]]), mesh, [Shard(1)])
    weight.grad = gradient if dist.get_rank() == 0 else None
    return distclip.clip_grad_norm_([weight], inf).item()


def test_a_missing_cut_of_a_gradient_is_zeros():
    assert run_ranks(half_cut_otherwise, 2) == [5.0, 5.0]


def copy_of_a_shard() -> tuple[float, int, bool]:
    """(norm, collectives, whether the gradient was cut in place) for a whole gradient beside a cut parameter."""
    mesh = mesh_of(("tp", 2))
    weight = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    weight.grad = distribute_tensor(torch.tensor([1.0, 2.0, 2.0, 4.0]), mesh, [Replicate()])
    with count_collectives() as counts:
        norm = distclip.clip_grad_norm_([weight], inf)
    return norm.item(), counts.total(), weight.grad.placements == weight.placements


def pending_average() -> tuple[float, str]:
    """(norm of an average that is still to be taken, what is said to a DTensor in place of a norm)."""
    mesh = mesh_of(("dp", 2))
    weight = nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()]))
    terms = torch.tensor([6.0, 0.0]) if dist.get_rank() == 0 else torch.tensor([0.0, 8.0])
    weight.grad = DTensor.from_local(terms, mesh, [Partial("avg")], run_check=False)
    norm = distclip.clip_grad_norm_([weight], inf).item()
    try:
        distclip.clip_grads_with_norm_([weight], 1.0, weight.grad.norm())
    except ValueError as error:
        return norm, str(error)
    return norm, "no error"


def test_a_pending_average_is_taken_and_a_dtensor_is_no_norm():
    said = "total_norm must be a plain tensor, got a DTensor: use distclip.get_total_norm"
    assert run_ranks(pending_average, 2) == [(5.0, said)] * 2


def average_of_one_term() -> float:
    """The norm of an average that is still to be taken, where rank 1 has no gradient."""
    weight = nn.Parameter(distribute_tensor(torch.zeros(2), mesh_of(("dp", 2)), [Replicate()]))
    if dist.get_rank() == 0:
        terms = torch.tensor([6.0, 8.0])
        weight.grad = DTensor.from_local(terms, weight.device_mesh, [Partial("avg")], run_check=False)
    return distclip.clip_grad_norm_([weight], inf).item()


def test_a_missing_term_of_a_pending_average_is_zeros():
    assert run_ranks(average_of_one_term, 2) == [5.0, 5.0]


def test_a_whole_gradient_of_a_cut_parameter_is_cut_without_talking():
    assert run_ranks(copy_of_a_shard, 2) == [(5.0, 1, True)] * 2


def test_a_bad_norm_of_bare_gradients_is_returned_unless_asked_to_raise():
    assert distclip.get_total_norm([torch.tensor([nan])]).isnan()
    with pytest.raises(distclip.NonFiniteError):
        distclip.get_total_norm([torch.tensor([nan])], error_if_nonfinite=True)
