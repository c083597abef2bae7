"""``svg2::kmeans_``: labels are nearest centroids, centroids are means, every run gives the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels import kmeans
from svg2_compile.kernels.kmeans import initial_tokens, kmeans_reference, nearest_neighbour_chain

PROPERTY = settings(max_examples=30, deadline=None)
both_implementations = pytest.mark.parametrize(
    "kmeans_", [torch.ops.svg2.kmeans_, kmeans_reference], ids=["op", "reference"]
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def fresh_state(x, clusters):
    batch, heads, _, dim = x.shape
    return torch.zeros(batch, heads, clusters, dim), torch.zeros(1, dtype=torch.int32)


def cluster(x, clusters, iterations, seed=0, kmeans_=torch.ops.svg2.kmeans_):
    """Return labels and centroids of a first call."""
    centroids, calls = fresh_state(x, clusters)
    return kmeans_(x, centroids, calls, iterations, 1, seed), centroids


def start(x, clusters, seed=0):
    """Return the centroids that a first call starts from."""
    starts = initial_tokens(x.shape[1], x.shape[2], clusters, seed, x.device)
    return x.gather(2, starts.unsqueeze(-1).expand(x.shape[0], -1, -1, x.shape[3])).float()


def continued(x, centroids, iterations, kmeans_=torch.ops.svg2.kmeans_):
    """Return labels and centroids of a later call, which starts from ``centroids`` and orders nothing."""
    centroids = centroids.clone()
    return kmeans_(x, centroids, torch.ones(1, dtype=torch.int32), 1, iterations, 0), centroids


def partition(labels):
    """Return labels as the first token with the same one: equal for the same clusters, whatever their order."""
    return (labels.unsqueeze(-1) == labels.unsqueeze(-2)).int().argmax(-1)


def inertia(x, labels, centroids):
    """Return the sum of squared distances to the assigned centroid, in fp64, per head."""
    assigned = centroids.double().gather(2, labels.long().unsqueeze(-1).expand(x.shape))
    return (x.double() - assigned).square().sum((-1, -2))


@st.composite
def token_cases(draw, dtypes=DTYPES):
    """Tokens [B, H, N, D] around a few centres, contiguous or seen through a transpose, and a number of clusters."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    tokens, dim = draw(st.sampled_from([1, 15, 63, 64, 65, 1000])), draw(st.sampled_from([4, 24, 64]))
    clusters = min(tokens, draw(st.sampled_from([1, 3, 15, 63])))
    centres = torch.randn(5, dim, generator=generator)
    nearby = torch.randint(0, 5, (batch, tokens, heads), generator=generator)
    x = centres[nearby] + 0.3 * torch.randn(batch, tokens, heads, dim, generator=generator)
    x = x.transpose(1, 2).to(draw(st.sampled_from(dtypes)))
    return (x.contiguous() if draw(st.booleans()) else x), clusters


@both_implementations
@PROPERTY
@given(token_cases(), st.integers(1, 4))
def test_labels_are_the_nearest_centroids(kmeans_, case, iterations):
    x, clusters = case
    # Labels of iteration n + 1 are judged against the centroids they were taken from, those of iteration n.
    _, before = cluster(x, clusters, iterations)
    labels, _ = continued(x, before, 1, kmeans_)
    scores = x.double() @ before.double().mT - before.double().square().sum(-1).unsqueeze(-2) / 2
    lost = scores.amax(-1) - scores.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    # fp32 rounds each of the D products and sums of a score; only a tie within that may fall either way.
    size = x.double().norm(dim=-1) * before.double().norm(dim=-1).amax(-1, keepdim=True)
    size = size + before.double().square().sum(-1).amax(-1, keepdim=True)
    assert (lost <= 2 * x.shape[-1] * torch.finfo(torch.float32).eps * size).all()


@both_implementations
@PROPERTY
@given(token_cases(), st.integers(1, 4))
def test_centroids_are_the_means_of_the_returned_labels(kmeans_, case, iterations):
    x, clusters = case
    labels, centroids = cluster(x, clusters, iterations, kmeans_=kmeans_)
    members = torch.nn.functional.one_hot(labels.long(), clusters).double()  # [B, H, N, C]
    sizes = members.sum(-2).unsqueeze(-1)
    means = members.mT @ x.double() / sizes.clamp(min=1)
    error = (centroids.double() - means).abs().masked_fill(sizes == 0, 0)
    assert (error <= x.shape[2] * torch.finfo(torch.float32).eps * x.double().abs().max()).all()


@PROPERTY
@given(token_cases())
def test_inertia_never_rises(case):
    x, clusters = case
    history = torch.stack([inertia(x, *cluster(x, clusters, n)) for n in range(1, 6)])
    rounding = 1e-5 * x.double().square().sum((-1, -2))
    assert (history[1:] <= history[:-1] + rounding).all()


@PROPERTY
@given(token_cases())
def test_same_input_gives_the_same_bits_and_leaves_the_global_generator_alone(case):
    x, clusters = case
    state = torch.random.get_rng_state()
    first, second = cluster(x, clusters, 3), cluster(x, clusters, 3)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(torch.random.get_rng_state(), state)


@PROPERTY
@given(token_cases(dtypes=[torch.float32]))
def test_a_warm_start_continues_where_the_last_call_stopped(case):
    x, clusters = case
    centroids, calls = fresh_state(x, clusters)
    torch.ops.svg2.kmeans_(x, centroids, calls, 2, 3, 0)
    labels = torch.ops.svg2.kmeans_(x, centroids, calls, 2, 3, 0)
    _, expected_centroids = cluster(x, clusters, 2)
    for _ in range(3):
        expected_labels, expected_centroids = continued(x, expected_centroids, 1)
    assert torch.equal(labels, expected_labels)
    assert torch.equal(centroids, expected_centroids)
    assert calls.item() == 2


@both_implementations
@PROPERTY
@given(token_cases(dtypes=[torch.float32]), st.integers(1, 4))
def test_a_first_call_orders_the_centroids_before_its_last_iteration(kmeans_, case, iterations):
    x, clusters = case
    before = start(x, clusters) if iterations == 1 else continued(x, start(x, clusters), iterations - 1, kmeans_)[1]
    ordered = torch.stack([torch.stack([means[nearest_neighbour_chain(means)] for means in each]) for each in before])
    labels, centroids = cluster(x, clusters, iterations, kmeans_=kmeans_)
    expected_labels, expected_centroids = continued(x, ordered, 1, kmeans_)
    assert torch.equal(labels, expected_labels)
    assert torch.equal(centroids, expected_centroids)


@PROPERTY
@given(token_cases(dtypes=[torch.float32]), st.integers(1, 4))
def test_the_order_does_not_change_the_clusters(case, iterations):
    x, clusters = case
    labels, centroids = cluster(x, clusters, iterations)
    plain_labels, plain_centroids = continued(x, start(x, clusters), iterations)
    assert torch.equal(partition(labels), partition(plain_labels))
    rounding = 1e-5 * x.double().square().sum((-1, -2))
    assert ((inertia(x, labels, centroids) - inertia(x, plain_labels, plain_centroids)).abs() <= rounding).all()


@PROPERTY
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 15, 64, 65]), st.integers(1, 3), st.sampled_from([1, 24]))
def test_the_chain_goes_to_the_nearest_centroid_not_yet_visited(seed, clusters, values, dim):
    # Few values: with one dimension, most centroids have duplicates.
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randint(-values, values + 1, (clusters, dim), generator=generator).float()
    order = nearest_neighbour_chain(centroids).tolist()
    assert order[0] == 0
    assert sorted(order) == list(range(clusters))
    for position in range(1, clusters):
        left = sorted(order[position:])
        distances = [(centroids[each] - centroids[order[position - 1]]).square().sum().item() for each in left]
        assert order[position] == left[distances.index(min(distances))]


def test_a_distance_that_is_not_finite_comes_last_and_is_visited_once():
    centroids = torch.tensor([0.0, float("nan"), 3e38, float("inf"), 1.0]).unsqueeze(-1)
    assert nearest_neighbour_chain(centroids).tolist() == [0, 4, 1, 2, 3]


def test_kept_clusters_form_longer_runs_in_the_order_of_the_chain():
    # Tokens on a closed curve, spread over the sequence as a raster spreads an image: neighbours on the curve are far.
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(2000, generator=generator) * 2 * torch.pi
    waves = torch.arange(1, 5)
    curve = torch.cat([(angle[:, None] * waves).cos() / waves, (angle[:, None] * waves).sin() / waves], -1)
    x = curve[None, None]
    runs = [mean_run(nearest_quarter(each)) for each in (cluster(x, 64, 5)[1], continued(x, start(x, 64), 5)[1])]
    assert runs[0] >= 4 * runs[1]


def nearest_quarter(centroids):
    """Return bool [C, C], True where a centroid is among the quarter nearest to another."""
    distances = torch.cdist(centroids[0, 0], centroids[0, 0])
    return distances <= distances.quantile(0.25, dim=-1, keepdim=True)


def mean_run(keep):
    """Return the mean length of the runs of neighbouring kept clusters."""
    starts = keep & ~torch.nn.functional.pad(keep, (1, 0))[..., :-1]
    return (keep.sum() / starts.sum()).item()


@PROPERTY
@given(token_cases())
def test_heads_and_batch_elements_do_not_influence_each_other(case):
    x, clusters = case
    labels, centroids = cluster(x, clusters, 2)
    alone_labels, alone_centroids = cluster(x[-1:, :1].contiguous(), clusters, 2)
    assert torch.equal(labels[-1:, :1], alone_labels)
    assert torch.equal(centroids[-1:, :1], alone_centroids)


@PROPERTY
@given(token_cases(dtypes=[torch.float64]), st.integers(1, 40), st.integers(1, 4))
def test_cosines_in_the_metric_of_a_gram_matrix_are_cosines_between_profiles(case, count, iterations):
    """SVOO's form: every token and centroid is scored by the same rows, and what is compared are these lists."""
    x, clusters = case
    batch, heads, _, dim = x.shape
    rows = torch.randn(batch, heads, count, dim, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    centroids, calls = torch.zeros(batch, heads, clusters, dim, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    kmeans_reference(x, centroids, calls, iterations, 1, 0, rows.mT @ rows)
    before = centroids.clone()
    labels = kmeans_reference(x, centroids, calls, 1, 1, 0, rows.mT @ rows)
    tokens, means = x @ rows.mT, before @ rows.mT
    cosines = normalized(tokens) @ normalized(means).mT
    lost = cosines.amax(-1) - cosines.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    # a short profile is the difference of long ones
    conditions = rows.norm(dim=(-2, -1), keepdim=True).squeeze(-1) * x.norm(dim=-1) / tokens.norm(dim=-1)
    assert (lost <= 1e-10 * conditions.clamp(min=1) ** 2).all()
    members = torch.nn.functional.one_hot(labels.long(), clusters).double()
    sizes = members.sum(-2).unsqueeze(-1)
    assert torch.allclose(centroids, torch.where(sizes > 0, members.mT @ x / sizes.clamp(min=1), before))


def normalized(rows):
    return torch.nn.functional.normalize(rows, dim=-1, eps=1e-300)


def spread_metric(x):
    """Return a metric [B, H, D, D] that stretches some directions a hundredfold."""
    batch, heads, _, dim = x.shape
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randn(batch, heads, 2 * dim, dim, generator=generator) * torch.logspace(0, 1, dim)
    return rows.mT @ rows


@both_implementations
@PROPERTY
@given(token_cases())
def test_in_a_metric_labels_are_the_largest_cosines(kmeans_, case):
    x, clusters = case
    centroids, calls = fresh_state(x, clusters)
    metric = spread_metric(x)
    kmeans_(x, centroids, calls, 2, 1, 0, metric)
    before = centroids.double()
    labels = kmeans_(x, centroids, calls, 2, 1, 0, metric)
    directions = before @ metric.double()
    directions = directions / (directions * before).sum(-1, keepdim=True).sqrt()
    scores = x.double() @ directions.mT
    lost = scores.amax(-1) - scores.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    # fp32 rounds each of the D products and sums of M c, of c . M c and of a score; the metric has a condition of 100
    size = x.double().norm(dim=-1) * directions.norm(dim=-1).amax(-1, keepdim=True)
    assert (lost <= 100 * x.shape[-1] * torch.finfo(torch.float32).eps * size).all()


@both_implementations
def test_in_a_metric_lengths_and_directions_that_it_does_not_see_make_no_difference(kmeans_):
    x = torch.tensor([[1.0, 0, 5], [3, 0.1, -7], [0, 2, 9], [-0.1, 1, -3]]).expand(1, 1, 4, 3)
    centroids = torch.tensor([[1.0, 0, -50], [0, 100, 7], [0, 0, 1]]).expand(1, 1, 3, 3).clone()
    metric = torch.diag(torch.tensor([1.0, 1, 0])).expand(1, 1, 3, 3)
    labels = kmeans_(x, centroids, torch.ones(1, dtype=torch.int32), 1, 1, 0, metric)
    assert labels.flatten().tolist() == [0, 0, 1, 1]
    assert centroids[0, 0, 2].tolist() == [0, 0, 1]


@both_implementations
def test_tiles_do_not_change_the_labels(kmeans_, monkeypatch):
    x = torch.randn(1, 2, 1000, 16)
    labels, _ = cluster(x, 7, 1, kmeans_=kmeans_)
    for name in ("MAX_TILE_SCORES", "CACHED_SCORES"):
        monkeypatch.setattr(kmeans, name, 7 * 64)
    assert torch.equal(cluster(x, 7, 1, kmeans_=kmeans_)[0], labels)


@both_implementations
def test_ties_go_to_the_lowest_label_and_empty_clusters_keep_their_centroid(kmeans_):
    x = torch.ones(1, 1, 15, 4)
    centroids, calls = torch.full((1, 1, 3, 4), 2.0), torch.ones(1, dtype=torch.int32)
    labels = kmeans_(x, centroids, calls, 1, 1, 0)
    assert (labels == 0).all()
    assert centroids[0, 0, :, 0].tolist() == [1.0, 2.0, 2.0]


def test_starting_tokens_are_distinct_in_range_and_depend_on_seed_and_head():
    for tokens, clusters in ((1, 1), (65, 65), (1000, 7), (75600, 1000)):
        starts = initial_tokens(4, tokens, clusters, 3, torch.device("cpu"))
        assert starts.shape == (4, clusters)
        assert (starts.diff(dim=-1) > 0).all()
        assert starts.min() >= 0
        assert starts.max() < tokens
    assert not torch.equal(starts, initial_tokens(4, tokens, clusters, -4, torch.device("cpu")))
    assert not torch.equal(starts[0], starts[1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(1, 2, 9, 4, dtype=torch.int32)}, TypeError, "x must be torch.float16 or .* got torch.int32"),
        ({"x": torch.ones(1, 2, 9, 4, dtype=torch.complex64)}, TypeError, "x must be .* got torch.complex64"),
        ({"x": torch.ones(2, 9, 4)}, ValueError, "x must have 4 axes"),
        ({"centroids": torch.ones(1, 2, 0, 4)}, ValueError, "centroids must hold at least 1 cluster, got 0"),
        ({"centroids": torch.ones(1, 2, 10, 4)}, ValueError, "no more clusters than tokens, got 10 and 9"),
        ({"centroids": torch.ones(1, 1, 3, 4)}, ValueError, r"centroids must have shape \(1, 2, 3, 4\)"),
        ({"centroids": torch.ones(1, 2, 3, 4).half()}, TypeError, "centroids must be torch.float32, got torch.float16"),
        ({"calls": torch.zeros(2, dtype=torch.int32)}, ValueError, r"calls must have shape \(1,\)"),
        ({"iters_init": 0}, ValueError, "iters_init and iters_step must be at least 1, got 0 and 1"),
        ({"iters_step": 0}, ValueError, "iters_init and iters_step must be at least 1, got 1 and 0"),
        ({"metric": torch.ones(1, 2, 4, 3)}, ValueError, r"metric must have shape \(1, 2, 4, 4\)"),
        ({"metric": torch.ones(1, 2, 4, 4).half()}, TypeError, "metric must be torch.float32, got torch.float16"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    arguments = {
        "x": torch.ones(1, 2, 9, 4),
        "centroids": torch.ones(1, 2, 3, 4),
        "calls": torch.zeros(1, dtype=torch.int32),
        "iters_init": 1,
        "iters_step": 1,
        "seed": 0,
    }
    with pytest.raises(error, match=message):
        torch.ops.svg2.kmeans_(**(arguments | changes))


def test_opcheck():
    x = torch.randn(2, 65, 3, 8).transpose(1, 2)
    torch.library.opcheck(torch.ops.svg2.kmeans_.default, (x, *fresh_state(x, 5), 2, 1, 0))
    torch.library.opcheck(torch.ops.svg2.kmeans_.default, (x, *fresh_state(x, 5), 2, 1, 0, spread_metric(x)))


def test_compiled_equals_eager_and_the_mutation_is_visible():
    x = torch.randn(2, 65, 3, 8).transpose(1, 2)
    compiled = torch.compile(lambda *args: torch.ops.svg2.kmeans_(*args, 3, 2, 0), fullgraph=True)
    state, expected_state = fresh_state(x, 5), fresh_state(x, 5)
    for _ in range(2):
        assert torch.equal(compiled(x, *state), torch.ops.svg2.kmeans_(x, *expected_state, 3, 2, 0))
    assert torch.equal(state[0], expected_state[0])
    assert state[1].item() == 2
