"""``svg2::cluster_means``: the mean of the tokens of every cluster."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svg2_compile.kernels.card import FAST_DTYPES, MAX_HEAD_DIM, Kernels, Limits, same_dtype
from svg2_compile.kernels.checks import FLOATING, accumulation_dtype, check_dtype, check_rank, check_shape
from svg2_compile.kernels.op import define
from svg2_compile.kernels.sort_labels import sort_labels_reference

if TYPE_CHECKING:
    from svg2_compile.kernels.self_check import Kind

# The self-check: tokens of one cluster, tokens behind the last one, and what fp32 sums in another order may be off.
MORE_THAN_A_TILE, HIDDEN_TOKENS, TOLERANCE = 140, 5, 1e-5


def _check(x: Tensor, sizes: Tensor) -> None:
    """Check the arguments of ``svg2::cluster_means``."""
    check_rank("x", x, 4)
    check_rank("sizes", sizes, 3)
    check_shape("sizes", sizes, (*x.shape[:2], sizes.shape[2]))
    check_dtype("x", x, *FLOATING)
    check_dtype("sizes", sizes, torch.int32)


def cluster_means_reference(x: Tensor, sizes: Tensor) -> Tensor:
    """Return the mean of the tokens of every cluster: what stands in for a cluster that nobody attends to.

    m_j = sum of x_t over the tokens t of cluster j, divided by n_j.

    Args:
        x: fp16, bf16, fp32 (fp64 for judging) [B, G, N, D], any strides, in cluster order.
        sizes: int32 [B, G, C], tokens per cluster; tokens behind the last cluster are hidden.

    Returns:
        [B, G, C, D] in the dtype of ``x``, contiguous, added up in fp32 (fp64 for fp64); 0 for an empty cluster.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree.

    Promises:
        Deterministic, no device synchronisation. Tokens of another cluster, and hidden ones, cannot influence a mean,
        not even with NaN.
    """
    _check(x, sizes)
    dtype = accumulation_dtype(x)
    means = x.new_empty((*sizes.shape, x.shape[3]))
    ends = sizes.cumsum(-1)
    # one bag more for hidden tokens
    starts = torch.nn.functional.pad(ends, (1, 0))
    position = torch.arange(x.shape[2], device=x.device, dtype=torch.int64)
    for b in range(x.shape[0]):
        for g in range(x.shape[1]):
            # Not a product with who is a member, in which a NaN would reach every cluster.
            sums = torch.nn.functional.embedding_bag(position, x[b, g].to(dtype), starts[b, g], mode="sum")
            means[b, g] = sums[:-1] / sizes[b, g].clamp(min=1).unsqueeze(-1)
    return means


def check_cluster_means(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how means are wrong: of a giant, small and empty clusters, with hidden tokens that are NaN."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(1, 2, kind.tokens, kind.dim, generator=generator, dtype=torch.float32, device="cpu")
    x[:, :, -HIDDEN_TOKENS:] = math.nan
    labels = torch.randint(kind.k_clusters, (1, 2, kind.tokens), generator=generator, dtype=torch.int32, device="cpu")
    labels[:, :, :MORE_THAN_A_TILE], labels[:, :, -HIDDEN_TOKENS:] = 0, kind.k_clusters
    sizes = sort_labels_reference(labels, kind.k_clusters + 1)[1][:, :, :-1].contiguous()
    x = x.to(kind.dtype)
    got = call(x.to(kind.device), sizes.to(kind.device)).cpu().double()
    wanted = cluster_means_reference(x.double(), sizes)
    error = float((got - wanted).abs().max())
    allowed = torch.finfo(kind.dtype).eps * float(wanted.abs().max()) + TOLERANCE
    return None if error <= allowed else f"off by {error:.3g}, at most {allowed:.3g} is rounding"


define(
    cluster_means_reference,
    name="cluster_means",
    part="selection",
    check=_check,
    fake=lambda x, sizes: x.new_empty((*sizes.shape, x.shape[3])),
    kernels=Kernels(
        limits=Limits(FAST_DTYPES, MAX_HEAD_DIM),
        seen=lambda x, sizes: (x, x.shape[3], sizes.shape[2], sizes.shape[2]),
        seen_dtype=same_dtype,
        launch="cluster_means_triton:cluster_means_triton",
        self_check="cluster_means:check_cluster_means",
        modules=("cluster_means_triton",),
    ),
)
