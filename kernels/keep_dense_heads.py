"""``svg2::keep_dense_heads_``: heads that the guard found wanting keep everything.

Plain PyTorch on every device: it copies the lists of runs, some megabytes.
"""

import torch
from torch import Tensor

from svg2_compile.kernels.checks import check_dtype, check_head_groups, check_rank, check_shape
from svg2_compile.kernels.judge_heads import DENSE_HEADS
from svg2_compile.kernels.op import define
from svg2_compile.kernels.selection_statistics import STATISTICS, statistics_of
from svg2_compile.kernels.work_list import COUNTS, PIECES


def _check(
    runs: Tensor,
    counts: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    dense_heads: Tensor,
    call_statistics: Tensor,
    statistics: Tensor,
) -> None:
    """Check the arguments of ``svg2::keep_dense_heads_``."""
    check_rank("runs", runs, 5)
    check_rank("k_sizes", k_sizes, 3)
    batch, heads, q_clusters, slots = runs.shape[:4]
    k_heads, k_clusters = k_sizes.shape[1:]
    check_head_groups(heads, k_heads)
    check_shape("runs", runs, (batch, heads, q_clusters, slots, 2))
    check_shape("counts", counts, (batch, heads, q_clusters, len(COUNTS)))
    check_shape("q_sizes", q_sizes, (batch, heads, q_clusters))
    check_shape("k_sizes", k_sizes, (batch, k_heads, k_clusters))
    check_shape("dense_heads", dense_heads, (batch, heads, len(DENSE_HEADS)))
    check_shape("call_statistics", call_statistics, (batch, heads, q_clusters, len(STATISTICS)))
    check_shape("statistics", statistics, call_statistics.shape)
    for name, x in (("runs", runs), ("counts", counts), ("q_sizes", q_sizes), ("k_sizes", k_sizes)):
        check_dtype(name, x, torch.int32)
    check_dtype("dense_heads", dense_heads, torch.float32, torch.float64)
    check_dtype("call_statistics", call_statistics, torch.float32, torch.float64)
    check_dtype("statistics", statistics, call_statistics.dtype)


def keep_dense_heads_reference(
    runs: Tensor,
    counts: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    dense_heads: Tensor,
    call_statistics: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the selection with everything kept in the heads that are dense, and add the statistics of that.

    Args:
        runs: int32 [B, H, C_q, R, 2], the selection, as ``select_blocks`` returns it.
        counts: int32 [B, H, C_q, 4], likewise.
        q_sizes: int32 [B, H, C_q], tokens per query cluster.
        k_sizes: int32 [B, G, C_k], tokens per key cluster; query head h uses key head h // (H / G).
        dense_heads: fp32 (fp64 for judging) [B, H, 2], columns named by ``DENSE_HEADS``.
        call_statistics: fp32 (fp64 for judging) [B, H, C_q, 5], what ``select_blocks`` added in this call, to zeros.
        statistics: the same, over all calls; added to.

    Returns:
        runs and counts as given, but one run of all keys for every query cluster of a dense head.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, or H is no multiple of G.

    Promises:
        Deterministic, no aliasing, no device synchronisation.
    """
    _check(runs, counts, q_sizes, k_sizes, dense_heads, call_statistics, statistics)
    is_dense = (dense_heads[..., 0] > 0)[..., None, None]  # [B, H, 1, 1]
    repeats = runs.shape[1] // k_sizes.shape[1]
    tokens = k_sizes.sum(-1, dtype=torch.int32).repeat_interleave(repeats, dim=1).unsqueeze(-1)  # [B, H, 1]
    one_run = torch.zeros_like(runs)
    one_run[..., 0, 1] = tokens
    pieces = [(tokens > 0).int(), *(tokens // piece for piece in PIECES)]
    all_counts = torch.stack(pieces, dim=-1).expand_as(counts)
    mass = torch.ones_like(call_statistics[..., 0])
    dense_statistics = statistics_of(all_counts, tokens.to(mass.dtype).expand_as(mass), mass, q_sizes, k_sizes)
    statistics += dense_statistics.where(is_dense, call_statistics)
    return one_run.where(is_dense.unsqueeze(-1), runs), all_counts.where(is_dense, counts)


define(
    keep_dense_heads_reference,
    name="keep_dense_heads_",
    part="selection",
    mutates=("statistics",),
    check=_check,
    fake=lambda runs, counts: (runs.new_empty(runs.shape), counts.new_empty(counts.shape)),
    runs="pytorch",
)
