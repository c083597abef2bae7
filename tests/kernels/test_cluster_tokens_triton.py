"""``svg2::cluster_tokens_`` in Triton: the reference's clusters, up to ties within rounding, and its permutations."""

import pytest
import torch
from triton_interpreter import DEVICE, assert_passes_under_the_interpreter, runs_kernels, starts_the_interpreter

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.cluster_tokens import cluster_tokens_reference
from svg2_compile.kernels.permute import permute_tokens_reference
from svg2_compile.kernels.sort_labels import sort_labels_reference


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


# Triton's interpreter computes wrong bf16 products.
LOW_PRECISION = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
# Batch, queries, keys, head dimension, query clusters, key clusters.
CASES = [(1, 1, 1, 16, 1, 1), (2, 15, 63, 24, 5, 3), (1, 64, 65, 80, 3, 16), (1, 300, 63, 16, 10, 5)]
CASES += [(1, 65, 300, 16, 1, 20)]


def random_tokens(seed, batch, heads, tokens, dim, dtype):
    """Return tokens [B, H, N, D] around a few centres, stored as (B, N, H, D)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, dim, generator=generator)
    nearby = torch.randint(0, 5, (batch, tokens, heads), generator=generator)
    x = centres[nearby] + 0.3 * torch.randn(batch, tokens, heads, dim, generator=generator)
    return x.transpose(1, 2).to(device=DEVICE, dtype=dtype)


def random_qkv(q_tokens, k_tokens, dim, dtype, batch=1, heads=2, groups=1):
    q = random_tokens(q_tokens, batch, heads, q_tokens, dim, dtype)
    return q, *(random_tokens(k_tokens + seed, batch, groups, k_tokens, dim, dtype) for seed in (1, 2))


def fresh_state(q, k, q_clusters, k_clusters):
    centroids = [
        torch.full((*x.shape[:2], clusters, x.shape[3]), float("nan"), device=DEVICE)
        for x, clusters in ((q, q_clusters), (k, k_clusters))
    ]
    return [*centroids, *(torch.zeros(1, dtype=torch.int32, device=DEVICE) for _ in "qk")]


def cluster_tokens(*arguments):
    from svg2_compile.kernels.cluster_tokens_triton import cluster_tokens_triton

    return cluster_tokens_triton(*arguments)


@runs_kernels
@pytest.mark.parametrize(("batch", "q_tokens", "k_tokens", "dim", "q_clusters", "k_clusters"), CASES)
def test_fp32_equals_the_reference_from_start_to_warm_start(batch, q_tokens, k_tokens, dim, q_clusters, k_clusters):
    tokens = random_qkv(q_tokens, k_tokens, dim, torch.float32, batch)
    state, expected_state = (fresh_state(*tokens[:2], q_clusters, k_clusters) for _ in range(2))
    for _ in range(2):
        outputs = cluster_tokens(*tokens, *state, 2, 1, -4)
        expected = cluster_tokens_reference(*tokens, *expected_state, 2, 1, -4)
        assert all(map(torch.equal, outputs, expected))
        assert all(each.is_contiguous() for each in outputs)
        for means, expected_means in zip(state, expected_state):
            torch.testing.assert_close(means, expected_means, rtol=0, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(("batch", "q_tokens", "k_tokens", "dim", "q_clusters", "k_clusters"), CASES)
def test_what_k_means_alone_returns_is_sorted_and_permuted(
    batch, q_tokens, k_tokens, dim, q_clusters, k_clusters, dtype
):
    from svg2_compile.kernels.kmeans_triton import kmeans_triton

    q, k, v = random_qkv(q_tokens, k_tokens, dim, dtype, batch, heads=1, groups=2)
    state, alone = (fresh_state(q, k, q_clusters, k_clusters) for _ in range(2))
    for _ in range(2):
        q_order, q_sizes, k_sizes, k_clustered, v_clustered = cluster_tokens(q, k, v, *state, 2, 1, 0)
        q_labels, k_labels = (
            kmeans_triton(x, centroids, calls, 2, 1, 0) for x, centroids, calls in zip((q, k), alone, alone[2:])
        )
        for means, expected_means in zip(state, alone):
            # the strides of both sides decide how a compiled kernel lays out its tiles, and that the order of additions
            torch.testing.assert_close(means, expected_means, rtol=0, atol=1e-5)
        assert all(map(torch.equal, (q_order, q_sizes), sort_labels_reference(q_labels, q_clusters)))
        k_order, expected_sizes = sort_labels_reference(k_labels, k_clusters)
        assert torch.equal(k_sizes, expected_sizes)
        assert torch.equal(k_clustered, permute_tokens_reference(k, k_order))
        assert torch.equal(v_clustered, permute_tokens_reference(v, k_order))


@runs_kernels
@pytest.mark.parametrize(("q_calls", "k_calls"), [(0, 1), (1, 0)])
@pytest.mark.parametrize(("iters_init", "iters_step"), [(3, 1), (1, 3)])
def test_the_calls_of_a_side_decide_on_the_device_how_many_of_its_iterations_run(
    q_calls, k_calls, iters_init, iters_step
):
    q, k, v = random_qkv(65, 65, 16, torch.float32)
    state, expected_state = (fresh_state(q, k, 5, 7) for _ in range(2))
    for each in (state, expected_state):
        each[0].copy_(q[:, :, :5])
        each[1].copy_(k[:, :, :7])
        each[2].fill_(q_calls)
        each[3].fill_(k_calls)
    outputs = cluster_tokens(q, k, v, *state, iters_init, iters_step, 0)
    expected = cluster_tokens_reference(q, k, v, *expected_state, iters_init, iters_step, 0)
    assert all(map(torch.equal, outputs, expected))
    assert [state[2].item(), state[3].item()] == [q_calls + 1, k_calls + 1]
    for means, expected_means in zip(state[:2], expected_state):
        torch.testing.assert_close(means, expected_means, rtol=0, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize(("iters_init", "iters_step"), [(4, 2), (1, 3), (5, 1)])
def test_state_that_is_vouched_for_needs_fewer_launches_and_gives_the_same_bits(iters_init, iters_step, monkeypatch):
    from svg2_compile.kernels import clustering
    from svg2_compile.kernels.known_state import known_as_clustered

    tokens = random_qkv(130, 65, 16, torch.float32, heads=1)
    state = fresh_state(*tokens[:2], 5, 7)
    cluster_tokens(*tokens, *state, iters_init, iters_step, 0)
    vouched_for = [each.clone() for each in state]
    expected = cluster_tokens(*tokens, *state, iters_init, iters_step, 0)
    launches = []
    for owner, name in [
        *((clustering.RepeatableLaunch, name) for name in ("first", "again")),
        *((clustering.Clustering, name) for name in ("_start", "_order")),
    ]:
        launch = getattr(owner, name)

        def counted(*arguments, launch=launch, **options):
            launches.append(None)
            return launch(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)
    with known_as_clustered(frozenset(each.data_ptr() for each in vouched_for[2:])):
        outputs = cluster_tokens(*tokens, *vouched_for, iters_init, iters_step, 0)
    assert all(map(torch.equal, outputs, expected)) and all(map(torch.equal, vouched_for, state))
    assert len(launches) == 1 + 5 * iters_step
    launches.clear()
    # one of two is not enough
    with known_as_clustered(frozenset([vouched_for[2].data_ptr()])):
        cluster_tokens(*tokens, *vouched_for, iters_init, iters_step, 0)
    assert len(launches) == 2 + 5 * max(iters_init, iters_step)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_layouts_and_repetition_do_not_change_the_bits(dtype):
    q, k, v = random_qkv(65, 130, 80, dtype, batch=2, heads=1)
    results = []
    for layout in ("given", "given", "contiguous", "fused", "strided rows"):
        state = fresh_state(q, k, 2, 5)
        tokens = q, k, v
        if layout == "contiguous":
            tokens = [x.contiguous() for x in tokens]
        elif layout == "fused":
            tokens = [x.repeat(1, 1, 1, 3).unflatten(-1, (3, -1))[..., 1, :] for x in tokens]
        elif layout == "strided rows":
            tokens = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tokens]
        results.append((*cluster_tokens(*tokens, *state, 1, 1, 0), *state))
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


@runs_kernels
def test_one_giant_cluster_and_many_empty_ones():
    # Everything is in cluster 0, across many tiles; the others keep their centroids and take no tokens.
    q, k = torch.ones(1, 1, 65, 16, device=DEVICE), torch.ones(1, 2, 1000, 16, device=DEVICE)
    v = torch.arange(2000.0, device=DEVICE).view(1, 2, 1000, 1).expand(-1, -1, -1, 16)
    state = fresh_state(q, k, 5, 40)
    for side in (0, 1):
        state[side].fill_(2.0)
        state[side + 2].fill_(1)
    q_order, q_sizes, k_sizes, k_clustered, v_clustered = cluster_tokens(q, k, v, *state, 1, 1, 0)
    assert torch.equal(q_order[0, 0], torch.arange(65, device=DEVICE).int())
    assert q_sizes[0, 0].tolist() == [65, 0, 0, 0, 0]
    assert k_sizes[0, 1].tolist() == [1000] + [0] * 39
    assert torch.equal(k_clustered, k) and torch.equal(v_clustered, v)
    assert state[1][0, 0, :, 0].tolist() == [1.0] + [2.0] * 39


@runs_kernels
def test_strided_state_is_updated_in_place():
    q, k, v = random_qkv(65, 63, 16, torch.float32, groups=2)
    expected = fresh_state(q, k, 5, 7)
    outputs = cluster_tokens(q, k, v, *expected, 2, 1, 0)
    state = fresh_state(q, k, 5, 7)
    state[:2] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in state[:2]]
    assert all(map(torch.equal, outputs, cluster_tokens(q, k, v, *state, 2, 1, 0)))
    assert all(map(torch.equal, state, expected))
