"""``svg2::kmeans_``: clusters the tokens of every head, warm-started from the previous call's centroids."""

from collections.abc import Callable

import torch
from torch import Tensor

from svg2_compile.kernels.card import FAST_DTYPES, MAX_CLUSTERS, MAX_HEAD_DIM, Kernels, Limits, same_dtype
from svg2_compile.kernels.checks import FLOATING, accumulation_dtype, check_dtype, check_rank, check_shape, check_value
from svg2_compile.kernels.op import define

# Scores in flight at a time, so that a long sequence never holds its whole N x C matrix.
MAX_TILE_SCORES = 2**24
# Scores that stay in a core's cache between the product that makes them and the argmax that reads them.
CACHED_SCORES = 2**17

LloydStep = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


def check_clustering(
    x: Tensor,
    centroids: Tensor,
    calls: Tensor,
    iters_init: int,
    iters_step: int,
    names: tuple[str, str, str] = ("x", "centroids", "calls"),
) -> None:
    """Check the tokens and the state of one clustering, by the names that the op gives them."""
    x_name, centroids_name, calls_name = names
    check_rank(x_name, x, 4)
    check_rank(centroids_name, centroids, 4)
    check_dtype(x_name, x, *FLOATING)
    check_dtype(centroids_name, centroids, accumulation_dtype(x))
    check_dtype(calls_name, calls, torch.int32)
    batch, heads, tokens, dim = x.shape
    clusters = centroids.shape[2]
    check_shape(centroids_name, centroids, (batch, heads, clusters, dim))
    check_shape(calls_name, calls, (1,))
    check_value(clusters >= 1, lambda: f"{centroids_name} must hold at least 1 cluster, got {clusters}")
    check_value(clusters <= tokens, lambda: f"there must be no more clusters than tokens, got {clusters} and {tokens}")
    check_value(
        iters_init >= 1 and iters_step >= 1,
        lambda: f"iters_init and iters_step must be at least 1, got {iters_init} and {iters_step}",
    )


def _check(
    x: Tensor, centroids: Tensor, calls: Tensor, iters_init: int, iters_step: int, metric: Tensor | None
) -> None:
    """Check the arguments of ``svg2::kmeans_``."""
    check_clustering(x, centroids, calls, iters_init, iters_step)
    if metric is not None:
        check_dtype("metric", metric, centroids.dtype)
        check_shape("metric", metric, (*x.shape[:2], x.shape[3], x.shape[3]))


def kmeans_reference(
    x: Tensor,
    centroids: Tensor,
    calls: Tensor,
    iters_init: int,
    iters_step: int,
    seed: int,
    metric: Tensor | None = None,
) -> Tensor:
    """Run a fixed number of Lloyd iterations on the tokens of every head and return the labels.

    Sections 1.1 and 1.2. Each iteration assigns a_i = argmax_j (x_i . c_j - ||c_j||^2 / 2), the nearest centroid, and
    then moves c_j to the mean of the tokens with a_i = j. The first call (``calls`` is 0) starts from tokens of ``x``,
    one from each of C equal stretches of the sequence; later calls start from ``centroids``.

    Immediately before its last iteration, the first call puts the centroids into the order of
    ``nearest_neighbour_chain``; neighbours in that order are near each other, so kept clusters form long runs. With one
    iteration, the starting tokens are ordered. Later calls keep the order.

    With ``metric`` M, a_i = argmax_j x_i . M c_j / sqrt(c_j . M c_j), the largest cosine in that metric; the rest is
    the same. With M = R^T R, it is the cosine between the profiles R x_i and R c_j: how the rows of R, such as the
    centroids of the queries, score a key and a cluster (SVOO, arXiv 2603.18636, "bidirectional co-clustering"; M is
    its Gram matrix, which makes the profiles themselves needless).

    Args:
        x: fp16, bf16 or fp32 (fp64 for judging) [B, H, N, D], any strides.
        centroids: fp32 (fp64 for fp64 tokens) [B, H, C, D], 1 <= C <= N; overwritten.
        calls: int32 [1], calls so far; incremented.
        iters_init: iterations of the first call, at least 1.
        iters_step: iterations of every later call, at least 1.
        seed: chooses the starting tokens; any integer.
        metric: fp32 (fp64 for fp64 tokens) [B, H, D, D], symmetric and positive semidefinite, or None. A centroid
            whose length in it is zero, or by rounding less, scores 0 with every token.

    Returns:
        int32 [B, H, N], contiguous, values in 0 ... C - 1: the last assignment. ``centroids`` are its means.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, C is 0 or above N, or an iteration count is below 1.

    Promises:
        Deterministic: a function of the arguments only, global generators untouched. Ties go to the lowest label, an
        empty cluster keeps its centroid. Heads and batch elements do not influence each other. This reference reads
        ``calls`` on the host, a device synchronisation on CUDA.
    """
    _check(x, centroids, calls, iters_init, iters_step, metric)
    return _cluster(x, centroids, calls, iters_init, iters_step, seed, metric, _lloyd_iteration)


def kmeans_cpu(
    x: Tensor,
    centroids: Tensor,
    calls: Tensor,
    iters_init: int,
    iters_step: int,
    seed: int,
    metric: Tensor | None = None,
) -> Tensor:
    """Compute ``kmeans_reference`` with tiles that fit a cache and sums over sorted tokens."""
    _check(x, centroids, calls, iters_init, iters_step, metric)
    return _cluster(x, centroids, calls, iters_init, iters_step, seed, metric, _lloyd_iteration_cpu)


def _cluster(
    x: Tensor,
    centroids: Tensor,
    calls: Tensor,
    iters_init: int,
    iters_step: int,
    seed: int,
    metric: Tensor | None,
    lloyd_iteration: LloydStep,
) -> Tensor:
    """Iterate head by head.

    ``lloyd_iteration`` takes tokens, centroids, the metric and labels to write, and returns the means.
    """
    batch, heads, tokens, _ = x.shape
    labels = torch.empty((batch, heads, tokens), dtype=torch.int32, device=x.device)
    is_first_call = int(calls) == 0
    starts = initial_tokens(heads, tokens, centroids.shape[2], seed, x.device) if is_first_call else None
    for b in range(batch):
        for h in range(heads):
            head_tokens = x[b, h].to(centroids.dtype).contiguous()
            means = centroids[b, h] if starts is None else head_tokens[starts[h]]
            for remaining in reversed(range(iters_step if starts is None else iters_init)):
                if starts is not None and remaining == 0:
                    means = means[nearest_neighbour_chain(means)]
                means = lloyd_iteration(head_tokens, means, None if metric is None else metric[b, h], labels[b, h])
            centroids[b, h] = means
    calls.add_(1)
    return labels


def initial_tokens(heads: int, tokens: int, clusters: int, seed: int, device: torch.device) -> Tensor:
    """Return the starting tokens, int64 [H, C]: for every cluster one, drawn from its own stretch of N / C tokens.

    The draw is a hash of (seed, head, cluster), so any device computes the same one without a generator.
    """
    head = torch.arange(heads, device=device, dtype=torch.int64)[:, None]
    cluster = torch.arange(clusters, device=device, dtype=torch.int64)
    start = cluster * tokens // clusters
    length = (cluster + 1) * tokens // clusters - start
    draw = _mix32(_mix32(seed * 0x9E3779B9 % 2**32 + head) + cluster)
    return start + (draw * length >> 32)


def nearest_neighbour_chain(centroids: Tensor) -> Tensor:
    """Return the order of a greedy walk through all centroids: from the first, always to the nearest one left.

    The walk starts at index 0, the centroid of the first stretch of the sequence: a corner of the video, and the only
    choice that needs no arithmetic, so that no device can round its way to another.

    Args:
        centroids: fp32 (fp64 for judging) [C, D].

    Returns:
        int64 [C], a permutation of 0 ... C - 1. Position p holds the index, among those not at 0 ... p - 1, with the
        smallest ||c - c'||^2 to the centroid c' at p - 1, summed from differences in the dtype of ``centroids``.

    Promises:
        Ties go to the lowest index. A distance that is not finite counts as the largest finite one.
    """
    largest = torch.finfo(centroids.dtype).max
    is_left = torch.ones(len(centroids), dtype=torch.bool, device=centroids.device)
    order = [0]
    for _ in range(1, len(centroids)):
        is_left[order[-1]] = False
        distances = (centroids - centroids[order[-1]]).square().sum(-1).nan_to_num(nan=largest, posinf=largest)
        order.append(int(distances.masked_fill(~is_left, float("inf")).argmin()))
    return torch.tensor(order, device=centroids.device, dtype=torch.int64)


def _mix32(x: Tensor) -> Tensor:
    """Return MurmurHash3's 32-bit finaliser of ``x``, held in int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def scored_by(centroids: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return d_j [C, D] and h_j [C]: a token x belongs to the cluster with the largest x . d_j - h_j."""
    if metric is None:
        return centroids, centroids.square().sum(-1) / 2
    directions = centroids @ metric
    squares = (directions * centroids).sum(-1, keepdim=True)
    return torch.where(squares > 0, directions / squares.clamp(min=0).sqrt(), 0), squares.new_zeros(len(centroids))


def _lloyd_iteration(tokens: Tensor, centroids: Tensor, metric: Tensor | None, labels: Tensor) -> Tensor:
    """Write the nearest of ``centroids`` for every token to ``labels`` and return the means of that assignment."""
    clusters = centroids.shape[0]
    cluster = torch.arange(clusters, device=tokens.device, dtype=torch.int64)[:, None]
    directions, offsets = scored_by(centroids, metric)
    sums = torch.zeros_like(centroids)
    sizes = centroids.new_zeros(clusters, 1)
    rows = max(1, MAX_TILE_SCORES // clusters)
    for start in range(0, tokens.shape[0], rows):
        tile = tokens[start : start + rows]
        nearest = torch.addmm(offsets, tile, directions.T, beta=-1).argmax(-1)
        labels[start : start + rows] = nearest
        # A product with the one-hot matrix: unlike scattered additions, the same bits every time on every device.
        members = (nearest == cluster).to(tile.dtype)  # [C, rows]
        sums.addmm_(members, tile)
        sizes += members.sum(-1, keepdim=True)
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)


def _lloyd_iteration_cpu(tokens: Tensor, centroids: Tensor, metric: Tensor | None, labels: Tensor) -> Tensor:
    """Do what ``_lloyd_iteration`` does, in a fraction of the memory traffic."""
    clusters = centroids.shape[0]
    directions, offsets = scored_by(centroids, metric)
    rows = max(1, CACHED_SCORES // clusters)
    for start in range(0, tokens.shape[0], rows):
        scores = torch.addmm(offsets, tokens[start : start + rows], directions.T, beta=-1)
        labels[start : start + rows] = scores.argmax(-1)
    sizes = labels.bincount(minlength=clusters)
    order = labels.sort(stable=True).indices
    means = torch.nn.functional.embedding_bag(order, tokens, sizes.cumsum(0) - sizes, mode="mean")
    return torch.where(sizes[:, None] > 0, means, centroids)


define(
    kmeans_reference,
    name="kmeans_",
    part="clustering",
    mutates=("centroids", "calls"),
    check=_check,
    fake=lambda x: x.new_empty(x.shape[:3], dtype=torch.int32),
    cpu=kmeans_cpu,
    kernels=Kernels(
        limits=Limits(FAST_DTYPES, MAX_HEAD_DIM, MAX_CLUSTERS),
        seen=lambda x, centroids: (x, x.shape[3], centroids.shape[2], centroids.shape[2]),
        seen_dtype=same_dtype,
        launch="kmeans_triton:kmeans_triton",
        self_check="self_check:check_kmeans",
        modules=("kmeans_triton", "assign_triton", "assign_gluon", "centroids_triton", "sort_labels_triton"),
        assigns=True,
    ),
)
