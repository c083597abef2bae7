"""Block-sparse attention for GPUs with a tensor memory accelerator: whole tiles of kept keys, loaded by descriptor.

One program per tile of queries. It walks the runs of kept keys of its query cluster in whole tiles of ``BLOCK_N`` keys.
Where tensor cores work on their own, the scores of a tile are multiplied before the values of the tile before it, which
keep them busy while the exponentials are computed. What is left at the end of every run is cut into pieces of 16 keys
and packed into tiles half as wide, which are loaded by pointer.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"
# mypy: disable-error-code="assignment, misc"

from functools import cache

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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

ROTATED_FROM = 128


@triton.jit
def _next_tile(key, stop, run, next_run, BLOCK_N: tl.constexpr):
    """Return where the walk over whole tiles stands after the tile at ``key``."""
    next_key, next_stop = first_and_last_key(next_run)
    key += BLOCK_N
    is_done = key + BLOCK_N > stop
    return tl.where(is_done, next_key, key), tl.where(is_done, next_stop, stop), run + is_done.to(tl.int32)


@triton.jit
def _next_rests(key, stop, run, ahead, PIECE: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first keys and the lengths of the next pieces of what whole tiles leave, and where the walk is then.

    The walk is at ``key`` of the run that ends before ``stop``; ``run`` is the index of the one after it, the first of
    those in ``ahead``. The last piece of every run is shorter than the others, and may be empty.
    """
    # First of all: then Triton's pipeliner loads the runs in the stage that walks them, one tile before they are used.
    first_keys = ()
    last_keys = ()
    for i in tl.static_range(COUNT):
        first_key, last_key = first_and_last_key(ahead[i])
        first_keys = first_keys + (first_key + (last_key - first_key) // BLOCK_N * BLOCK_N,)  # noqa: RUF005
        last_keys = last_keys + (last_key,)  # noqa: RUF005
    keys = ()
    lengths = ()
    for i in tl.static_range(COUNT):
        keys = keys + (key,)  # noqa: RUF005
        lengths = lengths + (stop - key,)  # noqa: RUF005
        key += PIECE
        is_done = key > stop
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
    return keys, lengths, key, stop, run


@triton.jit
def _bits_of(weights, dtype: tl.constexpr):
    """Return weights, rounded, as integers: if a loop carries them so, Triton leaves them in registers for Hopper."""
    integer: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
    return weights.to(dtype).to(integer, bitcast=True)


@triton.jit
def _accumulate_bits(acc, bits, decay, v):
    """Return acc * decay + weights v."""
    return tl.dot(bits.to(v.dtype, bitcast=True), v, acc * decay[:, None], input_precision="ieee")


@triton.jit(
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
def attention_descriptor_kernel(
    q_ptr,
    k_desc,
    v_desc,
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
    k_tokens,
    context,
    q_clusters,
    tile_slots,
    run_slots,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PIECE: tl.constexpr,
    ROTATED: tl.constexpr,
    COUNTS: tl.constexpr,
    TILE_COLUMN: tl.constexpr,
    PIECE_COLUMN: tl.constexpr,
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
    first_key_row = (b * (heads // repeats) + g) * k_tokens
    tile_ptr = tiles_ptr + (bh * tile_slots + program % tile_slots) * 3
    cluster = tl.load(tile_ptr)
    first_row = tl.load(tile_ptr + 1)
    last_row = tl.load(tile_ptr + 2)
    if first_row == last_row:
        return

    offs_d = tl.arange(0, BLOCK_D)
    offs_rest = tl.arange(0, BLOCK_REST)
    lse_ptr += bh * tokens
    out_ptr += b * stride_out_b + h * stride_out_h
    if order_ptr is not None:
        order_ptr += bh * tokens
    rows, inside = query_rows(order_ptr, first_row, last_row, BLOCK_M)
    q = load_rows(q_ptr + b * stride_q_b + h * stride_q_h, rows, stride_q_n, inside, offs_d, DIM, MASKED=True)

    row = bh * q_clusters + cluster
    runs_ptr += row * run_slots
    counts_ptr += row * COUNTS
    num_runs = tl.load(counts_ptr)
    full_tiles = tl.load(counts_ptr + TILE_COLUMN)
    rest_pieces = tl.load(counts_ptr + PIECE_COLUMN) - full_tiles * (BLOCK_N // PIECE) + num_runs

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
            offs_rest,
            offs_d,
            scale_log2,
            acc,
            row_max,
            row_sum,
            DIM,
            HAS_CONTEXT_MASK,
        )

    PIECES_PER_TILE: tl.constexpr = BLOCK_REST // PIECE
    slot_n = offs_rest // PIECE
    offs_piece = offs_rest % PIECE
    first_key, stop = first_and_last_key(tl.load(runs_ptr, mask=num_runs > 0, other=0))
    key = first_key + (stop - first_key) // BLOCK_N * BLOCK_N
    run = 1
    ahead = load_runs(runs_ptr, run, num_runs, PIECES_PER_TILE)
    for _ in range(0, rest_pieces, PIECES_PER_TILE):
        piece_keys, lengths, key, stop, run = _next_rests(key, stop, run, ahead, PIECE, PIECES_PER_TILE, BLOCK_N)
        ahead = load_runs(runs_ptr, run, num_runs, PIECES_PER_TILE)
        keys = spread(piece_keys, slot_n, PIECES_PER_TILE) + offs_piece
        valid = offs_piece < spread(lengths, slot_n, PIECES_PER_TILE)
        acc, row_max, row_sum = attend_masked(
            q,
            k_ptr + first_key_row * DIM,
            v_ptr + first_key_row * DIM,
            keys,
            valid,
            DIM,
            DIM,
            offs_d,
            scale_log2,
            acc,
            row_max,
            row_sum,
            DIM,
        )

    # Whole tiles, walked as above; there is nothing to skip, for runs with a whole tile come first.
    first_tile_row = first_key_row.to(tl.int32)
    key, stop = first_and_last_key(tl.load(runs_ptr, mask=num_runs > 0, other=0))
    run = 1
    (next_run,) = load_runs(runs_ptr, run, num_runs, 1)
    if ROTATED:
        if full_tiles > 0:
            scores = scores_of(q, k_desc.load([first_tile_row + key, 0]))
            weights, decay, row_max, row_sum = softmax(scores, offs_d, scale_log2, row_max, row_sum, MASKED=False)
            # With 0, which LLVM cannot know; else it moves the rounding to the head of the loop, where the product of
            # the iteration before may still read the registers that it writes.
            bits = _bits_of(weights, q.dtype) ^ tl.minimum(num_runs, 0).to(tl.int16)
            for _ in range(1, full_tiles):
                key_before = key
                key, stop, run = _next_tile(key, stop, run, next_run, BLOCK_N)
                (next_run,) = load_runs(runs_ptr, run, num_runs, 1)
                scores = scores_of(q, k_desc.load([first_tile_row + key, 0]))
                acc = _accumulate_bits(acc, bits, decay, v_desc.load([first_tile_row + key_before, 0]))
                weights, decay, row_max, row_sum = softmax(scores, offs_d, scale_log2, row_max, row_sum, MASKED=False)
                bits = _bits_of(weights, q.dtype)
            acc = _accumulate_bits(acc, bits, decay, v_desc.load([first_tile_row + key, 0]))
    else:
        for _ in range(full_tiles):
            tile_row = first_tile_row + key
            key, stop, run = _next_tile(key, stop, run, next_run, BLOCK_N)
            (next_run,) = load_runs(runs_ptr, run, num_runs, 1)
            scores = scores_of(q, k_desc.load([tile_row, 0]))
            weights, decay, row_max, row_sum = softmax(scores, offs_d, scale_log2, row_max, row_sum, MASKED=False)
            acc = accumulate(acc, weights, decay, v_desc.load([tile_row, 0]))

    store_results(out_ptr, lse_ptr, acc, row_max, row_sum, rows, inside, stride_out_n, offs_d, DIM)


def block_sparse_attention_descriptor(
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
    """Compute ``block_sparse_attention_reference`` in two launches, blind to what is kept.

    For head dimensions up to 128 whose rows are multiples of 16 bytes, fewer than 2^31 keys of all heads, and compute
    capability 9.0 or newer. Besides its results it allocates the tiles of queries, 12 bytes each, and contiguous copies
    of keys and values that are not yet. No device synchronisation; keys that are not kept are not read. ``tiles`` None
    takes what ``tuning`` says.
    """
    block_d = padded_power_of_two(q.shape[3])
    if tiles is None:
        tiles = attention_tiles(capability_of(q.device), block_d, q.dtype, "descriptor")
    call = AttentionCall.of(q, k, v, q_sizes, runs, counts, context_k, context_v, context_mask, q_order, scale, tiles)
    if call.is_empty:
        return call.results
    keys, values = _rows(call.k), _rows(call.v)
    block = [tiles.block_n, block_d]
    descriptors = TensorDescriptor.from_tensor(keys, block), TensorDescriptor.from_tensor(values, block)
    return call.launch(
        attention_descriptor_kernel,
        (*descriptors, keys, values, call.context_k, call.context_v),
        call.mask_or_stand_in,
        call.packed_runs,
        (*call.context_k.stride()[:3], *call.context_v.stride()[:3]),
        (k.shape[2], call.context),
        _constexprs(q.shape[3], tiles, call.context > 0, call.context_mask is not None),
    )


def _rows(x: Tensor) -> Tensor:
    """Return [B, G, N, D] as contiguous, aligned rows of all heads; at least one, for a descriptor cannot have none."""
    rows = x.reshape(-1, x.shape[3]).contiguous()
    if rows.shape[0] == 0:
        return x.new_zeros((1, x.shape[3]))
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


@cache
def _constexprs(dim: int, tiles: AttentionTiles, has_context: bool, has_context_mask: bool) -> dict[str, int | bool]:
    """Return the compile-time arguments."""
    return {
        **triton_constexprs(dim, tiles, has_context, has_context_mask),
        "BLOCK_REST": tiles.block_n // 2,
        # Narrower tiles are for GPUs whose products the exponentials cannot overlap.
        "ROTATED": tiles.block_n >= ROTATED_FROM,
        "TILE_COLUMN": 1 + PIECES.index(tiles.block_n),
        "PIECE_COLUMN": 1 + PIECES.index(tiles.piece),
    }


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel as launched on a compute capability such as 90; none where there are no descriptors."""
    if capability < 90:
        return []

    def cut(kind: str, dim: int, has_context: bool) -> Cut:
        block_d = padded_power_of_two(dim)
        tiles = attention_tiles(capability, block_d, DTYPES[kind], "descriptor")
        types = dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<{kind}[{tiles.block_n}, {block_d}]>")
        return tiles, _constexprs(dim, tiles, has_context, has_context), types

    return attention_variants(attention_descriptor_kernel, "_context", cut)
