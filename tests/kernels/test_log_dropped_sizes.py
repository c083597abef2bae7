"""``svg2::log_dropped_sizes``: the weight of every cluster that is dropped, found again from the runs."""

import math

import pytest
import torch
from attention_cases import block_cases, random_case
from hypothesis import given, settings
from means_cases import dropped_arguments

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)

svg2 = torch.ops.svg2
PROPERTY = settings(max_examples=50, deadline=None)


@PROPERTY
@given(block_cases())
def test_it_is_the_logarithm_of_what_is_dropped(case):
    sizes = case.k_sizes.repeat_interleave(case.q.shape[1] // case.k.shape[1], dim=1).unsqueeze(2)
    wanted = sizes.double().log().expand(case.keep.shape).masked_fill(case.keep, -math.inf)
    got = svg2.log_dropped_sizes(*dropped_arguments(case))
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0)


@PROPERTY
@given(block_cases())
def test_slots_past_the_runs_may_hold_anything(case):
    runs, counts, k_sizes = dropped_arguments(case)
    unused = torch.arange(runs.shape[3]) >= counts[..., :1]
    for anything in ((-1, -1), (0, 2**31 - 1), (0, 1)):
        other = torch.where(unused.unsqueeze(-1), torch.tensor(anything, dtype=torch.int32), runs)
        assert torch.equal(
            svg2.log_dropped_sizes(other, counts, k_sizes), svg2.log_dropped_sizes(*dropped_arguments(case))
        )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"runs": torch.zeros(2, 4, 5, 4).int()}, ValueError, "runs must have 5 axes"),
        ({"runs": torch.zeros(2, 4, 5, 3, 2).int()}, ValueError, r"runs must have shape \(2, 4, 5, 4, 2\)"),
        ({"runs": torch.zeros(2, 3, 5, 4, 2).int()}, ValueError, "multiple of the key/value heads, got 3 and 2"),
        ({"counts": torch.zeros(2, 4, 5, 3).int()}, ValueError, r"counts must have shape \(2, 4, 5, 4\)"),
        ({"k_sizes": torch.zeros(1, 2, 7).int()}, ValueError, r"k_sizes must have shape \(2, 2, 7\)"),
        ({"k_sizes": torch.zeros(2, 2, 7)}, TypeError, "k_sizes must be torch.int32"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    arguments = dict(zip(("runs", "counts", "k_sizes"), dropped_arguments(random_case())))
    with pytest.raises(error, match=message):
        svg2.log_dropped_sizes(**(arguments | changes))


def test_opcheck():
    torch.library.opcheck(svg2.log_dropped_sizes.default, dropped_arguments(random_case()))
