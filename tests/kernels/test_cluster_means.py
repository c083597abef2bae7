"""``svg2::cluster_means``: the mean of every cluster, and nothing of any other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from means_cases import by_hand, random_tokens

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)

svg2 = torch.ops.svg2
PROPERTY = settings(max_examples=30, deadline=None)


@PROPERTY
@given(
    st.integers(0, 2**31),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([1, 2, 33]),
    st.sampled_from(["uneven", "half empty", "giant", "singletons"]),
    st.integers(0, 9),
)
def test_means_are_those_of_the_members(seed, dtype, clusters, kind, hidden):
    x, sizes = random_tokens(seed, dtype, hidden=hidden, clusters=clusters, kind=kind)
    means = svg2.cluster_means(x, sizes)
    assert means.dtype == dtype and means.is_contiguous()
    wanted = by_hand(x, sizes)
    # a step of the mean itself, and sums of up to 65 numbers in fp32
    step = torch.finfo(dtype).eps + 65 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(means.double(), wanted, rtol=0, atol=step * x.abs().max().double().item())


def test_a_nan_stays_in_its_cluster_and_hidden_tokens_are_in_none():
    x, sizes = random_tokens()
    wanted = svg2.cluster_means(x, sizes)
    poisoned = x.clone()
    start = int(sizes[0, 0, :4].sum())
    assert sizes[0, 0, 4] > 0
    poisoned[0, 0, start] = math.nan
    poisoned[:, :, -7:] = math.nan
    got = svg2.cluster_means(poisoned, sizes)
    assert got[0, 0, 4].isnan().all()
    got[0, 0, 4] = wanted[0, 0, 4]
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 65)}, ValueError, "x must have 4 axes"),
        ({"x": torch.zeros(2, 3, 65, 8).int()}, TypeError, "x must be .* got torch.int32"),
        ({"sizes": torch.zeros(2, 3).int()}, ValueError, "sizes must have 3 axes"),
        ({"sizes": torch.zeros(1, 3, 9).int()}, ValueError, r"sizes must have shape \(2, 3, 9\)"),
        ({"sizes": torch.zeros(2, 3, 9)}, TypeError, "sizes must be torch.int32, got torch.float32"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    x, sizes = random_tokens()
    with pytest.raises(error, match=message):
        svg2.cluster_means(**({"x": x, "sizes": sizes} | changes))


def test_opcheck():
    torch.library.opcheck(svg2.cluster_means.default, random_tokens())
