"""``svg2::block_masses_by_keys``: the attention mass of every block, estimated from its keys and the mean query."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svg2_compile.kernels.card import FAST_DTYPES, MAX_HEAD_DIM, Kernels, Limits, same_dtype
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
from svg2_compile.kernels.sort_labels import sort_labels_reference

if TYPE_CHECKING:
    from svg2_compile.kernels.self_check import Kind

# What one step of the reference may hold at a time.
MAX_SCORES = 2**24
# The self-check: keys of one cluster, keys behind the last one, and how far sums in another order may be off.
MORE_THAN_A_TILE, HIDDEN_KEYS, TOLERANCE = 140, 5, 1e-3


def check_centroids_and_keys(q_centroids: Tensor, k: Tensor, k_sizes: Tensor) -> None:
    """Check mean queries, keys in the order of their clusters, and the sizes of these."""
    check_rank("q_centroids", q_centroids, 4)
    check_rank("k", k, 4)
    check_rank("k_sizes", k_sizes, 3)
    batch, heads, q_clusters, dim = q_centroids.shape
    k_heads, k_clusters = k_sizes.shape[1:]
    check_head_groups(heads, k_heads)
    check_shape("k", k, (batch, k_heads, k.shape[2], dim))
    check_shape("k_sizes", k_sizes, (batch, k_heads, k_clusters))
    check_dtype("k", k, *FLOATING)
    check_dtype("q_centroids", q_centroids, accumulation_dtype(k))
    check_dtype("k_sizes", k_sizes, torch.int32)
    check_value(
        q_clusters >= 1 and k_clusters >= 1,
        lambda: f"there must be at least 1 cluster on either side, got {q_clusters} and {k_clusters}",
    )


def block_masses_by_keys_reference(q_centroids: Tensor, k: Tensor, k_sizes: Tensor, scale: float) -> Tensor:
    """Return the attention mass of every block, that of the mean query over the keys of the cluster.

    Not of the paper, whose equation 1 takes the centroid of the keys in place of them. With scores
    s_it = scale * <q_i, k_t> of query centroid i, rounded to the dtype of k, and key t,
    P_it = exp(s_it) / sum_u exp(s_iu) over the keys u of all clusters, and the mass of block (i, j) is the sum of P_it
    over all keys t of cluster j.

    Args:
        q_centroids: fp32 (fp64 for fp64 keys) [B, H, C_q, D].
        k: fp16, bf16 or fp32 (fp64 for judging) [B, G, N_k, D], any strides, in cluster order; query head h uses key
            head h // (H / G).
        k_sizes: int32 [B, G, C_k], keys per cluster, not all 0; keys behind the last cluster are hidden.
        scale: factor of the attention scores.

    Returns:
        fp32 (fp64 for fp64 keys) [B, H, C_q, C_k], contiguous; rows sum to 1. An empty key cluster has mass 0.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, H is no multiple of G, or there are no clusters.

    Promises:
        Deterministic, no device synchronisation. Hidden keys cannot influence the result, whatever they hold.
    """
    check_centroids_and_keys(q_centroids, k, k_sizes)
    dtype, device = q_centroids.dtype, k.device
    batch, heads, q_clusters = q_centroids.shape[:3]
    keys, k_clusters, repeats = k.shape[2], k_sizes.shape[2], heads // k_sizes.shape[1]
    ends = k_sizes.cumsum(-1)
    masses = torch.zeros((batch, heads, q_clusters, k_clusters), dtype=dtype, device=device)
    columns = max(1, MAX_SCORES // (q_clusters + k_clusters))

    def scores_of(b: int, h: int, position: Tensor) -> Tensor:
        means = q_centroids[b, h].to(k.dtype).to(dtype)
        scores = means @ k[b, h // repeats, position].to(dtype).T * scale
        return scores.masked_fill_(position >= ends[b, h // repeats, -1], -math.inf)

    for b in range(batch):
        for h in range(heads):
            last, first = ends[b, h // repeats], (ends - k_sizes)[b, h // repeats]
            starts = range(0, keys, columns)
            parts = [
                torch.arange(start, min(start + columns, keys), device=device, dtype=torch.int64) for start in starts
            ]
            total = torch.full((q_clusters,), -math.inf, dtype=dtype, device=device)
            for position in parts:
                total = torch.logaddexp(total, scores_of(b, h, position).logsumexp(-1))
            for position in parts:
                members = (first <= position.unsqueeze(-1)) & (position.unsqueeze(-1) < last)
                # Not scattered to the clusters, but a product: it adds in the same order every time.
                masses[b, h] += (scores_of(b, h, position) - total.unsqueeze(-1)).exp() @ members.to(dtype)
    return masses


def check_block_masses_by_keys(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how masses are wrong: of giants, small and empty clusters, with hidden keys that are NaN."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    q_means, k = (
        torch.randn(1, 2, count, kind.dim, generator=generator, dtype=torch.float32, device="cpu")
        for count in (kind.q_clusters, kind.tokens)
    )
    k[:, :, -HIDDEN_KEYS:] = math.nan
    labels = torch.randint(kind.k_clusters, (1, 2, kind.tokens), generator=generator, dtype=torch.int32, device="cpu")
    labels[:, :, :MORE_THAN_A_TILE], labels[:, :, -HIDDEN_KEYS:] = 0, kind.k_clusters
    k_sizes = sort_labels_reference(labels, kind.k_clusters + 1)[1][:, :, :-1].contiguous()
    arguments, scale = (q_means, k.to(kind.dtype), k_sizes), 2 * kind.dim**-0.5
    got = call(*(each.to(kind.device) for each in arguments), scale).cpu()
    wanted = block_masses_by_keys_reference(*arguments, scale)
    error, allowed = (float(each.abs().max()) for each in (got - wanted, TOLERANCE * wanted))
    return None if error <= allowed else f"off by {error:.3g}, at most {allowed:.3g} is rounding"


define(
    block_masses_by_keys_reference,
    name="block_masses_by_keys",
    part="selection",
    check=check_centroids_and_keys,
    fake=lambda q_centroids, k_sizes: q_centroids.new_empty((*q_centroids.shape[:3], k_sizes.shape[2])),
    kernels=Kernels(
        limits=Limits(FAST_DTYPES, MAX_HEAD_DIM),
        seen=lambda q_centroids, k, k_sizes: (k, k.shape[3], q_centroids.shape[2], k_sizes.shape[2]),
        seen_dtype=same_dtype,
        launch="block_masses_by_keys_triton:block_masses_by_keys_triton",
        self_check="block_masses_by_keys:check_block_masses_by_keys",
        modules=("block_masses_by_keys_triton",),
    ),
)
