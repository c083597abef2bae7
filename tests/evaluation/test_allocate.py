"""The allocation of a density: no other one that costs no more has less error, and a larger one takes nothing back."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svg2_compile.calibration.allocate import Place, allocate, lower_hull
from svg2_compile.passes.errors import ConfigError

PROPERTY = settings(max_examples=150, deadline=None)
SLACK = 1e-9


@st.composite
def heads(draw, most=4):
    """Return costs and errors of a few heads with a few candidates, in any shape."""
    numbers = st.integers(0, 40).map(lambda each: each / 8)
    count = draw(st.integers(1, most))
    sizes = [draw(st.integers(1, 4)) for _ in range(count)]
    costs = [[draw(numbers) for _ in range(size)] for size in sizes]
    errors = [[draw(numbers) for _ in range(size)] for size in sizes]
    return costs, errors


@st.composite
def limits(draw, costs):
    least, most = sum(map(min, costs)), sum(map(max, costs))
    return least + draw(st.integers(0, 12)) / 10 * (most - least + 1)


def total(places, values):
    return sum(place.between(of) for place, of in zip(places, values, strict=True))


@PROPERTY
@given(st.data())
def test_no_choice_of_candidates_that_costs_no_more_has_less_error(data):
    costs, errors = data.draw(heads())
    limit = data.draw(limits(costs))
    found = allocate(costs, errors, limit)
    assert total(found, costs) <= limit + SLACK
    for choice in itertools.product(*(range(len(each)) for each in costs)):
        places = [Place(each, each) for each in choice]
        if total(places, costs) <= limit:
            assert total(found, errors) <= total(places, errors) + SLACK


@PROPERTY
@given(st.data())
def test_of_convex_curves_with_equal_steps_it_is_the_best_choice_of_candidates(data):
    count = data.draw(st.integers(1, 3))
    costs = [[0.0, 1.0, 2.0, 3.0]] * count
    steps = st.lists(st.integers(0, 50), min_size=3, max_size=3).map(lambda each: sorted(each, reverse=True))
    errors = [[sum(of[place:]) for place in range(4)] for of in (data.draw(steps) for _ in range(count))]
    limit = float(data.draw(st.integers(0, 3 * count)))
    found = allocate(costs, errors, limit)
    assert all(place.share == 0 for place in found)
    choices = itertools.product(range(4), repeat=count)
    best = min(sum(of[at] for of, at in zip(errors, choice)) for choice in choices if sum(choice) <= limit)
    assert total(found, errors) == best


@PROPERTY
@given(st.data())
def test_a_larger_limit_moves_no_head_back_and_has_no_more_error(data):
    costs, errors = data.draw(heads())
    smaller, larger = sorted([data.draw(limits(costs)), data.draw(limits(costs))])
    before, after = (allocate(costs, errors, each) for each in (smaller, larger))
    for place, other, of in zip(before, after, costs, strict=True):
        assert place.between(of) <= other.between(of) + SLACK
    assert total(after, errors) <= total(before, errors) + SLACK


@PROPERTY
@given(st.data())
def test_one_head_at_most_stands_between_and_what_can_be_spent_is_spent(data):
    costs, errors = data.draw(heads())
    limit = data.draw(limits(costs))
    found = allocate(costs, errors, limit)
    assert sum(place.share > 0 for place in found) <= 1
    assert all(0 <= place.share < 1 for place in found)
    dearest = sum(of[lower_hull(of, wrong)[-1]] for of, wrong in zip(costs, errors))
    assert abs(total(found, costs) - min(limit, dearest)) <= SLACK


@PROPERTY
@given(heads(most=1))
def test_the_hull_is_convex_falls_and_lies_below_every_candidate(case):
    (costs,), (errors,) = case
    hull = lower_hull(costs, errors)
    points = [(costs[each], errors[each]) for each in hull]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert all(slope < 0 for slope in slopes)
    assert all(after >= before - SLACK for before, after in itertools.pairwise(slopes))
    for cost, error in zip(costs, errors):
        for (a, wrong_a), (b, wrong_b) in itertools.pairwise(points):
            if a <= cost <= b:
                assert error >= wrong_a + (wrong_b - wrong_a) * (cost - a) / (b - a) - SLACK
        assert error >= points[-1][1] or cost < points[-1][0]


def test_equal_heads_and_equal_numbers_always_give_the_same():
    costs, errors = [[0.1, 0.5, 0.9]] * 3, [[3.0, 1.0, 0.0]] * 3
    assert allocate(costs, errors, 1.1) == [Place(1, 1), Place(1, 1), Place(0, 0)]


def test_less_than_every_heads_least_is_refused():
    with pytest.raises(ConfigError, match=r"density must be at least 0\.6 here.*got 0\.5; give a larger --density"):
        allocate([[0.2, 1.0]] * 3, [[1.0, 0.0]] * 3, 0.5)
