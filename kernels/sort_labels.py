"""``svg2::sort_labels``: the permutation that makes clusters contiguous."""

import torch
from torch import Tensor

from svg2_compile.kernels.checks import check_dtype, check_rank, check_value
from svg2_compile.kernels.why_not import why_not_triton

torch.library.define(
    "svg2::sort_labels", "(Tensor labels, int clusters) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)


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


torch.library.impl("svg2::sort_labels", "cpu", sort_labels_reference)


@torch.library.impl("svg2::sort_labels", "cuda")
def _sort_labels_cuda(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    _check(labels, clusters)
    if why_not_triton("sort_labels", labels.device, labels.dtype, clusters=clusters):
        return sort_labels_reference(labels, clusters)
    from svg2_compile.kernels.sort_labels_triton import sort_labels_triton

    return sort_labels_triton(labels, clusters)


def _sort_labels_fake(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    _check(labels, clusters)
    return labels.new_empty(labels.shape), labels.new_empty((*labels.shape[:2], clusters))


torch.library.register_fake("svg2::sort_labels", _sort_labels_fake)
