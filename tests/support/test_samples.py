"""Samples: what every run takes, and that nothing is lost."""

import pytest

from support.samples import crossed, most, sample

LETTERS = [pytest.param(letter, id=letter) for letter in "abc"]


def taken(cases) -> list[tuple]:
    return [case.values for case in cases if not case.marks]


def test_a_sample_marks_the_rest():
    assert taken(sample(LETTERS, "b")) == taken(most(LETTERS, "a", "c")) == [("b",)]
    assert [case.id for case in sample(LETTERS, "b")] == ["a", "b", "c"]


@pytest.mark.parametrize("choose", [sample, most])
def test_what_is_not_there_is_no_sample(choose):
    with pytest.raises(AssertionError):
        choose(LETTERS, "d")


def test_each_value_of_each_axis_is_taken():
    cases = crossed([1, 2, 3], [("a", "b"), ("c", "d")])
    assert taken(cases) == [(1, "a", "b"), (2, "c", "d"), (3, "a", "b")]
    assert len(cases) == 6
