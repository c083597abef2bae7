"""``svg2::cluster_tokens_``: clusters queries and keys, and brings keys and values into the order of the clusters."""

from collections.abc import Callable

import torch
from torch import Tensor

from svg2_compile.kernels.card import FAST_DTYPES, MAX_CLUSTERS, MAX_HEAD_DIM, Kernels, Limits, same_dtype
from svg2_compile.kernels.checks import check_dtype, check_rank, check_shape, check_value
from svg2_compile.kernels.kmeans import check_clustering, kmeans_cpu, kmeans_reference
from svg2_compile.kernels.op import define
from svg2_compile.kernels.permute import permute_tokens_cpu, permute_tokens_reference
from svg2_compile.kernels.sort_labels import sort_labels_reference

Clustered = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    q_calls: Tensor,
    k_calls: Tensor,
    iters_init: int,
    iters_step: int,
) -> None:
    """Check the arguments of ``svg2::cluster_tokens_``."""
    check_clustering(q, q_centroids, q_calls, iters_init, iters_step, ("q", "q_centroids", "q_calls"))
    check_clustering(k, k_centroids, k_calls, iters_init, iters_step, ("k", "k_centroids", "k_calls"))
    check_dtype("k", k, q.dtype)
    check_dtype("v", v, q.dtype)
    check_rank("v", v, 4)
    check_shape("v", v, k.shape)
    check_value(
        k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3],
        lambda: f"q and k must agree in batch and head dimension, got shapes {tuple(q.shape)} and {tuple(k.shape)}",
    )


def cluster_tokens_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    q_calls: Tensor,
    k_calls: Tensor,
    iters_init: int,
    iters_step: int,
    seed: int,
) -> Clustered:
    """Cluster queries and keys, sort both by cluster, and permute keys and values.

    Sections 1.1 to 1.4. What these compute together:

        q_labels = kmeans_(q, q_centroids, q_calls);    q_order, q_sizes = sort_labels(q_labels)
        k_labels = kmeans_(k, k_centroids, k_calls);    k_order, k_sizes = sort_labels(k_labels)
        k_clustered = permute_tokens(k, k_order);       v_clustered = permute_tokens(v, k_order)

    Args:
        q: fp16, bf16 or fp32 (fp64 for judging) [B, H, N, D], any strides.
        k: [B, G, N_k, D], dtype of q, any strides; G key heads, as many as there are or not.
        v: [B, G, N_k, D], dtype of q, any strides.
        q_centroids: fp32 (fp64 for fp64 tokens) [B, H, C_q, D], 1 <= C_q <= N; overwritten.
        k_centroids: the same dtype [B, G, C_k, D], 1 <= C_k <= N_k; overwritten.
        q_calls: int32 [1], calls so far for the queries; incremented.
        k_calls: int32 [1], calls so far for the keys; incremented.
        iters_init: iterations of the first call of a side, at least 1.
        iters_step: iterations of every later call, at least 1.
        seed: chooses the starting tokens; any integer.

    Returns:
        q_order: int32 [B, H, N], the query found at each sorted position.
        q_sizes: int32 [B, H, C_q], queries per cluster; sums to N.
        k_sizes: int32 [B, G, C_k], keys per cluster; sums to N_k.
        k_clustered: [B, G, N_k, D], the keys, cluster by cluster.
        v_clustered: [B, G, N_k, D], the values in the same order.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, there are no clusters or more than tokens, or an iteration count is below 1.

    Promises:
        As its parts: deterministic, ties go to the lowest label, tokens of a cluster keep their order, keys and values
        are bitwise copies. Outputs are contiguous and alias nothing. Queries and keys do not influence each other. This
        reference reads the counts of calls on the host, a device synchronisation on CUDA.
    """
    _check(q, k, v, q_centroids, k_centroids, q_calls, k_calls, iters_init, iters_step)
    sides = (q, q_centroids, q_calls), (k, k_centroids, k_calls)
    labels = [kmeans_reference(*side, iters_init, iters_step, seed) for side in sides]
    return _sorted_and_permuted(labels, (q_centroids, k_centroids), k, v, permute_tokens_reference)


def cluster_tokens_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    q_calls: Tensor,
    k_calls: Tensor,
    iters_init: int,
    iters_step: int,
    seed: int,
) -> Clustered:
    """Compute ``cluster_tokens_reference`` from the parts that are made for a CPU."""
    _check(q, k, v, q_centroids, k_centroids, q_calls, k_calls, iters_init, iters_step)
    sides = (q, q_centroids, q_calls), (k, k_centroids, k_calls)
    labels = [kmeans_cpu(*side, iters_init, iters_step, seed) for side in sides]
    return _sorted_and_permuted(labels, (q_centroids, k_centroids), k, v, permute_tokens_cpu)


def _sorted_and_permuted(
    labels: list[Tensor],
    centroids: tuple[Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    permute_tokens: Callable[[Tensor, Tensor], Tensor],
) -> Clustered:
    """Return what the labels of queries and keys make of them."""
    sort = sort_labels_reference
    (q_order, q_sizes), (k_order, k_sizes) = (sort(each, means.shape[2]) for each, means in zip(labels, centroids))
    return q_order, q_sizes, k_sizes, permute_tokens(k, k_order), permute_tokens(v, k_order)


def _empty(q: Tensor, k: Tensor, v: Tensor, q_centroids: Tensor, k_centroids: Tensor) -> Clustered:
    """Return the empty result."""
    return (
        q.new_empty(q.shape[:3], dtype=torch.int32),
        q.new_empty(q_centroids.shape[:3], dtype=torch.int32),
        k.new_empty(k_centroids.shape[:3], dtype=torch.int32),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
    )


define(
    cluster_tokens_reference,
    name="cluster_tokens_",
    part="clustering",
    mutates=("q_centroids", "k_centroids", "q_calls", "k_calls"),
    check=_check,
    fake=_empty,
    cpu=cluster_tokens_cpu,
    kernels=Kernels(
        limits=Limits(FAST_DTYPES, MAX_HEAD_DIM, MAX_CLUSTERS),
        seen=lambda q, q_centroids, k_centroids: (q, q.shape[3], q_centroids.shape[2], k_centroids.shape[2]),
        seen_dtype=same_dtype,
        launch="cluster_tokens_triton:cluster_tokens_triton",
        self_check="self_check:check_cluster_tokens",
        modules=(
            "cluster_tokens_triton",
            "kmeans_triton",
            "assign_triton",
            "assign_gluon",
            "centroids_triton",
            "sort_labels_triton",
        ),
        assigns=True,
    ),
)
