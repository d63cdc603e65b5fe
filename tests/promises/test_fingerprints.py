"""Fingerprints: the same gradients have the same numbers in every layout, and any other bit another one."""

import re
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip import Clipper, Fingerprint, Layout, LayoutError, Report
from distclip.kernels.fingerprint import fingerprints, seed_of, whole
from promises.test_accelerator import on_the_accelerator
from promises.test_statistics_on_accelerators import KINDS, made
from support.accelerator import EXISTS, raw
from support.parallel import EIGHT, FOUR, THREE, TWO, by_name, ep_named, mesh_of
from support.ranks import count_collectives, run_ranks, same_bits
from support.samples import most

ALL = (1 << 64) - 1
LAYOUTS = most(
    [
        pytest.param(layout, size, id=f"{layout.__name__}-{size}")
        for size, layouts in ((2, TWO), (3, THREE), (4, [*FOUR, ep_named]), (8, EIGHT))
        for layout in layouts
        if layout.__name__ != "ep_plain"
    ],
    *("fsdp1_grad_op-2", "fsdp1_grad_op_flat-2", "fsdp1_no_shard-2", "fsdp1_ignored-2", "fsdp1_full-2", "fsdp1_full-4"),
    *("fsdp1_full_flat-4", "fsdp1_hybrid-4", "fsdp1_hybrid_zero2-4", "fsdp1_experts-4", "fsdp1_copies-4"),
    *("fsdp1_tp-4", "cp_fsdp2-4", "hsdp_tp_sequence-8", "pp_fsdp2_tp-8", "three_axes-8", "by_hand-8"),
)


def number_of(name: str, gradient: Tensor) -> int:
    """By the kernel, which has tests of its own: of a whole gradient."""
    return int(fingerprints([gradient.contiguous()], [whole(gradient.numel())], [seed_of(name)])) & ALL


def named(gradients: dict[str, Tensor], chunks: int) -> dict[str, Tensor]:
    """By the names that fingerprints have; of stages, which the oracle numbers, those that say on which rank they are.

    ``chunks``: stages of each rank.
    """
    found = {}
    parts = {name: re.fullmatch(r"(\d+)[. ](.*)", name) for name in gradients}
    shared = Counter(part[2] for part in parts.values() if part)
    for name, part in parts.items():
        if part is None:
            found[name if chunks == 1 else f"0.{name}"] = gradients[name]
        elif chunks > 1:
            own = f"{int(part[1]) // 2}.{part[2]}"
            twin = f"{int(part[1]) ^ 1}.{part[2]}" in gradients
            found[f"{own}[pp={int(part[1]) % 2}]" if twin else own] = gradients[name]
        elif shared[part[2]] > 1:
            found[f"{part[2]}[pp={part[1]}]"] = gradients[name]
        else:
            found[part[2]] = gradients[name]
    return found


def printed(layout) -> tuple[Fingerprint, Fingerprint | None, dict[str, Tensor] | None]:
    """By the call, by the report of a step, and the gradients of the whole model by name, if these are known."""
    job = layout(torch.float32, 30.0)
    job.backward()
    gradients = by_name(job.whole()) if job.exact else {}
    if "experts" in layout.__name__ or layout.__name__.endswith("flat"):  # whose names these are not
        gradients = {}
    clipper = Clipper(job.parts, 1.0, fingerprint_every=1, **job.options)
    called = clipper.fingerprint()
    report = clipper.clip_()
    assert report.coef.item() < 1
    return called, report.fingerprint, named(gradients, len(job.parts)) if gradients else None


@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
def test_every_layout_has_the_numbers_of_one_process(layout, size):
    ranks = run_ranks(printed, size, layout)
    called, _, gradients = ranks[0]
    assert all(rank[:2] == (called, called) for rank in ranks)
    assert called.differ == ()
    assert called.total == sum(called.parameters.values()) & ALL
    if gradients is not None:
        numbers = {name: number_of(name, each) for name, each in gradients.items()}
        assert {name: number for name, number in called.parameters.items() if number} == numbers
    if layout.__name__ in ("fsdp1_full_flat", "fsdp1_hybrid_flat", "fsdp1_tp_flat"):  # the others reduce differently
        other = next(p for p in LAYOUTS if p.id == f"{layout.__name__.removesuffix('_flat')}-{size}")
        assert run_ranks(printed, size, *other.values[:1])[0][0] == called


class Layers(nn.ModuleDict):
    """Stages with the names of the whole model."""

    def __init__(self, *numbers: int) -> None:
        super().__init__({str(n): nn.Linear(3, 2) for n in numbers})
        for n in numbers:
            chance = torch.Generator().manual_seed(n)
            for p in self[str(n)].parameters():
                p.grad = torch.randn(p.shape, generator=chance)


def staged(chunks: int) -> Fingerprint:
    rank, mesh = dist.get_rank(), mesh_of(("pp", 2))
    parts = [Layers(0, 1), Layers(2, 3)][rank : rank + 1] if chunks == 1 else [Layers(rank), Layers(rank + 2)]
    return Clipper(parts, 1.0, split_over=[mesh["pp"]]).fingerprint()


@pytest.mark.parametrize("chunks", [1, 2])
def test_stages_with_names_of_the_whole_model_have_its_numbers(chunks):
    alone = Clipper(Layers(0, 1, 2, 3), 1.0).fingerprint()
    assert "3.weight" in alone.parameters
    assert run_ranks(staged, 2, chunks) == [alone, alone]


def small() -> nn.ParameterDict:
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(4, 3)) for name in ("a", "b")})
    for k, p in enumerate(model.values()):
        p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(k))
    return model


def flip(gradient: Tensor, element: int, bit: int) -> None:
    words = gradient.view(torch.int32).view(-1)
    words[element] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)


def test_any_flipped_bit_changes_the_number_of_its_parameter():
    model = small()
    clipper = Clipper(model, 1.0)
    before, seen = clipper.fingerprint(), set()
    for element, bit in ((e, b) for e in range(12) for b in range(32)):
        flip(model["b"].grad, element, bit)
        now = clipper.fingerprint()
        assert now.parameters["a"] == before.parameters["a"]
        seen |= {now.parameters["b"], now.total}
        flip(model["b"].grad, element, bit)
    assert len(seen - {before.parameters["b"], before.total}) == 2 * 12 * 32
    assert clipper.fingerprint() == before


def one_copy_differs() -> list[Fingerprint]:
    model, found = small(), []
    clipper = Clipper(model, 1.0)
    for flipped in ([], [0], [31], [0, 31]):
        if dist.get_rank() == 1:
            for bit in flipped:
                flip(model["b"].grad, 5, bit)
        found.append(clipper.fingerprint())
        if dist.get_rank() == 1:
            for bit in flipped:
                flip(model["b"].grad, 5, bit)
    return found


def test_copies_that_differ_change_the_number_too_and_are_mostly_named():
    ranks = run_ranks(one_copy_differs, 3)
    assert ranks[0] == ranks[1] == ranks[2]
    honest, *others = ranks[0]
    assert honest == Clipper(small(), 1.0).fingerprint()
    assert len({each.parameters["b"] for each in ranks[0]}) == 4
    assert all(each.parameters["a"] == honest.parameters["a"] for each in others)
    assert [each.differ for each in others] == [("b",)] * 3
    assert others[0].to_dict()["differ"] == ["b"]


def test_none_counts_nothing_and_a_sparse_gradient_as_the_dense_one():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 2, sparse=True), "other": nn.Linear(2, 2)})
    rows = torch.tensor([3, 1, 3])
    model["embed"](rows).square().sum().backward()
    assert model["embed"].weight.grad.is_sparse
    sparse = Clipper(model, 1.0).fingerprint()
    assert sparse.parameters["other.weight"] == 0
    dense = model["embed"].weight.grad.to_dense()
    assert sparse.parameters["embed.weight"] == number_of("embed.weight", dense) == sparse.total
    model["embed"].weight.grad = dense
    assert Clipper(model, 1.0).fingerprint() == sparse


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_other_dtypes_and_orders_of_memory(dtype):
    model = nn.ParameterList([nn.Parameter(torch.zeros(4, 3, dtype=dtype))])
    gradient = torch.randn(3, 4, dtype=torch.complex64 if dtype.is_complex else torch.float64).to(dtype)
    model[0].grad = gradient.t()
    found = Clipper(model, 1.0, exact=True).fingerprint()
    assert found.parameters == {"0": number_of("0", gradient.t().contiguous())}


def in_which_steps() -> tuple[list[bool], list[dict[str, int]], list[int]]:
    model = small()
    clipper, counts = Clipper(model, 1e9, fingerprint_every=3), []
    have = []
    for _ in range(7):
        with count_collectives() as count:
            have.append(clipper.clip_().fingerprint is not None)
        counts.append(dict(count))
    other = Clipper(model, 1e9, fingerprint_every=3)
    other.load_state_dict(clipper.state_dict())
    have += [other.clip_().fingerprint is not None for _ in range(2)]
    lazy, calls = Clipper(model, 1e9), []
    for _ in range(2):
        with count_collectives() as count:
            lazy.fingerprint()
        calls.append(sum(count.values()))
    assert lazy.steps == 0
    return have, counts, calls


def test_it_is_of_every_nth_step_and_costs_one_all_reduce():
    for have, counts, calls in run_ranks(in_which_steps, 2):
        assert [k for k, each in enumerate(have, 1) if each] == [3, 6, 9]
        assert [counts[k] for k in (4, 5, 6)] == [{"allreduce": n} for n in (1, 2, 1)]  # none compares copies
        assert calls == [5, 2]


def test_a_report_without_one_is_as_it_was():
    report = Clipper(small(), 1.0).clip_()
    assert report.fingerprint is None
    assert set(report.to_dict()) == {"norm", "max_norm", "coef", "skip"}
    assert Report.__dataclass_fields__["fingerprint"].default is None


@pytest.mark.parametrize("every", [0, -1, 2.0, True])
def test_every_is_a_whole_number(every):
    with pytest.raises(ValueError, match="fingerprint_every must be a whole number of at least 1"):
        Clipper(small(), 1.0, fingerprint_every=every)


def refused() -> list[str]:
    """By what is not known of experts; and by ranks that differ in settings, in calls, and in one that fails."""
    met, model, rank = [], small(), dist.get_rank()

    def tried(call) -> None:
        try:
            call()
        except (LayoutError, ValueError) as error:
            met.append(f"{type(error).__name__}: {error}")

    def experts(layout: Layout) -> dict:
        return {"layout": lambda name, p: layout if name == "b" else None}

    for layout in (Layout(2), Layout(2, parts=True)):
        tried(lambda layout=layout: Clipper(model, 1.0, fingerprint_every=1, **experts(layout)))
        tried(Clipper(model, 1.0, **experts(layout)).fingerprint)
    tried(lambda: Clipper(model, 1.0, fingerprint_every=1 + rank // 2))
    clipper = Clipper(model, 1.0, fingerprint_every=1)
    tried(clipper.fingerprint if rank else clipper.clip_)
    tried(clipper.measure if rank else clipper.fingerprint)
    if rank == 1:
        model["a"].grad = None
    tried(clipper.fingerprint)
    model["a"].grad = torch.ones(4, 3)
    tried(clipper.fingerprint)
    return met


def test_what_is_not_known_is_an_error_on_all_ranks():
    for met in run_ranks(refused, 4):
        assert len(met) == 8
        assert all("LayoutError: layout= says how many ranks hold b" in each for each in met[:2])
        assert all("LayoutError: layout= says that ranks hold parts of b" in each for each in met[2:4])
        assert "ValueError: fingerprint_every must be the same" in met[4]
        assert all("do not agree" in each for each in met[5:7])
        assert "without a gradient of a" in met[7]


def only_one_cannot() -> str:
    from distclip.plan import fingerprint

    def place_of(piece, order):
        raise LayoutError(f"nobody knows where {piece.name} is")

    known = fingerprint.place_of
    fingerprint.place_of = place_of if dist.get_rank() == 1 else known
    try:
        Clipper(small(), 1.0, fingerprint_every=2)
    except LayoutError as error:
        return str(error)
    finally:
        fingerprint.place_of = known
    return ""


def test_where_one_rank_cannot_the_others_raise():
    well, failing = run_ranks(only_one_cannot, 2)
    assert re.search("could not make fingerprints; rank .*nobody knows where a is", well)
    assert failing == "nobody knows where a is"


def on_a_device() -> tuple[Fingerprint, Fingerprint, Fingerprint]:
    with on_the_accelerator():
        model = made(KINDS)
        model[2].grad = None
        gradients = {str(k): raw(p.grad).clone() for k, p in enumerate(model) if p.grad is not None}
        clipper = Clipper(model, 1.0, fingerprint_every=1)
        called, in_step = clipper.fingerprint(), clipper.clip_().fingerprint
    numbers = {str(k): number_of(str(k), gradients[str(k)]) if str(k) in gradients else 0 for k in range(len(KINDS))}
    return called, in_step, Fingerprint(sum(numbers.values()) & ALL, numbers)


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
@pytest.mark.parametrize("size", [1, 2])
def test_the_same_numbers_on_an_accelerator(size):
    for called, in_step, expected in run_ranks(on_a_device, size, fresh=True):
        assert called == in_step == expected


def altered() -> str:
    from distclip.ranks import connections, digits

    clipper = Clipper(small(), 1.0)
    clipper.fingerprint()

    def reduce(group, message, *more):
        reduced = connections.all_reduce(group, message, *more)
        reduced[2] += 1
        return reduced

    digits.all_reduce = reduce
    try:
        clipper.fingerprint()
    except RuntimeError as error:
        return str(error)
    finally:
        digits.all_reduce = connections.all_reduce
    return ""


def test_a_message_that_was_altered_on_its_way_is_noticed():
    assert all("altered on its way" in met for met in run_ranks(altered, 2, fresh=True))


def with_signals() -> bool:
    from distclip import SkipSpikes

    clipper = Clipper(small(), SkipSpikes(on=("loss",)), fingerprint_every=1)
    in_step = clipper.clip_(signals={"loss": 1.0}).fingerprint
    return same_bits([clipper.fingerprint().total, in_step.total])


def test_policies_that_ask_for_signals_need_none_for_it():
    assert with_signals()


def test_more_ranks_than_sums_have_room_for_are_refused(monkeypatch):
    monkeypatch.setattr("distclip.plan.fingerprint.MOST_RANKS", 0)
    clipper = Clipper(nn.Linear(2, 1), 1.0)
    with pytest.raises(ValueError, match="fingerprints are added on 0 ranks at most, and the group has 1"):
        clipper.fingerprint()
