"""``svg2::block_errors``: how wrong the mean of a key cluster would be in its place, for every block."""

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
# The smallest normal number of fp32: beside the largest weight of its block, an error is at least that.
LEAST_ERROR = 2.0**-126
# The self-check: keys of one cluster, keys behind the last one, and how far sums in another order may be off.
MORE_THAN_A_TILE, HIDDEN_KEYS, TOLERANCE = 140, 5, 1e-2


def _check(q_centroids: Tensor, k: Tensor, v: Tensor, k_means: Tensor, v_means: Tensor, k_sizes: Tensor) -> None:
    """Check the arguments of ``svg2::block_errors``."""
    check_centroids_and_keys(q_centroids, k, k_sizes)
    means = (*k_sizes.shape, k.shape[3])
    for name, x, shape in (("v", v, k.shape), ("k_means", k_means, means), ("v_means", v_means, means)):
        check_shape(name, x, shape)
        check_dtype(name, x, k.dtype)


def block_errors_reference(
    q_centroids: Tensor, k: Tensor, v: Tensor, k_means: Tensor, v_means: Tensor, k_sizes: Tensor, scale: float
) -> Tensor:
    """Return the logarithm of the squared error that the mean of a key cluster makes in its place.

    SVG-EAR (arXiv 2603.08982). With weights e_t = exp(scale * <q_i, k_t>) of the keys t of cluster j for the mean query
    i, rounded to the dtype of k, and e_c = exp(scale * <q_i, c_j>) of their mean c_j, and the mean v_j of their values,

        error_ij = sum over t of |e_t v_t - e_c v_j|^2.

    Weights are not divided by their sum over a row, so errors are comparable within a row only.

    Args:
        q_centroids: fp32 (fp64 for fp64 keys) [B, H, C_q, D].
        k: fp16, bf16 or fp32 (fp64 for judging) [B, G, N_k, D], any strides, in cluster order; query head h uses key
            head h // (H / G).
        v: [B, G, N_k, D] in the dtype of ``k``, in the order of ``k``.
        k_means: [B, G, C_k, D] in the dtype of ``k``, as ``cluster_means`` gives them.
        v_means: [B, G, C_k, D] in the dtype of ``k``, likewise.
        k_sizes: int32 [B, G, C_k], keys per cluster; keys behind the last cluster are hidden.
        scale: factor of the attention scores.

    Returns:
        fp32 (fp64 for fp64 keys) [B, H, C_q, C_k], contiguous, natural logarithm; -inf for an empty cluster. An error
        below 2^-126 of the square of its block's largest weight counts as that.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, H is no multiple of G, or there are no clusters.

    Promises:
        Deterministic, no device synchronisation. Exact but for rounding in the sums of e_t^2 |v_t|^2 and e_c^2 |v_j|^2
        over a block, which may be all there is where a mean is nearly right. Hidden keys and values cannot influence
        the result, whatever they hold.
    """
    _check(q_centroids, k, v, k_means, v_means, k_sizes)
    dtype, device = q_centroids.dtype, k.device
    batch, heads, q_clusters = q_centroids.shape[:3]
    keys, k_clusters, repeats = k.shape[2], k_sizes.shape[2], heads // k_sizes.shape[1]
    errors = torch.empty((batch, heads, q_clusters, k_clusters), dtype=dtype, device=device)
    columns = max(1, MAX_SCORES // (q_clusters + k_clusters))
    ends = k_sizes.cumsum(-1)
    for b in range(batch):
        for h in range(heads):
            g = h // repeats
            means = q_centroids[b, h].to(k.dtype).to(dtype)
            of_mean = means @ k_means[b, g].to(dtype).T * scale  # [C_q, C_k]
            v_mean = v_means[b, g].to(dtype)
            parts = []
            for start in range(0, keys, columns):
                position = torch.arange(start, min(start + columns, keys), device=device, dtype=torch.int64)
                cluster = torch.searchsorted(ends[b, g].long(), position, right=True)
                hidden = position >= ends[b, g, -1]
                parts.append((position, cluster.clamp(max=k_clusters - 1), hidden))
            highest = of_mean.clone()
            for position, cluster, hidden in parts:
                scores = _scores(means, k[b, g, position], scale, hidden)
                highest.scatter_reduce_(1, cluster.expand_as(scores), scores, "amax")
            of_mean = (of_mean - highest).exp()
            sums = torch.zeros_like(of_mean)
            for position, cluster, hidden in parts:
                weights = (_scores(means, k[b, g, position], scale, hidden) - highest[:, cluster]).exp()
                values = v[b, g, position].to(dtype).masked_fill(hidden.unsqueeze(-1), 0)
                terms = weights.square() * values.square().sum(-1)
                terms -= 2 * of_mean[:, cluster] * weights * (values * v_mean[cluster]).sum(-1)
                members = cluster.unsqueeze(-1) == torch.arange(k_clusters, device=device, dtype=torch.int64)
                # Not scattered to the clusters, but a product: it adds in the same order every time.
                sums += terms @ members.to(dtype)
            sums += k_sizes[b, g] * of_mean.square() * v_mean.square().sum(-1)
            errors[b, h] = torch.where(sums > LEAST_ERROR, sums, LEAST_ERROR).log() + 2 * highest
    return errors.masked_fill_(k_sizes.repeat_interleave(repeats, dim=1).unsqueeze(2) == 0, -math.inf)


def _scores(means: Tensor, keys: Tensor, scale: float, hidden: Tensor) -> Tensor:
    """Return the scaled scores of the mean queries with some keys, -inf where those are hidden."""
    return (means @ keys.to(means.dtype).T * scale).masked_fill_(hidden, -math.inf)


def check_block_errors(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how errors are wrong: of giant, small and empty clusters, with hidden keys and values that are NaN."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    q_means, k, v = (
        torch.randn(1, 2, count, kind.dim, generator=generator, dtype=torch.float32, device="cpu")
        for count in (kind.q_clusters, kind.tokens, kind.tokens)
    )
    for x in (k, v):
        x[:, :, -HIDDEN_KEYS:] = math.nan
    labels = torch.randint(kind.k_clusters, (1, 2, kind.tokens), generator=generator, dtype=torch.int32, device="cpu")
    labels[:, :, :MORE_THAN_A_TILE], labels[:, :, -HIDDEN_KEYS:] = 0, kind.k_clusters
    k_sizes = sort_labels_reference(labels, kind.k_clusters + 1)[1][:, :, :-1].contiguous()
    k, v = k.to(kind.dtype), v.to(kind.dtype)
    k_means, v_means = cluster_means_reference(k, k_sizes), cluster_means_reference(v, k_sizes)
    arguments, scale = (q_means, k, v, k_means, v_means, k_sizes), kind.dim**-0.5
    got = call(*(each.to(kind.device) for each in arguments), scale).cpu()
    wanted = block_errors_reference(*arguments, scale)
    # one key is its mean: what is left is rounding
    has_error = (k_sizes > 1).unsqueeze(2).expand_as(wanted)
    if not torch.equal(got.isinf(), wanted.isinf()):
        return "other clusters are empty"
    error = float((got - wanted)[has_error].abs().max()) if bool(has_error.any()) else 0.0
    return None if error <= TOLERANCE else f"off by {error:.3g}, at most {TOLERANCE:.3g} is rounding"


define(
    block_errors_reference,
    name="block_errors",
    part="selection",
    check=_check,
    fake=lambda q_centroids, k_sizes: q_centroids.new_empty((*q_centroids.shape[:3], k_sizes.shape[2])),
    kernels=Kernels(
        limits=Limits(FAST_DTYPES, MAX_HEAD_DIM),
        seen=lambda q_centroids, k, k_sizes: (k, k.shape[3], q_centroids.shape[2], k_sizes.shape[2]),
        seen_dtype=same_dtype,
        launch="block_errors_triton:block_errors_triton",
        self_check="block_errors:check_block_errors",
        modules=("block_errors_triton",),
    ),
)
