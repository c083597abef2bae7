"""``svg2::gram``: the metric in which the queries' centroids see the keys."""

import torch
from torch import Tensor

from svg2_compile.kernels.checks import check_dtype, check_head_groups, check_rank, check_value
from svg2_compile.kernels.op import define


def _check(centroids: Tensor, k_heads: int) -> None:
    """Check the arguments of ``svg2::gram``."""
    check_rank("centroids", centroids, 4)
    check_dtype("centroids", centroids, torch.float32, torch.float64)
    check_value(k_heads >= 1, lambda: f"k_heads must be at least 1, got {k_heads}")
    check_head_groups(centroids.shape[1], k_heads)


def gram_reference(centroids: Tensor, k_heads: int) -> Tensor:
    """Return the sum of c c^T over all centroids c of the queries of each key head.

    A key x has the profile (c_1 . x, c_2 . x, ...) with these centroids; x . M y is the product of two profiles.

    Args:
        centroids: fp32 (fp64 for judging) [B, H, C, D].
        k_heads: G, the key heads; query head h uses key head h // (H / G).

    Returns:
        M: [B, G, D, D] in the dtype of ``centroids``, contiguous, symmetric but for rounding, positive semidefinite.

    Raises:
        TypeError: another dtype.
        ValueError: not four axes, or H is no multiple of G.

    Promises:
        Deterministic on a CPU for a given number of threads, no aliasing; no autocast. On a GPU the product is
        PyTorch's, in TF32 where the user allows that.
    """
    _check(centroids, k_heads)
    batch, _, _, dim = centroids.shape
    rows = centroids.reshape(batch, k_heads, -1, dim)
    with torch.autocast(centroids.device.type, enabled=False):
        return rows.mT @ rows


define(
    gram_reference,
    name="gram",
    part="clustering",
    check=_check,
    fake=lambda centroids, k_heads: centroids.new_empty(
        (centroids.shape[0], k_heads, centroids.shape[3], centroids.shape[3])
    ),
    runs="pytorch",
)
