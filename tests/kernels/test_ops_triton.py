"""The Triton ops through dispatch, on a GPU, at sizes that the interpreter has no time for."""

import pytest
import torch

from svg2_compile.kernels import ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.kmeans import kmeans_reference
from svg2_compile.kernels.permute import permute_tokens_reference, unpermute_tokens_reference
from svg2_compile.kernels.select_blocks import select_blocks_reference
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.kernels.sort_labels import sort_labels_reference
from svg2_compile.kernels.work_list import kept_keys

svg2 = torch.ops.svg2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
# batch, heads, tokens, head dimension, clusters
SHAPES = [(1, 3, 1000, 64, 16), (2, 2, 4097, 128, 100), (1, 4, 8192, 64, 256), (1, 2, 32760, 128, 1000)]


def clustered_tokens(batch, heads, tokens, dim, dtype):
    """Return tokens around 20 centres, stored as (B, N, H, D)."""
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    centres = torch.randn(20, dim, generator=generator, device="cuda")
    which = torch.randint(20, (batch, tokens, heads), generator=generator, device="cuda")
    noise = torch.randn(batch, tokens, heads, dim, generator=generator, device="cuda")
    return (2 * centres[which] + noise).to(dtype).transpose(1, 2)


def fresh_state(batch, heads, clusters, dim):
    centroids = torch.zeros(batch, heads, clusters, dim, device="cuda")
    return centroids, torch.zeros(1, dtype=torch.int32, device="cuda")


def inertia(x, centroids, labels):
    chosen = centroids.gather(2, labels.long()[..., None].expand(*labels.shape, x.shape[-1]))
    return float((x.float() - chosen).square().sum(-1).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "heads", "tokens", "dim", "clusters"), SHAPES)
def test_clusters_are_as_tight_as_the_reference_and_the_same_twice(batch, heads, tokens, dim, clusters, dtype):
    x = clustered_tokens(batch, heads, tokens, dim, dtype)
    first, second, expected = (fresh_state(batch, heads, clusters, dim) for _ in range(3))
    for _ in range(2):
        labels, again = (svg2.kmeans_(x, *state, 5, 2, 0) for state in (first, second))
        wanted = kmeans_reference(x, *expected, 5, 2, 0)
    assert torch.equal(labels, again)
    assert torch.equal(first[0], second[0])
    # Ties within rounding may fall otherwise and grow from there; the clusters must be as good.
    assert inertia(x, first[0], labels) == pytest.approx(inertia(x, expected[0], wanted), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "heads", "tokens", "dim", "clusters"), SHAPES)
def test_clustering_both_sides_is_as_tight_as_the_reference_and_the_same_twice(
    batch, heads, tokens, dim, clusters, dtype
):
    q, k = (clustered_tokens(batch, each, tokens, dim, dtype) for each in (heads, 1))
    q = q[:, :, : tokens // 2 + clusters]
    # Two numbers say which token a value belongs to; every dtype holds them exactly.
    v = torch.stack([torch.arange(tokens, device="cuda") // 256, torch.arange(tokens, device="cuda") % 256], -1)
    v = torch.nn.functional.pad(v, (0, dim - 2)).to(dtype).expand(batch, 1, tokens, dim)
    first, second, expected = (
        [state for pair in zip(*(fresh_state(batch, n, clusters, dim) for n in (heads, 1))) for state in pair]
        for _ in range(3)
    )
    for _ in range(2):
        outputs, again = (svg2.cluster_tokens_(q, k, v, *state, 5, 2, 0) for state in (first, second))
        expected_labels = [
            kmeans_reference(x, expected[side], expected[side + 2], 5, 2, 0) for side, x in enumerate((q, k))
        ]
    assert all(map(torch.equal, (*outputs, *first), (*again, *second)))
    q_order, q_sizes, k_sizes, k_clustered, v_clustered = outputs
    k_order = (v_clustered[..., 0].long() * 256 + v_clustered[..., 1].long()).int()
    assert torch.equal(k_clustered, permute_tokens_reference(k, k_order))
    for side, (x, order, sizes) in enumerate(((q, q_order, q_sizes), (k, k_order, k_sizes))):
        labels = labels_of(order, sizes)
        # Sorting the labels gives the order back: it is a permutation, and stable.
        assert all(map(torch.equal, (order, sizes), sort_labels_reference(labels, clusters)))
        wanted = inertia(x, expected[side], expected_labels[side])
        assert inertia(x, first[side], labels) == pytest.approx(wanted, rel=0.02)


def labels_of(order, sizes):
    """Return the labels, int32 [B, H, N], that sort to ``order`` with clusters of ``sizes``."""
    clusters = torch.arange(sizes.shape[2], device=sizes.device, dtype=torch.int32)
    rows = [clusters.repeat_interleave(each) for each in sizes.flatten(0, 1)]
    in_order = torch.stack(rows).view(order.shape)
    return torch.empty_like(in_order).scatter_(2, order.long(), in_order)


@pytest.mark.parametrize(("batch", "heads", "tokens", "dim", "clusters"), SHAPES)
def test_sort_permutation_and_selection_equal_the_reference(batch, heads, tokens, dim, clusters):
    x = clustered_tokens(batch, heads, tokens, dim, torch.bfloat16)
    centroids, calls = fresh_state(batch, heads, clusters, dim)
    labels = svg2.kmeans_(x, centroids, calls, 5, 2, 0)
    order, sizes = svg2.sort_labels(labels, clusters)
    for got, wanted in zip((order, sizes), sort_labels_reference(labels, clusters)):
        assert torch.equal(got, wanted)
    permuted = svg2.permute_tokens(x, order)
    assert torch.equal(permuted, permute_tokens_reference(x, order))
    assert torch.equal(svg2.unpermute_tokens(permuted, order), unpermute_tokens_reference(permuted, order))
    statistics = [torch.zeros(batch, heads, clusters, len(STATISTICS), device="cuda") for _ in range(2)]
    arguments = (centroids, centroids, sizes, sizes, dim**-0.5, 0.9, 0.1)
    kept, wanted = (
        kept_keys(*select(*arguments, each), tokens)
        for select, each in zip((svg2.select_blocks, select_blocks_reference), statistics)
    )
    # A cluster may differ where the mass before it is within rounding of top_p.
    assert float((kept != wanted).float().mean()) <= 1e-3
    torch.testing.assert_close(*(each.sum(2) for each in statistics), rtol=1e-3, atol=1e-3)
