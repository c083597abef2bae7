"""A stable counting sort of labels, without atomics: what ``sort_labels`` and clustering share.

The labels of every block of tokens have been counted. Two launches: add the counts up over blocks and clusters; place
every token behind the equal labels before it. Queries and keys share them: the buffers hold the rows of all query
heads, then those of all key heads.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.launch import RepeatableLaunch, cdiv, persistent_grid
from svg2_compile.kernels.sides import SIZES, Sides, locate, row_start, tiles_to_do

COUNT_N = 512  # tokens counted together; the table of counts takes 4 * C / 512 bytes a token
PLACE_N = 32  # tokens placed at a time, one by each thread
TABLE_COLUMNS = 4  # the table's rows are multiples of this, so that four counts are one access
SCAN_ELEMENTS = 8192  # counts added up at a time
SCAN_WARPS = 8
SCAN_REGISTERS = 255  # of a thread; there are fewer programs than processors
PLACE_WARPS = 1
PROGRAMS_PER_PROCESSOR = 16
PLACE_PROGRAMS_PER_PROCESSOR = 32  # a block is placed in one chain of loads; many chains hide their latency


def table_columns(clusters: int) -> int:
    """Return the columns of the table of counts."""
    return cdiv(clusters, TABLE_COLUMNS) * TABLE_COLUMNS


def table_elements(sides: Sides) -> int:
    """Return the elements of the table of counts."""
    return sides.total(*(cdiv(n, COUNT_N) * table_columns(c) for n, c in sides.tokens_and_clusters))


@triton.jit
def count_labels(labels_ptr, counts_ptr, first, tokens, columns, COUNT_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Count the labels of one block of a head; the pointers are those of its head and of its row in the table."""
    offs_n = first + tl.arange(0, COUNT_N)
    offs_c = tl.arange(0, BLOCK_C)
    is_token = offs_n < tokens
    label = tl.load(labels_ptr + offs_n, mask=is_token, other=0)
    counts = tl.histogram(label, BLOCK_C, mask=is_token)
    tl.store(counts_ptr + offs_c, counts, mask=offs_c < columns)


@triton.jit(do_not_specialize=[*SIZES, "iteration"])
def scan_kernel(
    counts_ptr,
    q_sizes_ptr,
    k_sizes_ptr,
    starts_ptr,
    needed_ptr,
    batch,
    q_heads,
    k_heads,
    q_tokens,
    k_tokens,
    q_clusters,
    k_clusters,
    iteration,
    COUNT_N: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Turn the counts of each block into those of the blocks before it, and write every cluster's size and start.

    A row of ``starts`` has one element more than clusters: the last is the number of tokens.
    """
    q_rows = tiles_to_do(batch, q_heads, 1, needed_ptr, iteration, 1, 0)
    k_rows = tiles_to_do(batch, k_heads, 1, needed_ptr, iteration, 1, 1)
    q_columns = tl.cdiv(q_clusters, TABLE_COLUMNS) * TABLE_COLUMNS
    k_columns = tl.cdiv(k_clusters, TABLE_COLUMNS) * TABLE_COLUMNS
    offs_c = tl.arange(0, BLOCK_C)
    for item in range(tl.program_id(0), q_rows + k_rows, tl.num_programs(0)):
        is_k, row, _ = locate(item, q_rows, 1, 1, 1)
        clusters = tl.where(is_k, k_clusters, q_clusters)
        columns = tl.where(is_k, k_columns, q_columns)
        blocks = tl.cdiv(tl.where(is_k, k_tokens, q_tokens), COUNT_N)
        q_table, k_table = tl.cdiv(q_tokens, COUNT_N) * q_columns, tl.cdiv(k_tokens, COUNT_N) * k_columns
        table = counts_ptr + row_start(is_k, row, batch * q_heads, q_table, k_table)
        sizes = tl.zeros([BLOCK_C], tl.int32)
        for first_block in range(0, blocks, BLOCK_B):
            offs_b = first_block + tl.arange(0, BLOCK_B)
            pointers = table + (tl.cast(offs_b, tl.int64) * columns)[:, None] + offs_c[None, :]
            mask = (offs_b < blocks)[:, None] & (offs_c < columns)[None, :]
            counts = tl.load(pointers, mask=mask, other=0)
            # In place: an element is overwritten only with a sum it is part of, hence after it was read.
            tl.store(pointers, sizes[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
            sizes += tl.sum(counts, 0)
        is_cluster = offs_c < clusters
        sizes_ptr = tl.where(is_k, k_sizes_ptr, q_sizes_ptr)
        tl.store(sizes_ptr + tl.cast(row, tl.int64) * clusters + offs_c, sizes, mask=is_cluster)
        starts = starts_ptr + row_start(is_k, row, batch * q_heads, q_clusters + 1, k_clusters + 1)
        tl.store(starts, 0)
        tl.store(starts + 1 + offs_c, tl.cumsum(sizes, 0), mask=is_cluster)


@triton.jit(do_not_specialize=[*SIZES, "iteration"])
def place_kernel(
    labels_ptr,
    counts_ptr,
    starts_ptr,
    q_order_ptr,
    k_order_ptr,
    needed_ptr,
    batch,
    q_heads,
    k_heads,
    q_tokens,
    k_tokens,
    q_clusters,
    k_clusters,
    iteration,
    COUNT_N: tl.constexpr,
    PLACE_N: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr,
):
    """Write every token to its sorted position: its cluster's start plus the equal labels before it.

    A program goes through its block ``PLACE_N`` tokens at a time and adds what it placed to its row of the table.
    """
    q_tiles = tiles_to_do(batch, q_heads, q_tokens, needed_ptr, iteration, COUNT_N, 0)
    k_tiles = tiles_to_do(batch, k_heads, k_tokens, needed_ptr, iteration, COUNT_N, 1)
    q_columns = tl.cdiv(q_clusters, TABLE_COLUMNS) * TABLE_COLUMNS
    k_columns = tl.cdiv(k_clusters, TABLE_COLUMNS) * TABLE_COLUMNS
    lane = tl.arange(0, PLACE_N)
    # What an equal label adds: one token to the cluster in the low half, one token before this one in the high half.
    weight = tl.where(lane[:, None] < lane[None, :], 0x10001, 1)
    for tile in range(tl.program_id(0), q_tiles + k_tiles, tl.num_programs(0)):
        is_k, row, block = locate(tile, q_tiles, q_tokens, k_tokens, COUNT_N)
        tokens = tl.where(is_k, k_tokens, q_tokens)
        labels_row = labels_ptr + row_start(is_k, row, batch * q_heads, q_tokens, k_tokens)
        starts_row = starts_ptr + row_start(is_k, row, batch * q_heads, q_clusters + 1, k_clusters + 1)
        order_row = tl.where(is_k, k_order_ptr, q_order_ptr) + tl.cast(row, tl.int64) * tokens
        q_table, k_table = tl.cdiv(q_tokens, COUNT_N) * q_columns, tl.cdiv(k_tokens, COUNT_N) * k_columns
        table = counts_ptr + row_start(is_k, row, batch * q_heads, q_table, k_table)
        table += tl.cast(block, tl.int64) * tl.where(is_k, k_columns, q_columns)
        begin = block * COUNT_N
        stop = tl.minimum(begin + COUNT_N, tokens)
        next_label = tl.load(labels_row + begin + lane, mask=begin + lane < stop, other=-1)
        for first in range(begin, stop, PLACE_N):
            offs_n = first + lane
            is_token = offs_n < stop
            label = next_label
            next_label = tl.load(labels_row + offs_n + PLACE_N, mask=offs_n + PLACE_N < stop, other=-1)
            start = tl.load(starts_row + label, mask=is_token, other=0)
            before = tl.load(table + label, mask=is_token, other=0)
            equal = tl.sum(tl.where(label[:, None] == label[None, :], weight, 0), 0)
            # Everybody has read the table before anybody writes it, and the next tokens read what was written.
            tl.debug_barrier()
            tl.store(table + label, before + (equal & 0xFFFF), mask=is_token)
            tl.debug_barrier()
            tl.store(order_row + (start + before + (equal >> 16)), offs_n, mask=is_token)


@dataclass(frozen=True, slots=True)
class SortedLabels:
    """What the sort writes, with its table of counts."""

    q_order: Tensor
    """int32 [B, H, N], the token found at each sorted position."""
    k_order: Tensor
    """The same of the second side; anything where there is none."""
    q_sizes: Tensor
    """int32 [B, H, C], tokens per cluster."""
    k_sizes: Tensor
    """The same of the second side; anything where there is none."""
    starts: Tensor
    """int32, for every head of both sides [C + 1]: the sorted position of each cluster's first token, and N."""
    counts: Tensor
    """int32, for every head of both sides at least [ceil(N / COUNT_N), table_columns(C)]."""

    @classmethod
    def empty(cls, sides: Sides, counts: Tensor) -> "SortedLabels":
        """Return uninitialised tensors around a table of ``table_elements``."""

        def empty(heads: int, row: int) -> Tensor:
            return counts.new_empty((sides.batch, heads, row))

        (q_tokens, q_clusters), (k_tokens, k_clusters) = sides.tokens_and_clusters
        return cls(
            q_order=empty(sides.q_heads, q_tokens),
            k_order=empty(sides.k_heads, k_tokens),
            q_sizes=empty(sides.q_heads, q_clusters),
            k_sizes=empty(sides.k_heads, k_clusters),
            starts=counts.new_empty(sides.total(q_clusters + 1, k_clusters + 1)),
            counts=counts,
        )


def launch_sort(
    labels: Tensor, result: SortedLabels, sides: Sides, needed: Tensor | None = None
) -> tuple[RepeatableLaunch, RepeatableLaunch]:
    """Sort ``labels``, int32 and contiguous, into ``result``, whose counts are those of the labels.

    It is iteration 0. Leaves a side alone where ``needed``, int32 [2] on the device, is given and not above that.
    """
    blocks = sides.total(*(cdiv(tokens, COUNT_N) for tokens, _ in sides.tokens_and_clusters))
    scan_grid = persistent_grid(labels.device, sides.total(1, 1), PROGRAMS_PER_PROCESSOR)
    place_grid = persistent_grid(labels.device, blocks, PLACE_PROGRAMS_PER_PROCESSOR)
    with torch.cuda.device_of(labels):
        scan = RepeatableLaunch.first(
            scan_kernel,
            scan_grid,
            result.counts,
            result.q_sizes,
            result.k_sizes,
            result.starts,
            needed,
            *sides.arguments(),
            0,  # iteration
            COUNT_N=COUNT_N,
            TABLE_COLUMNS=TABLE_COLUMNS,
            BLOCK_B=scan_blocks(sides.block_c),
            BLOCK_C=sides.block_c,
            num_warps=SCAN_WARPS,
            num_stages=1,
            maxnreg=SCAN_REGISTERS,
        )
        place = RepeatableLaunch.first(
            place_kernel,
            place_grid,
            labels,
            result.counts,
            result.starts,
            result.q_order,
            result.k_order,
            needed,
            *sides.arguments(),
            0,  # iteration
            COUNT_N=COUNT_N,
            PLACE_N=PLACE_N,
            TABLE_COLUMNS=TABLE_COLUMNS,
            num_warps=PLACE_WARPS,
            num_stages=1,
        )
    return scan, place


def scan_blocks(block_c: int) -> int:
    """Return how many blocks the scan adds up at a time."""
    return min(32, SCAN_ELEMENTS // block_c)
