"""What the demo says of steps that ran side by side, on a quiet machine and on a busy one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svg2_compile.passes.errors import ConfigError
from svg2_compile.video.paired import BUSY_SPREAD, PairedSteps

QUIET = PairedSteps((2.0, 2.02, 2.0, 2.04, 2.0, 2.06), (2.0, 2.0, 1.6, 1.36, 1.25, 1.3), 4)
BUSY = PairedSteps((2.0, 2.1, 2.0, 4.0, 2.0, 2.0), (2.0, 2.1, 1.4, 2.8, 3.0, 1.4), 4)
seconds = st.floats(1e-3, 1e3)


def test_the_gain_is_the_median_of_the_pairs():
    assert QUIET.ratios == pytest.approx((1.25, 1.5, 1.6, 2.06 / 1.3))
    assert QUIET.step_speedup == pytest.approx((1.5 + 2.06 / 1.3) / 2)
    assert QUIET.generation_speedup == pytest.approx(12.12 / 9.51)


def test_a_quiet_machine_is_given_a_figure_and_its_range():
    assert not QUIET.is_busy
    assert QUIET.warning() is None
    assert QUIET.said_of_step() == "1.54× (1.25 to 1.60)"
    assert QUIET.said_of_generation() == "1.27×"


def test_a_busy_machine_is_given_a_range_and_told_why():
    assert BUSY.is_busy
    assert BUSY.dense_spread == pytest.approx(1.0)
    assert BUSY.said_of_step() == "0.7 to 1.4×"
    assert BUSY.said_of_generation() == "about 1.1×"
    warning = BUSY.warning()
    for part in ("The machine is busy", "2.00 to 4.00 s", "a spread of 100 %", "not exact", "run it again"):
        assert part in warning


def test_one_slow_moment_that_hits_a_pair_does_not_move_the_gain():
    """An interruption of both steps of a pair leaves their ratio; of one, it moves one ratio of four."""
    slowed = PairedSteps((2.0, 2.0, 2.0, 6.0, 2.0, 2.0), (2.0, 2.0, 1.3, 3.9, 1.3, 1.3), 4)
    assert slowed.step_speedup == pytest.approx(2.0 / 1.3)
    one = PairedSteps((2.0,) * 6, (2.0, 2.0, 1.3, 1.3, 1.3, 9.0), 4)
    assert one.step_speedup == pytest.approx(2.0 / 1.3)


def test_a_single_sparse_step_has_no_range():
    assert PairedSteps((2.0, 2.0), (2.0, 1.0), 1).said_of_step() == "2.00×"


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=12), st.data())
def test_the_gain_lies_between_the_pairs_and_does_not_depend_on_the_unit(pairs, data):
    count = data.draw(st.integers(1, len(pairs)))
    dense, sparse = zip(*pairs)
    steps = PairedSteps(dense, sparse, count)
    assert min(steps.ratios) <= steps.step_speedup <= max(steps.ratios)
    scaled = PairedSteps(tuple(8 * x for x in dense), tuple(8 * x for x in sparse), count)
    assert scaled.step_speedup == steps.step_speedup
    assert scaled.is_busy == steps.is_busy


@pytest.mark.parametrize(("last", "busy"), [(1 + BUSY_SPREAD - 0.01, False), (1 + BUSY_SPREAD + 0.01, True)])
def test_the_limit_is_the_limit(last, busy):
    assert PairedSteps((1.0, 1.0, 1.0, last), (1.0, 1.0, 0.5, 0.5), 2).is_busy is busy


@pytest.mark.parametrize(
    ("dense", "sparse", "count"), [((1.0,), (1.0, 1.0), 1), ((1.0,), (1.0,), 0), ((1.0,), (1.0,), 2)]
)
def test_steps_that_do_not_pair_are_refused(dense, sparse, count):
    with pytest.raises(ConfigError, match="steps must come in pairs"):
        PairedSteps(dense, sparse, count)
