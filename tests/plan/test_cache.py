"""Plans that the functions reuse: a hit and a miss do the same, and nobody is kept alive, swapped or mistaken."""

import gc
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from math import inf
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

import distclip
from distclip.layouts.piece import local_tensor
from distclip.plan import cache
from support.layouts import backward, batch, build
from support.oracle import true_norm, whole_gradients
from support.parallel import Job, by_hand, by_hand_realigned, ddp_tp, full_gradients, hsdp, mesh_of, tp_sequence, united
from support.ranks import count_collectives, run_ranks, same_bits
from support.samples import crossed


@pytest.fixture(autouse=True)
def _nothing_is_known() -> Iterator[None]:
    cache.plans.clear()
    yield
    cache.plans.clear()


@contextmanager
def plans_made() -> Iterator[list[float]]:
    """The p of every plan that the functions make."""
    made: list[float] = []

    def noted(listed, p, *others):
        made.append(p)
        return original(listed, p, *others)

    original = cache.plan_of
    with patch.object(cache, "plan_of", noted):
        yield made


def parameters(*sizes: int) -> list[Parameter]:
    return [Parameter(torch.zeros(size)) for size in sizes or (5, 3, 7, 2)]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False)), nn.Linear(3, 2))


def fill(tensors, scale: float = 1.0) -> None:
    for tensor in tensors:
        tensor.grad = scale * torch.randn(tensor.shape, dtype=tensor.dtype)


def clip(handed, holders: Sequence[Tensor], bound: float = inf, **options) -> Tensor:
    """The norm by the function; it, and what clipping leaves, are the oracle's."""
    oracle = true_norm(whole_gradients(holders), options.get("norm_type", 2.0))
    assert oracle > 0, "a vacuous case"
    norm = distclip.clip_grad_norm_(handed, bound, **options)
    assert norm.item() == pytest.approx(oracle, rel=2e-7)
    left = true_norm(whole_gradients(holders), options.get("norm_type", 2.0))
    assert left == pytest.approx(min(oracle, bound), rel=1e-5)
    return norm


# ---- one plan for the same parameters ------------------------------------------------------------------------


MODEL = net()
HANDED = {
    "a list": lambda: LIST,
    "a list made anew": lambda: list(MODEL.parameters()),
    "a generator": lambda: MODEL.parameters(),
    "one tensor": lambda: LIST[0],
    "a module": lambda: MODEL,
    "a list of modules": lambda: [MODEL[0], MODEL[1]],
    "a generator of modules": lambda: MODEL.children(),
}
LIST = list(MODEL.parameters())


@pytest.mark.parametrize("what", HANDED)
def test_the_same_parameters_reuse_one_plan(what):
    holders = {"one tensor": LIST[:1], "a list of modules": LIST[:5]}.get(what, LIST)
    with plans_made() as made:
        for step in range(4):
            fill(LIST)
            clip(HANDED[what](), holders, bound=0.5 if step % 2 else inf)
    assert made == [2.0]


def test_another_norm_type_makes_a_plan_of_its_own():
    for handed in (LIST, MODEL):
        with plans_made() as made:
            for p in (2.0, 1.0, inf, 1, 2):
                fill(LIST)
                clip(handed, LIST, norm_type=p)
        assert set(made) == {2.0, 1.0, inf}


def test_other_lists_that_begin_and_end_alike_are_told_apart():
    a, b, c, d = parameters(3, 3, 3, 3)
    with plans_made() as made:
        for step in range(3):
            for middle in (b, d):
                fill([a, b, c, d], scale=10.0**step)
                clip([a, middle, c], [a, middle, c])
        clip([b, d, c], [b, d, c])
        clip([a, c], [a, c])
    assert len(made) >= 3, "lists of one length, dtype and ends may share a plan"


def test_lists_that_differ_in_the_middle_are_told_apart_while_gradients_stay():
    """What lies in one process is known by its gradients: those of the others must not vouch for a new one."""
    a, b, c, d, e = parameters(3, 3, 3, 3, 3)
    fill([a, b, c, d, e])
    d.grad.fill_(1e6)
    for middle in ([b, b], [b, d], [b, b], [d, b], [d, d], [b, e], [b, b]):
        clip([a, *middle, c], [a, *dict.fromkeys(middle), c])


@pytest.mark.parametrize("where", [1, 2])
def test_a_weight_that_is_untied_counts_by_itself(where):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    model[1].weight = model[2].weight
    fill(model.parameters())
    clip(model, list(model.parameters()))
    model[where].weight = Parameter(torch.zeros(3, 3))
    fill([model[where].weight], scale=1e6)
    assert clip(model, list(model.parameters())) > 1e5


def with_other_groups() -> dict[str, object]:
    pair, world = dist.new_group([0, 1]), dist.group.WORLD
    ways = {
        "nothing": {},
        "the group": {"group": world},
        "another group": {"group": pair},
        "split over the group": {"split_over": [world]},
        "split over another": {"split_over": [pair]},
        "both": {"group": world, "split_over": [pair]},
    }
    model = nn.ParameterList(parameters(4, 5))
    counts, norms = [], []
    with plans_made() as made:
        for _ in range(3):
            for handed in (list(model), model):
                for options in ways.values():
                    fill(model, 1.0 + dist.get_rank() if "split_over" in options else 1.0)
                    mine = true_norm([p.grad for p in model])
                    norms.append((mine, distclip.clip_grad_norm_(handed, inf, **options).item(), bool(options)))
            counts.append(len(made))
    return {"counts": counts, "norms": norms, "ways": len(ways)}


def test_another_group_and_another_split_make_plans_of_their_own():
    results = run_ranks(with_other_groups, 2)
    for r in results:
        first, *_ = r["counts"]
        assert first == 2 * r["ways"]
    for left, right in zip(*(r["norms"] for r in results), strict=True):
        assert left[1] == right[1]
        split = left[0] != right[0]  # ranks that hold copies fill them alike
        assert left[1] == pytest.approx((left[0] ** 2 + right[0] ** 2 * split) ** 0.5, rel=2e-7)


def test_what_is_not_a_parameter_is_refused_between_known_ones_too():
    a, b, c = parameters(2, 2, 2)
    fill([a, b, c])
    clip([a, b, c], [a, b, c])
    for odd, says in (("weight", "got str"), (nn.Linear(2, 2), "got both")):
        with pytest.raises(ValueError, match=says):
            distclip.clip_grad_norm_([a, odd, c], 1.0)


# ---- nothing is kept alive, and no more than promised --------------------------------------------------------


def handed_out(model: nn.Module, kind: str) -> nn.Module | list:
    return {"list": [*model.parameters()], "module": model, "modules": [*model.children()]}[kind]


def references(model: nn.Module) -> list[weakref.ref]:
    """To everything that a model is made of, down to the memory of its gradients."""
    holders = list(model.parameters())
    gradients = [local_tensor(p.grad) for p in holders]
    parts = [*model.modules(), *holders, *(p.grad for p in holders), *map(local_tensor, holders), *gradients]
    return list(map(weakref.ref, [*parts, *(g.untyped_storage() for g in gradients)]))


def living(known: Sequence[weakref.ref]) -> list[str]:
    return [type(reference()).__name__ for reference in known if reference() is not None]


@pytest.mark.parametrize("kind", ["list", "module", "modules"])
def test_no_tensor_and_no_model_is_kept_alive(kind):
    model = net()
    for _ in range(3):
        fill(model.parameters())
        clip(handed_out(model, kind), list(model.parameters()), bound=1.0)
    known = references(model)
    assert len(living(known)) == len(known)
    del model
    gc.collect()
    assert living(known) == []


def dtensors_are_freed(kind: str) -> tuple[bool, list[str]]:
    """DTensors by hand: FSDP2 itself keeps its modules."""
    job = by_hand(torch.float32, 1.0)
    for _ in range(3):
        job.backward()
        clip(handed_out(job.parts[0], kind), list(job.parameters()), bound=1.0)
    known = references(job.parts[0])
    all_alive = len(living(known)) == len(known)
    del job
    gc.collect()
    deadline = time.monotonic() + 10
    while living(known) and time.monotonic() < deadline:
        time.sleep(0.001)  # Gloo's threads let go of what they have sent 2 ms late where cores are busy
    return all_alive, living(known)


@pytest.mark.parametrize("kind", ["list", "module"])
def test_no_dtensor_is_kept_alive(kind):
    assert run_ranks(dtensors_are_freed, 2, kind) == [(True, [])] * 2


@pytest.mark.parametrize("before", [False, True], ids=["a new attribute", "an attribute that was None"])
def test_what_hangs_on_a_parameter_is_not_kept_alive(before):
    """Megatron and others hang a buffer of gradients on each parameter, as ``main_grad``."""
    for handed in (lambda p: [p], lambda p: nn.ParameterList([p])):
        (p,) = parameters(4)
        fill([p])
        if before:
            p.main_grad = None
        model = handed(p)
        clip(model, [p])
        p.main_grad = torch.ones(1000)
        alive = weakref.ref(p.main_grad)
        del p, model
        gc.collect()
        assert alive() is None


def test_as_many_lists_are_known_as_promised():
    cache.plans.clear()
    lists = [parameters(3, 4, 2) for _ in range(cache.MOST)]
    with plans_made() as made:
        for _ in range(2):
            for ps in lists:
                fill(ps)
                clip(ps, ps)
    assert len(made) == cache.MOST


def some_hidden() -> list[tuple[float, float]]:
    """DDP over tensor parallel shows some of its parameters after a forward, and not the others."""
    job = ddp_tp(torch.float32, 30.0)
    seen = []
    for _ in range(3):
        job.backward()
        seen.append((distclip.clip_grad_norm_(job.parts, inf).item(), true_norm(united(job))))
        for holder in distclip.Clipper(job.parts, inf).engine.holders:
            holder.grad = None
    return seen


def test_parameters_that_a_module_hides_are_counted_at_every_call():
    for seen in run_ranks(some_hidden, 2):
        for norm, oracle in seen:
            assert norm == pytest.approx(oracle, rel=1e-6)


def test_no_more_lists_are_known_than_promised():
    lists = [parameters(3, 4, 2) for _ in range(50)]
    for ps in lists:
        fill(ps)
        clip(ps, ps)
    with plans_made() as made:
        for ps in lists[-cache.MOST :]:
            clip(ps, ps)
    assert not made
    with plans_made() as made:
        for ps in lists:  # also those that were forgotten
            clip(ps, ps)
    assert len(made) == len(lists)


def test_the_list_in_use_is_the_last_to_be_forgotten():
    ours, theirs = parameters(), [parameters(2, 2) for _ in range(30)]
    with plans_made() as made:
        for ps in theirs:
            fill([*ours, *ps])
            clip(ours, ours)
            clip(ps, ps)
    assert len(made) == 1 + len(theirs)


def test_plans_of_modules_go_with_their_modules():
    models = [net() for _ in range(50)]
    with plans_made() as made:
        for _ in range(2):
            for model in models:
                fill(model.parameters())
                clip(model, list(model.parameters()))
        kept = [weakref.ref(cache.planned([model], 2.0, None, (), None).plan.weights) for model in models]
    assert len(made) == len(models) == len([alive for alive in kept if alive() is not None])
    del models, model
    gc.collect()
    assert not [alive for alive in kept if alive() is not None]


# ---- swapping --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "module"])
def test_parameters_can_still_be_swapped(kind):
    model = net()
    for _ in range(3):
        fill(model.parameters())
        clip(handed_out(model, kind), list(model.parameters()))
        for p in list(model.parameters()):
            other = Parameter(torch.zeros(p.numel() + 1))
            fill([other], scale=100.0)
            torch.utils.swap_tensors(p, other)
        assert clip(handed_out(model, kind), list(model.parameters())) > 100


@pytest.mark.parametrize("kind", ["list", "module"])
def test_a_module_can_still_be_converted_by_swapping(kind):
    model = net()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for dtype in (torch.half, torch.float64, torch.float32):
            fill(model.parameters())
            clip(handed_out(model, kind), list(model.parameters()))
            model.to(dtype)
            norm = distclip.clip_grad_norm_(handed_out(model, kind), inf)
            assert norm.item() == pytest.approx(true_norm(p.grad for p in model.parameters()), rel=2e-7)
            assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def swapped_dtensors(kind: str) -> list[tuple[float, float, torch.dtype]]:
    """A fully_shard'ed model and a DTensor by hand, moved and converted between calls, which swaps their parameters."""
    model = build()
    fully_shard(model, mesh=mesh_of(("dp", dist.get_world_size())))
    model.register_parameter("hand", Parameter(distribute_tensor(torch.zeros(5, 3), mesh_of(("a", 2)), [Shard(1)])))
    seen = []
    for step in range(2):
        model.zero_grad()
        words, targets = batch(step)
        (model(words) - targets).square().sum().mul(10.0**step).backward()
        model.hand.grad = torch.ones_like(model.hand)
        for convert in (nn.Module.cpu, nn.Module.double, nn.Module.float, partial(nn.Module.to, device="cpu")):
            held = list(map(id, map(local_tensor, model.parameters())))
            convert(model)
            for _ in range(2):
                oracle = true_norm(whole_gradients(model.parameters()))
                norm = distclip.clip_grad_norm_(handed_out(model, kind), inf)
                seen.append((norm.item(), oracle, norm.dtype))
            assert held != list(map(id, map(local_tensor, model.parameters()))), "nothing was swapped"
    return seen


@pytest.mark.parametrize("kind", ["list", "module"])
def test_sharded_parameters_can_still_be_swapped(kind):
    results = run_ranks(swapped_dtensors, 2, kind)
    assert same_bits([[norm for norm, _, _ in r] for r in results])
    for norm, oracle, _ in results[0]:
        assert norm == pytest.approx(oracle, rel=2e-7)
        assert oracle > 0
    wide = [dtype == torch.float64 for _, _, dtype in results[0]]
    assert wide == [False, False, True, True, False, False, False, False] * 2


# ---- what has changed is noticed -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "module"])
@pytest.mark.parametrize("moves", [False, True], ids=["gradients converted in place", "gradients made anew"])
def test_a_dtype_changed_in_place_is_noticed(kind, moves):
    model = net()
    fill(model.parameters())
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        if moves:
            fill(model.parameters())
        norm = distclip.clip_grad_norm_(handed_out(model, kind), inf)
        assert norm.item() == pytest.approx(true_norm(p.grad for p in model.parameters()), rel=2e-7)
        assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def dtype_changed_on_ranks(forgets: int | None) -> list[tuple[float, str]]:
    """Plain parameters of a group that talks; one rank made its plan anew after the dtype changed."""
    model = net()
    seen = []
    for step, dtype in enumerate((torch.float32, torch.float64, torch.float32)):
        model.to(dtype)
        torch.manual_seed(step)
        fill(model.parameters())
        if dist.get_rank() == forgets:
            cache.plans.clear()
        norm = distclip.clip_grad_norm_(model.parameters(), inf, group=dist.group.WORLD)
        seen.append((norm.item() / true_norm(p.grad for p in model.parameters()), str(norm.dtype)))
    return seen


@pytest.mark.parametrize("forgets", [None, 0, 1])
def test_a_dtype_changed_in_place_is_noticed_on_all_ranks(forgets):
    for seen in run_ranks(dtype_changed_on_ranks, 2, forgets):
        assert [ratio for ratio, _ in seen] == pytest.approx([1.0] * 3, rel=2e-7)
        assert [dtype for _, dtype in seen] == ["torch.float32", "torch.float64", "torch.float32"]


def test_one_float64_parameter_among_others_makes_the_norm_float64():
    a, b = parameters(3, 4)
    b.data = b.data.double()
    fill([a, b])
    for _ in range(2):
        assert distclip.clip_grad_norm_([a, b], inf).dtype == torch.float64


def resized_on_ranks(forgets: int) -> list[float]:
    """A plain parameter of a group that talks, resized in place on all ranks; one of them forgets its plan."""
    ps = parameters(5, 3, 7)
    ratios = []
    for size in (3, 8, 2):
        ps[1].grad = None
        ps[1].data = torch.zeros(size)
        torch.manual_seed(size)
        fill(ps)
        if dist.get_rank() == forgets:
            cache.plans.clear()
        norm = distclip.clip_grad_norm_(ps, inf, group=dist.group.WORLD)
        ratios.append(norm.item() / true_norm(p.grad for p in ps))
    return ratios


@pytest.mark.parametrize("forgets", [0, 1])
def test_a_parameter_resized_on_all_ranks_is_no_disagreement(forgets):
    for ratios in run_ranks(resized_on_ranks, 2, forgets):
        assert ratios == pytest.approx([1.0] * 3, rel=2e-7)


def swapped(mixed: bool) -> list[tuple[float, float]]:
    """Two DTensors trade their contents in place, as ``module.to`` does: another placement, the same object."""
    mesh = mesh_of(("dp", dist.get_world_size()))
    whole = [torch.arange(8.0), torch.arange(8.0) + 5]
    cut, copied = (Parameter(distribute_tensor(torch.zeros(8), mesh, [place])) for place in (Shard(0), Replicate()))
    ps = [cut, *(parameters(4) if mixed else ()), copied]
    seen = []
    for _ in range(2):
        for p, values in ((ps[0], whole[0]), (ps[-1], whole[1])):
            p.grad = distribute_tensor(values, mesh, p.placements)
        if mixed:
            ps[1].grad = torch.ones(4)
        norm = distclip.clip_grad_norm_(ps, inf)
        seen.append((norm.item(), true_norm([*whole, *([torch.ones(4)] if mixed else [])])))
        ps[0].grad = ps[-1].grad = None
        torch.utils.swap_tensors(ps[0], ps[-1])
    return seen


@pytest.mark.parametrize("mixed", [False, True])
def test_placements_swapped_in_place_are_noticed(mixed):
    for seen in run_ranks(swapped, 2, mixed):
        for norm, oracle in seen:
            assert norm == pytest.approx(oracle, rel=2e-7)


def test_a_parameter_resized_in_place_is_noticed():
    ps = parameters(5, 3, 7)
    for size in (3, 8, 0, 1):
        fill(ps)
        clip(ps, ps)
        ps[1].grad = None
        ps[1].data = torch.zeros(size)
        fill(ps[1:2], scale=100.0)
        clip(ps, ps)


@pytest.mark.parametrize("kind", ["list", "module"])
def test_a_parameter_replaced_by_its_like_is_noticed(kind):
    """Made and deleted in a loop, so that a new parameter often gets the address of an old one."""
    model = nn.ParameterList(parameters(4, 4, 4))
    addresses = set()
    for step in range(300):
        model[1] = Parameter(torch.zeros(4))
        addresses.add(id(model[1]))
        for p in model if step % 3 == 0 else model[1:2]:  # the others' gradients stay, mostly
            p.grad = torch.full((4,), 1.0 + step % 7)
        clip(handed_out(model, kind), list(model), bound=0.5 if step % 5 == 0 else inf)
    assert len(addresses) < 200, "no address was used again"


def test_a_whole_list_replaced_at_the_same_addresses_is_noticed():
    again, seen = 0, set()
    for step in range(300):
        ps = parameters(4, 2 + step % 2, 4)
        key = tuple(map(id, ps))
        again += key in seen
        seen.add(key)
        for p in ps:
            p.grad = torch.full_like(p, 1.0 + step % 7)
        clip(ps, ps)
        del p, ps
    assert again > 20


def test_a_module_that_got_another_layer_is_noticed():
    model = net()
    fill(model.parameters())
    clip(model, list(model.parameters()))
    model.append(nn.Linear(2, 2))
    fill(model[-1].parameters(), scale=100.0)
    assert clip(model, list(model.parameters())) > 50
    model[1].append(nn.Linear(3, 3))
    fill(model[1][-1].parameters(), scale=1e4)
    assert clip(model, list(model.parameters())) > 5e3
    model[0].register_parameter("scale", Parameter(torch.zeros(3)))
    fill([model[0].scale], scale=1e6)
    assert clip(model, list(model.parameters())) > 1e5
    del model[1], model[0].scale
    assert clip(model, list(model.parameters())) < 1e3


def test_layers_that_change_places_are_noticed():
    model = net()
    fill(model.parameters())
    clip(model, list(model.parameters()))
    model[0], model[2] = model[2], model[0]
    fill(model.parameters())
    model[0].weight.grad[0, 0] = torch.nan
    with pytest.raises(distclip.NonFiniteError, match=r"0\.weight"):
        distclip.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)


def test_an_error_names_the_shape_that_is_there_now():
    a, b, c, d = parameters(2, 3, 2, 5)
    fill([a, b, c, d])
    clip([a, b, c], [a, b, c])
    d.grad[0] = torch.nan
    with pytest.raises(distclip.NonFiniteError, match=r"parameter 1 of shape \(5,\)"):
        distclip.clip_grad_norm_([a, d, c], 1.0, error_if_nonfinite=True)


def test_an_error_names_the_layer_by_the_name_it_has_now():
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    fill(model.parameters())
    clip(model, list(model.parameters()))
    model["third"] = model.pop("second")
    model["third"].weight.grad[0, 0] = torch.nan
    with pytest.raises(distclip.NonFiniteError, match=r"third\.weight"):
        distclip.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)


def test_a_parameter_on_another_device_is_noticed():
    """As ``module.cuda()`` moves it, in place; the meta device stands in for an accelerator."""
    a, b, c = parameters(2, 3, 2)
    fill([a, b, c])
    elsewhere = Parameter(torch.zeros(3, device="meta"))
    for middle, on_host in ((b, True), (elsewhere, False), (b, True)):
        planned = cache.planned([a, middle, c], 2.0, None, (), None)
        assert planned.plan.on_host == on_host
        assert planned.plan.pieces[1].device == middle.device


def renamed_on_ranks(forgets: int | None) -> list[float]:
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    norms = []
    for step in range(3):
        fill(model.parameters())
        if dist.get_rank() == forgets:
            cache.plans.clear()
        oracle = true_norm(p.grad for p in model.parameters())
        norms.append(distclip.clip_grad_norm_(model, inf, group=dist.group.WORLD).item() / oracle)
        model[f"other {step}"] = model.pop(list(model)[-1])
    return norms


@pytest.mark.parametrize("forgets", [None, 0, 1])
def test_a_layer_renamed_on_all_ranks_is_no_disagreement(forgets):
    for norms in run_ranks(renamed_on_ranks, 2, forgets):
        assert norms == pytest.approx([1.0] * 3, rel=2e-7)


def said_of(handed) -> str:
    try:
        return f"a norm of {distclip.clip_grad_norm_(handed, inf).item()}"
    except distclip.LayoutError as error:
        return str(error)


def wrapped_by_fsdp1(new_gradients: bool, orig: bool) -> list[str]:
    """Bare parameters before and after: with original parameters they are the same objects."""
    model = net()
    fill(model.parameters())
    before = list(model.parameters())
    first = [said_of(before), said_of(model), said_of(before)]
    if new_gradients:
        model.zero_grad()
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=orig)
    if new_gradients:
        wrapped(torch.randn(2, 4)).sum().backward()
    return [*first, said_of(before if orig else list(wrapped.parameters()))]


@pytest.mark.parametrize("orig", [True, False], ids=["orig", "flat"])
@pytest.mark.parametrize("new_gradients", [True, False])
def test_a_parameter_that_fsdp1_wrapped_after_the_first_call_is_noticed(new_gradients, orig):
    for *first, last in run_ranks(wrapped_by_fsdp1, 2, new_gradients, orig):
        assert all(said.startswith("a norm of ") for said in first)
        assert "is managed by FSDP1" in last


def tag_beside_fsdp1() -> list[str]:
    """Between the same plain layers once a tagged one, then another that FSDP1 wrapped, whose mark is its only one."""
    around, tagged, other = parameters(2, 2), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    tagged.weight.no_weight_decay = True
    fill([*around, tagged.weight])
    wrapped = FullyShardedDataParallel(other, device_id=torch.device("cpu"), use_orig_params=True)
    wrapped(torch.ones(2, 3)).sum().backward()
    return [said_of([around[0], weight, around[1]]) for weight in (tagged.weight, *wrapped.parameters(), tagged.weight)]


def test_one_mark_is_not_taken_for_another():
    for first, second, third in run_ranks(tag_beside_fsdp1, 2):
        assert first == third
        assert first.startswith("a norm of ")
        assert "is managed by FSDP1" in second


def fsdp1_module_after_the_first_call(orig: bool) -> list[tuple[float, float]]:
    model = build()
    backward(model)
    distclip.clip_grad_norm_(model, inf)
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=orig)
    seen = []
    for step in range(4):
        wrapped.zero_grad()
        backward(wrapped, step)
        norms = [distclip.clip_grad_norm_(m, inf) for m in (wrapped, wrapped, [wrapped])]
        flat = wrapped._flat_param.grad
        shards = [torch.empty_like(flat) for _ in range(2)]
        dist.all_gather(shards, flat)
        seen += [(norm.item(), true_norm(shards)) for norm in norms]
    return seen


@pytest.mark.parametrize("orig", [True, False], ids=["orig", "flat"])
def test_a_module_that_fsdp1_wrapped_after_the_first_call_has_its_norm(orig):
    left, right = run_ranks(fsdp1_module_after_the_first_call, 2, orig)
    assert left == right
    assert all(norm == pytest.approx(oracle, rel=2e-7) and oracle > 0 for norm, oracle in left)


def wrapped_by_fsdp2(kind: str) -> list[tuple[float, float]]:
    seen = []
    mesh = mesh_of(("dp", dist.get_world_size()))
    for whole in (False, True):
        model = build()
        wraps = [[], [*model.blocks, model] if whole else [*model.blocks]]
        for modules in wraps:
            for module in modules:
                fully_shard(module, mesh=mesh)
            model.zero_grad()
            words, targets = batch(0)  # all ranks have the same rows: plain parameters need no reduction
            (model(words) - targets).square().sum().backward()
            for _ in range(2):
                oracle = true_norm(whole_gradients(model.parameters()))
                norm = distclip.clip_grad_norm_(handed_out(model, kind), inf)
                seen.append((norm.item(), oracle))
    return seen


@pytest.mark.parametrize("kind", ["list", "module"])
def test_a_parameter_that_fsdp2_wrapped_after_the_first_call_is_noticed(kind):
    left, right = run_ranks(wrapped_by_fsdp2, 2, kind)
    assert left == right
    assert all(norm == pytest.approx(oracle, rel=2e-7) and oracle > 0 for norm, oracle in left)


def looked_at_between() -> dict[str, object]:
    """A forward without backward, as validation does, leaves FSDP2's unsharded copies in place of parameters."""
    model = build()
    mesh = mesh_of(("dp", dist.get_world_size()))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    sharded = list(fully_shard(model, mesh=mesh, reshard_after_forward=False).parameters())
    seen, said = [], []
    for step in range(3):
        model.zero_grad()
        backward(model, step)
        seen += [distclip.clip_grad_norm_(handed, inf).item() for handed in (model, list(model.parameters()))]
        oracle = true_norm(whole_gradients(sharded))
        with torch.no_grad():
            model(batch(step)[0])
        said.append(said_of(list(model.parameters())))
        seen += [distclip.clip_grad_norm_(handed, inf).item() for handed in (sharded, model, sharded)]
        assert seen[-5:] == pytest.approx([oracle] * 5, rel=2e-7)
    return {"seen": seen, "said": said}


def test_unsharded_copies_are_not_taken_for_the_parameters_that_are_known():
    left, right = run_ranks(looked_at_between, 2)
    assert left["seen"] == right["seen"]
    assert len(set(left["seen"])) == 3
    assert all("is an unsharded copy" in said for said in left["said"] + right["said"])


def copies_in_place_of_plain_ones() -> list[str]:
    """The blocks are sharded after a first call; FSDP2 then shows plain copies, between the same first and last."""
    model = build()
    backward(model)
    said = [said_of(list(model.parameters()))]
    for block in model.blocks:
        fully_shard(block, mesh=mesh_of(("dp", dist.get_world_size())), reshard_after_forward=False)
    with torch.no_grad():
        model(batch(0)[0])
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    return [*said, said_of(list(model.parameters()))]


def test_unsharded_copies_are_not_taken_for_the_plain_parameters_that_were_there():
    for first, second in run_ranks(copies_in_place_of_plain_ones, 2):
        assert first.startswith("a norm of ")
        assert "is an unsharded copy" in second


def unmanaged_in_place_of_managed(made: str) -> tuple[float, float]:
    """A DTensor made from one that FSDP2 manages, whose placements may be the same object: its gradient is a sum."""
    model = build()
    mesh = mesh_of(("dp", dist.get_world_size()))
    fully_shard(model, mesh=mesh)
    backward(model)
    ps = list(model.parameters())
    clip(ps, ps)
    ps[3] = Parameter({"a copy": ps[3].detach().clone, "zeros": lambda: torch.zeros_like(ps[3])}[made]())
    ps[3].grad = DTensor.from_local(torch.full(ps[3].shape, 1.5), mesh, [Partial()], run_check=False)
    oracle = true_norm(whole_gradients(ps))
    return distclip.clip_grad_norm_(ps, inf).item(), oracle


@pytest.mark.parametrize("made", ["a copy", "zeros"])
def test_a_dtensor_made_from_a_managed_one_is_not_taken_for_it(made):
    left, right = run_ranks(unmanaged_in_place_of_managed, 2, made)
    assert left == right
    assert left[0] == pytest.approx(left[1], rel=2e-7)
    assert left[1] > 3 * 240**0.5  # two terms of 1.5 an element, and more


# ---- one rank's memory is no other rank's business -------------------------------------------------------------


def split(dtype: torch.dtype, scale: float) -> Job:
    """Two stages as plain tensors, of unlike numbers of parameters."""
    mesh = mesh_of(("pp", dist.get_world_size()))
    me = dist.get_rank()
    model = nn.ParameterDict({f"{me}-{i}": Parameter(torch.zeros(4 + i, dtype=dtype)) for i in range(3 - me)})

    def run() -> None:
        for name, p in model.items():
            p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))

    return Job([model], run, lambda: full_gradients(model), {"split_over": [mesh["pp"]]})


def fsdp2(dtype: torch.dtype, scale: float) -> Job:
    model = build(dtype=dtype)
    mesh = mesh_of(("dp", dist.get_world_size()))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Job([model], lambda: backward(model, scale=scale), lambda: full_gradients(model))


def remembered_on_one_rank(layout, kind: str, p: float) -> dict[str, object]:
    """Rank 0 forgets its plans before every call, rank 1 never; gradients move between calls, and are missing once."""
    job = layout(torch.float32, 30.0)
    norms, oracles, collectives, kept = [], [], [], []
    with plans_made() as made:
        for step in range(5):
            for holder in job.parameters():
                kept.append(holder.grad)  # so that the next one lies elsewhere
                holder.grad = None
            job.backward()
            if step == 3:
                for holder in list(job.parameters())[::2]:
                    holder.grad = None
            oracles.append(true_norm(united(job), p))
            handed = job.parts if kind == "modules" else job.parameters()
            bound = oracles[-1] / 3 if step % 2 else inf
            if dist.get_rank() == 0:
                cache.plans.clear()
            with count_collectives() as counts:
                norms.append(distclip.clip_grad_norm_(handed, bound, p, **job.options))
            collectives.append(dict(counts))
    return {"norms": norms, "oracles": oracles, "collectives": collectives, "plans": len(made)}


REMEMBERED = [(fsdp2, 2), (tp_sequence, 2), (split, 2), (by_hand, 4), (by_hand_realigned, 4), (hsdp, 4)]


@pytest.mark.parametrize(
    ("layout", "size", "kind", "p"), crossed(REMEMBERED, product(["tensors", "modules"], [2.0, inf]))
)
def test_a_plan_that_one_rank_alone_remembers_changes_nothing(layout, size, kind, p):
    results = run_ranks(remembered_on_one_rank, size, layout, kind, p)
    first, *others = [r["plans"] for r in results]
    assert first == 5
    assert max(others) <= 2, "modules of an earlier test that are collected meanwhile cost one more"
    assert same_bits([r["norms"] for r in results])
    assert all(r["collectives"] == results[0]["collectives"] for r in results)
    assert all(step["allreduce"] >= 1 for step in results[0]["collectives"])
    for norm, oracle in zip(results[0]["norms"], results[0]["oracles"], strict=True):
        assert norm.item() == pytest.approx(oracle, rel=2e-7)
        assert oracle > 0


# ---- process groups --------------------------------------------------------------------------------------------


def across_jobs() -> list[tuple[float, float, int]]:
    """One process, its process group destroyed and made anew, with and without one in between."""
    ps = parameters(6, 4)
    model = nn.ParameterList(ps)
    seen = []
    for job in range(3):
        if job:
            fill(ps)  # before there is a group
            seen.append((distclip.clip_grad_norm_(model, inf).item(), true_norm(p.grad for p in ps), 0))
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        mesh = mesh_of(("a", 1))
        cut = [Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))]
        cut[0].grad = distribute_tensor(torch.full((4,), 3.0), mesh, [Shard(0)])
        for handed in (model, ps, cut):
            for options in ({}, {"group": dist.group.WORLD}, {"split_over": [dist.group.WORLD]}):
                for _ in range(2):
                    fill(ps)
                    oracle = true_norm(whole_gradients(handed))
                    with count_collectives() as counts:
                        norm = distclip.clip_grad_norm_(handed, inf, **options)
                    talks = int(bool(options) or handed is cut)
                    seen.append((norm.item(), oracle, counts.total() - talks))
        dist.destroy_process_group()
    return seen


def test_a_plan_does_not_outlive_its_process_group():
    (seen,) = run_ranks(across_jobs, 1, fresh=True)
    assert len(seen) == 3 * 18 + 2
    for norm, oracle, odd in seen:
        assert norm == pytest.approx(oracle, rel=2e-7)
        assert odd == 0
