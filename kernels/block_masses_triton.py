"""``svg2::block_masses`` in Triton: softmaxes of all queries over the means of the keys, added up cluster by cluster.

A program takes a tile of queries of one cluster, and the blocks of means twice: for the log-sum-exp of every query,
then for the probabilities, which it adds up over its queries. A last kernel adds the sums of a cluster's tiles. So
nothing is added in memory, and the order of the sums is always the same.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.attention_steps import (
    LOG2_E,
    load_rows,
    query_rows,
    scores_of,
    softmax,
)
from svg2_compile.kernels.cluster_sizes import sum_of
from svg2_compile.kernels.launch import cdiv, padded_power_of_two, rows_of_unit_stride
from svg2_compile.kernels.work_list_triton import query_tiles_triton

# Means, or masses, of a program of the first and of the last kernel; tiles that the last one adds at a time.
BLOCK_ROWS = 32
BLOCK_K = 128
BLOCK_TILES = 8
NUM_WARPS = 4
LOWEST = tl.constexpr(-3.0e38)


def _tile(dtype: torch.dtype, dim: int, k_clusters: int) -> dict[str, int]:
    """Return queries and key clusters of a tile, warps and stages: fp32 products keep both operands in registers."""
    if dtype == torch.float32:
        queries, clusters, warps, stages = 32, 32 if dim <= 128 else 16, 8, 2
    else:
        queries, clusters, warps, stages = (128, 64, 4, 2) if dim <= 128 else (64, 32, 4, 2)
    clusters = min(clusters, padded_power_of_two(k_clusters))
    return {"BLOCK_M": queries, "BLOCK_C": clusters, "num_warps": warps, "num_stages": stages}


@triton.jit(do_not_specialize=["k_clusters"])
def means_kernel(
    centroids_ptr,
    k_sizes_ptr,
    means_ptr,
    log_sizes_ptr,
    k_clusters,
    slots,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Write means [slots, BLOCK_D] in the dtype of the queries and log2 of the sizes; 0 and -inf where no key is."""
    offs_c = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    sizes = tl.load(k_sizes_ptr + group * k_clusters + offs_c, mask=offs_c < k_clusters, other=0)
    # The mean of an empty cluster may hold anything.
    means = load_rows(centroids_ptr + group * k_clusters * DIM, offs_c, DIM, sizes > 0, offs_d, DIM, True)
    rows = group * slots + offs_c
    is_slot = offs_c < slots
    means_ptrs = means_ptr + rows[:, None] * BLOCK_D + offs_d[None, :]
    tl.store(means_ptrs, means.to(means_ptr.dtype.element_ty), mask=is_slot[:, None])
    tl.store(log_sizes_ptr + rows, tl.log2(sizes.to(tl.float32)), mask=is_slot)


@triton.jit(do_not_specialize=["heads", "repeats", "tokens", "tile_slots"])
def sums_kernel(
    q_ptr,
    q_order_ptr,
    tiles_ptr,
    means_ptr,
    log_sizes_ptr,
    sums_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_n,
    scale_log2,
    heads,
    repeats,
    tokens,
    tile_slots,
    slots,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the sums over a tile of queries of P_tj / n_j, for every key cluster j."""
    head = tl.program_id(1).to(tl.int64)
    tile = head * tile_slots + tl.program_id(0)
    first_row = tl.load(tiles_ptr + tile * 3 + 1)
    last_row = tl.load(tiles_ptr + tile * 3 + 2)
    if first_row >= last_row:
        return
    group = head // repeats
    offs_c = tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr += head // heads * stride_q_b + head % heads * stride_q_h
    rows, inside = query_rows(q_order_ptr + head * tokens, first_row, last_row, BLOCK_M)
    q = load_rows(q_ptr, rows, stride_q_n, inside, offs_d, DIM, True)
    means_ptr += group * slots * BLOCK_D
    log_sizes_ptr += group * slots

    # Not -inf: the first blocks may have no keys, and then -inf is the difference from their maximum.
    highest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, slots, BLOCK_C):
        means = load_rows(means_ptr, first + offs_c, BLOCK_D, offs_c, offs_d, BLOCK_D, False)
        log_sizes = tl.load(log_sizes_ptr + first + offs_c)
        scores = scores_of(q, means) * scale_log2 + log_sizes[None, :]
        _, _, highest, total = softmax(scores, offs_c, 1.0, highest, total, False)
    # Nothing is left of the probabilities of a row that is none.
    total = tl.where(inside, highest + tl.log2(total), float("inf"))
    for first in range(0, slots, BLOCK_C):
        means = load_rows(means_ptr, first + offs_c, BLOCK_D, offs_c, offs_d, BLOCK_D, False)
        # Queries along the second axis: their sum is one of neighbouring lanes.
        weights = tl.exp2(scores_of(means, q) * scale_log2 - total[None, :])
        tl.store(sums_ptr + tile * slots + first + offs_c, tl.sum(weights, 1))


@triton.jit(do_not_specialize=["repeats", "q_clusters", "k_clusters", "tile_slots"])
def block_masses_kernel(
    sums_ptr,
    q_sizes_ptr,
    k_sizes_ptr,
    masses_ptr,
    repeats,
    q_clusters,
    k_clusters,
    tile_slots,
    slots,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Write ``BLOCK_K`` masses of one query cluster."""
    cluster = tl.program_id(0) % q_clusters
    offs_k = tl.program_id(0) // q_clusters * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_t = tl.arange(0, BLOCK_TILES)
    head = tl.program_id(1).to(tl.int64)
    q_sizes_ptr += head * q_clusters
    k_sizes_ptr += head // repeats * k_clusters
    is_cluster = offs_k < k_clusters
    k_sizes = tl.load(k_sizes_ptr + offs_k, mask=is_cluster, other=0)
    # The tiles of this cluster come after those of the clusters before it.
    offs_q = tl.arange(0, BLOCK_Q)
    tiles_before = tl.cdiv(tl.load(q_sizes_ptr + offs_q, mask=offs_q < cluster, other=0), BLOCK_M)
    size = tl.load(q_sizes_ptr + cluster)
    tiles = tl.cdiv(size, BLOCK_M)
    sums_ptr += (head * tile_slots + tl.sum(tiles_before, 0)) * slots
    sums = tl.zeros([BLOCK_TILES, BLOCK_K], tl.float32)
    for first in range(0, tiles, BLOCK_TILES):
        of_tiles = sums_ptr + (first + offs_t).to(tl.int64)[:, None] * slots + offs_k[None, :]
        sums += tl.load(of_tiles, mask=(first + offs_t < tiles)[:, None] & (offs_k < slots)[None, :], other=0.0)
    # Where no key is, the sum may be infinite.
    masses = tl.where(k_sizes > 0, tl.sum(sums, 0) * k_sizes.to(tl.float32), 0.0)
    if size == 0:
        masses = k_sizes.to(tl.float32)
        size = sum_of(k_sizes_ptr, k_clusters, BLOCK_K)
    tl.store(
        masses_ptr + (head * q_clusters + cluster) * k_clusters + offs_k, masses / size.to(tl.float32), mask=is_cluster
    )


def block_masses_triton(
    q: Tensor, q_order: Tensor, k_centroids: Tensor, q_sizes: Tensor, k_sizes: Tensor, scale: float
) -> Tensor:
    """Compute ``block_masses_reference`` for at most ``MAX_CLUSTERS`` clusters on either side.

    Allocates the result, a copy of the centroids in the dtype of q, the tiles of queries, and the sums of each tile,
    less than 4 B H (N / 128 + C_q) (C_k + 64) bytes for 16-bit queries of up to 128 elements: 54 MiB for q of
    (1, 40, 75600, 128) and 100 / 500 clusters. Sums round in another order.
    """
    q = rows_of_unit_stride(q)
    batch, heads, tokens, dim = q.shape
    k_heads, k_clusters = k_sizes.shape[1:]
    q_clusters, repeats = q_sizes.shape[2], heads // k_heads
    k_centroids, q_order, q_sizes, k_sizes = (each.contiguous() for each in (k_centroids, q_order, q_sizes, k_sizes))
    tile = _tile(q.dtype, dim, k_clusters)
    block_m, block_c, block_d = tile["BLOCK_M"], tile["BLOCK_C"], padded_power_of_two(dim)
    slots = cdiv(k_clusters, block_c) * block_c
    means = torch.empty((batch, k_heads, slots, block_d), dtype=q.dtype, device=q.device)
    log_sizes = torch.empty((batch, k_heads, slots), dtype=torch.float32, device=q.device)
    tiles = query_tiles_triton(q_sizes, tokens, block_m)
    tile_slots = tiles.shape[2]
    sums = torch.empty((batch, heads, tile_slots, slots), dtype=torch.float32, device=q.device)
    masses = torch.empty((batch, heads, q_clusters, k_clusters), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        means_kernel[(cdiv(slots, BLOCK_ROWS), batch * k_heads)](
            k_centroids, k_sizes, means, log_sizes, k_clusters, slots,
            DIM=dim, BLOCK_D=block_d, BLOCK_ROWS=BLOCK_ROWS, num_warps=NUM_WARPS,
        )  # fmt: skip
        sums_kernel[(tile_slots, batch * heads)](
            q, q_order, tiles, means, log_sizes, sums, *q.stride()[:3], scale * LOG2_E,
            heads, repeats, tokens, tile_slots, slots,
            DIM=dim, BLOCK_D=block_d, **tile,
        )  # fmt: skip
        block_masses_kernel[(q_clusters * cdiv(k_clusters, BLOCK_K), batch * heads)](
            sums, q_sizes, k_sizes, masses, repeats, q_clusters, k_clusters, tile_slots, slots,
            num_warps=NUM_WARPS, **_last_constexprs(block_m, q_clusters),
        )  # fmt: skip
    return masses


def _last_constexprs(block_m: int, q_clusters: int) -> dict[str, int]:
    """Return the compile-time arguments of the last kernel."""
    blocks = {"BLOCK_Q": padded_power_of_two(q_clusters), "BLOCK_K": BLOCK_K, "BLOCK_TILES": BLOCK_TILES}
    return {"BLOCK_M": block_m} | blocks


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernels for the usual dtypes and head dims, few and many clusters."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    variants = []
    for kind, dim, clusters in (
        ("bf16", 128, 512),
        ("bf16", 64, 512),
        ("bf16", 256, 64),
        ("fp16", 80, 100),
        ("fp32", 128, 512),
        ("fp32", 256, 64),
    ):
        tile = _tile(dtypes[kind], dim, clusters)
        warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
        widths = {"DIM": dim, "BLOCK_D": padded_power_of_two(dim)}
        last = _last_constexprs(tile["BLOCK_M"], clusters)
        for fn, constexprs, num_warps, num_stages in (
            (means_kernel, widths | {"BLOCK_ROWS": BLOCK_ROWS}, NUM_WARPS, 3),
            (sums_kernel, widths | tile, warps, stages),
            (block_masses_kernel, last, NUM_WARPS, 3),
        ):
            types = dict.fromkeys(fn.arg_names, "i32") | {"scale_log2": "fp32"}
            types |= dict.fromkeys(("q_ptr", "means_ptr"), f"*{kind}")
            types |= dict.fromkeys(("centroids_ptr", "log_sizes_ptr", "sums_ptr", "masses_ptr"), "*fp32")
            types |= dict.fromkeys(("q_order_ptr", "tiles_ptr", "q_sizes_ptr", "k_sizes_ptr"), "*i32")
            signature = {name: types[name] for name in fn.arg_names if name not in constexprs}
            variants.append(
                AotVariant(
                    name=f"{fn.__name__}_{kind}_d{dim}_c{clusters}",
                    fn=fn,
                    signature=signature,
                    constexprs=constexprs,
                    num_warps=num_warps,
                    num_stages=num_stages,
                    divisible_by_16=tuple(
                        x for x in signature if x.startswith("stride") or x.endswith("_ptr") or x == "slots"
                    ),
                )
            )
    return variants
