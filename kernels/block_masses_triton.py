"""``svg2::block_masses`` in Triton: softmaxes of the queries that are asked over the means of the keys, twice.

The first kernel writes the log-sum-exp of every query that is asked. In the second, a program to a query cluster and a
block of key clusters adds up their probabilities in registers. So nothing is added in memory, and the order of the sums
is always the same.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.attention_steps import LOG2_E, load_rows, rows_of_unit_stride, scores_of, softmax
from svg2_compile.kernels.block_masses import QUERIES
from svg2_compile.kernels.launch import AotVariant, cdiv, padded_power_of_two
from svg2_compile.kernels.select_blocks_triton import sum_of

NUM_STAGES = 2
SIZES_BLOCK = tl.constexpr(128)
ASKED = tl.constexpr(QUERIES)


def _tile(dtype: torch.dtype, dim: int, k_clusters: int) -> dict[str, int]:
    """Return queries and key clusters of a tile, and warps: fp32 products keep both operands in registers."""
    if dtype == torch.float32:
        queries, clusters, warps = 32, 32, 8
    else:
        queries, clusters, warps = (128, 64, 4) if dim <= 128 else (64, 32, 4)
    return {"BLOCK_M": queries, "BLOCK_C": min(clusters, padded_power_of_two(k_clusters, 16)), "num_warps": warps}


@triton.jit
def _load_means(means_ptr, k_sizes_ptr, first, k_clusters, offs_d, DIM: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return a block of means [BLOCK_C, BLOCK_D] and log2 of the sizes, -inf where there is no key."""
    offs_c = first + tl.arange(0, BLOCK_C)
    sizes = tl.load(k_sizes_ptr + offs_c, mask=offs_c < k_clusters, other=0)
    # The mean of an empty cluster may hold anything.
    return load_rows(means_ptr, offs_c, DIM, sizes > 0, offs_d, DIM, True), tl.log2(sizes.to(tl.float32))


@triton.jit
def _locate(q_sizes_ptr, cluster):
    """Return where a query cluster begins, and its size."""
    return sum_of(q_sizes_ptr, cluster, SIZES_BLOCK), tl.load(q_sizes_ptr + cluster)


@triton.jit
def _load_queries(q_ptr, q_order_ptr, start, size, index, stride_q_n, offs_d, DIM: tl.constexpr):
    """Return the queries of a cluster that are asked, those of number ``index``, and which of them there are."""
    asked = tl.minimum(size, ASKED)
    is_query = index < asked
    within = tl.where(size > ASKED, (2 * index + 1).to(tl.int64) * size // (2 * ASKED), index)
    query = tl.load(q_order_ptr + start + within, mask=is_query, other=0)
    return load_rows(q_ptr, query, stride_q_n, is_query, offs_d, DIM, True), is_query


@triton.jit(do_not_specialize=["heads", "repeats", "tokens", "q_clusters", "k_clusters"])
def totals_kernel(
    q_ptr,
    q_order_ptr,
    means_ptr,
    q_sizes_ptr,
    k_sizes_ptr,
    totals_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_n,
    scale_log2,
    heads,
    repeats,
    tokens,
    q_clusters,
    k_clusters,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write log2 of the sum of n_j exp(s_tj) over the key clusters for ``BLOCK_M`` queries of a cluster."""
    PARTS: tl.constexpr = ASKED // BLOCK_M
    cluster = tl.program_id(0) // PARTS
    index = tl.program_id(0) % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    group = head // repeats
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr += head // heads * stride_q_b + head % heads * stride_q_h
    start, size = _locate(q_sizes_ptr + head * q_clusters, cluster)
    q, is_query = _load_queries(q_ptr, q_order_ptr + head * tokens, start, size, index, stride_q_n, offs_d, DIM)
    means_ptr += group * k_clusters * DIM
    k_sizes_ptr += group * k_clusters
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, k_clusters, BLOCK_C):
        means, log_sizes = _load_means(means_ptr, k_sizes_ptr, first, k_clusters, offs_d, DIM, BLOCK_C)
        scores = scores_of(q, means) * scale_log2 + log_sizes[None, :]
        _, _, highest, total = softmax(scores, log_sizes >= 0, 1.0, highest, total, True)
    # Nothing is left of the probabilities of a row that is none.
    total = tl.where(is_query, highest + tl.log2(total), float("inf"))
    tl.store(totals_ptr + (head * q_clusters + cluster) * ASKED + index, total)


@triton.jit(do_not_specialize=["heads", "repeats", "tokens", "q_clusters", "k_clusters"])
def masses_kernel(
    q_ptr,
    q_order_ptr,
    means_ptr,
    q_sizes_ptr,
    k_sizes_ptr,
    totals_ptr,
    masses_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_n,
    scale_log2,
    heads,
    repeats,
    tokens,
    q_clusters,
    k_clusters,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the masses of ``BLOCK_C`` key clusters for one query cluster."""
    blocks = tl.cdiv(k_clusters, BLOCK_C)
    cluster = tl.program_id(0) // blocks
    first_cluster = tl.program_id(0) % blocks * BLOCK_C
    head = tl.program_id(1).to(tl.int64)
    group = head // repeats
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr += head // heads * stride_q_b + head % heads * stride_q_h
    q_order_ptr += head * tokens
    k_sizes_ptr += group * k_clusters
    row = head * q_clusters + cluster
    start, size = _locate(q_sizes_ptr + head * q_clusters, cluster)
    means_ptr += group * k_clusters * DIM
    means, log_sizes = _load_means(means_ptr, k_sizes_ptr, first_cluster, k_clusters, offs_d, DIM, BLOCK_C)
    masses = tl.zeros([BLOCK_C], tl.float32)
    for part in range(ASKED // BLOCK_M):
        index = part * BLOCK_M + tl.arange(0, BLOCK_M)
        q, _ = _load_queries(q_ptr, q_order_ptr, start, size, index, stride_q_n, offs_d, DIM)
        total = tl.load(totals_ptr + row * ASKED + index)
        # Queries along the second axis: their sum is one of neighbouring lanes.
        scores = scores_of(means, q) * scale_log2 + log_sizes[:, None]
        masses += tl.sum(tl.exp2(scores - total[None, :]), 1)
    offs_c = first_cluster + tl.arange(0, BLOCK_C)
    asked = tl.minimum(size, ASKED)
    if size == 0:
        masses = tl.load(k_sizes_ptr + offs_c, mask=offs_c < k_clusters, other=0).to(tl.float32)
        asked = sum_of(k_sizes_ptr, k_clusters, SIZES_BLOCK)
    tl.store(masses_ptr + row * k_clusters + offs_c, masses / asked.to(tl.float32), mask=offs_c < k_clusters)


def block_masses_triton(
    q: Tensor, q_order: Tensor, k_centroids: Tensor, q_sizes: Tensor, k_sizes: Tensor, scale: float
) -> Tensor:
    """Compute ``block_masses_reference`` for at most ``MAX_CLUSTERS`` clusters on either side.

    Allocates the result, a copy of the centroids in the dtype of q, and fp32 [B, H, C_q, QUERIES]. Sums round in
    another order.
    """
    q = rows_of_unit_stride(q)
    batch, heads, tokens, dim = q.shape
    q_clusters, k_clusters = q_sizes.shape[2], k_sizes.shape[2]
    means = k_centroids.to(q.dtype).contiguous()
    q_order, q_sizes, k_sizes = (each.contiguous() for each in (q_order, q_sizes, k_sizes))
    totals = torch.empty((batch, heads, q_clusters, QUERIES), dtype=torch.float32, device=q.device)
    masses = torch.empty((batch, heads, q_clusters, k_clusters), dtype=torch.float32, device=q.device)
    tile = _tile(q.dtype, dim, k_clusters) | {"DIM": dim, "BLOCK_D": padded_power_of_two(dim)}
    sizes = (heads, heads // k_sizes.shape[1], tokens, q_clusters, k_clusters)
    parts, blocks = QUERIES // tile["BLOCK_M"], cdiv(k_clusters, tile["BLOCK_C"])
    with torch.cuda.device_of(q):
        totals_kernel[(q_clusters * parts, batch * heads)](
            q, q_order, means, q_sizes, k_sizes, totals, *q.stride()[:3], scale * LOG2_E, *sizes,
            num_stages=NUM_STAGES, **tile,
        )  # fmt: skip
        masses_kernel[(q_clusters * blocks, batch * heads)](
            q, q_order, means, q_sizes, k_sizes, totals, masses, *q.stride()[:3], scale * LOG2_E, *sizes,
            num_stages=NUM_STAGES, **tile,
        )  # fmt: skip
    return masses


def aot_variants() -> list[AotVariant]:
    """Return both kernels for the usual dtypes and head dims, few and many clusters."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    strides = ("stride_q_b", "stride_q_h", "stride_q_n")
    variants = []
    for kind, dim, clusters in (
        ("bf16", 128, 512),
        ("bf16", 64, 512),
        ("bf16", 256, 64),
        ("fp16", 80, 100),
        ("fp32", 128, 512),
    ):
        tile = _tile(dtypes[kind], dim, clusters)
        warps = tile.pop("num_warps")
        pointers = {"q_ptr": f"*{kind}", "q_order_ptr": "*i32", "means_ptr": f"*{kind}", "q_sizes_ptr": "*i32"}
        pointers |= {"k_sizes_ptr": "*i32", "totals_ptr": "*fp32"}
        for fn, name, kernel_pointers in (
            (totals_kernel, "totals", pointers),
            (masses_kernel, "masses", pointers | {"masses_ptr": "*fp32"}),
        ):
            variants.append(
                AotVariant(
                    name=f"{name}_{kind}_d{dim}_c{clusters}",
                    fn=fn,
                    signature=kernel_pointers
                    | dict.fromkeys(strides, "i32")
                    | {"scale_log2": "fp32"}
                    | dict.fromkeys(("heads", "repeats", "tokens", "q_clusters", "k_clusters"), "i32"),
                    constexprs=tile | {"DIM": dim, "BLOCK_D": padded_power_of_two(dim)},
                    num_warps=warps,
                    num_stages=NUM_STAGES,
                    divisible_by_16=(*kernel_pointers, *strides),
                )
            )
    return variants
