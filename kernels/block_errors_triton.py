"""``svg2::block_errors`` in Triton, one launch.

A program takes a tile of mean queries and a few neighbouring key clusters, and walks keys and values of each once. The
largest weight of a block so far is what all others are beside, as in a softmax that goes on. Nothing is added in
memory, so the order of the sums is always the same.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.attention_steps import LN_2, LOG2_E, load_rows, scores_of
from svg2_compile.kernels.block_errors import LEAST_ERROR
from svg2_compile.kernels.cluster_sizes import sum_of
from svg2_compile.kernels.launch import rows_of_unit_stride
from svg2_compile.kernels.walk_clusters import (
    constexprs_of,
    grid_of,
    place_of_program,
    tile_beside_means,
    usual_variants,
)

LEAST = tl.constexpr(LEAST_ERROR)


@triton.jit(do_not_specialize=["heads", "repeats", "q_clusters", "k_clusters"])
def errors_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_means_ptr,
    v_means_ptr,
    k_sizes_ptr,
    errors_ptr,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    stride_v_b,
    stride_v_h,
    stride_v_n,
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
    """Write the logarithms of the errors of ``CLUSTERS`` key clusters; -inf where no key is."""
    offs_m, first_cluster, head, group = place_of_program(q_clusters, repeats, BLOCK_M, CLUSTERS)
    k_heads = heads // repeats
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    is_dim = offs_d < DIM
    inside = offs_m < q_clusters
    q = load_rows(q_ptr + head * q_clusters * DIM, offs_m, DIM, inside, offs_d, DIM, True)
    k_ptr += group // k_heads * stride_k_b + group % k_heads * stride_k_h
    v_ptr += group // k_heads * stride_v_b + group % k_heads * stride_v_h
    k_sizes_ptr += group * k_clusters
    first_key = sum_of(k_sizes_ptr, first_cluster, BLOCK_SIZES)
    for cluster in range(first_cluster, tl.minimum(first_cluster + CLUSTERS, k_clusters)):
        size = tl.load(k_sizes_ptr + cluster)
        mean_row = (group * k_clusters + cluster) * DIM + offs_d
        k_mean = tl.load(k_means_ptr + mean_row, mask=is_dim, other=0.0).to(tl.float32)
        v_mean = tl.load(v_means_ptr + mean_row, mask=is_dim, other=0.0).to(tl.float32)
        of_mean = tl.sum(q.to(tl.float32) * k_mean[None, :], 1) * scale_log2
        # The sums of weights squared times |v|^2, and of weights times v . v_mean, beside the largest weight.
        highest = of_mean
        squares = tl.zeros([BLOCK_M], tl.float32)
        products = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, size, BLOCK_N):
            valid = first + offs_n < size
            rows = first_key + first + offs_n
            k = load_rows(k_ptr, rows, stride_k_n, valid, offs_d, DIM, True)
            v = load_rows(v_ptr, rows, stride_v_n, valid, offs_d, DIM, True).to(tl.float32)
            of_square = tl.sum(v * v, 1)
            of_product = tl.sum(v * v_mean[None, :], 1)
            scores = tl.where(valid[None, :], scores_of(q, k) * scale_log2, -float("inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores - new_highest[:, None])
            decay = tl.exp2(highest - new_highest)
            squares = squares * decay * decay + tl.sum(weights * weights * of_square[None, :], 1)
            products = products * decay + tl.sum(weights * of_product[None, :], 1)
            highest = new_highest
        mean_weight = tl.exp2(of_mean - highest)
        last = size.to(tl.float32) * mean_weight * mean_weight * tl.sum(v_mean * v_mean, 0)
        error = squares - 2.0 * mean_weight * products + last
        logs = (tl.log2(tl.where(error > LEAST, error, LEAST)) + 2.0 * highest) * LN_2
        logs = tl.where(size > 0, logs, -float("inf"))
        tl.store(errors_ptr + (head * q_clusters + offs_m) * k_clusters + cluster, logs, mask=inside)
        first_key += size


def block_errors_triton(
    q_centroids: Tensor, k: Tensor, v: Tensor, k_means: Tensor, v_means: Tensor, k_sizes: Tensor, scale: float
) -> Tensor:
    """Compute ``block_errors_reference``.

    Allocates the result, and a copy of the centroids in the dtype of k. Sums round in another order.
    """
    k, v, k_sizes = rows_of_unit_stride(k), rows_of_unit_stride(v), k_sizes.contiguous()
    batch, heads, q_clusters, dim = q_centroids.shape
    groups, k_clusters = k_sizes.shape[1:]
    q = q_centroids.to(k.dtype).contiguous()
    errors = torch.empty((batch, heads, q_clusters, k_clusters), dtype=torch.float32, device=k.device)
    tile = tile_beside_means(k.dtype, dim, q_clusters)
    with torch.cuda.device_of(k):
        errors_kernel[grid_of(q_centroids, k_sizes, tile)](
            q, k, v, k_means.contiguous(), v_means.contiguous(), k_sizes, errors, *k.stride()[:3], *v.stride()[:3],
            scale * LOG2_E, heads, heads // groups, q_clusters, k_clusters,
            **constexprs_of(dim), **tile,
        )  # fmt: skip
    return errors


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel for the usual dtypes and head dims, few and many clusters."""
    return usual_variants(errors_kernel, tile_beside_means, {"k_sizes_ptr": "*i32", "errors_ptr": "*fp32"})
