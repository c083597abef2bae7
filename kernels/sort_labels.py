"""``svg2::sort_labels``: the permutation that makes clusters contiguous."""

import torch
from torch import Tensor

from svg2_compile.kernels.card import MAX_CLUSTERS, Kernels, Limits
from svg2_compile.kernels.checks import check_dtype, check_rank, check_value
from svg2_compile.kernels.op import define


def _check(labels: Tensor, clusters: int) -> None:
    """Check the arguments of ``svg2::sort_labels``."""
    check_rank("labels", labels, 3)
    check_dtype("labels", labels, torch.int32)
    check_value(clusters >= 1, lambda: f"clusters must be at least 1, got {clusters}")


def sort_labels_reference(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Sort tokens by cluster label, stably.

    Section 1.4: pi = argsort(labels).

    Args:
        labels: int32 [B, H, N], values in 0 ... clusters - 1.
        clusters: number of clusters C, at least 1.

    Returns:
        order: int32 [B, H, N], the token found at each sorted position.
        sizes: int32 [B, H, C], tokens per cluster; sums to N.

    Raises:
        TypeError: labels are not int32.
        ValueError: labels do not have three axes, or clusters < 1.

    Promises:
        Deterministic. Within a cluster, tokens keep their order. Outputs are contiguous.
    """
    _check(labels, clusters)
    labels = labels.contiguous()
    order = labels.sort(dim=-1, stable=True).indices.int()
    sizes = labels.new_zeros((*labels.shape[:2], clusters))
    return order, sizes.scatter_add_(2, labels.long(), torch.ones_like(labels))


def _empty(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Return the empty result."""
    return labels.new_empty(labels.shape), labels.new_empty((*labels.shape[:2], clusters))


define(
    sort_labels_reference,
    name="sort_labels",
    part="clustering",
    check=_check,
    fake=_empty,
    kernels=Kernels(
        limits=Limits(clusters=MAX_CLUSTERS),
        seen=lambda labels, clusters: (labels, 0, clusters, clusters),
        seen_dtype=lambda tokens: torch.int32,
        launch="sort_labels_triton:sort_labels_triton",
        self_check="self_check:check_sort_labels",
        modules=("sort_labels_triton",),
    ),
)
