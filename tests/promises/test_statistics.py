"""Statistics on every layout: norms of groups, parameters and rows, of gradients and values, and what travels for them.

The oracle: norms of whole tensors in float64, as in test_matrix.py.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from math import inf

import pytest
import torch
from torch import Tensor

import distclip
from distclip import Statistic
from support import parallel
from support.oracle import rows_in
from support.parallel import EIGHT, FOUR, THREE, TWO, by_name, whole_values
from support.ranks import run_ranks, same_bits
from support.samples import most, rare
from support.statistics import Recorder, both, expected, lengths, members

P = (1.0, 2.0, 3.0, inf)
LEVELS = {"nothing": 1, "group": 3, "parameter": 5, "row": 8}  # the finest, and how many statistics are seen then
WAYS = tuple(product(P, LEVELS))
SOME = (*product((2.0,), LEVELS), (1.0, "group"), (3.0, "parameter"), (inf, "nothing"), (inf, "row"))
NAMED = [parallel.ep_named if layout is parallel.ep_plain else layout for layout in FOUR]
LAYOUTS = most(
    [
        pytest.param(layout, size, id=f"{layout.__name__}-{size}")
        for size, layouts in ((2, TWO), (3, THREE), (4, NAMED), (8, EIGHT))
        for layout in layouts
    ],
    *("fsdp1_grad_op-2", "fsdp1_grad_op_flat-2", "fsdp1_no_shard_flat-2", "fsdp1_full-4", "fsdp1_full_flat-4"),
    *("fsdp1_hybrid_zero2-4", "fsdp1_copies_flat-4", "pp_fsdp2_tp-8", "by_hand-8", "hsdp_tp_sequence-8"),
)


def groups_of(names: Sequence[str]) -> dict[str, str | list[str]]:
    """All, a group of one, some by a wildcard, and every second: they overlap."""
    return {"all": "*", "one": names[0], "wild": f"{names[-1][:2]}*", "odd": names[1::2]}


def measured(layout, ways: tuple[tuple[float, str], ...]) -> dict[str, object]:
    """What policies see for each p and finest level of these; what travelled; and the whole tensors."""
    job = layout(torch.float32, 30.0)
    job.backward()
    gradients = by_name(twin(layout, job))
    watching = distclip.Clipper(job.parts, inf, watch="parameters", **job.options)
    watched = watching.measure().norms  # misplaced gradients are in place from now on
    names = list(watched)
    group = Statistic("group", groups=groups_of(names))
    parameter, row = Statistic("parameter"), Statistic("row")
    levels = {
        "nothing": (),
        "group": both(group),
        "parameter": both(group, parameter),
        "row": both(Statistic(), group, parameter, row),
    }
    seen, sent, reported = {}, {}, {}
    for p, finest in ways:
        recorder = Recorder(levels[finest])
        clipper = distclip.Clipper(job.parts, recorder, norm_type=p, **job.options)
        with lengths() as sent[p, finest]:
            reported[p, finest] = clipper.measure().norm
        seen[p, finest] = recorder.seen
    flags = 2 * watching.engine.plan.sends_flags
    values = by_name(twin_values(layout, job))
    return {
        "seen": seen,
        "sent": sent,
        "reported": reported,
        "watched": torch.stack(list(watched.values())),
        "names": names,
        "flags": flags,
        "whole": {"gradient": gradients, "parameter": values},
        "exact": job.exact,
    }


def twin(layout, job) -> parallel.Whole:
    """The gradients of the same model with parameters that have names, where flat ones have none."""
    if not is_flat(layout):
        return job.whole()
    other = getattr(parallel, layout.__name__.removesuffix("_flat"))(torch.float32, 30.0)
    other.backward()
    return other.whole()


def twin_values(layout, job) -> parallel.Whole:
    if not is_flat(layout):
        return whole_values(job)
    other = getattr(parallel, layout.__name__.removesuffix("_flat"))(torch.float32, 30.0)
    other.backward()
    return whole_values(other)


def is_flat(layout) -> bool:
    return layout.__name__.endswith("_flat")


# ---- the oracle ---------------------------------------------------------------------------------------------


def unit_of(name: str, names: Sequence[str], interleaved: bool) -> str | None:
    """What the unit of a whole tensor is called: with the number of a stage or an expert before its ``name``."""
    number, _, rest = name.replace(" ", ".").partition(".")
    if interleaved:  # two stages a rank, which are its parts 0 and 1
        return f"{int(number) // 2}.{rest}" if number.isdigit() else f"0.{name}"
    forms = (name, f"{rest}[pp={number}]", f"{rest}[ep={number}]", f"{rest}[{number}]", rest)
    return next((form for form in forms if form in names), None)


def labelled(whole: parallel.Whole, names: Sequence[str], interleaved: bool) -> dict[str, Tensor]:
    """Whole tensors by their units. Those that DDP hides, and which have numbers, in their order."""
    units = {name: unit_of(name, names, interleaved) for name in whole}
    hidden = iter([name for name in names if name not in units.values()])
    found = {unit or next(hidden): whole[name] for name, unit in units.items()}
    assert set(found) <= set(names)
    assert len(found) == len(whole)
    return found


def slots(finest: str, values: Mapping[str, Tensor], names: Sequence[str]) -> int:
    """How many units a message has at the level that travels: of groups, one for parameters in the same ones."""
    if finest == "group":
        chosen = [members([p] if isinstance(p, str) else p, names) for p in groups_of(names).values()]
        return len({tuple(name in group for group in chosen) for name in names})
    return len(names) if finest == "parameter" else sum(len(rows_in(values[name])) for name in names)


def errors(result: dict, layout) -> dict[tuple[str, str, float, str], float]:
    """How far off each statistic is, relative to its oracle: by level, kind, p, and the level that travelled."""
    names, found = result["names"], {}
    whole = {of: labelled(tensors, names, layout is parallel.pp_interleaved) for of, tensors in result["whole"].items()}
    for name, value in whole["parameter"].items():
        whole["gradient"].setdefault(name, torch.zeros_like(value))  # an expert without tokens
    for (p, finest), seen in result["seen"].items():
        for statistic, norms in seen.items():
            oracle = torch.tensor(expected(statistic, whole[statistic.of], names, p), dtype=torch.float64)
            assert norms.numel() == len(oracle)
            apart = (norms.view(-1) - oracle).abs()
            apart = torch.where(apart > 0, apart / (oracle if result["exact"] else oracle.max()), 0)
            found[statistic.per, statistic.of, p, finest] = apart.max().item()
    return found


def ulps(norm: Tensor, other: Tensor) -> int:
    """How many numbers of their dtype they are apart."""
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}[norm.dtype]
    return abs(norm.view(whole).item() - other.view(whole).item())


@pytest.mark.parametrize("ways", [pytest.param(SOME, id="some"), rare(WAYS, id="all")])
@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
def test_norms_of_every_level_are_those_of_whole_tensors(layout, size, ways):
    results = run_ranks(measured, size, layout, ways)
    first = results[0]
    assert same_bits([list(map(repr, r["seen"])) for r in results])
    for key in first["seen"]:
        assert same_bits([list(r["seen"][key].values()) for r in results])
    assert same_bits([first["watched"], first["seen"][2.0, "parameter"][Statistic("parameter")].float()])
    found = errors(first, layout)
    assert len(found) == sum(LEVELS[finest] for _, finest in ways)
    assert not {key: error for key, error in found.items() if not error <= (2e-7 if first["exact"] else 1e-6)}
    whole = labelled(first["whole"]["parameter"], first["names"], layout is parallel.pp_interleaved)
    for (p, finest), norm in first["reported"].items():  # of which the order of additions is not the same
        assert ulps(norm, first["reported"].get((p, "nothing"), norm)) <= 1, (p, finest)
    for (p, finest), sent in first["sent"].items():
        count = 1 if finest == "nothing" else 2 * slots(finest, whole, first["names"])
        assert sent == [count + (2 if p == inf else 1) + first["flags"]], (p, finest)
