"""``svg2::gram``: sums of outer products, head by head of the keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)

gram = torch.ops.svg2.gram


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 7, 64]), st.sampled_from([4, 80]))
def test_it_is_the_sum_over_the_query_heads_of_a_key_head(batch, k_heads, repeats, clusters, dim):
    centroids = torch.randn(batch, k_heads * repeats, clusters, dim, generator=torch.Generator().manual_seed(dim))
    metric = gram(centroids, k_heads)
    exact = torch.zeros(batch, k_heads, dim, dim, dtype=torch.float64)
    for head in range(k_heads * repeats):
        rows = centroids[:, head].double()
        exact[:, head // repeats] += rows.mT @ rows
    # fp32 rounds each of the products and sums
    rounding = repeats * clusters * torch.finfo(torch.float32).eps * centroids.square().amax() * repeats * clusters
    assert (metric - exact).abs().max() <= rounding
    assert metric.is_contiguous() and metric.dtype is torch.float32


def test_autocast_does_not_round_it():
    centroids = torch.randn(1, 2, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gram(centroids, 2), gram(centroids.clone(), 2)) and gram(centroids, 2).dtype is torch.float32


@pytest.mark.parametrize(
    ("centroids", "k_heads", "error", "message"),
    [
        (torch.ones(2, 3, 4), 1, ValueError, "centroids must have 4 axes"),
        (torch.ones(1, 2, 3, 4).half(), 1, TypeError, "centroids must be torch.float32 or torch.float64"),
        (torch.ones(1, 3, 3, 4), 2, ValueError, "heads"),
        (torch.ones(1, 3, 3, 4), 0, ValueError, "k_heads must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(centroids, k_heads, error, message):
    with pytest.raises(error, match=message):
        gram(centroids, k_heads)


def test_opcheck():
    torch.library.opcheck(gram.default, (torch.randn(2, 4, 5, 8), 2))
