"""Block-sparse attention for Hopper: warps that load and warps that multiply.

One program per tile of 128 queries. A warp walks the runs of kept keys in pieces of 16 and lets the tensor memory
accelerator put eight of them into one tile of keys, wherever they lie; two groups of four warps each attend from 64
queries. Tensor cores work on the values of one tile while the exponentials of the next are computed. A group whose 64
rows hold no query, as half of all last tiles of a cluster have, leaves the tensor cores to the other.

A tile has eight slots. Slots hold the full pieces of all runs first, then the tail of every run: a piece that ends
where the run does, of which only the keys after the full pieces count. So all but the tails of runs shorter than a
piece read kept keys only. Tiles of context follow.
"""

# Gluon has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"
# mypy: disable-error-code="assignment"

import math
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

from svg2_compile.kernels.attention_steps import LOG2_E, empty_results, rows_of_unit_stride
from svg2_compile.kernels.gluon_names import element_type, load_box, shared_layout, thread_barrier
from svg2_compile.kernels.launch import AotVariant
from svg2_compile.kernels.tuning import GLUON
from svg2_compile.kernels.work_list import COUNTS, PIECES
from svg2_compile.kernels.work_list_triton import query_tiles_triton

LN_2 = gl.constexpr(math.log(2))
PIECE = gl.constexpr(GLUON.piece)
NUM_COUNTS = gl.constexpr(len(COUNTS))
FULL_PIECES = gl.constexpr(1 + PIECES.index(GLUON.piece))
CONSUMER_REGISTERS = 224
PRODUCER_REGISTERS = 56


class Tiles(NamedTuple):
    """What the warps of a program share: tiles of keys and values on their way, and how many there are."""

    k_smem: Any  # [STAGES, BLOCK_N, DIM]
    v_smem: Any  # [STAGES, BLOCK_N, DIM]
    valid_smem: Any  # [MASKS, BLOCK_N]
    """Which keys of a tile may be attended to; of the first tile and all that are not full."""
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


class Queries(NamedTuple):
    """A tile of queries, and where its results go."""

    q_smem: Any  # [2, BLOCK_M / 2, DIM]
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
def _fill(tiles, tile, k_desc, v_desc, rows):
    """Load a tile of keys and values, a piece from each of ``rows``, once what was there before has been used."""
    STAGES: gl.constexpr = tiles.k_smem.shape[0]
    BLOCK_N: gl.constexpr = tiles.k_smem.shape[1]
    BYTES: gl.constexpr = tiles.k_smem.dtype.primitive_bitwidth // 8 * BLOCK_N * tiles.k_smem.shape[2]
    stage = tile % STAGES
    phase = (tile // STAGES) & 1
    mbarrier.wait(tiles.bars.index(STAGES + stage), phase ^ 1)
    mbarrier.expect(tiles.bars.index(stage), BYTES)
    for i in gl.static_range(BLOCK_N // PIECE):
        box = tiles.k_smem.index(stage).slice(i * PIECE, PIECE)
        load_box(k_desc, [rows[i], 0], tiles.bars.index(stage), box)
    after = tile - STAGES + 1  # says that the values of tile - STAGES were used
    if after > 0:
        mbarrier.wait(tiles.bars.index(STAGES + after % STAGES), (after // STAGES) & 1)
    mbarrier.expect(tiles.bars.index(2 * STAGES + stage), BYTES)
    for i in gl.static_range(BLOCK_N // PIECE):
        box = tiles.v_smem.index(stage).slice(i * PIECE, PIECE)
        load_box(v_desc, [rows[i], 0], tiles.bars.index(2 * STAGES + stage), box)


@gluon.jit
def _tell_validity(tiles, tile, is_valid, is_dirty):
    """Write which keys of a tile are valid. What arrives on a barrier afterwards takes it to who waits there."""
    MASKS: gl.constexpr = tiles.valid_smem.shape[0]
    tiles.valid_smem.index(tile % MASKS).store(is_valid.to(gl.int8))
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tiles.dirty_smem.index(tile % MASKS).store(gl.full([1], is_dirty, gl.int32, one))
    thread_barrier()


@gluon.jit
def _produce(tiles, keys):
    """Load the tiles of keys and values in the order in which they are used."""
    BLOCK_N: gl.constexpr = tiles.k_smem.shape[1]
    SLOTS: gl.constexpr = BLOCK_N // PIECE
    layout: gl.constexpr = gl.BlockedLayout([BLOCK_N // 32], [32], [1], [0])
    offs_n = gl.arange(0, BLOCK_N, layout)
    zeros = gl.zeros([BLOCK_N], gl.int32, layout)
    piece_tiles = (keys.num_full + keys.num_runs + SLOTS - 1) // SLOTS * (tiles.total > 0).to(gl.int32)
    # The first tile is masked in any case.
    _tell_validity(tiles, 0, offs_n >= 0, False)
    run = 0
    key, stop = _load_run(keys, 0, True, 0, 0)
    next_key, next_stop = _load_run(keys, 1, True, 0, 0)
    for tile in range(tiles.full):
        rows = ()
        for _ in gl.static_range(SLOTS):
            rows = rows + (keys.first_row + key,)  # noqa: RUF005
            run, key, stop, next_key, next_stop = _next_piece(keys, run, key, stop, next_key, next_stop)
        _fill(tiles, tile, keys.k_desc, keys.v_desc, rows)
    for tile in range(tiles.full, piece_tiles):
        tail = tile * SLOTS - keys.num_full
        tails = tail + offs_n // PIECE
        firsts, stops = _load_run(keys, tails, tails >= 0, zeros, zeros)
        is_valid = (tails < 0) | (offs_n % PIECE >= PIECE - (stops - firsts) % PIECE)
        # The last run is the shortest. What is read beside a run of less than a piece may be NaN.
        last = gl.minimum(tail + SLOTS, keys.num_runs) - 1
        last_key, last_stop = _load_run(keys, last, True, 0, 0)
        _tell_validity(tiles, tile, is_valid, last_stop - last_key < PIECE)
        rows = ()
        for i in gl.static_range(SLOTS):
            # Slots that are left over repeat the last tail.
            _, tail_stop = _load_run(keys, gl.minimum(tail + i, last), tail + i >= 0, 0, 0)
            rows = rows + (keys.first_row + gl.where(tail + i >= 0, tail_stop - PIECE, key),)  # noqa: RUF005
            run, key, stop, next_key, next_stop = _next_piece(keys, run, key, stop, next_key, next_stop)
        _fill(tiles, tile, keys.k_desc, keys.v_desc, rows)
    for tile in range(piece_tiles, tiles.total):
        first_key = (tile - piece_tiles) * BLOCK_N
        is_valid = first_key + offs_n < keys.context
        if keys.context_mask_ptr is not None:
            is_valid = gl.load(keys.context_mask_ptr + first_key + offs_n, mask=is_valid, other=0) != 0
        _tell_validity(tiles, tile, is_valid, gl.min(is_valid.to(gl.int32), 0) == 0)
        rows = ()
        for i in gl.static_range(SLOTS):
            rows = rows + (keys.first_context_row + first_key + i * PIECE,)  # noqa: RUF005
        _fill(tiles, tile, keys.context_k_desc, keys.context_v_desc, rows)


@gluon.jit
def _mask(tiles, tile, scores):
    """Return the scores with those of keys that may not be attended to at -inf."""
    MASKS: gl.constexpr = tiles.valid_smem.shape[0]
    layout: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
    valid = tiles.valid_smem.index(tile % MASKS).load(layout) != 0
    return gl.where(valid[None, :], scores, -float("inf"))


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

    Either group of warps does it before it multiplies; they write the same.
    """
    MASKS: gl.constexpr = tiles.valid_smem.shape[0]
    STAGES: gl.constexpr = tiles.v_smem.shape[0]
    DIM: gl.constexpr = tiles.v_smem.shape[2]
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    if gl.max(tiles.dirty_smem.index(tile % MASKS).load(one), 0) != 0:
        # More at once would spill.
        ROWS: gl.constexpr = 32
        for i in gl.static_range(tiles.v_smem.shape[1] // ROWS):
            values = tiles.v_smem.index(tile % STAGES).slice(i * ROWS, ROWS)
            valid = tiles.valid_smem.index(tile % MASKS).slice(i * ROWS, ROWS).load(gl.SliceLayout(1, layout)) != 0
            values.store(gl.where(valid[:, None], values.load(layout), 0.0))
        fence_async_shared()
        thread_barrier()


@gluon.jit
def _step(tiles, tile, q, acc, weights, row_max, row_sum, scale_log2):
    """Score tile ``tile`` and accumulate the one before it."""
    STAGES: gl.constexpr = tiles.k_smem.shape[0]
    BLOCK_N: gl.constexpr = tiles.k_smem.shape[1]
    ROWS: gl.constexpr = q.shape[0]
    s_layout: gl.constexpr = row_max.type.layout.parent
    o_layout: gl.constexpr = acc.type.layout
    stage = tile % STAGES
    phase = (tile // STAGES) & 1
    before = (tile - 1) % STAGES
    mbarrier.wait(tiles.bars.index(stage), phase)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    scores = warpgroup_mma(q, tiles.k_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    acc = warpgroup_mma(weights, tiles.v_smem.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    if tile >= tiles.full:
        scores = _mask(tiles, tile, scores)
    new_weights, decay, row_max, row_sum = _softmax(scores, scale_log2, row_max, row_sum)
    new_weights = gl.convert_layout(new_weights.to(tiles.v_smem.dtype), weights.type.layout)
    # Standing here, this wait keeps the assembler from finishing the product before the exponentials.
    mbarrier.wait(tiles.bars.index(2 * STAGES + stage), phase)
    acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
    # An arrival costs a barrier among the warps: one for keys and values together.
    mbarrier.arrive(tiles.bars.index(STAGES + stage), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
    if tile >= tiles.full:
        _clear(tiles, tile)
    return acc, new_weights, row_max, row_sum


@gluon.jit
def _query_rows(queries, half, layout: gl.constexpr):
    """Return where 64 queries lie in their head, -1 for those that the tile does not have."""
    ROWS: gl.constexpr = queries.q_smem.shape[1]
    rows = queries.first_row + half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    is_query = rows < queries.last_row
    if queries.order_ptr is not None:
        rows = gl.load(queries.order_ptr + rows, mask=is_query, other=0)
    return gl.where(is_query, rows, -1)


@gluon.jit
def _consume(half, tiles, queries):
    """Attend from 64 queries to every tile of keys. Without a query, let the tiles pass."""
    STAGES: gl.constexpr = tiles.k_smem.shape[0]
    BLOCK_N: gl.constexpr = tiles.k_smem.shape[1]
    ROWS: gl.constexpr = queries.q_smem.shape[1]
    DIM: gl.constexpr = queries.q_smem.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    operand_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    scale_log2 = queries.scale_log2

    rows = _query_rows(queries, half, load_layout)
    offs_d = gl.arange(0, DIM, gl.SliceLayout(0, load_layout))
    q_ptrs = queries.q_ptr + rows.to(gl.int64)[:, None] * queries.stride_q_n + offs_d[None, :]
    q = queries.q_smem.index(half)
    q.store(gl.load(q_ptrs, mask=(rows >= 0)[:, None], other=0.0))
    rows = _query_rows(queries, half, o_layout)
    fence_async_shared()
    thread_barrier()

    row_max = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, s_layout))
    row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
    acc = gl.zeros([ROWS, DIM], gl.float32, o_layout)
    total = tiles.total * (queries.first_row + half * ROWS < queries.last_row).to(gl.int32)
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
        weights, _, row_max, row_sum = _softmax(_mask(tiles, 0, scores), scale_log2, row_max, row_sum)
        weights = gl.convert_layout(weights.to(tiles.v_smem.dtype), operand_layout)
        mbarrier.wait(tiles.bars.index(2 * STAGES), 0)
        _clear(tiles, 0)
        for tile in range(1, total):
            acc, weights, row_max, row_sum = _step(tiles, tile, q, acc, weights, row_max, row_sum, scale_log2)
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
def _attention_kernel(
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
    if context_mask_ptr is not None:
        context_mask_ptr += b * stride_mask_b

    dtype: gl.constexpr = k_desc.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M // 2, DIM], dtype)
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, DIM], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M // 2, DIM], q_layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], kv_layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], kv_layout)
    # The validity of a tile is written before its stage is free; by then twice the stages before it is used up.
    masks: gl.constexpr = 2 * STAGES
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    valid_smem = gl.allocate_shared_memory(gl.int8, [masks, BLOCK_N], plain)
    dirty_smem = gl.allocate_shared_memory(gl.int32, [masks, 1], plain)
    bars = gl.allocate_shared_memory(gl.int64, [3 * STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(bars.index(stage), count=1)
        mbarrier.init(bars.index(STAGES + stage), count=2)
        mbarrier.init(bars.index(2 * STAGES + stage), count=1)
    fence_async_shared()
    tiles = Tiles(k_smem, v_smem, valid_smem, dirty_smem, bars, full_tiles, total_tiles)
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
    )
    queries = Queries(
        q_smem, q_ptr, order_ptr, out_ptr, lse_ptr, stride_q_n, stride_out_n, first_row, last_row, scale_log2
    )
    gl.warp_specialize(
        [(_consume, (0, tiles, queries)), (_consume, (1, tiles, queries)), (_produce, (tiles, keys))],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
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

    Allocates what the Triton implementation does, and contiguous copies of keys, values and context that are not yet.
    No device synchronisation.
    """
    # The kernel takes the maximum, and masks, before it scales.
    if scale < 0:
        q, scale = -q, -scale
    elif scale == 0:
        q, scale = torch.zeros_like(q), 1.0
    q = rows_of_unit_stride(q)
    batch, heads, tokens, dim = q.shape
    groups, k_tokens = k.shape[1:3]
    out, lse = empty_results(q, q_order)
    if out.numel() == 0:
        return out, lse
    tiles = query_tiles_triton(q_sizes, tokens, GLUON.block_m)
    runs, counts = runs.contiguous(), counts.contiguous()
    keys, values = _rows(k), _rows(v)
    # Without a context its arguments are never read.
    context = 0 if context_k is None else context_k.shape[2]
    context_keys = keys if context_k is None or context == 0 else _rows(context_k)
    context_values = values if context_v is None or context == 0 else _rows(context_v)
    mask = None if context_mask is None or context == 0 else context_mask.contiguous().view(torch.uint8)
    with torch.cuda.device_of(q):
        _attention_kernel[(batch * heads * tiles.shape[2],)](
            q,
            keys,
            values,
            context_keys,
            context_values,
            mask,
            None if q_order is None else q_order.contiguous(),
            out,
            lse,
            tiles,
            runs,
            counts,
            *q.stride()[:3],
            *out.stride()[:3],
            0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
            scale * LOG2_E,
            heads,
            heads // groups,
            tokens,
            k_tokens,
            context,
            runs.shape[2],
            tiles.shape[2],
            runs.shape[3],
            num_warps=GLUON.num_warps,
            **_constexprs(dim),
        )
    return out, lse


def _rows(x: Tensor) -> TensorDescriptor:
    """Return [B, G, N, D] as rows of all heads, to be loaded piece by piece."""
    rows = x.contiguous().view(-1, x.shape[3])
    block = [GLUON.piece, x.shape[3]]
    return TensorDescriptor.from_tensor(rows, block, shared_layout(tuple(block), element_type(x)))


def _constexprs(dim: int) -> dict[str, int]:
    """Return the compile-time arguments."""
    return {
        "DIM": dim,
        "BLOCK_M": GLUON.block_m,
        "BLOCK_N": GLUON.block_n,
        "STAGES": GLUON.num_stages,
        "CONSUMER_REGISTERS": CONSUMER_REGISTERS,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
    }


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel as launched on Hopper, with everything in it and with the least; nothing elsewhere."""
    if capability != 90:
        return []
    variants = []
    for dtype, name in ((gl.bfloat16, "bf16"), (gl.float16, "fp16")):
        for dim, has_context_mask in ((64, True), (64, False), (128, True), (128, False)):
            layout = shared_layout((GLUON.piece, dim), dtype)
            constexprs: dict[str, object] = {**_constexprs(dim)}
            if not has_context_mask:
                constexprs["context_mask_ptr"] = None
            types = dict.fromkeys(_attention_kernel.arg_names, "i32") | {"scale_log2": "fp32", "lse_ptr": "*fp32"}
            types |= dict.fromkeys(("order_ptr", "tiles_ptr", "runs_ptr", "counts_ptr"), "*i32")
            types |= {"q_ptr": f"*{name}", "out_ptr": f"*{name}", "context_mask_ptr": "*u8"}
            descriptors = ("k_desc", "v_desc", "context_k_desc", "context_v_desc")
            types |= dict.fromkeys(descriptors, f"tensordesc<{name}[{GLUON.piece}, {dim}],{layout!r}>")
            signature = {argument: type_ for argument, type_ in types.items() if argument not in constexprs}
            aligned = (x for x in signature if x.endswith(("_ptr", "_b", "_h", "_n")) and "mask" not in x)
            variants.append(
                AotVariant(
                    name=f"attention_{name}_{dim}{'_context_mask' if has_context_mask else ''}",
                    fn=_attention_kernel,
                    signature=signature,
                    constexprs=constexprs,
                    num_warps=GLUON.num_warps,
                    num_stages=GLUON.num_stages,
                    divisible_by_16=tuple(aligned),
                )
            )
    return variants
