"""The sums of the tokens of every cluster, in Triton; the last of the keys can also write them, and values, sorted."""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.launch import padded_power_of_two
from svg2_compile.kernels.sides import SIZES, locate, row_start, tiles_to_do
from svg2_compile.kernels.token_variants import token_variant

SUM_N = 256  # sorted tokens added up by one program at a time
SUM_BYTES = 8192  # of x, read together by one program
SUM_WARPS = 4


@triton.jit(do_not_specialize=[*SIZES, "iteration"])
def sum_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_order_ptr,
    k_order_ptr,
    starts_ptr,
    sums_ptr,
    k_clustered_ptr,
    v_clustered_ptr,
    needed_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_n,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    stride_v_b,
    stride_v_h,
    stride_v_n,
    batch,
    q_heads,
    k_heads,
    q_tokens,
    k_tokens,
    q_clusters,
    k_clusters,
    iteration,
    DIM: tl.constexpr,
    SUM_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add up the tokens of every cluster within every tile of the sorted tokens.

    The sum of cluster c in tile t goes to slot t + c. Along the sorted tokens one of the two grows at every step, so
    no slot is taken twice, and the slots of a cluster are neighbours.

    With pointers for them, the last needed iteration of the keys also writes keys and values in sorted order.
    """
    q_tiles = tiles_to_do(batch, q_heads, q_tokens, needed_ptr, iteration, SUM_N, 0)
    k_tiles = tiles_to_do(batch, k_heads, k_tokens, needed_ptr, iteration, SUM_N, 1)
    is_last = tl.load(needed_ptr + 1) == iteration + 1
    in_tile = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    is_dim = offs_d < DIM
    for tile in range(tl.program_id(0), q_tiles + k_tiles, tl.num_programs(0)):
        is_k, row, tile_of_row = locate(tile, q_tiles, q_tokens, k_tokens, SUM_N)
        heads = tl.where(is_k, k_heads, q_heads)
        tokens = tl.where(is_k, k_tokens, q_tokens)
        clusters = tl.where(is_k, k_clusters, q_clusters)
        stride_n = tl.where(is_k, stride_k_n, stride_q_n)
        batch_index, head = tl.cast(row // heads, tl.int64), tl.cast(row % heads, tl.int64)
        x_row = tl.where(is_k, k_ptr, q_ptr) + batch_index * tl.where(is_k, stride_k_b, stride_q_b)
        x_row += head * tl.where(is_k, stride_k_h, stride_q_h)
        order_row = tl.where(is_k, k_order_ptr, q_order_ptr) + tl.cast(row, tl.int64) * tokens
        v_row = v_ptr + batch_index * stride_v_b + head * stride_v_h
        copies_start = tl.cast(row, tl.int64) * tokens * DIM
        ends = starts_ptr + row_start(is_k, row, batch * q_heads, q_clusters + 1, k_clusters + 1) + 1
        q_slots = tl.cdiv(q_tokens, SUM_N) + q_clusters - 1
        k_slots = tl.cdiv(k_tokens, SUM_N) + k_clusters - 1
        slot_row = sums_ptr + (row_start(is_k, row, batch * q_heads, q_slots, k_slots) + tile_of_row) * DIM

        begin = tile_of_row * SUM_N
        stop = tl.minimum(begin + SUM_N, tokens)
        token = tl.load(order_row + begin + in_tile, mask=begin + in_tile < stop, other=0)
        is_before = tl.load(ends + offs_c, mask=offs_c < clusters, other=2147483647) <= begin
        cluster = tl.sum(is_before.to(tl.int32), 0)
        next_end = tl.load(ends + cluster)
        while begin < stop:
            end = tl.minimum(next_end, stop)
            next_end = tl.load(ends + cluster + 1, mask=cluster + 1 < clusters, other=0)
            totals = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for first in range(begin, end, BLOCK_N):
                offs_n = first + in_tile
                mask = (offs_n < end)[:, None] & is_dim[None, :]
                here = token.to(tl.int64)
                rows = tl.load(x_row + (here * stride_n)[:, None] + offs_d[None, :], mask=mask, other=0.0)
                # Which tokens are next, whatever their cluster, is read while their rows' predecessors are on the way.
                following = tl.minimum(first + BLOCK_N, end) + in_tile
                token = tl.load(order_row + following, mask=following < stop, other=0)
                if k_clustered_ptr is not None:  # noqa: SIM102  (one is known at compile time, one is not)
                    if is_k & is_last:
                        values = tl.load(v_row + (here * stride_v_n)[:, None] + offs_d[None, :], mask=mask)
                        target = copies_start + offs_n.to(tl.int64)[:, None] * DIM + offs_d[None, :]
                        tl.store(k_clustered_ptr + target, rows, mask=mask)
                        tl.store(v_clustered_ptr + target, values, mask=mask)
                totals += rows.to(tl.float32)
            tl.store(slot_row + tl.cast(cluster, tl.int64) * DIM + offs_d, tl.sum(totals, 0), mask=is_dim)
            begin = end
            cluster += 1


def sum_rows(dtype: torch.dtype, block_d: int) -> int:
    """Return how many rows of ``block_d`` are read together to be added up."""
    return SUM_BYTES // (block_d * dtype.itemsize)


def sum_registers(capability: int | None) -> int:
    """Return the most registers of a thread: four programs share a processor; on sm_120 they would spill."""
    return 168 if capability == 120 else 128


def sum_variant(name: str, dtype: torch.dtype, dim: int, absent: dict[str, object], capability: int) -> AotVariant:
    """Return the sum for rows of ``dim``, with or without what else it can write."""
    block_d = padded_power_of_two(dim)
    shape = {"DIM": dim, "SUM_N": SUM_N, "BLOCK_N": sum_rows(dtype, block_d), "BLOCK_C": 512, "BLOCK_D": block_d}
    return token_variant(name, sum_kernel, dtype, {**shape, **absent}, SUM_WARPS, 1, sum_registers(capability))
