"""``svg2::least_keys_``: how many keys the query clusters of a head keep on average, as the least that each is to keep.

Plain PyTorch on every device: two sums over what the selection counts anyway.
"""

import torch
from torch import Tensor

from svg2_compile.kernels.checks import check_dtype, check_head_groups, check_rank, check_shape
from svg2_compile.kernels.op import define
from svg2_compile.kernels.selection_statistics import STATISTICS, per_query_head

FLOORS = ("calls", "floor_sum")
"""The last axis of ``floors``, per head and summed over calls: 1, and the least share of the keys."""


def _check(call_statistics: Tensor, k_sizes: Tensor, floors: Tensor) -> None:
    """Check the arguments of ``svg2::least_keys_``."""
    check_rank("call_statistics", call_statistics, 4)
    check_rank("k_sizes", k_sizes, 3)
    batch, heads, q_clusters = call_statistics.shape[:3]
    check_head_groups(heads, k_sizes.shape[1])
    check_shape("call_statistics", call_statistics, (batch, heads, q_clusters, len(STATISTICS)))
    check_shape("k_sizes", k_sizes, (batch, *k_sizes.shape[1:]))
    check_shape("floors", floors, (batch, heads, len(FLOORS)))
    check_dtype("call_statistics", call_statistics, torch.float32, torch.float64)
    check_dtype("k_sizes", k_sizes, torch.int32)
    check_dtype("floors", floors, call_statistics.dtype)


def least_keys_reference(call_statistics: Tensor, k_sizes: Tensor, floors: Tensor) -> Tensor:
    """Return the mean number of keys that the query clusters of each head keep, and remember its share of all keys.

    SCOPE (arXiv 2608.12780). With n_i queries and m_i kept keys of query cluster i, sum of n_i m_i / sum of n_i,
    rounded to a whole number.

    Args:
        call_statistics: fp32 (fp64 for judging) [B, H, C_q, 5], columns named by ``STATISTICS``; what ``select_blocks``
            added in this call, to zeros.
        k_sizes: int32 [B, G, C_k], tokens per key cluster; query head h uses key head h // (H / G).
        floors: dtype of the statistics [B, H, 2], columns named by ``FLOORS``; added to.

    Returns:
        int32 [B, H], contiguous; between the fewest and the most keys that a query cluster with queries keeps.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, or H is no multiple of G.

    Promises:
        Deterministic, no device synchronisation.
    """
    _check(call_statistics, k_sizes, floors)
    density = call_statistics[..., STATISTICS.index("density_sum")].sum(-1)
    floors += torch.stack((torch.ones_like(density), density), dim=-1)
    keys = per_query_head(k_sizes.sum(-1, dtype=torch.int32), density.shape[1])
    # of no keys, a share is no number
    return (density * keys).round().nan_to_num(0).int()


define(
    least_keys_reference,
    name="least_keys_",
    part="selection",
    mutates=("floors",),
    check=_check,
    fake=lambda call_statistics: call_statistics.new_empty(call_statistics.shape[:2], dtype=torch.int32),
    runs="pytorch",
)
