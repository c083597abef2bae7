"""Block-sparse attention for any GPU: one program per tile of queries, over packed tiles of keys, loaded by pointer.

A program walks the runs of kept keys of its query cluster and cuts them into pieces of 16. A tile of keys is assembled
from whatever pieces come next, so clusters of any size cost their own keys and little more. Full pieces come first:
their tiles need no mask.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"
# mypy: disable-error-code="assignment, misc"

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.attention_call import DTYPES, AttentionCall, Cut, attention_variants, triton_constexprs
from svg2_compile.kernels.attention_steps import (
    accumulate,
    attend_context,
    attend_masked,
    first_and_last_key,
    load_rows,
    load_runs,
    query_rows,
    scores_of,
    softmax,
    spread,
    store_results,
)
from svg2_compile.kernels.launch import padded_power_of_two
from svg2_compile.kernels.tuning import AttentionTiles, attention_tiles
from svg2_compile.kernels.why_not import capability_of
from svg2_compile.kernels.work_list import PIECES


@triton.jit
def _next_pieces(key, stop, run, ahead, PIECE: tl.constexpr, COUNT: tl.constexpr):
    """Return the first keys of the next full pieces, and where the walk stands after them.

    The walk is at ``key`` of the run that ends before ``stop``; ``run`` is the index of the one after it, the first of
    those in ``ahead``.
    """
    # First of all: then Triton's pipeliner loads the runs in the stage that walks them, one tile before they are used.
    first_keys = ()
    last_keys = ()
    for i in tl.static_range(COUNT):
        first_key, last_key = first_and_last_key(ahead[i])
        first_keys = first_keys + (first_key,)  # noqa: RUF005
        last_keys = last_keys + (last_key,)  # noqa: RUF005
    keys = ()
    for i in tl.static_range(COUNT):
        keys = keys + (key,)  # noqa: RUF005
        key += PIECE
        is_done = key + PIECE > stop
        key = tl.where(is_done, first_keys[0], key)
        stop = tl.where(is_done, last_keys[0], stop)
        run += is_done.to(tl.int32)
        next_first_keys = ()
        next_last_keys = ()
        for j in tl.static_range(COUNT - 1 - i):
            next_first_keys = next_first_keys + (tl.where(is_done, first_keys[j + 1], first_keys[j]),)  # noqa: RUF005
            next_last_keys = next_last_keys + (tl.where(is_done, last_keys[j + 1], last_keys[j]),)  # noqa: RUF005
        first_keys = next_first_keys
        last_keys = next_last_keys
    return keys, key, stop, run


@triton.jit
def _last_pieces(runs, piece_keys, left_pieces, PIECE: tl.constexpr, COUNT: tl.constexpr):
    """Return the first keys and the lengths of what is left: full pieces, then what full pieces leave of every run."""
    keys = ()
    lengths = ()
    for i in tl.static_range(COUNT):
        first_key, last_key = first_and_last_key(runs[i])
        length = last_key - first_key
        is_full = i < left_pieces
        keys = keys + (tl.where(is_full, piece_keys[i], first_key + length // PIECE * PIECE),)  # noqa: RUF005
        lengths = lengths + (tl.where(is_full, PIECE, length % PIECE),)  # noqa: RUF005
    return keys, lengths


@triton.jit(
    do_not_specialize=[
        "stride_mask_b",
        "heads",
        "repeats",
        "tokens",
        "context",
        "q_clusters",
        "tile_slots",
        "run_slots",
    ]
)
def attention_pointer_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    context_k_ptr,
    context_v_ptr,
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
    stride_k_b,
    stride_k_h,
    stride_k_n,
    stride_v_b,
    stride_v_h,
    stride_v_n,
    stride_ck_b,
    stride_ck_h,
    stride_ck_n,
    stride_cv_b,
    stride_cv_h,
    stride_cv_n,
    stride_out_b,
    stride_out_h,
    stride_out_n,
    stride_mask_b,
    scale_log2,
    heads,
    repeats,
    tokens,
    context,
    q_clusters,
    tile_slots,
    run_slots,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr,
    COUNTS: tl.constexpr,
    COLUMN: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    HAS_CONTEXT_MASK: tl.constexpr,
):
    """Attend from one tile of queries to all it keeps. Tiles of one query cluster run together and share keys in L2.

    With ``order_ptr`` the rows of queries and results lie where it says.
    """
    program = tl.program_id(0)
    bh = (program // tile_slots).to(tl.int64)
    b = bh // heads
    h = bh % heads
    g = h // repeats
    tile_ptr = tiles_ptr + (bh * tile_slots + program % tile_slots) * 3
    cluster = tl.load(tile_ptr)
    first_row = tl.load(tile_ptr + 1)
    last_row = tl.load(tile_ptr + 2)
    if first_row == last_row:
        return

    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    slot_n = offs_n // PIECE
    offs_piece = offs_n % PIECE
    lse_ptr += bh * tokens
    out_ptr += b * stride_out_b + h * stride_out_h
    if order_ptr is not None:
        order_ptr += bh * tokens
    rows, inside = query_rows(order_ptr, first_row, last_row, BLOCK_M)
    q = load_rows(q_ptr + b * stride_q_b + h * stride_q_h, rows, stride_q_n, inside, offs_d, DIM, MASKED=True)
    k_ptr += b * stride_k_b + g * stride_k_h
    v_ptr += b * stride_v_b + g * stride_v_h

    row = bh * q_clusters + cluster
    runs_ptr += row * run_slots
    num_runs = tl.load(counts_ptr + row * COUNTS)
    full_pieces = tl.load(counts_ptr + row * COUNTS + COLUMN)
    PIECES_PER_TILE: tl.constexpr = BLOCK_N // PIECE
    full_tiles = full_pieces // PIECES_PER_TILE

    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if HAS_CONTEXT:
        # First, so that what only the context needs keeps no registers from the long loops.
        acc, row_max, row_sum = attend_context(
            q,
            context_k_ptr + b * stride_ck_b + g * stride_ck_h,
            context_v_ptr + b * stride_cv_b + g * stride_cv_h,
            context_mask_ptr + b * stride_mask_b,
            context,
            stride_ck_n,
            stride_cv_n,
            offs_n,
            offs_d,
            scale_log2,
            acc,
            row_max,
            row_sum,
            DIM,
            HAS_CONTEXT_MASK,
        )

    key, stop = first_and_last_key(tl.load(runs_ptr, mask=num_runs > 0, other=0))
    run = 1
    # Loaded a tile before it is needed. A tile of P pieces gets through P runs at most.
    ahead = load_runs(runs_ptr, run, num_runs, PIECES_PER_TILE)
    for _ in range(full_tiles):
        piece_keys, key, stop, run = _next_pieces(key, stop, run, ahead, PIECE, PIECES_PER_TILE)
        ahead = load_runs(runs_ptr, run, num_runs, PIECES_PER_TILE)
        keys = spread(piece_keys, slot_n, PIECES_PER_TILE) + offs_piece
        k = load_rows(k_ptr, keys, stride_k_n, offs_n, offs_d, DIM, MASKED=False)
        scores = scores_of(q, k)
        weights, decay, row_max, row_sum = softmax(scores, offs_n, scale_log2, row_max, row_sum, MASKED=False)
        v = load_rows(v_ptr, keys, stride_v_n, offs_n, offs_d, DIM, MASKED=False)
        acc = accumulate(acc, weights, decay, v)

    # The full pieces that fill no tile, and what is left at the end of every run.
    left_pieces = full_pieces - full_tiles * PIECES_PER_TILE
    piece_keys, key, stop, run = _next_pieces(key, stop, run, ahead, PIECE, PIECES_PER_TILE)
    tails = load_runs(runs_ptr, -left_pieces, num_runs, PIECES_PER_TILE)
    for first_slot in range(0, left_pieces + num_runs, PIECES_PER_TILE):
        tile_keys, lengths = _last_pieces(tails, piece_keys, left_pieces - first_slot, PIECE, PIECES_PER_TILE)
        tails = load_runs(runs_ptr, first_slot + PIECES_PER_TILE - left_pieces, num_runs, PIECES_PER_TILE)
        keys = spread(tile_keys, slot_n, PIECES_PER_TILE) + offs_piece
        valid = offs_piece < spread(lengths, slot_n, PIECES_PER_TILE)
        acc, row_max, row_sum = attend_masked(
            q, k_ptr, v_ptr, keys, valid, stride_k_n, stride_v_n, offs_d, scale_log2, acc, row_max, row_sum, DIM
        )

    store_results(out_ptr, lse_ptr, acc, row_max, row_sum, rows, inside, stride_out_n, offs_d, DIM)


def block_sparse_attention_pointer(
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
    tiles: AttentionTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``block_sparse_attention_reference`` for fp16, bf16 and fp32 in two launches, blind to what is kept.

    Besides its results it allocates the tiles of queries, 12 bytes each. No device synchronisation; keys that are not
    kept are not read. ``tiles`` None takes what ``tuning`` says.
    """
    if tiles is None:
        tiles = attention_tiles(capability_of(q.device), padded_power_of_two(q.shape[3]), q.dtype)
    call = AttentionCall.of(q, k, v, q_sizes, runs, counts, context_k, context_v, context_mask, q_order, scale, tiles)
    if call.is_empty:
        return call.results
    keys = call.k, call.v, call.context_k, call.context_v
    strides = (*call.k.stride()[:3], *call.v.stride()[:3], *call.context_k.stride()[:3], *call.context_v.stride()[:3])
    constexprs = _constexprs(q.shape[3], tiles, call.context > 0, call.context_mask is not None)
    return call.launch(
        attention_pointer_kernel, keys, call.mask_or_stand_in, call.packed_runs, strides, (call.context,), constexprs
    )


@cache
def _constexprs(dim: int, tiles: AttentionTiles, has_context: bool, has_context_mask: bool) -> dict[str, int | bool]:
    """Return the compile-time arguments."""
    return triton_constexprs(dim, tiles, has_context, has_context_mask) | {"COLUMN": 1 + PIECES.index(tiles.piece)}


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel as launched on a compute capability such as 90, with everything in it and with the least."""

    def cut(kind: str, dim: int, has_context: bool) -> Cut:
        tiles = attention_tiles(capability, padded_power_of_two(dim), DTYPES[kind])
        return tiles, _constexprs(dim, tiles, has_context, has_context), {}

    return attention_variants(attention_pointer_kernel, "_context", cut)
