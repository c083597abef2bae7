"""``svg2::log_dropped_sizes``: how heavy the mean of each dropped key cluster is to its query clusters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svg2_compile.kernels.card import MAX_CLUSTERS, Kernels, Limits
from svg2_compile.kernels.checks import check_dtype, check_head_groups, check_rank, check_shape
from svg2_compile.kernels.op import define
from svg2_compile.kernels.selection_statistics import per_query_head
from svg2_compile.kernels.work_list import COUNTS, kept_runs_reference, max_runs

if TYPE_CHECKING:
    from svg2_compile.kernels.self_check import Kind

# Logarithms of the same integers differ by their last bits.
TOLERANCE = 1e-5


def _check(runs: Tensor, counts: Tensor, k_sizes: Tensor) -> None:
    """Check the arguments of ``svg2::log_dropped_sizes``."""
    check_rank("runs", runs, 5)
    check_rank("k_sizes", k_sizes, 3)
    batch, heads, q_clusters = runs.shape[:3]
    k_heads, k_clusters = k_sizes.shape[1:]
    check_head_groups(heads, k_heads)
    check_shape("k_sizes", k_sizes, (batch, k_heads, k_clusters))
    check_shape("runs", runs, (batch, heads, q_clusters, max_runs(k_clusters), 2))
    check_shape("counts", counts, (batch, heads, q_clusters, len(COUNTS)))
    for name, x in (("runs", runs), ("counts", counts), ("k_sizes", k_sizes)):
        check_dtype(name, x, torch.int32)


def log_dropped_sizes_reference(runs: Tensor, counts: Tensor, k_sizes: Tensor) -> Tensor:
    """Return ln n_j of every key cluster that a query cluster drops: what n_j keys at their mean weigh, beside one.

    Args:
        runs: int32 [B, H, C_q, R, 2], the ranges of keys that each query cluster attends to, as ``KeptRuns`` has them:
            whole clusters.
        counts: int32 [B, H, C_q, 4], columns named by ``COUNTS``.
        k_sizes: int32 [B, G, C_k], keys per cluster; query head h uses key head h // (H / G).

    Returns:
        fp32 [B, H, C_q, C_k], contiguous; -inf for a cluster that is kept, or has no keys.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, or H is no multiple of G.

    Promises:
        Deterministic, no device synchronisation.
    """
    _check(runs, counts, k_sizes)
    batch, heads, q_clusters, slots, _ = runs.shape
    k_clusters = k_sizes.shape[2]
    sizes = per_query_head(k_sizes, heads)
    ends = sizes.cumsum(-1)
    is_run = torch.arange(slots, device=runs.device, dtype=torch.int64) < counts[..., :1]
    # A run begins where a cluster does, and ends where one does that is dropped, or behind all. Those there are not
    # begin and end nowhere.
    edges = torch.where(is_run.unsqueeze(-1), runs, ends[:, :, None, None, -1:])
    clusters = torch.searchsorted(ends, edges.flatten(2).contiguous(), right=True).view(edges.shape)
    first, last = clusters.unbind(-1)
    steps = torch.zeros((batch, heads, q_clusters, k_clusters + 1), dtype=torch.int32, device=runs.device)
    one = torch.ones_like(first, dtype=torch.int32)
    steps.scatter_add_(-1, first, one).scatter_add_(-1, last, -one)
    is_kept = steps[..., :-1].cumsum(-1) > 0
    return sizes.float().log().unsqueeze(2).masked_fill(is_kept, -math.inf)


def check_log_dropped_sizes(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how weights are wrong: of empty and other clusters, between runs of every length."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    k_sizes = torch.randint(0, 3, (1, 2, kind.k_clusters), generator=generator, dtype=torch.int32, device="cpu")
    shape = (1, 2, kind.q_clusters, kind.k_clusters)
    keep = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < 0.5
    kept = kept_runs_reference(keep, k_sizes)
    got = call(*(each.to(kind.device) for each in (kept.runs, kept.counts, k_sizes))).cpu()
    wanted = log_dropped_sizes_reference(kept.runs, kept.counts, k_sizes)
    if not torch.equal(got.isinf(), wanted.isinf()):
        return "other clusters are dropped"
    error = float((got - wanted).nan_to_num(0).abs().max())
    return None if error <= TOLERANCE else f"off by {error:.3g}, at most {TOLERANCE:.3g} is rounding"


define(
    log_dropped_sizes_reference,
    name="log_dropped_sizes",
    part="selection",
    check=_check,
    fake=lambda runs, k_sizes: runs.new_empty((*runs.shape[:3], k_sizes.shape[2]), dtype=torch.float32),
    kernels=Kernels(
        limits=Limits(clusters=MAX_CLUSTERS),
        seen=lambda runs, k_sizes: (runs, 0, runs.shape[2], k_sizes.shape[2]),
        seen_dtype=lambda tokens: torch.int32,
        launch="log_dropped_sizes_triton:log_dropped_sizes_triton",
        self_check="log_dropped_sizes:check_log_dropped_sizes",
        modules=("log_dropped_sizes_triton",),
    ),
)
