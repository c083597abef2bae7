"""Block-sparse attention for GPUs with a tensor memory accelerator: whole tiles of kept keys, loaded by descriptor.

One program per tile of queries. It walks the runs of kept keys of its query cluster in whole tiles of ``BLOCK_N`` keys.
Where tensor cores work on their own, the scores of a tile are multiplied before the values of the tile before it, which
keep them busy while the exponentials are computed. What is left at the end of every run is cut into pieces of 16 keys
and packed into tiles half as wide, which are loaded by pointer.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"
# mypy: disable-error-code="assignment, misc"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.attention_steps import (
    LOG2_E,
    accumulate,
    attend_context,
    attend_masked,
    context_arguments,
    empty_results,
    first_and_last_key,
    load_rows,
    load_runs,
    packed_runs,
    query_rows,
    rows_of_unit_stride,
    scores_of,
    softmax,
    spread,
    store_results,
)
from svg2_compile.kernels.launch import padded_power_of_two
from svg2_compile.kernels.tuning import AttentionTiles, attention_tiles
from svg2_compile.kernels.why_not import capability_of
from svg2_compile.kernels.work_list import COUNTS, PIECES
from svg2_compile.kernels.work_list_triton import query_tiles_triton

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


@triton.jit
def _tail_of(run, BLOCK_N: tl.constexpr):
    """Return the first key and the length of what whole tiles leave of a run."""
    first_key, last_key = first_and_last_key(run)
    length = last_key - first_key
    return first_key + length // BLOCK_N * BLOCK_N, length % BLOCK_N


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
def _attention_kernel(
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
    q = rows_of_unit_stride(q)
    if scale < 0:
        # The kernel takes the maximum before it scales.
        q, scale = -q, -scale
    batch, heads, tokens, dim = q.shape
    groups, k_tokens = k.shape[1:3]
    if tiles is None:
        tiles = attention_tiles(capability_of(q.device), padded_power_of_two(dim), q.dtype, "descriptor")
    out, lse = empty_results(q, q_order)
    if out.numel() == 0:
        return out, lse
    query_tiles = query_tiles_triton(q_sizes, tokens, tiles.block_m)
    runs, counts = packed_runs(runs), counts.contiguous()
    keys, values = _rows(k), _rows(v)
    has_context = context_k is not None and context_v is not None
    context_keys, context_values, mask = context_arguments(k, v, counts, context_k, context_v, context_mask)
    block = [tiles.block_n, padded_power_of_two(dim)]
    with torch.cuda.device_of(q):
        _attention_kernel[(batch * heads * query_tiles.shape[2],)](
            q,
            TensorDescriptor.from_tensor(keys, block),
            TensorDescriptor.from_tensor(values, block),
            keys,
            values,
            context_keys,
            context_values,
            mask,
            None if q_order is None else q_order.contiguous(),
            out,
            lse,
            query_tiles,
            runs,
            counts,
            *q.stride()[:3],
            *context_keys.stride()[:3],
            *context_values.stride()[:3],
            *out.stride()[:3],
            0 if mask.shape[0] == 1 else mask.stride(0),
            scale * LOG2_E,
            heads,
            heads // groups,
            tokens,
            k_tokens,
            context_keys.shape[2],
            runs.shape[2],
            query_tiles.shape[2],
            runs.shape[3],
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **_constexprs(dim, tiles, has_context, context_mask is not None),
        )
    return out, lse


def _rows(x: Tensor) -> Tensor:
    """Return [B, G, N, D] as contiguous, aligned rows of all heads; at least one, for a descriptor cannot have none."""
    rows = x.reshape(-1, x.shape[3]).contiguous()
    if rows.shape[0] == 0:
        return x.new_zeros((1, x.shape[3]))
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def _constexprs(dim: int, tiles: AttentionTiles, has_context: bool, has_context_mask: bool) -> dict[str, int | bool]:
    """Return the compile-time arguments."""
    return {
        "DIM": dim,
        "BLOCK_D": padded_power_of_two(dim),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_REST": tiles.block_n // 2,
        "PIECE": tiles.piece,
        # Narrower tiles are for GPUs whose products the exponentials cannot overlap.
        "ROTATED": tiles.block_n >= ROTATED_FROM,
        "COUNTS": len(COUNTS),
        "TILE_COLUMN": 1 + PIECES.index(tiles.block_n),
        "PIECE_COLUMN": 1 + PIECES.index(tiles.piece),
        "HAS_CONTEXT": has_context,
        "HAS_CONTEXT_MASK": has_context_mask,
    }


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel as launched on a compute capability such as 90; none where there are no descriptors."""
    if capability < 90:
        return []
    variants = []
    for name in ("bf16", "fp16"):
        for dim, has_context in ((64, True), (64, False), (128, True), (128, False)):
            tiles = attention_tiles(capability, padded_power_of_two(dim), torch.bfloat16, "descriptor")
            constexprs = _constexprs(dim, tiles, has_context, has_context)
            types = dict.fromkeys(_attention_kernel.arg_names, "i32") | {"scale_log2": "fp32", "lse_ptr": "*fp32"}
            types |= dict.fromkeys(("order_ptr", "tiles_ptr", "counts_ptr"), "*i32")
            types |= {"runs_ptr": "*i64", "context_mask_ptr": "*u8"}
            types |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "context_k_ptr", "context_v_ptr", "out_ptr"), f"*{name}")
            descriptors = ("k_desc", "v_desc")
            types |= dict.fromkeys(descriptors, f"tensordesc<{name}[{tiles.block_n}, {padded_power_of_two(dim)}]>")
            signature = {argument: type_ for argument, type_ in types.items() if argument not in constexprs}
            aligned = (x for x in signature if x.endswith(("_ptr", "_b", "_h", "_n")) and "mask" not in x)
            variants.append(
                AotVariant(
                    name=f"attention_{name}_{dim}{'_context' if has_context else ''}",
                    fn=_attention_kernel,
                    signature=signature,
                    constexprs=dict(constexprs),
                    num_warps=tiles.num_warps,
                    num_stages=tiles.num_stages,
                    divisible_by_16=tuple(aligned),
                )
            )
    return variants
