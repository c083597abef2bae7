"""``svg2::kmeans_`` in Triton: the reference's clusters, up to ties within rounding."""

import pytest
import torch
from clustering_cases import check_labels_and_means, continued, fresh_state, random_tokens, run
from triton_interpreter import DEVICE, assert_passes_under_the_interpreter, runs_kernels, starts_the_interpreter

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.kmeans import initial_tokens, kmeans_reference, nearest_neighbour_chain


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


# Triton's interpreter computes wrong bf16 products.
DTYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if DEVICE == "cuda" else [])
CASES = [(1, 1, 64), (15, 5, 16), (63, 16, 80), (64, 5, 128), (257, 1, 24)]


def start(x, clusters):
    """Return the centroids that a first call starts from."""
    starts = initial_tokens(x.shape[1], x.shape[2], clusters, 0, x.device)
    return x.gather(2, starts.unsqueeze(-1).expand(x.shape[0], -1, -1, x.shape[3])).float()


def partition(labels):
    """Return labels as the first token with the same one: equal for the same clusters, whatever their order."""
    return (labels.unsqueeze(-1) == labels.unsqueeze(-2)).int().argmax(-1)


def assert_is_greedy_chain(centroids):
    """Assert that every centroid [C, D] is, but for rounding, the nearest to its predecessor of those that follow."""
    centroids = centroids.double()
    for position in range(1, len(centroids)):
        distances = (centroids[position:] - centroids[position - 1]).square().sum(-1)
        # fp32 rounds each of the D differences, squares and sums, on either side of a comparison.
        assert distances[0] <= (1 + 4 * centroids.shape[1] * torch.finfo(torch.float32).eps) * distances.min()


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "clusters", "dim"), CASES)
def test_labels_are_nearest_and_centroids_are_their_means(tokens, clusters, dim, dtype):
    check_labels_and_means(random_tokens(tokens, dim, dtype), clusters)


@runs_kernels
def test_labels_and_centroids_of_a_longer_sequence():
    # More than one tile of tokens to count and to add up, and of clusters.
    check_labels_and_means(random_tokens(600, 64, torch.float16), 100)


@runs_kernels
@pytest.mark.parametrize(("tokens", "clusters", "dim"), [(65, 3, 16), (257, 2, 80)])
@pytest.mark.parametrize("seed", [-4])
def test_fp32_labels_equal_the_reference_from_start_to_warm_start(tokens, clusters, dim, seed):
    from svg2_compile.kernels.kmeans_triton import kmeans_triton

    x = random_tokens(tokens, dim, torch.float32, batch=2, heads=2)
    state, expected_state = fresh_state(x, clusters), fresh_state(x, clusters)
    for _ in range(2):
        labels = kmeans_triton(x, *state, 2, 1, seed)
        assert torch.equal(labels, kmeans_reference(x, *expected_state, 2, 1, seed))
        torch.testing.assert_close(state[0], expected_state[0], rtol=0, atol=1e-5)
    assert state[1].item() == 2


@runs_kernels
@pytest.mark.parametrize("seed", [0, -7, 2**40 + 3])
def test_the_first_call_starts_from_the_reference_tokens(seed):
    from svg2_compile.kernels.kmeans_triton import kmeans_triton

    tokens, clusters = 65, 20
    # Tokens far from each other: the one that starts a cluster is its own nearest.
    x = torch.zeros(1, 2, tokens, 16, device=DEVICE)
    x[..., 0] = 100.0 * torch.arange(tokens, device=DEVICE)
    centroids, calls = fresh_state(x, clusters)
    labels = kmeans_triton(x, centroids, calls, 1, 1, seed)
    starts = initial_tokens(2, tokens, clusters, seed, x.device)
    assert torch.equal(labels[0].gather(1, starts), torch.arange(clusters, device=DEVICE).expand(2, -1).int())


@runs_kernels
@pytest.mark.parametrize(("iters_init", "iters_step"), [(3, 1), (1, 3), (2, 2)])
def test_calls_decide_on_the_device_how_many_iterations_run(iters_init, iters_step):
    from svg2_compile.kernels.kmeans_triton import kmeans_triton

    x = random_tokens(65, 16, torch.float32)
    centroids, calls = fresh_state(x, 5)
    kmeans_triton(x, centroids, calls, iters_init, iters_step, 0)
    labels = kmeans_triton(x, centroids, calls, iters_init, iters_step, 0)
    _, expected_centroids = run(x, 5, iters_init)
    for _ in range(iters_step):
        expected_labels, expected_centroids = continued(x, expected_centroids, 1)
    assert torch.equal(labels, expected_labels)
    assert torch.equal(centroids, expected_centroids)
    assert torch.equal(partition(labels), partition(run(x, 5, iters_init + iters_step)[0]))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "clusters", "dim", "iterations"), [(257, 15, 24, 1), (64, 20, 80, 2)])
def test_a_first_call_orders_the_centroids_before_its_last_iteration(tokens, clusters, dim, iterations, dtype):
    x = random_tokens(tokens, dim, dtype, heads=2)
    before = start(x, clusters) if iterations == 1 else continued(x, start(x, clusters), iterations - 1)[1]
    labels, centroids = run(x, clusters, iterations)
    plain_labels, plain_centroids = continued(x, before, 1)
    assert torch.equal(partition(labels), partition(plain_labels))
    # Where the clusters went: no cluster is empty, so their tokens tell.
    order = torch.full_like(labels[..., :clusters], -1).scatter_(-1, labels.long(), plain_labels)
    assert torch.equal(order.sort(-1).values, torch.arange(clusters, device=DEVICE).int().expand(order.shape))
    rows = order.long().unsqueeze(-1).expand(centroids.shape)
    torch.testing.assert_close(centroids, plain_centroids.gather(2, rows), rtol=0, atol=1e-5)
    assert (order[..., 0] == 0).all()
    for chain in before.gather(2, rows).flatten(0, 1):
        assert_is_greedy_chain(chain)


@runs_kernels
@pytest.mark.parametrize(("clusters", "dim"), [(1, 16), (65, 24)])
def test_the_ordering_kernel_moves_everything_the_assignment_reads(clusters, dim):
    from svg2_compile.kernels.centroids_triton import MOVE_COLUMNS, WALK_COLUMNS, order_kernel

    # Small integers: distances are exact, so the chain is the reference's; many centroids have duplicates.
    generator = torch.Generator().manual_seed(0)
    centroids = torch.randint(-1, 2, (2, clusters, dim), generator=generator).float()
    centroids[:, clusters // 2 :, 2:] = 0
    centroids[1, 7:9], centroids[1, 20:22] = float("nan"), float("inf")
    rounded, norms = torch.randn(2, 128, 32).half(), torch.randn(2, 128)
    order = torch.arange(128).repeat(2, 1)
    order[:, :clusters] = torch.stack([nearest_neighbour_chain(head) for head in centroids])
    state = [each.clone().to(DEVICE) for each in (centroids, rounded, norms)]
    blocks = {"DIM": dim, "OPERAND_C": 128, "BLOCK_C": 128, "BLOCK_D": 32}
    blocks |= {"WALK_COLUMNS": WALK_COLUMNS, "MOVE_COLUMNS": MOVE_COLUMNS}
    for calls in (1, 0):
        calls_so_far = torch.full((1,), calls, dtype=torch.int32, device=DEVICE)
        means, operand, half_norms = state
        # The first head is one of queries, the second one of keys.
        arguments = (means[:1], means[1:], calls_so_far, calls_so_far, operand, half_norms)
        order_kernel[(1,)](*arguments, 1, 1, 1, clusters, clusters, **blocks)
        expected = (centroids, rounded[:, :, :dim], norms)
        if calls == 0:
            expected = [torch.stack([rows[at[: len(rows)]] for rows, at in zip(each, order)]) for each in expected]
        for moved, one_expected in zip((state[0], state[1][:, :, :dim], state[2]), expected):
            torch.testing.assert_close(moved.cpu(), one_expected, rtol=0, atol=0, equal_nan=True)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "clusters", "dim"), [(63, 5, 80), (65, 20, 16)])
def test_in_a_metric_it_equals_the_reference_from_start_to_warm_start(tokens, clusters, dim, dtype):
    from svg2_compile.kernels.kmeans import kmeans_reference, scored_by
    from svg2_compile.kernels.kmeans_triton import kmeans_triton

    x = random_tokens(tokens, dim, dtype, batch=2, heads=2)
    rows = torch.randn(2, 2, 2 * dim, dim, generator=torch.Generator().manual_seed(dim)).to(DEVICE)
    metric = rows.mT @ rows
    state, expected_state = fresh_state(x, clusters), fresh_state(x, clusters)
    for iterations in (2, 1):
        before = None if iterations == 2 else state[0].clone()
        labels = kmeans_triton(x, *state, iterations, 1, 0, metric)
        expected = kmeans_reference(x, *expected_state, iterations, 1, 0, metric)
        if dtype is torch.float32:
            assert torch.equal(labels, expected)
            torch.testing.assert_close(state[0], expected_state[0], rtol=0, atol=1e-5)
        elif before is not None:
            # nearest by the rounded directions, up to the rounding of those themselves
            for head_x, head_before, head_metric, head_labels in zip(
                *(each.flatten(0, 1) for each in (x, before, metric, labels))
            ):
                directions = scored_by(head_before, head_metric)[0].to(dtype).double()
                scores = head_x.double() @ directions.mT
                lost = scores.amax(-1) - scores.gather(-1, head_labels.long().unsqueeze(-1)).squeeze(-1)
                size = head_x.double().norm(dim=-1) * directions.norm(dim=-1).max()
                assert (lost <= 2 * torch.finfo(dtype).eps * size).all()


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_repetition_do_not_change_the_bits(dtype):
    x = random_tokens(65, 80, dtype, batch=2, heads=2)
    fused = torch.empty(2, 65, 3, 2, 80, dtype=dtype, device=DEVICE)[:, :, 1].transpose(1, 2).copy_(x)
    rows = x.transpose(2, 3).contiguous().transpose(2, 3)
    labels, centroids = run(x, 2, 1)
    for same in (x, x.contiguous(), fused, rows):
        again = run(same, 2, 1)
        assert torch.equal(again[0], labels)
        assert torch.equal(again[1], centroids)


@runs_kernels
@pytest.mark.parametrize("clusters", [3, 40])
def test_ties_go_to_the_lowest_label_and_empty_clusters_keep_their_centroid(clusters):
    from svg2_compile.kernels.kmeans_triton import kmeans_triton

    # One cluster takes all tokens, more than one tile of them.
    x = torch.ones(1, 1, 1000, 16, device=DEVICE)
    centroids = torch.full((1, 1, clusters, 16), 2.0, device=DEVICE)
    labels = kmeans_triton(x, centroids, torch.ones(1, dtype=torch.int32, device=DEVICE), 1, 1, 0)
    assert (labels == 0).all()
    assert centroids[0, 0, :, 0].tolist() == [1.0] + [2.0] * (clusters - 1)


@runs_kernels
def test_ties_between_tiles_and_columns_go_to_the_lowest_label():
    from svg2_compile.kernels.kmeans_triton import kmeans_triton

    # Centroids 3, 40, 67 and 99 are the same nearest one; tiles are 32 or 64 clusters wide.
    x = torch.ones(1, 1, 65, 16, device=DEVICE)
    centroids = torch.full((1, 1, 100, 16), 5.0, device=DEVICE)
    centroids[:, :, [3, 40, 67, 99]] = 1.0
    for dtype in DTYPES:
        calls = torch.ones(1, dtype=torch.int32, device=DEVICE)
        assert (kmeans_triton(x.to(dtype), centroids.clone(), calls, 1, 1, 0) == 3).all()


@runs_kernels
def test_singletons_are_their_own_centroids():
    x = random_tokens(65, 64, torch.float32)
    labels, centroids = run(x, 65, 2)
    assert torch.equal(labels.sort(-1).values, torch.arange(65, device=DEVICE).int().expand(1, 1, 65))
    assert torch.equal(centroids.gather(2, labels.long().unsqueeze(-1).expand(x.shape)), x)
    assert_is_greedy_chain(centroids[0, 0])


@runs_kernels
def test_a_strided_state_is_updated_in_place():
    from svg2_compile.kernels.kmeans_triton import kmeans_triton

    x = random_tokens(65, 16, torch.float32, heads=2)
    expected_labels, expected = run(x, 5, 2)
    centroids = torch.zeros(1, 5, 2, 16, device=DEVICE).transpose(1, 2)
    labels = kmeans_triton(x, centroids, torch.zeros(1, dtype=torch.int32, device=DEVICE), 2, 1, 0)
    assert torch.equal(labels, expected_labels)
    assert torch.equal(centroids, expected)


@runs_kernels
def test_labels_of_not_a_number_are_labels():
    x = torch.full((1, 1, 65, 16), float("nan"), device=DEVICE)
    labels, _ = run(x, 5, 2)
    assert (labels == 0).all()
