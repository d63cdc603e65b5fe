"""Bugs that other projects had or have, each as the situation it came from: here the norm is the one of the oracle.

Every test also makes the other project's wrong number, and asserts that it is another one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import hypot, inf, isnan, nan, sqrt
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from support.layouts import backward, ddp, fsdp2
from support.oracle import same_tensors, true_norm
from support.parallel import (
    Job,
    by_hand,
    by_hand_realigned,
    ep_dtensor,
    ep_plain,
    fsdp1_full,
    fsdp1_no_shard,
    full_gradients,
    hsdp,
    mesh_of,
    pp_1f1b_tied,
    pp_fsdp2,
    pp_gpipe,
    pp_interleaved,
    tp,
    tp_sequence,
    united,
)
from support.ranks import count_collectives, run_ranks, same_bits

MEASURED_TORCH = torch.__version__.startswith("2.13")
AFTER = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
Layout = Callable[[torch.dtype, float], Job]


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def gradients(job: Job) -> list[Tensor]:
    """What this rank holds, as plain tensors."""
    return [local(p.grad) for p in job.parameters() if p.grad is not None]


@dataclass(frozen=True)
class Seen:
    """What one rank saw. ``mine`` is the norm of what it holds; ``after`` that of the whole, after clipping to 1/3."""

    norm: float
    clippers: float
    oracle: float
    mine: float
    after: float
    collectives: int
    notes: Any = None


def see(layout: Layout, p: float, dtype: torch.dtype, scale: float, note: Callable[[Job, list[Tensor]], Any]) -> Seen:
    """Measure and clip one job by Clipper and by function; ``note`` looks at it before, with all whole gradients."""
    job = layout(dtype, scale)
    job.backward()
    whole = united(job)
    oracle, mine, notes = true_norm(whole, p), true_norm(gradients(job), p), note(job, whole)
    clippers = distclip.Clipper(job.parts, inf, norm_type=p, **job.options).measure().norm.item()
    with count_collectives() as counts:
        norm = distclip.clip_grad_norm_(job.parts, oracle / 3, p, **job.options).item()
    after = true_norm(united(job), p) / (oracle / 3)
    return Seen(norm, clippers, oracle, mine, after, counts.total(), notes)


def nothing(job: Job, whole: list[Tensor]) -> None:
    return None


def seen(layout: Layout, size: int, p: float = 2.0, dtype=torch.float32, scale: float = 30.0, note=nothing):
    """What every rank saw, once it is sure that they all saw the oracle's norm, to the bit, and clipped to it."""
    ranks: list[Seen] = run_ranks(see, size, layout, p, dtype, scale, note)
    assert same_bits([r.norm for r in ranks] + [r.clippers for r in ranks])
    assert ranks[0].norm == pytest.approx(ranks[0].oracle, rel=2e-7)
    assert ranks[0].after == pytest.approx(1, rel=AFTER[dtype])
    return ranks


def is_another(wrong: float, ranks: Sequence[Seen], by: float = 1e-3) -> bool:
    """Whether the number of the other project could be told from ours."""
    return abs(wrong / ranks[0].norm - 1) > by


def together(ranks: Sequence[Seen]) -> float:
    """The sum over ranks of all that they hold, copies and all."""
    return hypot(*(r.mine for r in ranks))


def hand_made(made: dict[str, Tensor], dtype: torch.dtype, scale: float, **options) -> Job:
    """Parameters with made-up gradients: of one name the same, placed as the parameter is."""
    model = nn.ParameterDict({name: nn.Parameter(value.to(dtype)) for name, value in made.items()})

    def fill() -> None:
        for name, p in model.items():
            chance = torch.Generator().manual_seed(sum(map(ord, name)))
            whole = (scale * torch.randn(p.shape, generator=chance)).to(dtype)
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole

    return Job([model], fill, lambda: full_gradients(model), options)


def ddp_job(dtype: torch.dtype, scale: float) -> Job:
    """DDP, with the group said: these ranks talk."""
    model = ddp()
    options = {"group": dist.group.WORLD}
    return Job([model], lambda: float(backward(model, scale=scale)), lambda: full_gradients(model), options)


def fsdp2_job(dtype: torch.dtype, scale: float) -> Job:
    model = fsdp2()
    return Job([model], lambda: float(backward(model, scale=scale)), lambda: full_gradients(model))


def torchs_error(job: Job, whole: list[Tensor]) -> str:
    """What torch's own function says to a job."""
    try:
        nn.utils.get_total_norm([p.grad for p in job.parameters() if p.grad is not None])
    except RuntimeError as error:
        return str(error)
    return "no error"


# ---- meshes and plain tensors side by side ------------------------------------------------------------------


def test_dense_and_expert_meshes_make_one_norm():
    """pytorch#180346: norms of DTensors on two meshes cannot be stacked, so the call raises."""
    for rank in seen(ep_dtensor, 4, note=torchs_error):
        if MEASURED_TORCH:
            assert "must have the same mesh" in rank.notes


def test_tensor_parallel_layers_beside_plain_ones_make_one_norm():
    """torchtune#2420: under tensor parallel the norm of plain layers and that of DTensors do not mix: it raises."""
    for rank in seen(tp, 2, note=torchs_error):
        if MEASURED_TORCH:
            assert "mixed torch.Tensor and DTensor" in rank.notes


def part_of_the_model(kind: str) -> tuple[str, float, float, float]:
    """(error, norm, oracle, norm of what this rank holds) of all parameters but the first."""
    job = (fsdp1_full if kind == "fsdp1" else fsdp2_job)(torch.float32, 30.0)
    job.backward()
    listed = list(job.parameters())[1:]
    mine = true_norm([local(p.grad) for p in listed if p.grad is not None])
    try:
        norm = distclip.clip_grad_norm_(listed, inf).item()
    except distclip.LayoutError as error:
        return str(error), nan, nan, mine
    return "no error", norm, true_norm([p.grad.full_tensor() for p in listed]), mine


def test_a_list_that_is_not_the_whole_model_is_never_the_local_norm():
    """accelerate 1.15: a list that is not exactly the FSDP model's falls through to torch's norm of local shards."""
    for error, *_ in run_ranks(part_of_the_model, 2, "fsdp1"):
        assert "is managed by FSDP1" in error
    for _, norm, oracle, mine in run_ranks(part_of_the_model, 2, "fsdp2"):
        assert norm == pytest.approx(oracle, rel=2e-7)
        assert abs(mine / norm - 1) > 1e-3


# ---- the norm of one rank shown as that of all --------------------------------------------------------------


def test_every_rank_reports_the_whole_norm_and_not_its_shards():
    """pytorch#170862, torchtitan#766: under FSDP2 each rank logs the norm of its own shards."""
    ranks = seen(fsdp2_job, 2)
    assert all(is_another(r.mine, ranks) for r in ranks)


def test_fsdp_and_ddp_report_the_same_norm():
    """pytorch#88621: the same model and batch have one norm under DDP and another under FSDP."""
    sharded, copied, original = seen(fsdp2_job, 2), seen(ddp_job, 2), seen(fsdp1_full, 2)
    assert sharded[0].norm == pytest.approx(copied[0].norm, rel=1e-6)
    assert original[0].norm == pytest.approx(copied[0].norm, rel=1e-6)
    assert is_another(sharded[0].mine, copied)


@pytest.mark.parametrize("layout", [pp_gpipe, pp_interleaved])
def test_pipeline_stages_make_one_norm(layout):
    """torchtitan#596: every pipeline stage clips by the norm of its own layers."""
    ranks = seen(layout, 2)
    assert all(is_another(r.mine, ranks) for r in ranks)


def test_experts_make_one_norm_with_the_dense_layers_they_share():
    """NeMo Automodel#3816: a norm for each expert group, so that shards of one dense layer are scaled unlike."""
    ranks = seen(ep_dtensor, 4)
    groups = hypot(ranks[0].mine, ranks[2].mine), hypot(ranks[1].mine, ranks[3].mine)
    assert is_another(groups[0], ranks)
    assert is_another(groups[0] / groups[1] * ranks[0].norm, ranks), "the groups are scaled unlike"


# ---- counted twice ------------------------------------------------------------------------------------------


def test_replicas_that_talk_are_counted_once():
    """twinkle#290: under DDP the norm is summed over ranks that hold the same gradients: 0.8 becomes 1.131."""
    ranks = seen(ddp_job, 2)
    assert together(ranks) == pytest.approx(sqrt(2) * ranks[0].norm)


def test_unsharded_fsdp1_is_counted_once():
    """pytorch#88955: with NO_SHARD the norm grows with the number of ranks."""
    ranks = seen(fsdp1_no_shard, 2)
    assert together(ranks) == pytest.approx(sqrt(2) * ranks[0].norm)


def test_hsdp_is_summed_over_shards_and_not_over_replicas():
    """VeOmni#184: under HSDP the sum runs over the replicate axis as well."""
    ranks = seen(hsdp, 4)
    assert together(ranks) == pytest.approx(sqrt(2) * ranks[0].norm)


def test_layers_outside_the_tensor_parallel_plan_are_counted_once():
    """NeMo-RL#3788: norms and biases that all tensor-parallel ranks hold are counted once for each of them."""
    ranks = seen(tp, 2)
    assert is_another(together(ranks), ranks)


def tied_gradient(job: Job, whole: list[Tensor]) -> float:
    return true_norm([p.grad for part in job.parts for n, p in part.named_parameters() if n == "embed.weight"])


def test_a_tied_embedding_on_two_stages_is_counted_once():
    """Megatron-LM#7227: first and last stage both count the embedding they share: 40 instead of 28.284."""
    ranks = seen(pp_1f1b_tied, 2, note=tied_gradient)
    assert ranks[0].notes == ranks[1].notes > 0
    assert is_another(hypot(ranks[0].norm, ranks[0].notes), ranks)


def adapters_beside_experts(dtype: torch.dtype, scale: float) -> Job:
    """Two experts, one on each rank, beside an adapter that both hold."""
    made = {"adapter": torch.ones(4, 3), f"expert{dist.get_rank()}": torch.ones(3, 3)}
    own = distclip.Layout(1)
    return hand_made(made, dtype, scale, layout=lambda name, p: own if name.startswith("expert") else None)


def test_adapters_that_expert_ranks_share_are_counted_once():
    """VeOmni's shared LoRA: counted once on every expert-parallel rank, the norm grew by up to sqrt(ranks)."""
    ranks = seen(adapters_beside_experts, 2)
    assert is_another(together(ranks), ranks)


# ---- experts ------------------------------------------------------------------------------------------------


def owned_experts(dtype: torch.dtype, scale: float) -> Job:
    """Three ranks own two experts, none and one, beside a dense layer that all hold."""
    mine = [("expert0", "expert1"), (), ("expert2",)][dist.get_rank()]
    made = {"dense": torch.ones(3, 3)} | {name: torch.ones(4, 3) for name in mine}
    own = distclip.Layout(1)
    return hand_made(made, dtype, scale, layout=lambda name, p: own if name.startswith("expert") else None)


def test_norms_of_ranks_are_never_averaged():
    """DeepSpeed#8475: "due to the presence of moe params" the ranks' norms are averaged: 7.236 for 10.954."""
    ranks = seen(owned_experts, 3)
    assert is_another(sum(r.mine for r in ranks) / 3, ranks)


def test_a_rank_that_owns_no_expert_takes_part():
    """DeepSpeed#8478: a rank without expert gradients returns early, and the others wait for ever."""
    ranks = seen(owned_experts, 3)
    assert len({r.mine for r in ranks}) == 3
    assert [r.collectives for r in ranks] == [1, 1, 1]


def test_ranks_with_unlike_numbers_of_parameters_reduce_the_same_words():
    """NeMo Automodel#2012: the all-reduce is as long as the rank's list of parameters: it hangs with experts."""
    for norm_type in (1.0, inf):
        assert [r.collectives for r in seen(owned_experts, 3, norm_type)] == [1, 1, 1]


def experts_over_tensor_parallel(dtype: torch.dtype, scale: float) -> Job:
    mesh = mesh_of(("ep", 2), ("tp", 2))
    made = {
        "dense": distribute_tensor(torch.ones(6, 3), mesh["tp"], [Shard(0)]),
        "experts": distribute_tensor(torch.ones(4, 6, 3), mesh, [Shard(0), Shard(1)]),
    }
    return hand_made(made, dtype, scale)


def dense_norm(job: Job, whole: list[Tensor]) -> float:
    return true_norm(whole[:1])  # in the order of names


def test_experts_are_in_the_norm_under_expert_and_tensor_parallel():
    """Megatron-LM#5916: with both, the experts are left out of the norm, and everything is clipped too little."""
    ranks = seen(experts_over_tensor_parallel, 4, note=dense_norm)
    assert is_another(ranks[0].notes, ranks)


def experts_in_the_second_stage(dtype: torch.dtype, scale: float) -> Job:
    mesh = mesh_of(("pp", 2), ("ep", 2))
    stage = mesh.get_local_rank("pp")
    made = {f"dense{stage}": torch.ones(5, 3)}
    if stage == 1:
        made["experts"] = distribute_tensor(torch.ones(4, 6, 3), mesh["ep"], [Shard(0)])
    return hand_made(made, dtype, scale, split_over=[mesh["pp"]])


def test_a_stage_without_experts_takes_part():
    """torchtitan#1541: the stage without experts has the number 0.0 where the others have a DTensor: it crashes."""
    ranks = seen(experts_in_the_second_stage, 4)
    assert all(is_another(r.mine, ranks) for r in ranks[:2])


def test_an_expert_without_tokens_counts_nothing():
    """ColossalAI: a rank whose list of gradients is empty returns 0.0 before the collective of the others."""
    ranks = seen(ep_plain, 4)
    assert [r.collectives for r in ranks] == [1, 1, 1, 1]
    assert ranks[0].mine != ranks[1].mine


# ---- inf-norms ----------------------------------------------------------------------------------------------


def empty_shards(job: Job, whole: list[Tensor]) -> int:
    return sum(g.numel() == 0 for g in gradients(job))


def test_the_inf_norm_of_an_empty_shard_is_nothing():
    """pytorch#173238, torchrec#3809: the largest element of no elements raises on one rank, and the others hang."""
    ranks = seen(fsdp2_job, 3, inf, note=empty_shards)
    assert max(r.notes for r in ranks) > 0
    if MEASURED_TORCH:
        with pytest.raises(RuntimeError):
            torch.linalg.vector_norm(torch.zeros(0), inf)


def test_the_inf_norm_is_the_largest_element():
    """torchrec#3199: sums of powers with p = inf end as x ** (1 / inf): the norm is always 1.0."""
    ranks = seen(fsdp2_job, 2, inf)
    assert is_another(1.0, ranks)
    assert {r.mine for r in ranks} != {ranks[0].oracle}


@pytest.mark.parametrize("p", [0.5, 1.0, 3.0])
def test_every_norm_type_has_its_own_power(p):
    """DeepSpeed#8313: squares are summed for every norm type, then the p-th root is taken."""
    ranks = seen(ep_dtensor, 4, p)
    squares = run_ranks(see, 4, ep_dtensor, 2.0, torch.float32, 30.0, nothing)[0].oracle ** 2
    assert is_another(squares ** (1 / p), ranks)


def inf_then_two() -> list[list[float]]:
    """[norms for p = inf, 2, inf, 2] with the gradients of rank 0 only, then without any; and the oracle's."""
    job = fsdp1_full(torch.float32, 30.0)
    job.backward()
    mine = [g.clone() for g in gradients(job)]
    sizes = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, [true_norm(mine, inf), true_norm(mine)])
    norms = []
    for keeps in (dist.get_rank() == 0, False):
        if not keeps:
            job.parts[0].zero_grad()
        norms.append([distclip.clip_grad_norm_(job.parts, inf, p).item() for p in (inf, 2.0, inf, 2.0)])
    return [*norms, sizes[0]]


def test_an_inf_norm_leaves_nothing_behind():
    """torch 2.13 FSDP1: on a rank without gradients the inf-norm is written into a cached zero, for ever."""
    for some, none, (largest, two) in run_ranks(inf_then_two, 2):
        assert some == pytest.approx([largest, two] * 2, rel=2e-7)
        assert none == [0.0] * 4
        assert hypot(largest, two) / two > 1 + 1e-3, "what torch says the second time"


def nan_on(bad: int, norm_type: float) -> tuple[bool, bool, str, bool]:
    """(norm is NaN, skip, culprit, gradients kept) with one NaN on rank ``bad``."""
    model = fsdp2()
    clipper = distclip.Clipper(model, 1.0, norm_type=norm_type)
    backward(model)
    if dist.get_rank() == bad:
        local(model.blocks[1][3].weight.grad)[0, 0] = nan
    before = [local(p.grad).nan_to_num(7.0) for p in model.parameters()]
    report = clipper.clip_()
    kept = same_tensors(before, [local(p.grad).nan_to_num(7.0) for p in model.parameters()])
    return isnan(report.norm.item()), report.skip.item(), str(report.culprit), kept


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_no_maximum_drops_a_nan_whichever_rank_has_it(bad):
    """mlx#4072: a MAX all-reduce keeps or drops a NaN by the order of ranks (Gloo's does so too)."""
    said = f"blocks.1.3.weight has NaN in its reduced gradient, held by rank {bad}; "
    said += "distclip.find_source(model) says which rank it came from"
    assert run_ranks(nan_on, 3, bad, inf) == [(True, True, said, True)] * 3


# ---- precision and range ------------------------------------------------------------------------------------


def test_a_large_fp32_gradient_on_the_cpu_keeps_its_norm():
    """pytorch#169237: one fp32 running sum on the CPU: 3e-4 off at 1e7 elements."""
    chunk = torch.randn(10**5)
    parameter = nn.Parameter(torch.zeros(10**7))
    parameter.grad = chunk.repeat(100)
    oracle = 10 * true_norm([chunk])
    assert distclip.clip_grad_norm_([parameter], inf).item() == pytest.approx(oracle, rel=2e-7)
    if MEASURED_TORCH:
        assert abs(nn.utils.get_total_norm([parameter.grad]).item() / oracle - 1) > 1e-5


def largest_square(job: Job, whole: list[Tensor]) -> float:
    return max(w.square().max().item() for w in whole if w.numel())


def test_squares_beyond_fp16_do_not_overflow():
    """fairscale#263: 5000 ** 2 is inf in fp16, and so is the norm."""
    ranks = seen(by_hand, 4, dtype=torch.float16, scale=5000.0, note=largest_square)
    assert ranks[0].notes == inf


def test_finite_gradients_are_never_zeroed_because_their_squares_overflow():
    """pytorch#194326: a norm that fits fp32 overflows on the way, the coefficient is 0, and so is every gradient."""
    ranks = seen(by_hand, 4, scale=1e20, note=largest_square)
    assert ranks[0].notes == inf


def test_bf16_stages_are_not_added_in_bf16():
    """NeMo Automodel#825: norms of bf16 pipeline stages are squared and reduced in bf16."""
    ranks = seen(pp_gpipe, 2, dtype=torch.bfloat16)
    squares = [torch.tensor(r.mine, dtype=torch.bfloat16).square() for r in ranks]
    assert is_another(sum(squares).sqrt().item(), ranks, by=1e-5)


def test_bf16_gradients_themselves_are_scaled():
    """NeMo Automodel's grad_utils: bf16 gradients are scaled in their fp32 copies: nothing is clipped."""
    ranks = seen(by_hand, 4, dtype=torch.bfloat16)
    assert ranks[0].after < 1.01  # 3 if nothing was


def test_epsilon_is_added_once_and_not_on_every_rank():
    """pytorch#149768: each rank adds 1e-6 to its part of a norm that is not summed yet."""
    ranks = run_ranks(see, 4, by_hand, 2.0, torch.float32, 3e-8, nothing)
    for rank in ranks:
        assert rank.norm == pytest.approx(rank.oracle, rel=2e-7)
        assert rank.after == pytest.approx(rank.norm / (rank.norm + 1e-6), rel=1e-6)
        assert rank.after > 1.2 * rank.norm / (rank.norm + 4e-6)


# ---- pending sums -------------------------------------------------------------------------------------------


def norm_of_terms(job: Job, whole: list[Tensor]) -> float:
    """What comes of squaring the terms before they are added: every rank's own, over all ranks."""
    total = torch.tensor(true_norm(gradients(job)) ** 2)
    dist.all_reduce(total)
    return total.sqrt().item()


def test_a_pending_sum_is_added_before_it_is_squared():
    """pytorch#159856: the norm of a Partial gradient is taken of its terms: 8.787 for 5.649."""
    ranks = seen(by_hand_realigned, 4, note=norm_of_terms)
    assert is_another(ranks[0].notes, ranks)


def terms_missing(where: str) -> tuple[float, float, int]:
    """(norm, oracle, gradients dropped) of sequence parallel, whose norm layers leave pending sums."""
    job = tp_sequence(torch.float32, 30.0)
    job.backward()
    whole, dropped = [], 0
    for p in job.parameters():
        pending = isinstance(p.grad, DTensor) and p.grad.placements[0] == Partial()
        if where == "on rank 1" and pending:  # what is left is the term of rank 0
            term = p.grad.to_local().clone()
            dist.broadcast(term, 0)
            whole.append(term)
            p.grad = None if dist.get_rank() == 1 else p.grad
            dropped += 1
        elif where == "of one layer" and pending and not dropped:
            p.grad = None
            dropped += 1
        else:
            whole.append(p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad)
    return distclip.Clipper(job.parts, inf).clip_().norm.item(), true_norm(whole), dropped


@pytest.mark.parametrize(("where", "count"), [("on rank 1", 4), ("of one layer", 1)])
def test_missing_terms_of_a_pending_sum_are_zeros(where, count):
    """AReaL#1139: a rank that saw no gradient skips the collectives that the others wait in."""
    every, _, _ = run_ranks(terms_missing, 2, "nowhere")[0]
    some = run_ranks(terms_missing, 2, where)
    assert same_bits([norm for norm, _, _ in some])
    for norm, oracle, dropped in some:
        assert norm == pytest.approx(oracle, rel=2e-7)
        assert dropped == count
        assert abs(norm / every - 1) > 1e-4


# ---- what is not a number, and what is not a bound ----------------------------------------------------------


def unsummable(use: str, where: str) -> tuple[list[str], list[int], bool, float]:
    """A gradient that waits for a maximum, on the first of two meshes; then a good one everywhere."""
    mesh = mesh_of(("dp", 2), ("tp", 2))
    first, speaks = mesh.get_local_rank("dp") == 0, mesh.get_local_rank("tp") == 0
    weight = nn.Parameter(distribute_tensor(torch.zeros(4), mesh["tp"], [Replicate()]))
    terms = torch.arange(4.0) + dist.get_rank()
    kind = "max" if first and (speaks or where == "all ranks") else "sum"
    weight.grad = DTensor.from_local(terms.clone(), mesh["tp"], [Partial(kind)], run_check=False)
    if first and not speaks and where == "one rank, the other has none":
        weight.grad = None
    kept = weight.grad
    clipper = distclip.Clipper(nn.ParameterList([weight]), 1.0) if use == "Clipper" else None
    said, counted = [], []
    for _ in range(2):
        with count_collectives() as counts:
            try:
                distclip.clip_grad_norm_([weight], 1.0) if clipper is None else clipper.clip_()
            except distclip.LayoutError as error:
                said.append(str(error))
        counted.append(counts.total())
    if first:
        unscaled = weight.grad is kept and (kept is None or torch.equal(local(kept), terms))
    else:
        unscaled = torch.equal(weight.grad.full_tensor(), 2 * torch.arange(4.0) + 5)
    weight.grad = distribute_tensor(torch.tensor([1.0, 2.0, 2.0, 4.0]), mesh["tp"], [Replicate()])
    return said, counted, unscaled, distclip.clip_grad_norm_([weight], inf).item()


@pytest.mark.parametrize("use", ["function", "Clipper"])
@pytest.mark.parametrize("where", ["all ranks", "one rank, the other has none", "one rank, the other has sums"])
def test_a_gradient_that_waits_for_a_maximum_is_refused_on_all_ranks(use, where):
    """torch redistributes it to the largest of what ranks hold, which is no gradient of anything."""
    cause = "let every rank run the same backward" if where.endswith("sums") else "a placement that cannot be summed"
    results = run_ranks(unsummable, 4, use, where)
    for rank, (said, counted, unscaled, norm) in enumerate(results):
        assert len(said) == 2
        assert all((cause if rank < 2 else "one of them stopped with an error of its own") in text for text in said)
        assert counted == results[rank // 2 * 2][1]
        assert unscaled
        assert norm == 5.0


def a_bad_expert(nonfinite: str) -> tuple[bool, list[bool]]:
    """(norm is NaN, whether each gradient kept its bits or became NaN) with a NaN in the experts of rank 3."""
    job = ep_dtensor(torch.float32, 30.0)
    clipper = distclip.Clipper(job.parts, 1.0, nonfinite=nonfinite, **job.options)
    job.backward()
    if dist.get_rank() == 3:
        local(job.parts[0]["experts"].grad)[0, 0, 0] = nan
    before = [g.clone() for g in gradients(job)]
    norm = clipper.clip_().norm.item()
    pairs = zip(before, gradients(job), strict=True)
    if nonfinite == "skip":
        return isnan(norm), [torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs]
    return isnan(norm), [bool(b.isnan().all()) for _, b in pairs]


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_a_bad_norm_is_never_a_number_and_turns_no_gradient_round(nonfinite):
    """DeepSpeed#8614: -1 stands for a bad norm, and every gradient is multiplied by it."""
    assert run_ranks(a_bad_expert, 4, nonfinite) == [(True, [True] * 3)] * 4


def bad_stage() -> str:
    job = pp_fsdp2(torch.float32, 30.0)
    job.backward()
    if dist.get_rank() == 3:
        local(job.parts[0].blocks[0][1].weight.grad)[0, 0] = inf
    try:
        distclip.clip_grad_norm_(job.parts, 1.0, error_if_nonfinite=True, **job.options)
    except distclip.NonFiniteError as error:
        return str(error)
    return "no error"


def test_a_bad_norm_names_parameter_and_rank():
    """pytorch#46849: the error says that the norm is not finite, and not whose."""
    for said in run_ranks(bad_stage, 4):
        assert "blocks.0.1.weight has inf in its reduced gradient, held by rank 3; " in said


def poisoned_window() -> list[bool]:
    """Which of ten steps were skipped when the gradient of the third was NaN on one rank."""
    model = fsdp2()
    clipper = distclip.Clipper(model, distclip.AutoClip(percentile=50, window=4))
    skips = []
    for step in range(10):
        backward(model, step)
        if step == 2 and dist.get_rank() == 1:
            local(model.embed.weight.grad)[0, 0] = nan
        skips.append(clipper.clip_().skip.item())
        model.zero_grad()
    return skips


def test_one_bad_norm_does_not_poison_the_window():
    """OLMo-core's SkipStepOptimizer: one NaN among the 128 norms kept, and 128 steps are skipped."""
    assert run_ranks(poisoned_window, 2) == [[False, False, True] + [False] * 7] * 2
    assert isnan(torch.tensor([1.0, nan]).std().item())


def negative_bounds() -> list[str]:
    job = by_hand(torch.float32, 30.0)
    job.backward()
    before = [g.clone() for g in gradients(job)]
    total = distclip.clip_grad_norm_(job.parts, inf)
    uses = [
        lambda: distclip.clip_grad_norm_(job.parts, -1.0),
        lambda: distclip.clip_grads_with_norm_(job.parts, -1.0, total),
        lambda: distclip.clip_grad_value_(job.parts, -1.0),
        lambda: distclip.Clipper(job.parts, -1.0).clip_(),
    ]
    said = []
    for use in uses:
        try:
            use()
        except ValueError as error:
            said.append(str(error))
    return [*said, "kept" if same_tensors(before, gradients(job)) else "changed"]


def test_a_negative_bound_turns_no_gradient_round():
    """pytorch#31367: a negative max_norm is taken, and the gradients point the other way."""
    for *said, gradients_are in run_ranks(negative_bounds, 2):
        assert gradients_are == "kept"
        assert len(said) == 4
        assert all("must be above 0" in s for s in said)


# ---- what kind of gradients, and how they are listed --------------------------------------------------------


def sparse_tables() -> tuple[float, float, float, float]:
    """(norm, oracle, norm of the values as they come, norm after): every rank has its own table, all share a layer."""
    rank, own = dist.get_rank(), distclip.Layout(1)
    model = nn.ModuleDict({f"table{rank}": nn.Embedding(10, 3, sparse=True), "dense": nn.Linear(3, 2)})
    words = torch.tensor([rank + 1, 4, 4, 4])
    (model[f"table{rank}"](words) * torch.arange(1.0, 13.0).view(4, 3)).sum().backward()
    model["dense"](torch.ones(3)).sum().backward()
    table = model[f"table{rank}"].weight.grad
    raw = table._values().norm().item()
    tables = [torch.zeros(10, 3) for _ in range(2)]
    dist.all_gather(tables, table.to_dense())
    layers = [p.grad for p in model["dense"].parameters()]
    oracle = true_norm([*tables, *layers])
    options = {"layout": lambda name, p: own if name.startswith("table") else None}
    norm = distclip.clip_grad_norm_(model, oracle / 2, **options).item()
    return norm, oracle, raw, distclip.clip_grad_norm_(model, inf, **options).item()


def test_sparse_gradients_count_as_the_rows_they_add_up_to():
    """pytorch#4829: sparse gradients raise; and rows that come several times are not the sum of their squares."""
    for norm, oracle, raw, after in run_ranks(sparse_tables, 2):
        assert norm == pytest.approx(oracle, rel=2e-7)
        assert abs(sqrt(2) * raw / oracle - 1) > 0.1
        assert after == pytest.approx(oracle / 2, rel=1e-6)


def listed_by_an_iterator() -> tuple[float, float, float]:
    """(norm, oracle, norm after): the parameters can be walked through only once."""
    model = fsdp2()
    backward(model, scale=30.0)
    oracle = true_norm([p.grad.full_tensor() for p in model.parameters()])
    norm = distclip.clip_grad_norm_((p for p in model.parameters()), oracle / 4).item()
    return norm, oracle, true_norm([p.grad.full_tensor() for p in model.parameters()])


def test_an_iterator_is_measured_and_then_clipped():
    """AReaL#335: the norm uses up model.parameters(), and the scaling finds nothing left."""
    for norm, oracle, after in run_ranks(listed_by_an_iterator, 2):
        assert norm == pytest.approx(oracle, rel=2e-7)
        assert after == pytest.approx(oracle / 4, rel=1e-6)


def clamped(layout: Layout) -> tuple[bool, bool, bool]:
    """(every element clamped, some were beyond, rescaling would be something else) for value clipping."""
    job = layout(torch.float32, 30.0)
    job.backward()
    before = united(job)
    bound = true_norm(before, inf) / 5
    distclip.Clipper(job.parts, distclip.ValueClip(bound), **job.options).clip_()
    after = united(job)
    wanted = [b.clamp(-bound, bound) for b in before]
    rescaled = [b / 5 for b in before]
    return same_tensors(after, wanted), not same_tensors(after, before), not same_tensors(after, rescaled)


@pytest.mark.parametrize("layout", [fsdp1_full, fsdp2_job, hsdp])
def test_value_clipping_of_shards_clamps_and_never_rescales(layout):
    """composer: "value" under FSDP1 is clipping by the inf-norm; Lightning#19236, torchrec#4388: forbidden."""
    assert run_ranks(clamped, 4, layout) == [(True, True, True)] * 4


def listed_gradients() -> tuple[float, float]:
    """(norm of the bare gradients, oracle) where one is on another mesh and one a plain tensor."""
    job = ep_dtensor(torch.float32, 30.0)
    job.backward()
    plain = torch.arange(6.0)
    oracle = true_norm([*united(job), plain])
    return distclip.get_total_norm([*(p.grad for p in job.parameters()), plain]).item(), oracle


def test_bare_gradients_of_several_meshes_make_one_norm():
    """NeMo Automodel#3301: torch's norm of gradients on an expert mesh and a data mesh raises."""
    for norm, oracle in run_ranks(listed_gradients, 4):
        assert norm == pytest.approx(oracle, rel=2e-7)


def replicated_by_mesh(dtype: torch.dtype, scale: float) -> Job:
    """A weight whole on one axis and cut on the other, in both orders, beside a scalar."""
    mesh = mesh_of(("a", 2), ("b", 2))
    made = {
        "whole_cut": distribute_tensor(torch.ones(5, 3), mesh, [Replicate(), Shard(0)]),
        "cut_whole": distribute_tensor(torch.ones(5, 3), mesh, [Shard(0), Replicate()]),
        "scalar": distribute_tensor(torch.ones(()), mesh, [Replicate(), Replicate()]),
    }
    return hand_made(made, dtype, scale)


def test_whole_and_cut_axes_are_told_apart():
    """hyper-parallel#279: replicated parameters are counted once for each shard: 48 or 100 for 28."""
    ranks = seen(replicated_by_mesh, 4)
    assert together(ranks) > 1.4 * ranks[0].norm


def clipped_twice_by_two_owners() -> str:
    model = fsdp2()
    mine, framework = distclip.Clipper(model, 1.0), distclip.Clipper(model, 2.0)
    backward(model, scale=30.0)
    framework.clip_()
    try:
        mine.verify()
    except distclip.LayoutError as error:
        return str(error)
    return "no error"


def test_two_owners_of_one_clipping_are_found():
    """DeepSpeed#8068: since 0.19.3 it clips by 1.0 unless told otherwise, beside the caller's own clipping."""
    for said in run_ranks(clipped_twice_by_two_owners, 2):
        assert "1 other Clipper(s) hold parameters of this one" in said
