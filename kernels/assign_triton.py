"""The assignment of ``svg2::kmeans_`` in Triton: every token to its nearest centroid, and the labels counted."""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.assign_tile import AssignTile, assign_tile
from svg2_compile.kernels.counting_sort import COUNT_N, TABLE_COLUMNS, count_labels
from svg2_compile.kernels.launch import RepeatableLaunch, padded_power_of_two
from svg2_compile.kernels.sides import SIZES, Sides, locate, row_start, tiles_to_do
from svg2_compile.kernels.token_variants import NAMES, ROWS, token_variant


@triton.jit(do_not_specialize=[*SIZES, "iteration"])
def assign_triton_kernel(
    q_ptr,
    k_ptr,
    operand_ptr,
    half_norms_ptr,
    labels_ptr,
    counts_ptr,
    needed_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_n,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    batch,
    q_heads,
    k_heads,
    q_tokens,
    k_tokens,
    q_clusters,
    k_clusters,
    iteration,
    DIM: tl.constexpr,
    COUNT_N: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr,
    COUNT_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the label of every token, argmax_j (x . c_j - ||c_j||^2 / 2), the lowest of equal ones; count the labels.

    A program takes a block of the table of counts, ``BLOCK_N`` tokens at a time. Blocks and steps within them are one
    loop: of two, the compiler would keep the addresses of the tokens in registers that another program could use.
    """
    STEPS: tl.constexpr = COUNT_N // BLOCK_N
    q_tiles = tiles_to_do(batch, q_heads, q_tokens, needed_ptr, iteration, COUNT_N, 0)
    k_tiles = tiles_to_do(batch, k_heads, k_tokens, needed_ptr, iteration, COUNT_N, 1)
    q_padded, k_padded = tl.cdiv(q_clusters, BLOCK_C) * BLOCK_C, tl.cdiv(k_clusters, BLOCK_C) * BLOCK_C
    in_tile = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    own_tiles = tl.cdiv(q_tiles + k_tiles - tl.program_id(0), tl.num_programs(0))
    for step in range(own_tiles * STEPS):
        tile = tl.program_id(0) + step // STEPS * tl.num_programs(0)
        is_k, row, block = locate(tile, q_tiles, q_tokens, k_tokens, COUNT_N)
        heads = tl.where(is_k, k_heads, q_heads)
        tokens = tl.where(is_k, k_tokens, q_tokens)
        padded = tl.where(is_k, k_padded, q_padded)
        first_token = block * COUNT_N + step % STEPS * BLOCK_N
        offs_n = first_token + in_tile
        is_token = offs_n < tokens
        x_row = tl.where(is_k, k_ptr, q_ptr) + tl.cast(row // heads, tl.int64) * tl.where(is_k, stride_k_b, stride_q_b)
        x_row += tl.cast(row % heads, tl.int64) * tl.where(is_k, stride_k_h, stride_q_h)
        x_rows = x_row + offs_n.to(tl.int64) * tl.where(is_k, stride_k_n, stride_q_n)
        x_pointers = x_rows[:, None] + offs_d[None, :]
        x = tl.load(x_pointers, mask=is_token[:, None] & (offs_d < DIM)[None, :], other=0.0)

        # A running maximum for every column of the tile, so that columns are compared only once, at the end.
        best = tl.full([BLOCK_N, BLOCK_C], float("-inf"), tl.float32)
        best_first = tl.zeros([BLOCK_N, BLOCK_C], tl.int32)
        operand_start = row_start(is_k, row, batch * q_heads, q_padded, k_padded)
        operand_pointers = operand_ptr + operand_start * BLOCK_D + offs_c[None, :] * BLOCK_D + offs_d[:, None]
        half_norm_pointers = half_norms_ptr + operand_start + offs_c
        for first in range(0, tl.where(first_token < tokens, padded, 0), BLOCK_C):
            operand = tl.load(operand_pointers + first * BLOCK_D)  # [BLOCK_D, BLOCK_C]
            half_norms = tl.load(half_norm_pointers + first)
            scores = tl.broadcast_to(-half_norms[None, :], [BLOCK_N, BLOCK_C])
            scores = tl.dot(x, operand, scores, input_precision="ieee")
            is_better = scores > best
            best = tl.where(is_better, scores, best)
            best_first = tl.where(is_better, first, best_first)
        cluster = tl.where(best == tl.max(best, 1)[:, None], best_first + offs_c[None, :], padded)
        labels_row = labels_ptr + row_start(is_k, row, batch * q_heads, q_tokens, k_tokens)
        tl.store(labels_row + offs_n, tl.min(cluster, 1), mask=is_token)

    # What this program labelled; in a loop of its own, which leaves the registers of the other one alone.
    tl.debug_barrier()
    q_columns = tl.cdiv(q_clusters, TABLE_COLUMNS) * TABLE_COLUMNS
    k_columns = tl.cdiv(k_clusters, TABLE_COLUMNS) * TABLE_COLUMNS
    q_table, k_table = tl.cdiv(q_tokens, COUNT_N) * q_columns, tl.cdiv(k_tokens, COUNT_N) * k_columns
    for tile in range(tl.program_id(0), q_tiles + k_tiles, tl.num_programs(0)):
        is_k, row, block = locate(tile, q_tiles, q_tokens, k_tokens, COUNT_N)
        columns = tl.where(is_k, k_columns, q_columns)
        labels_row = labels_ptr + row_start(is_k, row, batch * q_heads, q_tokens, k_tokens)
        counts_row = counts_ptr + row_start(is_k, row, batch * q_heads, q_table, k_table)
        counts_row += tl.cast(block, tl.int64) * columns
        tokens = tl.where(is_k, k_tokens, q_tokens)
        count_labels(labels_row, counts_row, block * COUNT_N, tokens, columns, COUNT_N, COUNT_C)


def launch_assign(
    grid: tuple[int],
    q: Tensor,
    k: Tensor,
    operand: Tensor,
    buffers: tuple[Tensor, ...],
    sides: Sides,
    tile: AssignTile,
) -> RepeatableLaunch:
    """Label the tokens of both sides, as iteration 0.

    Args:
        grid: any number of programs.
        q: [B, H, N, D], rows without gaps.
        k: the same of the second side; anything like it where there is none.
        operand: [padded C of all heads, padded D], the centroids in the dtype of the tokens.
        buffers: half squared norms, labels, counts and needed iterations, as the kernel takes them.
        sides: the sizes of both sides.
        tile: how the product is cut up.
    """
    return RepeatableLaunch.first(
        assign_triton_kernel,
        grid,
        q,
        k,
        operand,
        *buffers,
        *q.stride()[:3],
        *k.stride()[:3],
        *sides.arguments(),
        0,  # iteration
        **_constexprs(q.shape[3], tile, sides.block_c),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.max_registers,
    )


def _constexprs(dim: int, tile: AssignTile, count_c: int) -> dict[str, object]:
    """Return the compile-time arguments."""
    return {
        "DIM": dim,
        "COUNT_N": COUNT_N,
        "TABLE_COLUMNS": TABLE_COLUMNS,
        "COUNT_C": count_c,
        "BLOCK_N": tile.block_n,
        "BLOCK_C": tile.block_c,
        "BLOCK_D": padded_power_of_two(dim),
    }


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel for the usual rows."""
    variants = []
    for dtype, dim in ROWS:
        tile = assign_tile(dtype, padded_power_of_two(dim), capability)
        variants.append(
            token_variant(
                f"{assign_triton_kernel.__name__}_{NAMES[dtype]}_d{dim}",
                assign_triton_kernel,
                dtype,
                _constexprs(dim, tile, 512),
                tile.num_warps,
                tile.num_stages,
                tile.max_registers,
            )
        )
    return variants
