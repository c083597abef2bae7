"""``svg2::log_dropped_weights`` in Triton, one launch.

A program takes a tile of mean queries and a few neighbouring key clusters, and walks the keys of each once, unless
every query of the tile keeps the cluster. Nothing is added in memory, so the order of the sums is always the same.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.attention_steps import LN_2, LOG2_E, load_rows, scores_of, softmax
from svg2_compile.kernels.cluster_sizes import sum_of
from svg2_compile.kernels.launch import rows_of_unit_stride
from svg2_compile.kernels.walk_clusters import (
    constexprs_of,
    grid_of,
    place_of_program,
    tile_beside_means,
    usual_variants,
)


@triton.jit(do_not_specialize=["heads", "repeats", "q_clusters", "k_clusters"])
def weights_kernel(
    log_sizes_ptr,
    q_ptr,
    k_ptr,
    k_means_ptr,
    k_sizes_ptr,
    weights_ptr,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    scale_log2,
    heads,
    repeats,
    q_clusters,
    k_clusters,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZES: tl.constexpr,
    CLUSTERS: tl.constexpr,
):
    """Write the weights of ``CLUSTERS`` key clusters; -inf where no key is, or none is dropped."""
    offs_m, first_cluster, head, group = place_of_program(q_clusters, repeats, BLOCK_M, CLUSTERS)
    k_heads = heads // repeats
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_m < q_clusters
    q = load_rows(q_ptr + head * q_clusters * DIM, offs_m, DIM, inside, offs_d, DIM, True)
    k_ptr += group // k_heads * stride_k_b + group % k_heads * stride_k_h
    k_sizes_ptr += group * k_clusters
    first_key = sum_of(k_sizes_ptr, first_cluster, BLOCK_SIZES)
    for cluster in range(first_cluster, tl.minimum(first_cluster + CLUSTERS, k_clusters)):
        size = tl.load(k_sizes_ptr + cluster)
        place = (head * q_clusters + offs_m) * k_clusters + cluster
        log_sizes = tl.load(log_sizes_ptr + place, mask=inside, other=-float("inf"))
        is_dropped = (log_sizes > -float("inf")) & (size > 0)
        weights = tl.full([BLOCK_M], -float("inf"), tl.float32)
        if tl.max(is_dropped.to(tl.int32), 0) > 0:
            k_mean = tl.load(k_means_ptr + (group * k_clusters + cluster) * DIM + offs_d, mask=offs_d < DIM, other=0.0)
            of_mean = tl.sum(q.to(tl.float32) * k_mean.to(tl.float32)[None, :], 1) * scale_log2
            highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            for first in range(0, size, BLOCK_N):
                valid = first + offs_n < size
                k = load_rows(k_ptr, first_key + first + offs_n, stride_k_n, valid, offs_d, DIM, True)
                _, _, highest, total = softmax(scores_of(q, k), valid, scale_log2, highest, total, True)
            weights = (tl.log2(total) + (highest - of_mean)) * LN_2
        tl.store(weights_ptr + place, tl.where(is_dropped, weights, -float("inf")), mask=inside)
        first_key += size


def log_dropped_weights_triton(
    log_sizes: Tensor, q_centroids: Tensor, k: Tensor, k_means: Tensor, k_sizes: Tensor, scale: float
) -> Tensor:
    """Compute ``log_dropped_weights_reference``.

    Allocates the result, and a copy of the centroids in the dtype of k. Sums round in another order.
    """
    k, k_sizes, log_sizes = rows_of_unit_stride(k), k_sizes.contiguous(), log_sizes.contiguous()
    batch, heads, q_clusters, dim = q_centroids.shape
    groups, k_clusters = k_sizes.shape[1:]
    q = q_centroids.to(k.dtype).contiguous()
    weights = torch.empty((batch, heads, q_clusters, k_clusters), dtype=torch.float32, device=k.device)
    tile = tile_beside_means(k.dtype, dim, q_clusters)
    with torch.cuda.device_of(k):
        weights_kernel[grid_of(q_centroids, k_sizes, tile)](
            log_sizes, q, k, k_means.contiguous(), k_sizes, weights, *k.stride()[:3], scale * LOG2_E,
            heads, heads // groups, q_clusters, k_clusters,
            **constexprs_of(dim), **tile,
        )  # fmt: skip
    return weights


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel for the usual dtypes and head dims, few and many clusters."""
    pointers = {"log_sizes_ptr": "*fp32", "k_sizes_ptr": "*i32", "weights_ptr": "*fp32"}
    return usual_variants(weights_kernel, tile_beside_means, pointers)
