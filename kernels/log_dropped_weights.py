"""``svg2::log_dropped_weights``: what the keys of each dropped cluster weigh for a mean query, beside their mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svg2_compile.kernels.block_masses_by_keys import check_centroids_and_keys
from svg2_compile.kernels.card import FAST_DTYPES, MAX_HEAD_DIM, Kernels, Limits, same_dtype
from svg2_compile.kernels.checks import check_dtype, check_shape
from svg2_compile.kernels.cluster_means import cluster_means_reference
from svg2_compile.kernels.op import define
from svg2_compile.kernels.sort_labels import sort_labels_reference

if TYPE_CHECKING:
    from svg2_compile.kernels.self_check import Kind

# What one step of the reference may hold at a time.
MAX_SCORES = 2**24
# The self-check: keys of one cluster, keys behind the last one, and how far sums in another order may be off.
MORE_THAN_A_TILE, HIDDEN_KEYS, TOLERANCE = 140, 5, 1e-3


def _check(log_sizes: Tensor, q_centroids: Tensor, k: Tensor, k_means: Tensor, k_sizes: Tensor) -> None:
    """Check the arguments of ``svg2::log_dropped_weights``."""
    check_centroids_and_keys(q_centroids, k, k_sizes)
    check_shape("log_sizes", log_sizes, (*q_centroids.shape[:3], k_sizes.shape[2]))
    check_dtype("log_sizes", log_sizes, q_centroids.dtype)
    check_shape("k_means", k_means, (*k_sizes.shape, k.shape[3]))
    check_dtype("k_means", k_means, k.dtype)


def log_dropped_weights_reference(
    log_sizes: Tensor, q_centroids: Tensor, k: Tensor, k_means: Tensor, k_sizes: Tensor, scale: float
) -> Tensor:
    """Return the logarithm of what the keys of every dropped cluster weigh for the mean query, beside their mean.

    Not published: SVG-EAR (arXiv 2603.08982) lets a mean weigh as much as n_j keys at its place. Here, with scores
    s_it = scale * <q_i, k_t> of query centroid i, rounded to the dtype of k, and key t of cluster j with mean c_j,

        weight_ij = ln sum over t of exp(s_it) - scale * <q_i, c_j>,

    so that a pseudo-key at c_j with this bias weighs for the mean query what the keys do. By Jensen's inequality that
    is ln n_j or more.

    Args:
        log_sizes: fp32 (fp64 for fp64 keys) [B, H, C_q, C_k], as ``log_dropped_sizes`` gives it: -inf where no weight
            is wanted. Other values are not looked at.
        q_centroids: of the same dtype [B, H, C_q, D].
        k: fp16, bf16 or fp32 (fp64 for judging) [B, G, N_k, D], any strides, in cluster order; query head h uses key
            head h // (H / G).
        k_means: [B, G, C_k, D] in the dtype of ``k``, as ``cluster_means`` gives them.
        k_sizes: int32 [B, G, C_k], keys per cluster; keys behind the last cluster are hidden.
        scale: factor of the attention scores.

    Returns:
        [B, H, C_q, C_k] in the dtype of ``log_sizes``, contiguous, natural logarithm; -inf where that is -inf, and for
        an empty cluster.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, H is no multiple of G, or there are no clusters.

    Promises:
        Deterministic, no device synchronisation. Hidden keys cannot influence the result, whatever they hold.
    """
    _check(log_sizes, q_centroids, k, k_means, k_sizes)
    dtype, device = q_centroids.dtype, k.device
    batch, heads, q_clusters = q_centroids.shape[:3]
    keys, k_clusters, repeats = k.shape[2], k_sizes.shape[2], heads // k_sizes.shape[1]
    weights = torch.empty((batch, heads, q_clusters, k_clusters), dtype=dtype, device=device)
    columns = max(1, MAX_SCORES // (q_clusters + k_clusters))
    ends = k_sizes.cumsum(-1)
    for b in range(batch):
        for h in range(heads):
            g = h // repeats
            means = q_centroids[b, h].to(k.dtype).to(dtype)
            # one more cluster, of hidden keys
            highest = torch.full((q_clusters, k_clusters + 1), -math.inf, dtype=dtype, device=device)
            sums = torch.zeros_like(highest)
            parts = []
            for start in range(0, keys, columns):
                position = torch.arange(start, min(start + columns, keys), device=device, dtype=torch.int64)
                parts.append((position, torch.searchsorted(ends[b, g].long(), position, right=True)))
            for position, cluster in parts:
                scores = _scores(means, k[b, g, position], scale, cluster == k_clusters)
                highest.scatter_reduce_(1, cluster.expand_as(scores), scores, "amax")
            for position, cluster in parts:
                scores = _scores(means, k[b, g, position], scale, cluster == k_clusters)
                members = cluster.unsqueeze(-1) == torch.arange(k_clusters + 1, device=device, dtype=torch.int64)
                # Not scattered to the clusters, but a product: it adds in the same order every time.
                sums += (scores - highest[:, cluster]).exp() @ members.to(dtype)
            of_means = means @ k_means[b, g].to(dtype).T * scale
            weights[b, h] = sums[:, :-1].log() + (highest[:, :-1] - of_means)
    is_empty = k_sizes.repeat_interleave(repeats, dim=1).unsqueeze(2) == 0
    return weights.masked_fill_(is_empty | (log_sizes == -math.inf), -math.inf)


def _scores(means: Tensor, keys: Tensor, scale: float, hidden: Tensor) -> Tensor:
    """Return the scaled scores of the mean queries with some keys, 0 where those are hidden."""
    return (means @ keys.to(means.dtype).T * scale).masked_fill_(hidden, 0)


def check_log_dropped_weights(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how weights are wrong: of giant, small and empty clusters, some kept, with hidden keys that are NaN."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    q_means, k = (
        torch.randn(1, 2, count, kind.dim, generator=generator, dtype=torch.float32, device="cpu")
        for count in (kind.q_clusters, kind.tokens)
    )
    k[:, :, -HIDDEN_KEYS:] = math.nan
    labels = torch.randint(kind.k_clusters, (1, 2, kind.tokens), generator=generator, dtype=torch.int32, device="cpu")
    labels[:, :, :MORE_THAN_A_TILE], labels[:, :, -HIDDEN_KEYS:] = 0, kind.k_clusters
    k_sizes = sort_labels_reference(labels, kind.k_clusters + 1)[1][:, :, :-1].contiguous()
    k = k.to(kind.dtype)
    shape = (1, 2, kind.q_clusters, kind.k_clusters)
    is_kept = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < 0.3
    log_sizes = torch.zeros(shape, dtype=torch.float32, device="cpu").masked_fill_(is_kept, -math.inf)
    arguments = (log_sizes, q_means, k, cluster_means_reference(k, k_sizes), k_sizes)
    scale = kind.dim**-0.5
    got = call(*(each.to(kind.device) for each in arguments), scale).cpu()
    wanted = log_dropped_weights_reference(*arguments, scale)
    if not torch.equal(got.isinf(), wanted.isinf()):
        return "other clusters are dropped"
    error = float((got - wanted).nan_to_num(0).abs().max())
    return None if error <= TOLERANCE else f"off by {error:.3g}, at most {TOLERANCE:.3g} is rounding"


define(
    log_dropped_weights_reference,
    name="log_dropped_weights",
    part="selection",
    check=_check,
    fake=lambda log_sizes: log_sizes.new_empty(log_sizes.shape),
    kernels=Kernels(
        limits=Limits(FAST_DTYPES, MAX_HEAD_DIM),
        seen=lambda q_centroids, k, k_sizes: (k, k.shape[3], q_centroids.shape[2], k_sizes.shape[2]),
        seen_dtype=same_dtype,
        launch="log_dropped_weights_triton:log_dropped_weights_triton",
        self_check="log_dropped_weights:check_log_dropped_weights",
        modules=("log_dropped_weights_triton",),
    ),
)
