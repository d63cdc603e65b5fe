"""Answers and states with a number for each unit: read, checked and named alike on the host and on an accelerator."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor

from distclip import AutoClip, Decision, Statistic, Statistics, Units
from distclip.policies.answer import Numbers, Tensors
from distclip.policies.by_unit import in_order, labelled, orders_of
from distclip.policies.refusals import refusal_of
from distclip.policies.units import Gather, Level, RowNames
from support.accelerator import DEVICE, EXISTS, no_waits, raw, use_accelerator
from support.ranks import run_ranks

APART = Statistic("group", groups={"x": "a", "y": "c"})
OVER = Statistic("group", groups={"x": "a", "all": "*"})
ROWS = RowNames(["a", "b", "c"], [3, 1, 2])


def level(names: Sequence[str], lengths: list[int] | None, unit_of_slot: list[int] | None, device: str) -> Level:
    def ints(numbers):
        return None if numbers is None else torch.tensor(numbers).to(device)

    return Level(names, torch.ones(len(names)).to(device), Gather(None, ints(lengths)), ints(unit_of_slot))


def units(device: str = "cpu") -> Units:
    """Six rows of three parameters."""
    levels = {
        Statistic("row"): level(ROWS, None, [0, 1, 2, 3, 4, 5], device),
        Statistic("parameter"): level(["a", "b", "c"], [3, 1, 2], [0, 0, 0, 1, 2, 2], device),
        APART: Level(
            ["x", "y"],
            torch.ones(2).to(device),
            Gather(torch.tensor([0, 1, 2, 4, 5]).to(device), torch.tensor([3, 2]).to(device)),
            torch.tensor([0, 0, 0, 2, 1, 1]).to(device),
        ),
        OVER: level(["x", "all"], [3, 3], None, device),
    }
    return Units(6.0, levels)


def statistics(squares: Sequence[float] = (1.0, 4.0, 9.0, 16.0, 25.0, 36.0), device: str = "cpu") -> Statistics:
    slots = torch.tensor(squares, dtype=torch.float64).to(device)
    return Statistics(slots.sum().sqrt(), units(device), {"gradient": slots})


@dataclass(frozen=True)
class Mine:
    """A policy, of which only the name and the needs are asked."""

    levels: tuple[Statistic, ...] = ()

    def needs(self):
        return self.levels

    def init(self, units, device):
        raise AssertionError

    decide = init


def by_host(decision: Decision, seen: Statistics, finite: bool = True) -> Numbers:
    answer = Numbers.of(decision, Mine(), seen)
    answer.check(Mine(), seen, finite)
    return answer


def by_device(decision: Decision, seen: Statistics, finite: bool = True) -> Tensors:
    device = seen.norm().device
    known = torch.tensor(finite).to(device)
    with no_waits():
        answer = Tensors.of(decision, Mine(), seen, device)
        fault = answer.fault(seen, known)
    assert (fault.shape, fault.dtype) == ((), torch.float64)
    if raw(fault).item():
        raise refusal_of(raw(fault).item(), Mine(), seen.units)
    return answer


ROADS = {"host": by_host, "device": by_device}
EACH_ROAD = pytest.mark.parametrize("road", ROADS.values(), ids=ROADS)


def of_three(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


GOOD = {
    "one number": (Decision(2.0, per="parameter"), [2.0] * 3, None),
    "an int": (Decision(2, per="parameter", coef=1), [2.0] * 3, [1.0] * 3),
    "one element": (Decision(torch.full((1, 1), 2.0), per="parameter"), [2.0] * 3, None),
    "no bound": (Decision(inf, per="parameter"), [inf] * 3, None),
    "each": (Decision(of_three(1, 2, inf), per="parameter"), [1.0, 2.0, inf], None),
    "half": (Decision(torch.tensor([1, 2, 3], dtype=torch.float16), per="parameter"), [1.0, 2.0, 3.0], None),
    "ints": (Decision(torch.tensor([1, 2, 3]), per=Statistic("parameter")), [1.0, 2.0, 3.0], None),
    "learned": (Decision(torch.nn.Parameter(torch.ones(3)), per="parameter"), [1.0] * 3, None),
    "every second": (Decision(of_three(1, 9, 2, 9, 3, 9)[::2], per="parameter"), [1.0, 2.0, 3.0], None),
    "coefficients": (Decision(1.0, coef=of_three(0.5, 1, 0.25), per="parameter"), [1.0] * 3, [0.5, 1.0, 0.25]),
    "groups": (Decision(torch.tensor([1.0, 2.0]), coef=0.5, per=APART), [1.0, 2.0], [0.5, 0.5]),
    "rows": (Decision(torch.arange(1.0, 7.0), per="row"), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], None),
}


@EACH_ROAD
@pytest.mark.parametrize("name", GOOD)
def test_units_have_numbers_of_their_own_in_memory_of_their_own(name, road):
    decision, bounds, coefs = GOOD[name]
    answer = road(decision, statistics())
    assert answer.per == (Statistic(decision.per) if isinstance(decision.per, str) else decision.per)
    for number, given, wanted in ((answer.max_norm, decision.max_norm, bounds), (answer.coef, decision.coef, coefs)):
        every = [number] * 3 if isinstance(number, float) else None if number is None else number.tolist()
        assert every == wanted
        if isinstance(number, Tensor):
            assert (number.dtype, number.is_contiguous(), number.requires_grad) == (torch.float64, True, False)
            assert not (isinstance(given, Tensor) and given.data_ptr() == number.data_ptr())


@EACH_ROAD
@pytest.mark.parametrize("per", ["model", Statistic()])
def test_the_model_has_one_number_as_ever(per, road):
    answer = road(Decision(torch.tensor([2.0]), coef=0.5, per=per), statistics())
    assert answer.per == Statistic()
    assert (float(answer.max_norm), float(answer.coef)) == (2.0, 0.5)
    assert isinstance(answer.max_norm, float) == (road is by_host)


FAULTS = {  # the field, what the host knows of it, and the unit
    "a bound of NaN": (Decision(of_three(1, nan, 1), per="parameter"), "max_norm", "nan", "b (unit 1 of 3)"),
    "a bound of 0": (Decision(of_three(0, 1, 1), per="parameter"), "max_norm", "0.0", "a (unit 0 of 3)"),
    "the first of two": (Decision(of_three(1, -2, -3), per="parameter"), "max_norm", "-2.0", "b (unit 1 of 3)"),
    "one number for all": (Decision(-1.0, per="parameter"), "max_norm", "-1.0", "a (unit 0 of 3)"),
    "a row": (Decision(torch.tensor([1.0, 1, 1, 1, 1, -inf]), per="row"), "max_norm", "-inf", "c[1] (unit 5 of 6)"),
    "a group": (Decision(of_three(1, nan)[:2], per=APART), "max_norm", "nan", "y (unit 1 of 2)"),
    "a factor of 0": (Decision(1.0, coef=of_three(1, 1, 0), per="parameter"), "coef", "0.0", "c (unit 2 of 3)"),
    "a factor of inf": (Decision(inf, coef=of_three(2, inf, 0), per="parameter"), "coef", "inf", "b (unit 1 of 3)"),
    "a factor of NaN": (Decision(inf, coef=of_three(1, 1, nan), per="parameter"), "coef", "nan", "c (unit 2 of 3)"),
}


@EACH_ROAD
@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_number_is_named_with_its_field_and_its_unit(name, road):
    decision, field, value, unit = FAULTS[name]
    with pytest.raises(ValueError, match="no step was made") as caught:
        road(decision, statistics())
    told = f"{field} = {value} for {unit}" if road is by_host else f"a {field} for {unit} that no step can use"
    kind = "number" if field == "max_norm" else "finite number"
    assert str(caught.value).startswith(f"Mine.decide returned {told}, and no step was made: return a {kind} above 0")


@EACH_ROAD
def test_bounds_of_elements_are_two_numbers_whatever_the_level(road):
    bounds = (torch.tensor(1.0), torch.tensor(2.0))
    with pytest.raises(ValueError, match=r"Mine\.decide returned (a )?bounds .*no step was made: return two numbers"):
        road(Decision(1.0, bounds=bounds, per="parameter"), statistics())
    road(Decision(1.0, bounds=bounds, per="parameter"), statistics(), finite=False)


@EACH_ROAD
@pytest.mark.parametrize("bad", [nan, inf])
def test_of_a_unit_whose_norm_is_not_finite_any_number_will_do_and_of_others_it_will_not(road, bad):
    seen = statistics((1.0, 4.0, 9.0, bad, 25.0, 36.0))
    answer = road(Decision(of_three(1, nan, 1), coef=of_three(1, -1, 1), per="parameter"), seen, finite=False)
    assert answer.per == Statistic("parameter")
    with pytest.raises(ValueError, match=r"max_norm.* for c \(unit 2 of 3\)"):
        road(Decision(of_three(1, nan, -1), per="parameter"), seen, finite=False)


SHAPES = {
    "too few": torch.ones(2),
    "too many": torch.ones(4),
    "a column": torch.ones(3, 1),
    "none": torch.ones(0),
    "sparse": torch.ones(3).to_sparse(),
    "complex": torch.ones(3, dtype=torch.complex64),
    "bools": torch.ones(3, dtype=torch.bool),
    "meta": torch.ones(3, device="meta"),
    "a list": [1.0, 1.0, 1.0],
}


@EACH_ROAD
@pytest.mark.parametrize("field", ["max_norm", "coef"])
@pytest.mark.parametrize("name", SHAPES)
def test_another_shape_is_refused_and_the_right_one_named(name, field, road):
    answer: dict[str, Any] = {"max_norm": 1.0, "per": "parameter", field: SHAPES[name]}
    with pytest.raises(ValueError, match=rf"returned {field} = .* or a tensor of shape \(3,\)"):
        road(Decision(**answer), statistics())


LEVELS = {
    "unknown": "layer",
    "nothing": None,
    "a number": 3,
    "groups without patterns": "group",
    "other groups": Statistic("group", groups={"x": "b"}),
    "of parameters": Statistic("parameter", of="parameter"),
    "the model of parameters": Statistic(of="parameter"),
}


@EACH_ROAD
@pytest.mark.parametrize("name", LEVELS)
def test_a_level_that_is_none_or_was_not_asked_for_is_refused(name, road):
    with pytest.raises(ValueError, match=r"Mine\.decide returned per = .*no step was made: return 'model', or a stat"):
        road(Decision(1.0, per=LEVELS[name]), statistics())


@EACH_ROAD
def test_groups_that_overlap_bound_nothing(road):
    with pytest.raises(ValueError, match=r"Mine\.decide returned per = Statistic.*, whose groups overlap, and no step"):
        road(Decision(1.0, per=OVER), statistics())


@EACH_ROAD
def test_a_level_without_units_has_no_bad_one(road):
    seen = Statistics(torch.ones(()), Units(0.0, {APART: level([], None, [], "cpu")}), {"gradient": torch.ones(0)})
    assert road(Decision(-1.0, coef=torch.ones(0), per=APART), seen).max_norm.shape == (0,)


class Watched(RowNames):
    """Says which names it was asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked: list[Any] = []

    def __getitem__(self, index):
        self.asked.append(index)
        return super().__getitem__(index)


@EACH_ROAD
def test_only_the_unit_that_is_bad_is_looked_up_among_a_million(road):
    names = Watched(["a", "b"], [2**20 - 1, 1])
    row = Statistic("row")
    seen = Statistics(
        torch.ones(()), Units(0.0, {row: level(names, None, [], "cpu")}), {"gradient": torch.ones(2**20).double()}
    )
    bounds = torch.ones(2**20)
    road(Decision(bounds, per="row"), seen)
    assert names.asked == []
    bounds[-1] = nan
    with pytest.raises(ValueError, match=r" for b \(unit 1048575 of 1048576\)"):
        road(Decision(bounds, per="row"), seen)
    assert names.asked == [2**20 - 1]


def on_an_accelerator() -> list[tuple[Any, ...]]:
    """Every good and bad answer in tensors of the device: what is read, or what is said."""
    use_accelerator()
    seen = statistics(device=DEVICE)
    found: list[tuple[Any, ...]] = []
    for decision, *_ in [*GOOD.values(), *FAULTS.values()]:
        here = [n.detach().to(DEVICE) if isinstance(n, Tensor) else n for n in (decision.max_norm, decision.coef)]
        try:
            answer = by_device(Decision(here[0], coef=here[1], per=decision.per), seen)
        except ValueError as error:
            found.append((str(error),))
        else:
            found.append(tuple(None if n is None else raw(n).tolist() for n in (answer.max_norm, answer.coef)))
    return found


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
def test_an_accelerator_finds_the_same_without_a_wait():
    (found,) = run_ranks(on_an_accelerator, 1, fresh=True)
    good, bad = found[: len(GOOD)], found[len(GOOD) :]
    assert good == [(bounds, coefs) for _, bounds, coefs in GOOD.values()]
    for (told,), (_, field, _, unit) in zip(bad, FAULTS.values(), strict=True):
        assert told.startswith(f"Mine.decide returned a {field} for {unit} that no step can use, and no step was made")


# ---- states -------------------------------------------------------------------------------------------------

BOTH = Mine((Statistic("parameter", of="parameter"), Statistic("row")))
OWN = {"parameter": ["a", "b", "c"], "row": ["a", "b", "c"], "rows": [3, 1, 2]}


def test_a_state_says_the_names_of_the_units_that_its_policy_needs():
    assert labelled(BOTH, units()) == {"units": OWN}
    assert labelled(Mine((Statistic("parameter"),)), units()) == {"units": {"parameter": ["a", "b", "c"]}}
    for policy in (AutoClip(), Mine((APART, Statistic()))):  # whatever else is watched
        assert labelled(policy, units()) == {}


class Remembers(Mine):
    """States in which only some dimensions are of units, and others are as long by chance."""

    def init(self, units, device):
        parameters, rows = units.shape("parameter")[0], units.shape("row")[0]
        sizes = {"mean": (parameters,), "rows": (rows, 1), "count": (), "window": (3,), "past": (3, parameters)}
        return {name: torch.zeros(size, device=device) for name, size in sizes.items()}


def test_entries_go_where_their_units_are():
    policy, saved = Remembers(BOTH.levels), {"parameter": ["c", "a", "b"], "row": ["c", "a", "b"], "rows": [2, 3, 1]}
    own = labelled(policy, units())["units"]
    state = {
        "mean": torch.tensor([30.0, 10.0, 20.0]),
        "rows": torch.tensor([[30.0], [31.0], [10.0], [11.0], [12.0], [20.0]]),
        "count": torch.tensor(7),
        "window": torch.arange(3.0),
        "past": torch.tensor([[30.0, 10.0, 20.0]]).repeat(3, 1),
    }
    here = in_order(policy, units(), state, orders_of(saved, own))
    assert here["mean"].tolist() == [10.0, 20.0, 30.0]
    assert here["rows"].tolist() == [[10.0], [11.0], [12.0], [20.0], [30.0], [31.0]]
    assert (here["count"], here["window"].tolist()) == (7, [0.0, 1.0, 2.0])
    assert here["past"].tolist() == [[10.0, 20.0, 30.0]] * 3
    back = in_order(policy, units(), here, orders_of(own, saved))
    assert all(torch.equal(back[name], value) for name, value in state.items())


DAMAGED = {
    "other names": (OWN | {"parameter": ["a", "d", "e", "f", "g"]}, "lacks b, c, and has d, e, f and 1 more that this"),
    "names missing": (OWN | {"parameter": ["a", "b"]}, "lacks c, and has none"),
    "a name twice": (OWN | {"parameter": ["a", "b", "b"]}, "a list of different names"),
    "no names": (OWN | {"parameter": [1, 2, 3]}, "a list of different names"),
    "names of rows": (OWN | {"row": ["a", "b", "d"]}, "lacks c, and has d"),
    "other rows": (OWN | {"rows": [3, 2, 1]}, "has 2 rows of b, not 1"),
    "rows missing": (OWN | {"rows": [3, 2]}, "a list of 3 numbers"),
    "rows in a text": (OWN | {"rows": "321"}, "a list of 3 numbers"),
    "rows below 0": (OWN | {"rows": [3, 1, -2]}, "rows of c must lie between 0"),
    "a half row": (OWN | {"rows": [3, 1, 2.5]}, "rows of c must be a whole number"),
    "a level missing": ({"parameter": ["a", "b", "c"]}, "a dictionary of parameter, row, rows"),
    "nothing": (None, "a dictionary of parameter, row, rows"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_state_of_other_units_is_refused_by_their_names(name):
    given, says = DAMAGED[name]
    with pytest.raises(ValueError, match=says):
        orders_of(given, OWN)


@EACH_ROAD
@pytest.mark.parametrize("field", ["max_norm", "coef"])
def test_numbers_for_units_that_are_not_named_are_told_how_to_name_them(field, road):
    decision = Decision(**{"max_norm": 1.0, field: of_three(1, 1, 1)})
    with pytest.raises(ValueError, match=r"shape \(3,\) .*, or say by per= for which units these are$"):
        road(decision, statistics())
