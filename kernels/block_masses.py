"""``svg2::block_masses``: the attention mass of every block, estimated from its queries and the means of the keys."""

import torch
from torch import Tensor

from svg2_compile.kernels.card import FAST_DTYPES, MAX_CLUSTERS, MAX_HEAD_DIM, Kernels, Limits, same_dtype
from svg2_compile.kernels.checks import (
    FLOATING,
    accumulation_dtype,
    check_dtype,
    check_head_groups,
    check_rank,
    check_shape,
    check_value,
)
from svg2_compile.kernels.op import define

# What one step of the reference may hold at a time.
MAX_SCORES = 2**24


def _check(q: Tensor, q_order: Tensor, k_centroids: Tensor, q_sizes: Tensor, k_sizes: Tensor) -> None:
    """Check the arguments of ``svg2::block_masses``."""
    check_rank("q", q, 4)
    check_rank("q_sizes", q_sizes, 3)
    check_rank("k_centroids", k_centroids, 4)
    batch, heads, _, dim = q.shape
    k_heads, k_clusters = k_centroids.shape[1:3]
    check_head_groups(heads, k_heads)
    check_shape("q_order", q_order, q.shape[:3])
    check_shape("k_centroids", k_centroids, (batch, k_heads, k_clusters, dim))
    check_shape("q_sizes", q_sizes, (batch, heads, q_sizes.shape[2]))
    check_shape("k_sizes", k_sizes, (batch, k_heads, k_clusters))
    check_dtype("q", q, *FLOATING)
    check_dtype("k_centroids", k_centroids, accumulation_dtype(q))
    for name, indices in (("q_order", q_order), ("q_sizes", q_sizes), ("k_sizes", k_sizes)):
        check_dtype(name, indices, torch.int32)
    check_value(
        q_sizes.shape[2] >= 1 and k_clusters >= 1,
        lambda: f"there must be at least 1 cluster on either side, got {q_sizes.shape[2]} and {k_clusters}",
    )


def block_masses_reference(
    q: Tensor, q_order: Tensor, k_centroids: Tensor, q_sizes: Tensor, k_sizes: Tensor, scale: float
) -> Tensor:
    """Return the attention mass of every block, a mean over the queries of the cluster.

    Not of the paper, whose equation 1 takes the centroid of the queries in place of them. With scores
    s_tj = scale * <q_t, k_j> of query t and key centroid j, rounded to the dtype of q, and key cluster sizes n_j,
    P_tj = n_j exp(s_tj) / sum_l n_l exp(s_tl), and the mass of block (i, j) is the mean of P_tj over all queries t of
    cluster i.

    Args:
        q: fp16, bf16 or fp32 (fp64 for judging) [B, H, N, D], any strides, in token order.
        q_order: int32 [B, H, N], the query found at each position of the cluster order.
        k_centroids: fp32 (fp64 for fp64 queries) [B, G, C_k, D]; query head h uses key head h // (H / G).
        q_sizes: int32 [B, H, C_q], queries per cluster; sums to N.
        k_sizes: int32 [B, G, C_k], keys per cluster, not all 0.
        scale: factor of the attention scores.

    Returns:
        fp32 (fp64 for fp64 queries) [B, H, C_q, C_k], contiguous; rows sum to 1. An empty key cluster has mass 0; the
        keys of an empty query cluster have the shares of their sizes.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, H is no multiple of G, or there are no clusters.

    Promises:
        Deterministic, no device synchronisation. What the centroid of an empty cluster holds does not matter.
    """
    _check(q, q_order, k_centroids, q_sizes, k_sizes)
    dtype = k_centroids.dtype
    batch, heads, q_clusters = q_sizes.shape
    k_clusters, repeats = k_sizes.shape[2], heads // k_sizes.shape[1]
    tokens = q.shape[2]
    ends = q_sizes.cumsum(-1)
    masses = torch.zeros((batch, heads, q_clusters, k_clusters), dtype=dtype, device=q.device)
    rows = max(1, MAX_SCORES // (q_clusters + k_clusters))
    for b in range(batch):
        for h in range(heads):
            sizes = k_sizes[b, h // repeats]
            means = k_centroids[b, h // repeats].to(q.dtype).to(dtype)
            last, first = ends[b, h, :, None], (ends - q_sizes)[b, h, :, None]
            for start in range(0, tokens, rows):
                position = torch.arange(start, min(start + rows, tokens), device=q.device, dtype=torch.int64)
                queries = q[b, h, q_order[b, h, position].long()].to(dtype)
                scores = queries @ means.T * scale + sizes.to(dtype).log()
                probability = scores.masked_fill_(sizes == 0, float("-inf")).softmax(-1)
                # Not scattered to the clusters, but a product: it adds in the same order every time.
                masses[b, h] += ((first <= position) & (position < last)).to(dtype) @ probability
    masses /= q_sizes.clamp(min=1).unsqueeze(-1)
    shares = (k_sizes.to(dtype) / k_sizes.sum(-1, keepdim=True)).repeat_interleave(repeats, dim=1)
    return torch.where(q_sizes.unsqueeze(-1) > 0, masses, shares.unsqueeze(2))


define(
    block_masses_reference,
    name="block_masses",
    part="selection",
    check=_check,
    fake=lambda k_centroids, q_sizes, k_sizes: k_centroids.new_empty((*q_sizes.shape, k_sizes.shape[2])),
    kernels=Kernels(
        limits=Limits(FAST_DTYPES, MAX_HEAD_DIM, MAX_CLUSTERS),
        seen=lambda q, q_sizes, k_sizes: (q, q.shape[3], q_sizes.shape[2], k_sizes.shape[2]),
        seen_dtype=same_dtype,
        launch="block_masses_triton:block_masses_triton",
        self_check="self_check:check_block_masses",
        # and the tiles of queries, which are on the attention's card
        modules=("block_masses_triton",),
    ),
)
