"""``svg2::cluster_tokens_``: what k-means, sorting and permuting make of queries, keys and values, in one op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.cluster_tokens import cluster_tokens_reference
from svg2_compile.kernels.kmeans import kmeans_reference
from svg2_compile.kernels.permute import permute_tokens_reference
from svg2_compile.kernels.sort_labels import sort_labels_reference

ops = torch.ops.svg2
PROPERTY = settings(max_examples=30, deadline=None)
both_implementations = pytest.mark.parametrize(
    "cluster", [ops.cluster_tokens_, cluster_tokens_reference], ids=["op", "reference"]
)


def random_tokens(generator, batch, heads, tokens, dim, dtype=torch.float32):
    """Return tokens [B, H, N, D] around a few centres, stored as (B, N, H, D)."""
    centres = torch.randn(5, dim, generator=generator)
    nearby = torch.randint(0, 5, (batch, tokens, heads), generator=generator)
    x = centres[nearby] + 0.3 * torch.randn(batch, tokens, heads, dim, generator=generator)
    return x.transpose(1, 2).to(dtype)


def fresh_state(q, k, q_clusters, k_clusters):
    """Return centroids of queries and keys that no call may read, and how often each side was clustered."""
    centroids = [
        torch.full(
            (*x.shape[:2], clusters, x.shape[3]), float("nan"), dtype=torch.promote_types(x.dtype, torch.float32)
        )
        for x, clusters in ((q, q_clusters), (k, k_clusters))
    ]
    return [*centroids, *(torch.zeros(1, dtype=torch.int32) for _ in "qk")]


@st.composite
def cases(draw):
    """Queries, keys, values and numbers of clusters; as many keys as queries or not, as many key heads or fewer."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, groups, dim = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([4, 24]))
    heads = groups * draw(st.integers(1, 2))
    lengths = st.sampled_from([1, 15, 63, 64, 65, 200])
    q_tokens, k_tokens = draw(lengths), draw(lengths)
    q = random_tokens(generator, batch, heads, q_tokens, dim)
    k, v = (random_tokens(generator, batch, groups, k_tokens, dim) for _ in "kv")
    if draw(st.booleans()):
        q, k, v = (x.contiguous() for x in (q, k, v))
    clusters = st.sampled_from([1, 3, 15])
    return q, k, v, min(q_tokens, draw(clusters)), min(k_tokens, draw(clusters))


@both_implementations
@PROPERTY
@given(cases(), st.integers(1, 3), st.integers(1, 3), st.integers(-5, 5))
def test_the_result_is_that_of_the_parts_from_start_to_warm_start(cluster, case, iters_init, iters_step, seed):
    q, k, v, q_clusters, k_clusters = case
    iterations = (iters_init, iters_step, seed)
    state, of_parts = (fresh_state(q, k, q_clusters, k_clusters) for _ in range(2))
    for _ in range(2):
        q_order, q_sizes, k_sizes, k_clustered, v_clustered = cluster(q, k, v, *state, *iterations)
        kmeans = kmeans_reference if cluster is cluster_tokens_reference else ops.kmeans_
        q_labels = kmeans(q, of_parts[0], of_parts[2], *iterations)
        k_labels = kmeans(k, of_parts[1], of_parts[3], *iterations)
        assert all(torch.equal(*pair) for pair in zip(state, of_parts))
        assert all(map(torch.equal, (q_order, q_sizes), sort_labels_reference(q_labels, q_clusters)))
        k_order, expected_sizes = sort_labels_reference(k_labels, k_clusters)
        assert torch.equal(k_sizes, expected_sizes)
        assert torch.equal(k_clustered, permute_tokens_reference(k, k_order))
        assert torch.equal(v_clustered, permute_tokens_reference(v, k_order))


@PROPERTY
@given(cases())
def test_centroids_are_the_means_of_the_stretches_of_the_clustered_keys(case):
    q, k, v, q_clusters, k_clusters = case
    state = fresh_state(q, k, q_clusters, k_clusters)
    _, _, k_sizes, k_clustered, _ = ops.cluster_tokens_(q, k, v, *state, 3, 1, 0)
    for b, h in ((b, h) for b in range(k.shape[0]) for h in range(k.shape[1])):
        stretches = k_clustered[b, h].split(k_sizes[b, h].tolist())
        for stretch, centroid in zip(stretches, state[1][b, h]):
            # fp32 rounds each of at most N additions.
            error = k.shape[2] * torch.finfo(torch.float32).eps * float(k.abs().max())
            assert len(stretch) == 0 or (stretch.double().mean(0) - centroid.double()).abs().max() <= error


@PROPERTY
@given(cases())
def test_queries_and_keys_do_not_influence_each_other(case):
    q, k, v, q_clusters, k_clusters = case
    first, second = (fresh_state(q, k, q_clusters, k_clusters) for _ in range(2))
    before = ops.cluster_tokens_(q, k, v, *first, 2, 1, 0)
    after = ops.cluster_tokens_(q + 1, k, v, *second, 2, 1, 0)
    assert all(map(torch.equal, before[2:], after[2:]))
    assert torch.equal(first[1], second[1])
    again = fresh_state(q, k, q_clusters, k_clusters)
    other_keys = ops.cluster_tokens_(q, k * 2, v, *again, 2, 1, 0)
    assert all(map(torch.equal, before[:2], other_keys[:2]))


def test_each_side_counts_its_own_calls():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (random_tokens(generator, 1, 2, 65, 8) for _ in "qkv")
    state = fresh_state(q, k, 3, 5)
    # The keys were clustered before: they start from what they are given, and iterate as a later call does.
    state[3] += 4
    state[1].copy_(k[:, :, :5])
    expected = state[1].clone()
    ops.kmeans_(k, expected, torch.ones(1, dtype=torch.int32), 3, 1, 0)
    ops.cluster_tokens_(q, k, v, *state, 3, 1, 0)
    assert torch.equal(state[1], expected)
    assert [state[2].item(), state[3].item()] == [1, 5]


def test_outputs_are_contiguous_and_alias_nothing():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (random_tokens(generator, 2, 2, 65, 8) for _ in "qkv")
    state = fresh_state(q, k, 3, 5)
    outputs = ops.cluster_tokens_(q, k, v, *state, 2, 1, 0)
    assert all(each.is_contiguous() for each in outputs)
    assert len({each.untyped_storage().data_ptr() for each in (q, k, v, *state, *outputs)}) == 12


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.ones(2, 9, 4)}, ValueError, "q must have 4 axes"),
        ({"q": torch.ones(1, 2, 9, 4).int()}, TypeError, "q must be torch.float16 or .* got torch.int32"),
        ({"k": torch.ones(1, 2, 9, 4).half()}, TypeError, "k must be torch.float32, got torch.float16"),
        ({"v": torch.ones(1, 2, 9, 4).half()}, TypeError, "v must be torch.float32, got torch.float16"),
        ({"v": torch.ones(1, 2, 8, 4)}, ValueError, r"v must have shape \(1, 2, 9, 4\), got \(1, 2, 8, 4\)"),
        ({"q": torch.ones(1, 2, 9, 3), "q_centroids": torch.ones(1, 2, 3, 3)}, ValueError, "agree in batch and head"),
        ({"q_centroids": torch.ones(1, 2, 0, 4)}, ValueError, "q_centroids must hold at least 1 cluster, got 0"),
        ({"k_centroids": torch.ones(1, 2, 10, 4)}, ValueError, "no more clusters than tokens, got 10 and 9"),
        ({"k_centroids": torch.ones(1, 1, 3, 4)}, ValueError, r"k_centroids must have shape \(1, 2, 3, 4\)"),
        ({"k_calls": torch.zeros(2, dtype=torch.int32)}, ValueError, r"k_calls must have shape \(1,\)"),
        ({"iters_step": 0}, ValueError, "iters_init and iters_step must be at least 1, got 1 and 0"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    arguments = {name: torch.ones(1, 2, 9, 4) for name in "qkv"}
    arguments |= {f"{side}_centroids": torch.ones(1, 2, 3, 4) for side in "qk"}
    arguments |= {f"{side}_calls": torch.zeros(1, dtype=torch.int32) for side in "qk"}
    with pytest.raises(error, match=message):
        ops.cluster_tokens_(**(arguments | {"iters_init": 1, "iters_step": 1, "seed": 0} | changes))


def small_case():
    generator = torch.Generator().manual_seed(0)
    q = random_tokens(generator, 2, 4, 65, 8)
    k, v = (random_tokens(generator, 2, 2, 33, 8) for _ in "kv")
    return q, k, v, *(each.nan_to_num() for each in fresh_state(q, k, 5, 7))


def test_opcheck():
    torch.library.opcheck(ops.cluster_tokens_.default, (*small_case(), 2, 1, 0))


def test_compiled_equals_eager_and_the_mutation_is_visible():
    compiled = torch.compile(lambda *args: ops.cluster_tokens_(*args, 3, 2, 0), fullgraph=True)
    (*tokens, q_centroids, k_centroids, q_calls, k_calls), (_, _, _, *expected_state) = small_case(), small_case()
    state = (q_centroids, k_centroids, q_calls, k_calls)
    for _ in range(2):
        assert all(map(torch.equal, compiled(*tokens, *state), ops.cluster_tokens_(*tokens, *expected_state, 3, 2, 0)))
    assert all(map(torch.equal, state, expected_state))
    assert [q_calls.item(), k_calls.item()] == [2, 2]
