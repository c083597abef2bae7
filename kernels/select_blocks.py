"""``svg2::select_blocks``: which key clusters each query cluster attends to."""

import math

import torch
from torch import Tensor

from svg2_compile.kernels.card import FAST_DTYPES, MAX_CLUSTERS, MAX_HEAD_DIM, Kernels, Limits
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
from svg2_compile.kernels.selection_statistics import STATISTICS, per_query_head, statistics_of
from svg2_compile.kernels.work_list import COUNTS, kept_runs_reference, max_runs

# The smallest normal number of fp32.
LEAST_MASS = 2.0**-126
BUDGETS = ("top_p", "least_clusters", "most_clusters")
"""The last axis of ``budgets``."""


def _check(
    q_centroids: Tensor,
    k_centroids: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    top_p: float,
    min_keep_ratio: float,
    statistics: Tensor,
    masses: Tensor | None,
    errors: Tensor | None,
    least_keys: Tensor | None,
    budgets: Tensor | None,
) -> None:
    """Check the arguments of ``svg2::select_blocks``."""
    check_rank("q_centroids", q_centroids, 4)
    check_rank("k_centroids", k_centroids, 4)
    batch, heads, q_clusters, dim = q_centroids.shape
    k_heads, k_clusters = k_centroids.shape[1:3]
    check_head_groups(heads, k_heads)
    check_shape("k_centroids", k_centroids, (batch, k_heads, k_clusters, dim))
    check_shape("q_sizes", q_sizes, (batch, heads, q_clusters))
    check_shape("k_sizes", k_sizes, (batch, k_heads, k_clusters))
    check_shape("statistics", statistics, (batch, heads, q_clusters, len(STATISTICS)))
    check_dtype("q_centroids", q_centroids, *FLOATING)
    check_dtype("k_centroids", k_centroids, q_centroids.dtype)
    check_dtype("q_sizes", q_sizes, torch.int32)
    check_dtype("k_sizes", k_sizes, torch.int32)
    check_dtype("statistics", statistics, accumulation_dtype(q_centroids))
    if masses is not None:
        check_shape("masses", masses, (batch, heads, q_clusters, k_clusters))
        check_dtype("masses", masses, statistics.dtype)
    if errors is not None:
        check_shape("errors", errors, (batch, heads, q_clusters, k_clusters))
        check_dtype("errors", errors, statistics.dtype)
    if least_keys is not None:
        check_shape("least_keys", least_keys, (batch, heads))
        check_dtype("least_keys", least_keys, torch.int32)
    if budgets is not None:
        check_shape("budgets", budgets, (heads, len(BUDGETS)))
        check_dtype("budgets", budgets, statistics.dtype)
    check_value(
        q_clusters >= 1 and k_clusters >= 1,
        lambda: f"there must be at least 1 cluster on either side, got {q_clusters} and {k_clusters}",
    )
    check_value(top_p > 0, lambda: f"top_p must be above 0, got {top_p}")
    check_value(0 <= min_keep_ratio <= 1, lambda: f"min_keep_ratio must be in [0, 1], got {min_keep_ratio}")


def select_blocks_reference(
    q_centroids: Tensor,
    k_centroids: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    scale: float,
    top_p: float,
    min_keep_ratio: float,
    statistics: Tensor,
    masses: Tensor | None = None,
    errors: Tensor | None = None,
    least_keys: Tensor | None = None,
    budgets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep, for each query cluster, the likeliest key clusters until they carry ``top_p`` of the attention mass.

    Section 1.3, equations 1 and 2. With s_ij = scale * <q_i, k_j> and key cluster sizes n_j,
    P_ij = n_j exp(s_ij) / sum_l n_l exp(s_il). In descending order of P_ij, rank r is kept if r = 1, or the ranks
    before it sum to at most ``top_p``, or r <= floor(min_keep_ratio * C_k).

    Not the paper's: with ``least_keys``, a query cluster that keeps fewer keys than that goes on until it has them. And
    with ``errors``, that is only how many keys are kept. The ranks up to
    max(1, floor(min_keep_ratio * C_k / 2)) are kept in any case; then clusters in descending order of error per key,
    as long as fewer keys are kept than those would be.

    Nor is a budget of each head's own: with ``budgets``, rank r is kept if r <= max(1, most_clusters) and r = 1, or
    the ranks before it sum to at most the head's ``top_p``, or that is 1 or more, or r <= least_clusters. This stands
    in the place of ``top_p`` and of floor(min_keep_ratio * C_k).

    Args:
        q_centroids: fp32 (fp64 for judging) [B, H, C_q, D].
        k_centroids: fp32 (fp64 for judging) [B, G, C_k, D]; query head h uses key head h // (H / G).
        q_sizes: int32 [B, H, C_q], tokens per query cluster.
        k_sizes: int32 [B, G, C_k], tokens per key cluster, not all 0.
        scale: factor of the attention scores.
        top_p: share of the mass to keep, above 0; 1 and more keep every block.
        min_keep_ratio: share of the key clusters, by count, to keep in any case, in [0, 1].
        statistics: fp32 (fp64 for judging) [B, H, C_q, 5], columns named by ``STATISTICS``; added to.
        masses: dtype of statistics [B, H, C_q, C_k], at least 0; what to take for P, as ``block_masses`` returns it, in
            place of what the centroids say.
        errors: dtype of statistics [B, H, C_q, C_k], logarithms of what is wrong where a cluster is not kept, as
            ``block_errors`` returns it; None keeps what has most mass.
        least_keys: int32 [B, H], how many keys every query cluster of a head keeps at least; None sets no such floor.
        budgets: dtype of statistics [H, 3], columns named by ``BUDGETS``, the last two whole numbers; None for
            ``top_p`` and ``min_keep_ratio`` in all heads.

    Returns:
        runs: int32 [B, H, C_q, ceil(C_k / 2), 2], contiguous, the kept ranges of keys as ``KeptRuns`` has them; there
            is room for every selection.
        counts: int32 [B, H, C_q, 4], contiguous, columns named by ``COUNTS``.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, H is no multiple of G, or a number is out of range.

    Promises:
        Deterministic, no device synchronisation. Ties go to the lowest index. An empty key cluster has probability 0
        and the last rank, so every row keeps a key. A larger ``top_p`` keeps a superset. Budgets that are ``top_p``,
        floor(min_keep_ratio * C_k) and C_k in every head give the bits that no budgets give.
    """
    check = (q_centroids, k_centroids, q_sizes, k_sizes, top_p, min_keep_ratio, statistics)
    _check(*check, masses, errors, least_keys, budgets)
    dtype = statistics.dtype
    if masses is None:
        logits = block_logits(q_centroids.to(dtype), k_centroids.to(dtype), k_sizes, scale)
    else:
        # Every cluster with keys has some mass, and those of an empty one do not matter.
        is_empty = per_query_head(k_sizes, q_sizes.shape[1]).unsqueeze(2) == 0
        logits = torch.where(masses > LEAST_MASS, masses, LEAST_MASS).log().masked_fill(is_empty, -math.inf)
    keep, mass = kept_clusters(logits, top_p, min_keep_ratio, budgets)
    is_bounded = budgets is not None or top_p < 1
    if is_bounded and (least_keys is not None or errors is not None):
        by_mass, mass_of_it = keep, mass
        sizes = per_query_head(k_sizes, keep.shape[1])
        budget = (sizes.unsqueeze(2) * keep).sum(-1, keepdim=True)  # [B, H, C_q, 1]
        if least_keys is not None:
            budget = torch.maximum(budget, least_keys[..., None, None])
        if errors is None:
            keep = clusters_within(budget, logits, sizes)
        else:
            keep = routed_clusters(budget, logits, errors, sizes, min_keep_ratio, budgets)
        mass = (logits.softmax(-1) * keep).sum(-1)
        if budgets is not None:
            # where everything is asked for, errors choose nothing
            share = budgets[:, BUDGETS.index("top_p")].view(-1, 1)
            is_whole = (share >= 1) & by_mass.all(-1)
            keep = keep | is_whole.unsqueeze(-1)
            mass = torch.where(is_whole, mass_of_it, mass)
    kept = kept_runs_reference(keep, k_sizes)
    kept_tokens = torch.einsum("bhqk,bhk->bhq", keep.to(dtype), per_query_head(k_sizes, keep.shape[1]).to(dtype))
    statistics += statistics_of(kept.counts, kept_tokens, mass, q_sizes, k_sizes)
    return kept.runs, kept.counts


def block_logits(q_centroids: Tensor, k_centroids: Tensor, k_sizes: Tensor, scale: float) -> Tensor:
    """Return log(n_j) + s_ij of section 1.3, [B, H, C_q, C_k]; -inf for a cluster without keys."""
    heads = q_centroids.shape[1]
    k_centroids, k_sizes = per_query_head(k_centroids, heads), per_query_head(k_sizes, heads).to(q_centroids.dtype)
    # log n_j is -inf for an empty cluster. Its centroid may hold anything, so it is overwritten, not added to.
    scores = q_centroids @ k_centroids.transpose(-1, -2) * scale
    return (scores + k_sizes.log().unsqueeze(2)).masked_fill(k_sizes.unsqueeze(2) == 0, -math.inf)


def kept_clusters(
    logits: Tensor, top_p: float, min_keep_ratio: float, budgets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return which key clusters each query cluster keeps, bool [B, H, C_q, C_k], and their mass [B, H, C_q].

    ``logits`` [B, H, C_q, C_k] are logarithms of the masses, but for a constant in every row; -inf in empty clusters.
    """
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ranked.softmax(-1)
    if budgets is None and top_p >= 1:
        kept = torch.ones_like(ranked, dtype=torch.bool)
    else:
        before = torch.nn.functional.pad(probability.cumsum(-1)[..., :-1], (1, 0))
        # `before` is 0 at rank 1, which therefore is always kept.
        kept = before <= top_p
        kept[..., : math.floor(min_keep_ratio * logits.shape[3])] = True
        if budgets is not None:
            kept = _within(budgets, before)
    return torch.empty_like(kept).scatter_(-1, order, kept), (probability * kept).sum(-1)


def _within(budgets: Tensor, before: Tensor) -> Tensor:
    """Return which ranks every head keeps by its own budget, bool [B, H, C_q, C_k], from the mass before each."""
    share, least, most = (each.view(-1, 1, 1) for each in budgets.unbind(-1))
    rank = torch.arange(1, before.shape[3] + 1, device=before.device, dtype=torch.int64)
    kept = (before <= share) | (share >= 1) | (rank <= least)
    return kept & (rank <= most.clamp(min=1))


def routed_clusters(
    budget: Tensor,
    logits: Tensor,
    errors: Tensor,
    k_sizes: Tensor,
    min_keep_ratio: float,
    budgets: Tensor | None = None,
) -> Tensor:
    """Return which key clusters each query cluster keeps, bool [B, H, C_q, C_k], where errors decide and not masses.

    Args:
        budget: [B, H, C_q, 1], how many keys to keep.
        logits: [B, H, C_q, C_k], of the masses.
        errors: [B, H, C_q, C_k], of what is wrong without.
        k_sizes: int32 [B, H, C_k].
        min_keep_ratio: share of the clusters, by count, half of which is kept for its mass in any case.
        budgets: as the op takes them; their ``least_clusters`` stand for that share.
    """
    sizes = k_sizes.unsqueeze(2).expand(logits.shape)
    guaranteed: int | Tensor
    guaranteed = max(1, math.floor(min_keep_ratio * logits.shape[3] / 2))
    if budgets is not None:
        guaranteed = (budgets[:, BUDGETS.index("least_clusters")] / 2).floor().clamp(min=1).view(-1, 1, 1)
    likeliest = logits.sort(dim=-1, descending=True, stable=True).indices.argsort(-1) < guaranteed
    # what is no number comes last but for empty clusters
    per_key = (errors - sizes.clamp(min=1).log()).nan_to_num(nan=torch.finfo(errors.dtype).min)
    per_key = per_key.masked_fill(sizes == 0, -math.inf).masked_fill(likeliest, math.inf)
    return clusters_within(budget, per_key, k_sizes)


def clusters_within(budget: Tensor, worth: Tensor, k_sizes: Tensor) -> Tensor:
    """Return the clusters of most ``worth`` [B, H, C_q, C_k], up to the one that fills ``budget`` [B, H, C_q, 1]."""
    order = worth.sort(dim=-1, descending=True, stable=True).indices
    ranked = k_sizes.unsqueeze(2).expand(worth.shape).gather(-1, order)
    taken = ranked.cumsum(-1) - ranked < budget
    return torch.empty_like(taken).scatter_(-1, order, taken)


def _empty(k_centroids: Tensor, q_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the empty result."""
    runs = q_sizes.new_empty((*q_sizes.shape, max_runs(k_centroids.shape[2]), 2))
    return runs, q_sizes.new_empty((*q_sizes.shape, len(COUNTS)))


define(
    select_blocks_reference,
    name="select_blocks",
    part="selection",
    mutates=("statistics",),
    check=_check,
    fake=_empty,
    kernels=Kernels(
        limits=Limits(FAST_DTYPES, MAX_HEAD_DIM, MAX_CLUSTERS),
        seen=lambda q_centroids, k_centroids: (
            q_centroids,
            q_centroids.shape[3],
            q_centroids.shape[2],
            k_centroids.shape[2],
        ),
        # centroids are fp32 or wider
        seen_dtype=lambda tokens: torch.promote_types(tokens, torch.float32),
        launch="select_blocks_triton:select_blocks_triton",
        self_check="self_check:check_select_blocks",
        modules=("select_blocks_triton",),
    ),
)
