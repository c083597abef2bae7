"""Block-sparse attention for Hopper: warps that load and warps that multiply.

One program per tile of queries. A warp walks the runs of kept keys in pieces of 16 and lets the tensor memory
accelerator put eight of them into one tile of keys, wherever they lie; groups of four warps each attend from 64
queries. A group whose 64 rows hold no query, as many have in the last tile of a cluster, leaves the tensor cores to the
others.

At head dimension 128 there are two groups, and tensor cores work on the values of one tile while the exponentials of
the next are computed. At 64 exponentials take as long as products, and what counts is that some group always has a
product to issue: there are three, with too few registers each to do both at once.

A tile has eight slots. Slots hold the full pieces of all runs first, then the tail of every run: a piece that ends
where the run does, of which only the keys after the full pieces count. So all but the tails of runs shorter than a
piece read kept keys only. Tiles of context follow.
"""

# Gluon has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"
# mypy: disable-error-code="assignment"

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.attention_call import DTYPES, AttentionCall, Cut, attention_variants
from svg2_compile.kernels.gluon_names import element_type, load_box, shared_layout, thread_barrier
from svg2_compile.kernels.tuning import GLUON, GLUON_ROWS
from svg2_compile.kernels.tuning import PIECE as PIECE_KEYS
from svg2_compile.kernels.work_list import COUNTS, PIECES

LN_2 = gl.constexpr(math.log(2))
PIECE = gl.constexpr(PIECE_KEYS)
NUM_COUNTS = gl.constexpr(len(COUNTS))
FULL_PIECES = gl.constexpr(1 + PIECES.index(PIECE_KEYS))
LANES = gl.constexpr(32)
# Of a thread, by head dimension: the consumers', and the producer's.
REGISTERS = {64: (160, 32), 128: (224, 56)}


class Tiles(NamedTuple):
    """What the warps of a program share: tiles of keys and values on their way, and how many there are."""

    k_smem: Any  # [STAGES, BLOCK_N, DIM]
    v_smem: Any  # [STAGES, BLOCK_N, DIM]
    limit_smem: Any  # [MASKS, BLOCK_N]
    """The highest score of every key: -inf if it may not be attended to, else inf; of the first tile and all that are
    not full."""
    dirty_smem: Any  # [MASKS, 1]
    """Whether other keys of the tile may be NaN."""
    bars: Any
    """Of every stage: keys arrived; keys, and values of the tile before, used; values arrived."""
    full: Any
    """Tiles that have full pieces only; they are the first ones."""
    total: Any


class Keys(NamedTuple):
    """What one tile of queries attends to."""

    k_desc: Any
    v_desc: Any
    context_k_desc: Any
    context_v_desc: Any
    context_mask_ptr: Any
    runs_ptr: Any
    num_runs: Any
    num_full: Any
    """Full pieces of all runs."""
    context: Any
    first_row: Any
    """Where the head begins in ``k_desc``."""
    first_context_row: Any
    first_mask: Any
    """Where the batch entry begins in ``context_mask_ptr``."""


class Queries(NamedTuple):
    """A tile of queries, and where its results go."""

    q_smem: Any  # [GROUPS, ROWS, DIM]
    q_ptr: Any
    order_ptr: Any
    out_ptr: Any
    lse_ptr: Any
    stride_q_n: Any
    stride_out_n: Any
    first_row: Any
    last_row: Any
    scale_log2: Any


@gluon.jit
def _load_run(keys, run, is_needed, first, stop):
    """Return first and stop of a run if it is needed and there is one, else what is given."""
    is_needed = is_needed & (run < keys.num_runs)
    first = gl.load(keys.runs_ptr + run * 2, mask=is_needed, other=first)
    stop = gl.load(keys.runs_ptr + run * 2 + 1, mask=is_needed, other=stop)
    return first, stop


@gluon.jit
def _next_piece(keys, run, key, stop, next_key, next_stop):
    """Go on to the next full piece. The run after this one is known before it is needed."""
    key += PIECE
    is_done = key + PIECE > stop
    key = gl.where(is_done, next_key, key)
    stop = gl.where(is_done, next_stop, stop)
    run += is_done.to(gl.int32)
    next_key, next_stop = _load_run(keys, run + 1, is_done, next_key, next_stop)
    return run, key, stop, next_key, next_stop


@gluon.jit
def _begin(tiles, tile):
    """Announce a tile of keys and one of values, once what was there before has been used."""
    STAGES: gl.constexpr = tiles.k_smem.shape[0]
    BLOCK_N: gl.constexpr = tiles.k_smem.shape[1]
    BYTES: gl.constexpr = tiles.k_smem.dtype.primitive_bitwidth // 8 * BLOCK_N * tiles.k_smem.shape[2]
    stage = tile % STAGES
    after = tile - STAGES + 1  # says that the values of tile - STAGES were used, and before it that the keys were
    if after > 0:
        mbarrier.wait(tiles.bars.index(STAGES + after % STAGES), (after // STAGES) & 1)
    mbarrier.expect(tiles.bars.index(stage), BYTES)
    mbarrier.expect(tiles.bars.index(2 * STAGES + stage), BYTES)


@gluon.jit
def _load_piece(tiles, tile, slot: gl.constexpr, k_desc, v_desc, row):
    """Load the keys and the values of one slot of a tile."""
    STAGES: gl.constexpr = tiles.k_smem.shape[0]
    stage = tile % STAGES
    k_box = tiles.k_smem.index(stage).slice(slot * PIECE, PIECE)
    load_box(k_desc, [row, 0], tiles.bars.index(stage), k_box)
    v_box = tiles.v_smem.index(stage).slice(slot * PIECE, PIECE)
    load_box(v_desc, [row, 0], tiles.bars.index(2 * STAGES + stage), v_box)


@gluon.jit
def _tell_validity(tiles, tile, part: gl.constexpr, is_valid):
    """Write which keys of a part of a tile are valid, as many as a warp has lanes: all at once would spill."""
    MASKS: gl.constexpr = tiles.limit_smem.shape[0]
    limit = gl.where(is_valid, float("inf"), -float("inf"))
    tiles.limit_smem.index(tile % MASKS).slice(part * LANES, LANES).store(limit)


@gluon.jit
def _tell_dirt(tiles, tile, is_dirty):
    """Write whether a tile has NaN. What arrives on a barrier afterwards takes it, and validity, to who waits there."""
    MASKS: gl.constexpr = tiles.limit_smem.shape[0]
    one: gl.constexpr = gl.BlockedLayout([1], [LANES], [1], [0])
    tiles.dirty_smem.index(tile % MASKS).store(gl.full([1], is_dirty, gl.int32, one))
    thread_barrier()


@gluon.jit
def _produce(tiles, keys):
    """Load the tiles of keys and values in the order in which they are used."""
    BLOCK_N: gl.constexpr = tiles.k_smem.shape[1]
    SLOTS: gl.constexpr = BLOCK_N // PIECE
    PARTS: gl.constexpr = BLOCK_N // LANES
    layout: gl.constexpr = gl.BlockedLayout([1], [LANES], [1], [0])
    offs = gl.arange(0, LANES, layout)
    zeros = gl.zeros([LANES], gl.int32, layout)
    piece_tiles = (keys.num_full + keys.num_runs + SLOTS - 1) // SLOTS * (tiles.total > 0).to(gl.int32)
    # The first tile is masked in any case.
    for part in gl.static_range(PARTS):
        _tell_validity(tiles, 0, part, offs >= 0)
    _tell_dirt(tiles, 0, False)
    run = 0
    key, stop = _load_run(keys, 0, True, 0, 0)
    next_key, next_stop = _load_run(keys, 1, True, 0, 0)
    for tile in range(tiles.full):
        _begin(tiles, tile)
        for slot in gl.static_range(SLOTS):
            _load_piece(tiles, tile, slot, keys.k_desc, keys.v_desc, keys.first_row + key)
            run, key, stop, next_key, next_stop = _next_piece(keys, run, key, stop, next_key, next_stop)
    for tile in range(tiles.full, piece_tiles):
        tail = tile * SLOTS - keys.num_full
        for part in gl.static_range(PARTS):
            tails = tail + (part * LANES + offs) // PIECE
            firsts, stops = _load_run(keys, tails, tails >= 0, zeros, zeros)
            is_valid = (tails < 0) | (offs % PIECE >= PIECE - (stops - firsts) % PIECE)
            _tell_validity(tiles, tile, part, is_valid)
        # The last run is the shortest. What is read beside a run of less than a piece may be NaN.
        last = gl.minimum(tail + SLOTS, keys.num_runs) - 1
        last_key, last_stop = _load_run(keys, last, True, 0, 0)
        _tell_dirt(tiles, tile, last_stop - last_key < PIECE)
        _begin(tiles, tile)
        for slot in gl.static_range(SLOTS):
            # Slots that are left over repeat the last tail.
            _, tail_stop = _load_run(keys, gl.minimum(tail + slot, last), tail + slot >= 0, 0, 0)
            row = keys.first_row + gl.where(tail + slot >= 0, tail_stop - PIECE, key)
            _load_piece(tiles, tile, slot, keys.k_desc, keys.v_desc, row)
            run, key, stop, next_key, next_stop = _next_piece(keys, run, key, stop, next_key, next_stop)
    for tile in range(piece_tiles, tiles.total):
        first_key = (tile - piece_tiles) * BLOCK_N
        all_valid = 1
        for part in gl.static_range(PARTS):
            place = first_key + part * LANES + offs
            is_valid = place < keys.context
            if keys.context_mask_ptr is not None:
                is_valid = gl.load(keys.context_mask_ptr + keys.first_mask + place, mask=is_valid, other=0) != 0
            _tell_validity(tiles, tile, part, is_valid)
            all_valid = gl.minimum(all_valid, gl.min(is_valid.to(gl.int32), 0))
        _tell_dirt(tiles, tile, all_valid == 0)
        _begin(tiles, tile)
        for slot in gl.static_range(SLOTS):
            row = keys.first_context_row + first_key + slot * PIECE
            _load_piece(tiles, tile, slot, keys.context_k_desc, keys.context_v_desc, row)


@gluon.jit
def _mask(tiles, tile, scores):
    """Return the scores with those of keys that may not be attended to at -inf, were they NaN."""
    MASKS: gl.constexpr = tiles.limit_smem.shape[0]
    limit = tiles.limit_smem.index(tile % MASKS).load(gl.SliceLayout(0, scores.type.layout))
    return gl.minimum(scores, limit[None, :])


@gluon.jit
def _softmax(scores, scale_log2, row_max, row_sum):
    """Return the weights of a tile, the factor of what was accumulated before, and the new maximum and sum."""
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    shift = gl.where(new_max == -float("inf"), 0.0, new_max)
    weights = gl.exp2(scores * scale_log2 - shift[:, None])
    decay = gl.exp2(row_max - shift)
    return weights, decay, new_max, row_sum * decay + gl.sum(weights, 1)


@gluon.jit
def _clear(tiles, tile):
    """Overwrite values that may be NaN, which a weight of 0 would not undo.

    Every group of warps does it before it multiplies; they write the same.
    """
    MASKS: gl.constexpr = tiles.limit_smem.shape[0]
    STAGES: gl.constexpr = tiles.v_smem.shape[0]
    DIM: gl.constexpr = tiles.v_smem.shape[2]
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    if gl.max(tiles.dirty_smem.index(tile % MASKS).load(one), 0) != 0:
        # More at once would spill.
        ROWS: gl.constexpr = 32
        for i in gl.static_range(tiles.v_smem.shape[1] // ROWS):
            values = tiles.v_smem.index(tile % STAGES).slice(i * ROWS, ROWS)
            limit = tiles.limit_smem.index(tile % MASKS).slice(i * ROWS, ROWS).load(gl.SliceLayout(1, layout))
            values.store(gl.where(limit[:, None] > 0, values.load(layout), 0.0))
        fence_async_shared()
        thread_barrier()


@gluon.jit
def _step(tiles, tile, queries, group: gl.constexpr, acc, weights, row_max, row_sum):
    """Score tile ``tile`` and accumulate the one before it."""
    STAGES: gl.constexpr = tiles.k_smem.shape[0]
    BLOCK_N: gl.constexpr = tiles.k_smem.shape[1]
    ROWS: gl.constexpr = queries.q_smem.shape[1]
    OVERLAPS: gl.constexpr = queries.q_smem.shape[0] == 2
    s_layout: gl.constexpr = row_max.type.layout.parent
    o_layout: gl.constexpr = acc.type.layout
    stage = tile % STAGES
    phase = (tile // STAGES) & 1
    before = (tile - 1) % STAGES
    mbarrier.wait(tiles.bars.index(stage), phase)
    q = queries.q_smem.index(group)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    scores = warpgroup_mma(q, tiles.k_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    acc = warpgroup_mma(weights, tiles.v_smem.index(before), acc, is_async=True)
    # An arrival costs a barrier among the warps: one for keys and values together.
    if OVERLAPS:
        scores = warpgroup_mma_wait(1, deps=(scores,))
    else:
        scores, acc, weights = warpgroup_mma_wait(0, deps=(scores, acc, weights))
        mbarrier.arrive(tiles.bars.index(STAGES + stage), count=1)
    if tile >= tiles.full:
        scores = _mask(tiles, tile, scores)
    new_weights, decay, row_max, row_sum = _softmax(scores, queries.scale_log2, row_max, row_sum)
    new_weights = gl.convert_layout(new_weights.to(tiles.v_smem.dtype), weights.type.layout)
    # Standing here, this wait keeps the assembler from finishing the product before the exponentials.
    mbarrier.wait(tiles.bars.index(2 * STAGES + stage), phase)
    if OVERLAPS:
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
        mbarrier.arrive(tiles.bars.index(STAGES + stage), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
    if tile >= tiles.full:
        _clear(tiles, tile)
    return acc, new_weights, row_max, row_sum


@gluon.jit
def _query_rows(queries, group, layout: gl.constexpr):
    """Return where the queries of a group lie in their head, -1 for those that the tile does not have."""
    ROWS: gl.constexpr = queries.q_smem.shape[1]
    rows = queries.first_row + group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    is_query = rows < queries.last_row
    if queries.order_ptr is not None:
        rows = gl.load(queries.order_ptr + rows, mask=is_query, other=0)
    return gl.where(is_query, rows, -1)


@gluon.jit
def _consume(group: gl.constexpr, tiles, queries):
    """Attend from the queries of a group to every tile of keys. Without a query, let the tiles pass."""
    STAGES: gl.constexpr = tiles.k_smem.shape[0]
    BLOCK_N: gl.constexpr = tiles.k_smem.shape[1]
    ROWS: gl.constexpr = queries.q_smem.shape[1]
    DIM: gl.constexpr = queries.q_smem.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    operand_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)

    rows = _query_rows(queries, group, load_layout)
    offs_d = gl.arange(0, DIM, gl.SliceLayout(0, load_layout))
    q_ptrs = queries.q_ptr + rows.to(gl.int64)[:, None] * queries.stride_q_n + offs_d[None, :]
    q = queries.q_smem.index(group)
    q.store(gl.load(q_ptrs, mask=(rows >= 0)[:, None], other=0.0))
    rows = _query_rows(queries, group, o_layout)
    fence_async_shared()
    thread_barrier()

    row_max = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, s_layout))
    row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
    acc = gl.zeros([ROWS, DIM], gl.float32, o_layout)
    total = tiles.total * (queries.first_row + group * ROWS < queries.last_row).to(gl.int32)
    # Branching around all that follows would spill.
    for tile in range(total, tiles.total):
        mbarrier.wait(tiles.bars.index(tile % STAGES), (tile // STAGES) & 1)
        mbarrier.arrive(tiles.bars.index(STAGES + tile % STAGES), count=1)
    if total > 0:
        mbarrier.wait(tiles.bars.index(0), 0)
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
        scores = warpgroup_mma(q, tiles.k_smem.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(tiles.bars.index(STAGES), count=1)
        weights, _, row_max, row_sum = _softmax(_mask(tiles, 0, scores), queries.scale_log2, row_max, row_sum)
        weights = gl.convert_layout(weights.to(tiles.v_smem.dtype), operand_layout)
        mbarrier.wait(tiles.bars.index(2 * STAGES), 0)
        _clear(tiles, 0)
        for tile in range(1, total):
            acc, weights, row_max, row_sum = _step(tiles, tile, queries, group, acc, weights, row_max, row_sum)
        acc = warpgroup_mma(weights, tiles.v_smem.index((total - 1) % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))

    # A row that attends to nothing has sum 0 and maximum -inf: it gets 0 and -inf.
    row_max = gl.convert_layout(row_max, gl.SliceLayout(1, o_layout))
    row_sum = gl.convert_layout(row_sum, gl.SliceLayout(1, o_layout))
    divisor = gl.where(row_sum == 0, 1.0, row_sum)
    gl.store(queries.lse_ptr + rows, (row_max + gl.log2(divisor)) * LN_2, mask=rows >= 0)
    offs_d = gl.arange(0, DIM, gl.SliceLayout(0, o_layout))
    out_ptrs = queries.out_ptr + rows.to(gl.int64)[:, None] * queries.stride_out_n + offs_d[None, :]
    gl.store(out_ptrs, (acc / divisor[:, None]).to(tiles.v_smem.dtype), mask=(rows >= 0)[:, None])


@gluon.jit(
    do_not_specialize=[
        "stride_mask_b",
        "heads",
        "repeats",
        "tokens",
        "k_tokens",
        "context",
        "q_clusters",
        "tile_slots",
        "run_slots",
    ]
)
def attention_gluon_kernel(
    q_ptr,
    k_desc,
    v_desc,
    context_k_desc,
    context_v_desc,
    context_mask_ptr,
    order_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    runs_ptr,
    counts_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_n,
    stride_out_b,
    stride_out_h,
    stride_out_n,
    stride_mask_b,
    scale_log2,
    heads,
    repeats,
    tokens,
    k_tokens,
    context,
    q_clusters,
    tile_slots,
    run_slots,
    DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Attend from one tile of queries to all it keeps. Tiles of one query cluster run together and share keys in L2."""
    program = gl.program_id(0)
    bh = (program // tile_slots).to(gl.int64)
    b = bh // heads
    h = bh % heads
    key_head = (b * (heads // repeats) + h // repeats).to(gl.int32)
    tile_ptr = tiles_ptr + (bh * tile_slots + program % tile_slots) * 3
    cluster = gl.load(tile_ptr)
    first_row = gl.load(tile_ptr + 1)
    last_row = gl.load(tile_ptr + 2)
    row = bh * q_clusters + cluster
    runs_ptr += row * run_slots * 2
    SLOTS: gl.constexpr = BLOCK_N // PIECE
    num_runs = gl.load(counts_ptr + row * NUM_COUNTS)
    num_full = gl.load(counts_ptr + row * NUM_COUNTS + FULL_PIECES)
    # A slot that is left over has no rows and shall cost nothing.
    is_used = (first_row < last_row).to(gl.int32)
    full_tiles = num_full // SLOTS * is_used
    piece_tiles = (num_full + num_runs + SLOTS - 1) // SLOTS
    total_tiles = (piece_tiles + (context + BLOCK_N - 1) // BLOCK_N) * is_used

    q_ptr += b * stride_q_b + h * stride_q_h
    out_ptr += b * stride_out_b + h * stride_out_h
    lse_ptr += bh * tokens
    if order_ptr is not None:
        order_ptr += bh * tokens

    GROUPS: gl.constexpr = BLOCK_M // ROWS
    dtype: gl.constexpr = k_desc.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], dtype)
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, DIM], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, DIM], q_layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], kv_layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], kv_layout)
    # The limits of a tile are written before its stage is free: those of the tile there before may be read until then.
    masks: gl.constexpr = STAGES + 1
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    limit_smem = gl.allocate_shared_memory(gl.float32, [masks, BLOCK_N], plain)
    dirty_smem = gl.allocate_shared_memory(gl.int32, [masks, 1], plain)
    bars = gl.allocate_shared_memory(gl.int64, [3 * STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(bars.index(stage), count=1)
        mbarrier.init(bars.index(STAGES + stage), count=GROUPS)
        mbarrier.init(bars.index(2 * STAGES + stage), count=1)
    fence_async_shared()
    tiles = Tiles(k_smem, v_smem, limit_smem, dirty_smem, bars, full_tiles, total_tiles)
    keys = Keys(
        k_desc,
        v_desc,
        context_k_desc,
        context_v_desc,
        context_mask_ptr,
        runs_ptr,
        num_runs,
        num_full,
        context,
        key_head * k_tokens,
        key_head * context,
        b.to(gl.int32) * stride_mask_b,
    )
    queries = Queries(
        q_smem, q_ptr, order_ptr, out_ptr, lse_ptr, stride_q_n, stride_out_n, first_row, last_row, scale_log2
    )
    if GROUPS == 2:
        gl.warp_specialize(
            [(_consume, (0, tiles, queries)), (_consume, (1, tiles, queries)), (_produce, (tiles, keys))],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, tiles, queries)),
                (_consume, (1, tiles, queries)),
                (_consume, (2, tiles, queries)),
                (_produce, (tiles, keys)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )


def block_sparse_attention_gluon(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sizes: Tensor,
    runs: Tensor,
    counts: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    q_order: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute ``block_sparse_attention_reference`` for fp16 and bf16 rows of 64 or 128 on Hopper.

    Allocates what the one by pointers does, and contiguous copies of keys, values and context that are not yet.
    No device synchronisation.
    """
    dim = q.shape[3]
    tiles = GLUON[dim]
    call = AttentionCall.of(q, k, v, q_sizes, runs, counts, context_k, context_v, context_mask, q_order, scale, tiles)
    if call.is_empty:
        return call.results
    block = [PIECE_KEYS, dim]
    layout = _layout(dim, q.dtype)
    keys = _rows(call.k, block, layout), _rows(call.v, block, layout)
    context = keys
    if call.context > 0:
        context = _rows(call.context_k, block, layout), _rows(call.context_v, block, layout)
    return call.launch(
        attention_gluon_kernel,
        (*keys, *context),
        call.context_mask,
        call.runs,
        (),
        (k.shape[2], call.context),
        _constexprs(dim),
    )


def _rows(x: Tensor, block: list[int], layout: Any) -> TensorDescriptor:
    """Return [B, G, N, D] as rows of all heads, to be loaded piece by piece."""
    return TensorDescriptor.from_tensor(x.contiguous().view(-1, x.shape[3]), block, layout)


@cache
def _layout(dim: int, dtype: torch.dtype) -> Any:
    """Return how a piece of keys or values lies in shared memory."""
    return shared_layout((PIECE_KEYS, dim), element_type(dtype))


@cache
def _constexprs(dim: int) -> dict[str, int]:
    """Return the compile-time arguments."""
    consumer, producer = REGISTERS[dim]
    return {
        "DIM": dim,
        "BLOCK_M": GLUON[dim].block_m,
        "BLOCK_N": GLUON[dim].block_n,
        "STAGES": GLUON[dim].num_stages,
        "ROWS": GLUON_ROWS,
        "CONSUMER_REGISTERS": consumer,
        "PRODUCER_REGISTERS": producer,
    }


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel as launched on Hopper, with everything in it and with the least; nothing elsewhere."""
    if capability != 90:
        return []

    def cut(kind: str, dim: int, has_context_mask: bool) -> Cut:
        descriptors = ("k_desc", "v_desc", "context_k_desc", "context_v_desc")
        type_ = f"tensordesc<{kind}[{PIECE_KEYS}, {dim}],{_layout(dim, DTYPES[kind])!r}>"
        types = dict.fromkeys(descriptors, type_)
        absent = {} if has_context_mask else {"context_mask_ptr": None}
        return GLUON[dim], _constexprs(dim) | absent, types | {"runs_ptr": "*i32"}

    return attention_variants(attention_gluon_kernel, "_context_mask", cut)
