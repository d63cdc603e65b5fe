"""The same gradients in random layouts: exact norms and coefficients are one number each, the correctly rounded one.

    OMP_NUM_THREADS=1 python tests/fuzz/exact_layouts.py                        # 1050 layouts, a quarter of an hour
    OMP_NUM_THREADS=1 python tests/fuzz/exact_layouts.py --layouts 3 --seed 7   # of each kind of gradients

Of 10 layouts of each kind of gradients, 7 are those of 1 to 8 ranks simulated in this process: what each rank holds is
made by torch on its `fake` process group, and what ranks send is really added up. The others are those of 1 to 4 real
Gloo ranks, with FSDP1 too. Each is measured for p = 1, 2 and inf (complex gradients: 2). Ends with 1 where some norm or
coefficient is not that of the fractions, or ranks or layouts differ by a bit.

Private torch API, 2.13: ``torch.testing._internal.distributed.fake_pg``; FSDP1's ``_shard_param_infos``.
"""

import argparse
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from math import inf, isfinite, isnan, nan, nextafter, prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).parents[1]))

from distclip import Clipper, Layout
from distclip.gradients.storage import in_grad
from distclip.layouts.model import held_in
from distclip.layouts.piece import holders_of
from distclip.plan.build import Plan
from distclip.plan.measure import measure
from distclip.policies.coefficient import clip_coef
from support.older_torch import cut
from support.ranks import run_ranks
from support.simulated import simulate

SHAPES = [(7, 5), (11,), (4, 3, 2), (1, 3), (2,), (37, 13), (1,), (8, 8)]
NARROW = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {**NARROW, "fp64": torch.float64, "complex64": torch.complex64, "mixed": None}
BEYOND = {  # numbers drawn for each element
    "ordinary": lambda chance: chance.gauss(0, 1),
    "1e-45 to 3e38": lambda chance: chance.choice((-1, 1)) * min(10.0 ** chance.uniform(-45, 38.5), 3e38),
    "subnormal": lambda chance: chance.choice((-1, 1)) * 2.0 ** -chance.randint(127, 149),
    "half -0.0": lambda chance: chance.choice((-0.0, chance.gauss(0, 1))),
    "all zero": lambda chance: chance.choice((0.0, -0.0)),
    "one NaN": lambda chance: chance.gauss(0, 1),
    "one inf": lambda chance: chance.gauss(0, 1),
}
WAYS = ("DDP", "FSDP2", "HSDP", "any placements", "stages", "experts")  # simulated
REAL = (*WAYS, "FSDP1", "FSDP1 hybrid")

# ---- gradients, and what they are by fractions --------------------------------------------------------------


def gradients(kind: str, dtype: str, seed: int) -> list[Tensor]:
    """Whole ones, the same for the same arguments."""
    chance = random.Random(f"{kind} {dtype} {seed}")
    found = []
    for k, shape in enumerate(SHAPES):
        own = DTYPES[dtype] or [*NARROW.values(), torch.float64][k % 4]
        numbers = [[BEYOND[kind](chance) for _ in range(prod(shape))] for _ in range(2)]
        real, imaginary = (torch.tensor(each, dtype=torch.float64) for each in numbers)
        most = torch.finfo(own).max
        whole = torch.complex(real, imaginary) if own.is_complex else real
        parts = torch.view_as_real(whole) if own.is_complex else whole
        found.append((parts.clamp_(-most, most), whole)[1].to(own).view(shape))
    if kind.startswith("one"):
        last = found[chance.randrange(len(found))].view(-1)
        last[chance.randrange(len(last))] = nan if kind == "one NaN" else -inf
    return found


def is_nearest(norm: float, wholes: Sequence[Tensor], p: float) -> bool:
    """Whether no float64 number is nearer to the norm, whatever it is that has no end of digits."""
    numbers = [abs(x) for whole in wholes for x in _parts(whole)]
    if any(map(isnan, numbers)) or inf in numbers:
        return isnan(norm) if any(map(isnan, numbers)) else norm == inf
    if p == inf or not any(numbers) or not isfinite(norm):
        return norm == max(numbers)
    total = sum(Fraction(x) ** int(p) for x in numbers)
    below, above = ((Fraction(nextafter(norm, to)) + Fraction(norm)) / 2 for to in (0.0, inf))
    even = Fraction(norm) / Fraction(nextafter(norm, inf) - norm) % 2 == 0
    low, high = below ** int(p), above ** int(p)
    return low < total < high or (even and total in (low, high))


def _parts(whole: Tensor) -> list[float]:
    return (torch.view_as_real(whole) if whole.is_complex() else whole).double().flatten().tolist()


# ---- layouts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One layout on ``size`` ranks: all that is left open is drawn from ``seed``, alike on every rank."""

    way: str
    size: int
    seed: int


@dataclass(frozen=True)
class Placed:
    """What this rank holds, and what its user says of it."""

    parts: list[nn.Module]
    options: dict[str, Any]


def placed(case: Case, wholes: Sequence[Tensor], rank: int) -> Placed:
    chance = random.Random(case.seed)
    named = {f"p{k}": whole for k, whole in enumerate(wholes)}
    if case.way == "stages":
        count = chance.choice(_divisors(case.size))
        mesh = _mesh_of(chance, count, case.size // count)
        owners = {name: chance.randrange(count) for name in named}
        ours = {name: whole for name, whole in named.items() if owners[name] == mesh.get_local_rank(0)}
        placements = {name: _placements(chance, 1, whole) for name, whole in named.items()}
        return Placed([_cut(ours, _axis(mesh, 1), placements)], {"split_over": [_axis(mesh, 0)]})
    if case.way == "experts":
        copies = {name: chance.choice(_divisors(case.size)) for name in named}
        owners = {name: set(chance.sample(range(case.size), copies[name])) for name in named}
        ours = {name: whole for name, whole in named.items() if rank in owners[name]}
        return Placed([_plain(ours)], {"layout": lambda name, p: Layout(copies[name])})
    if case.way == "any placements":
        mesh = _mesh(chance, case.size)
        placements = {name: _placements(chance, mesh.ndim, whole) for name, whole in named.items()}
        return Placed([_cut(named, mesh, placements)], {})
    if case.way == "DDP":
        return Placed([_plain(named)], {})
    return Placed(_fsdp(case, chance, named), {})


def _fsdp(case: Case, chance: random.Random, named: dict[str, Tensor]) -> list[nn.Module]:
    """One unit for each dtype, since a unit has one."""
    parts: list[nn.Module] = []
    replicas = chance.choice(_divisors(case.size))
    for dtype in dict.fromkeys(whole.dtype for whole in named.values()):
        ours = {name: whole for name, whole in named.items() if whole.dtype == dtype}
        two = case.way in ("HSDP", "FSDP1 hybrid")
        mesh = _mesh_of(chance, replicas, case.size // replicas) if two else _mesh_of(chance, case.size)
        if case.way.startswith("FSDP1"):
            parts.append(_fsdp1(ours, mesh))
            continue
        module = fully_shard(_plain(ours), mesh=mesh)
        for (_, p), whole in zip(module.named_parameters(), ours.values(), strict=True):
            p.grad = cut(whole, p.device_mesh, p.placements)
        parts.append(module)
    return parts


def _fsdp1(ours: dict[str, Tensor], mesh: DeviceMesh) -> nn.Module:
    strategy = ShardingStrategy.HYBRID_SHARD if mesh.ndim == 2 else ShardingStrategy.FULL_SHARD
    module = FullyShardedDataParallel(
        _plain(ours), device_mesh=mesh, sharding_strategy=strategy, use_orig_params=True, device_id=torch.device("cpu")
    )
    flat = module._flat_param
    for p, info, whole in zip(flat._params, flat._shard_param_infos, ours.values(), strict=True):
        p.grad = None
        if info.in_shard:
            p.grad = whole.view(-1)[info.intra_param_start_idx : info.intra_param_end_idx + 1].clone().view_as(p)
    return module


def _plain(named: dict[str, Tensor]) -> nn.Module:
    module = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(whole)) for name, whole in named.items()})
    for name, whole in named.items():
        module[name].grad = whole.clone()
    return module


def _cut(named: dict[str, Tensor], mesh: DeviceMesh, placements: dict[str, list[Any]]) -> nn.Module:
    module = nn.ParameterDict()
    for name, whole in named.items():
        to = [torch.zeros_like(whole), whole]
        value, gradient = (cut(each, mesh, placements[name]) for each in to)
        module[name] = nn.Parameter(value)
        module[name].grad = gradient
    return module


def _placements(chance: random.Random, axes: int, whole: Tensor) -> list[Any]:
    return [Shard(chance.randrange(whole.ndim)) if chance.random() < 0.6 else Replicate() for _ in range(axes)]


def _mesh(chance: random.Random, size: int) -> DeviceMesh:
    """Of one to three axes, as many ranks along each as divide what is left."""
    sizes = [chance.choice(_divisors(size))]
    while len(sizes) < 2 and chance.random() < 0.7:
        sizes.append(chance.choice(_divisors(size // prod(sizes))))
    return _mesh_of(chance, *sizes, size // prod(sizes))


def _mesh_of(chance: random.Random, *sizes: int) -> DeviceMesh:
    """Half of them with the ranks in any order.

    Its names are other ones on each rank: torch takes equal meshes for one, also of simulated ranks.
    """
    ranks, names = list(range(prod(sizes))), [f"{axis} of rank {dist.get_rank()}" for axis in "abc"]
    if chance.random() < 0.5:
        chance.shuffle(ranks)
    return DeviceMesh("cpu", torch.tensor(ranks).view(sizes), mesh_dim_names=tuple(names[: len(sizes)]))


def _axis(mesh: DeviceMesh, number: int) -> DeviceMesh:
    return mesh[mesh.mesh_dim_names[number]]


def _divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]


# ---- measuring ----------------------------------------------------------------------------------------------

Found = dict[float, tuple[float, Tensor]]  # by p the float64 norm, and the coefficient


@contextmanager
def fake(rank: int, size: int) -> Iterator[None]:
    """This process as one of ``size`` ranks, of which torch knows the meshes."""
    hook = sys.excepthook  # in which torch wraps it, once for each group
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def simulated(case: Case, wholes: Sequence[Tensor], bounds: dict[float, float]) -> list[Found]:
    """By the plans of all ranks and their messages, as a Clipper makes them."""

    def use(group: Any) -> Found:
        with fake(group.rank, group.size):
            where = placed(case, wholes, group.rank)
            listed, found = held_in(where.parts), {}
            gradients = in_grad(holders_of(listed)).read()
            for p, bound in bounds.items():
                plan = Plan.of(listed, p, group, where.options.get("split_over", ()), where.options.get("layout"))
                all_of_it = measure(plan.exactly(), gradients)
                norm, disagree, _ = all_of_it.reduced.read()
                assert not disagree
                found[p] = norm, clip_coef(norm, bound, all_of_it.dtype)
            return found

    ends = simulate(use, case.size, collectives=len(bounds))
    failed = [end for end in ends if isinstance(end, Exception)]
    if failed:
        raise failed[0]
    return ends


def on_real_ranks(cases: Sequence[Case], of: tuple[str, str, int], bounds: dict[float, float]) -> list[Found]:
    wholes, found = gradients(*of), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases:
            where = placed(case, wholes, dist.get_rank())
            outcomes = {
                p: Clipper(where.parts, bound, norm_type=p, exact=True, **where.options).engine.decide()
                for p, bound in bounds.items()
            }
            found.append({p: (float(outcome.norm), outcome.report.coef) for p, outcome in outcomes.items()})
    return found


# ---- all of them --------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What was found of one kind of gradients.

    ``distinct``: how many rows of norms and coefficients, one for each p, all ranks of all layouts have.
    """

    layouts: int
    norms: int
    distinct: int
    right: bool


def look_at(kind: str, dtype: str, layouts: int, seed: int) -> Row:
    chance, of = random.Random(f"{kind} {dtype} {seed}"), (kind, dtype, seed)
    wholes, few = gradients(*of), layouts - layouts * 7 // 10
    norms = simulated(
        Case("DDP", 1, 0), wholes, dict.fromkeys((2.0,) if dtype == "complex64" else (1.0, 2.0, inf), 1.0)
    )
    bounds = {p: norm / 3 if isfinite(norm) and norm > 1e-30 else 1.0 for p, (norm, _) in norms[0].items()}
    found = []
    for k in range(layouts - few):
        found += simulated(Case(WAYS[k % len(WAYS)], chance.randint(1, 8), chance.randrange(1 << 32)), wholes, bounds)
    ways = WAYS if dtype == "complex64" else REAL  # FSDP1 takes none
    for size in range(1, 5):
        cases = [Case(chance.choice(ways), size, chance.randrange(1 << 32)) for _ in range(size - 1, few, 4)]
        found += [each for rank in run_ranks(on_real_ranks, size, cases, of, bounds) for each in rank]
    right = all(is_nearest(norm, wholes, p) for p, (norm, _) in found[0].items())
    right &= all(is_coefficient(*each, bounds[p]) for p, each in found[0].items())
    return Row(layouts, len(found) * len(bounds), len(set(map(repr, map(_bits, found)))), right)


def _bits(found: Found) -> list[Any]:
    """A norm that is not finite has no coefficient: its step is skipped."""
    return [(p, norm.hex(), isfinite(norm) and (c.dtype, c.item().hex())) for p, (norm, c) in found.items()]


def is_coefficient(norm: float, coef: Tensor, bound: float) -> bool:
    return isnan(norm) or torch.equal(coef, torch.scalar_tensor(min(1.0, bound / (norm + 1e-6)), dtype=coef.dtype))


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", type=int, default=25, help="of each kind and dtype")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(words)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(
        "| gradients | dtype | layouts | norms | distinct | as fractions say |", "|---|---|---|---|---|---|", sep="\n"
    )
    wrong = 0
    for kind in BEYOND:
        for dtype in DTYPES:
            row = look_at(kind, dtype, chosen.layouts, chosen.seed)
            wrong += row.distinct != 1 or not row.right
            cells = kind, dtype, row.layouts, row.norms, row.distinct, "yes" if row.right else "NO"
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
