"""What is wrong with the units where a Clipper is built is an error on all ranks, and none waits."""

from typing import Any

import pytest
import torch.distributed as dist

import distclip
from distclip import Decision, Statistic
from support import trained
from support.layouts import ddp
from support.ranks import run_ranks


class Needs:
    """A policy that asks for whatever it is made with, and makes whatever state."""

    def __init__(self, needs: Any, init: Any = None) -> None:
        self.asks, self.made = needs, init

    def needs(self):
        return self.asks() if callable(self.asks) else self.asks

    def init(self, units, device):
        return {} if self.made is None else self.made()

    def decide(self, statistics, state):
        return Decision(1.0), state


def _raise(error: Exception) -> Any:
    raise error


PER = (Statistic("parameter"),)
NEEDS: dict[str, tuple[Any, str]] = {
    "nothing": (None, "ValueError: Needs.needs returned None, and no Clipper was made: return a sequence of"),
    "a text": ("parameter", "ValueError: Needs.needs returned 'parameter', and no Clipper was made"),
    "texts": (["parameter"], "ValueError: Needs.needs returned ['parameter'], and no Clipper was made"),
    "a statistic": (Statistic("row"), "ValueError: Needs.needs returned Statistic(per"),
    "a set": ({Statistic("row")}, "ValueError: Needs.needs returned {Statistic(per"),
    "unknown": (lambda: [Statistic("layer")], "ValueError: per must be one of model, group, parameter, row, got"),
    "an error": (lambda: _raise(KeyError("x")), "KeyError: 'x'"),
    "groups of nothing": (
        [Statistic("group", groups={"a": "nowhere.*"})],
        "ValueError: the group 'a' is empty, no parameter matches 'nowhere.*': choose among embed.weight, ",
    ),
}
APART = "ValueError: policy must be the same on every rank: "
INITS: dict[str, tuple[Any, str]] = {
    "no state": (lambda: 3, "ValueError: Needs.init returned 3, and no Clipper was made"),
    "no tensors": (lambda: {"a": 1.0}, "ValueError: Needs.init returned {'a': 1.0}, and no Clipper was made"),
    "an error": (lambda: _raise(IndexError("x")), "IndexError: x"),
}


def built(wrong: dict[str, Any], right: dict[str, Any], ranks: list[int]) -> tuple[str, str]:
    """What a Clipper says that is wrong on some ranks, and then one that is right on all."""
    model, found = ddp(), []
    for kwargs in (wrong if dist.get_rank() in ranks else right, right):
        try:
            found.append(repr(distclip.Clipper(model, **kwargs)))
        except (ValueError, LookupError, TypeError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found[0], found[1]


def policy_of(kind: str, name: str) -> Needs:
    return Needs(NEEDS[name][0]) if kind == "needs" else Needs(PER, INITS[name][0])


def empty() -> dict[str, Any]:
    return {}


def built_with(kind: str, name: str, ranks: list[int]) -> tuple[str, str]:
    right = Needs(PER) if kind == "needs" else Needs(PER, empty)  # which ranks cannot tell from others by its text
    return built({"policy": policy_of(kind, name)}, {"policy": right}, ranks)


CONSTRUCTED = [("needs", name) for name in NEEDS] + [("init", name) for name in INITS]


@pytest.mark.parametrize(("kind", "name"), CONSTRUCTED)
def test_bad_needs_and_states_are_refused_where_the_clipper_is_built(kind, name):
    says = (NEEDS if kind == "needs" else INITS)[name][1]
    for told, after in run_ranks(built_with, 2, kind, name, [0, 1]):
        assert told.startswith(says)
        assert after.startswith("Clipper(")


@pytest.mark.parametrize(("kind", "name"), CONSTRUCTED)
def test_on_one_rank_alone_they_leave_none_waiting(kind, name):
    (told, after), (own, own_after) = run_ranks(built_with, 2, kind, name, [1])
    apart = name == "groups of nothing"  # which the ranks compare as they are given, before they look for them
    says = (NEEDS if kind == "needs" else INITS)[name][1]
    assert told.startswith(APART if apart else "LayoutError: a rank of the clipping group could not make its Clipper; ")
    assert own.startswith(APART if apart else says)
    assert after.startswith("Clipper(")
    assert own_after.startswith("Clipper(")


DIFFER: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "finer": ({"policy": Needs([Statistic("row")])}, {"policy": Needs(PER)}, "policy"),
    "nothing": ({"policy": Needs([])}, {"policy": Needs(PER)}, "policy"),
    "of parameters": ({"policy": Needs([Statistic("parameter", of="parameter")])}, {"policy": Needs(PER)}, "policy"),
    "groups": (
        {"policy": Needs([Statistic("group", groups={"a": "embed*"})])},
        {"policy": Needs([Statistic("group", groups={"a": "head*"})])},
        "policy",
    ),
    "watch": ({"policy": 1.0, "watch": "parameters"}, {"policy": 1.0}, "watch"),
    "watched groups": (
        {"policy": 1.0, "watch": {"a": "embed*"}},
        {"policy": 1.0, "watch": {"b": "embed*"}},
        "watch",
    ),
}


def built_apart(name: str) -> tuple[str, str]:
    return built(*DIFFER[name][:2], [1])


@pytest.mark.parametrize("name", DIFFER)
def test_statistics_that_differ_between_ranks_are_an_error_on_all(name):
    for told, after in run_ranks(built_apart, 2, name):
        assert told.startswith(f"ValueError: {DIFFER[name][2]} must be the same on every rank: build every Clipper ")
        assert after.startswith("Clipper(")


def staged(watch: dict[str, str], by_policy: bool) -> tuple[str, list[str]]:
    """Two pipeline stages: each knows names that the other does not."""
    training = trained.stages()
    policy = Needs([Statistic("group", groups=watch)]) if by_policy else 1.0
    options = training.options | ({} if by_policy else {"watch": watch})
    try:
        clipper = distclip.Clipper(training.parts, policy, **options)
    except ValueError as error:
        return f"{type(error).__name__}: {error}", []
    training.backward(0)
    return "", list(clipper.measure().norms)


@pytest.mark.parametrize("by_policy", [False, True], ids=["watch", "policy"])
def test_groups_of_stages_match_parameters_of_any_rank_or_none(by_policy):
    right = {"first": "embed.*", "last": "head.*", "second": "blocks.1.*"}
    for told, names in run_ranks(staged, 2, right, by_policy):
        assert told == ""
        assert names == ([] if by_policy else list(right))
    for told, _ in run_ranks(staged, 2, right | {"third": "blocks.2.*"}, by_policy):
        assert told.startswith("ValueError: the group 'third' is empty, no parameter matches 'blocks.2.*': choose ")
