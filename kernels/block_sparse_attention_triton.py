"""Block-sparse attention on the GPU: one program per tile of queries, over packed tiles of kept keys.

The work list holds what a query cluster keeps as pieces of 16 keys. A tile of keys is assembled from whatever pieces
come next, so clusters of any size cost their own keys and little more. Full pieces come first: their tiles need no
mask.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.launch import AotVariant, padded_power_of_two
from svg2_compile.kernels.permute import empty_token_major
from svg2_compile.kernels.tuning import AttentionTiles, attention_tiles
from svg2_compile.kernels.work_list import LENGTH_BITS
from svg2_compile.kernels.work_list_triton import work_list_triton

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _load_rows(base_ptr, rows, stride, valid, offs_d, DIM: tl.constexpr, MASKED: tl.constexpr):
    """Return the rows [BLOCK, BLOCK_D]; 0 in the padding of the head dimension and, if masked, in invalid rows."""
    ptrs = base_ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if MASKED:
        return tl.load(ptrs, mask=valid[:, None] & (offs_d < DIM)[None, :], other=0.0)
    if offs_d.shape[0] != DIM:
        return tl.load(ptrs, mask=(offs_d < DIM)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _scores(q, k):
    """Return q k^T in fp32."""
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def _softmax(scores, valid, scale_log2, row_max, row_sum, MASKED: tl.constexpr):
    """Return the weights of a tile, the factor of what was accumulated before, and the new maximum and sum."""
    if MASKED:
        scaled = tl.where(valid[None, :], scores * scale_log2, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scaled, 1))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp2(scaled - shift[:, None])
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        shift = new_max
        weights = tl.exp2(scores * scale_log2 - shift[:, None])
    decay = tl.exp2(row_max - shift)
    return weights, decay, new_max, row_sum * decay + tl.sum(weights, 1)


@triton.jit
def _accumulate(acc, weights, decay, v):
    """Return acc * decay + weights v."""
    return tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")


@triton.jit(
    do_not_specialize=[
        "stride_mask_b",
        "heads",
        "repeats",
        "tokens",
        "context",
        "q_clusters",
        "tile_slots",
        "piece_slots",
    ]
)
def _attention_kernel(
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
    pieces_ptr,
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
    piece_slots,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr,
    LENGTH_BITS: tl.constexpr,
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
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    slot_n = offs_n // PIECE
    offs_piece = offs_n % PIECE
    inside = offs_m < last_row
    rows = offs_m
    if order_ptr is not None:
        rows = tl.load(order_ptr + bh * tokens + offs_m, mask=inside, other=0)
    q = _load_rows(q_ptr + b * stride_q_b + h * stride_q_h, rows, stride_q_n, inside, offs_d, DIM, MASKED=True)
    k_ptr += b * stride_k_b + g * stride_k_h
    v_ptr += b * stride_v_b + g * stride_v_h

    row = bh * q_clusters + cluster
    pieces_ptr += row * piece_slots
    num_full = tl.load(counts_ptr + row * 2)
    num_pieces = tl.load(counts_ptr + row * 2 + 1)
    PIECES_PER_TILE: tl.constexpr = BLOCK_N // PIECE
    full_tiles = num_full // PIECES_PER_TILE

    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for tile in range(full_tiles):
        keys = (tl.load(pieces_ptr + tile * PIECES_PER_TILE + slot_n) >> LENGTH_BITS) + offs_piece
        k = _load_rows(k_ptr, keys, stride_k_n, offs_n, offs_d, DIM, MASKED=False)
        scores = _scores(q, k)
        weights, decay, row_max, row_sum = _softmax(scores, offs_n, scale_log2, row_max, row_sum, MASKED=False)
        v = _load_rows(v_ptr, keys, stride_v_n, offs_n, offs_d, DIM, MASKED=False)
        acc = _accumulate(acc, weights, decay, v)

    # The full pieces that fill no tile, and the ragged ones.
    for first_piece in range(full_tiles * PIECES_PER_TILE, num_pieces, PIECES_PER_TILE):
        slot = first_piece + slot_n
        piece = tl.load(pieces_ptr + slot, mask=slot < num_pieces, other=0)
        valid = offs_piece < (piece & ((1 << LENGTH_BITS) - 1))
        keys = (piece >> LENGTH_BITS) + offs_piece
        k = _load_rows(k_ptr, keys, stride_k_n, valid, offs_d, DIM, MASKED=True)
        scores = _scores(q, k)
        weights, decay, row_max, row_sum = _softmax(scores, valid, scale_log2, row_max, row_sum, MASKED=True)
        v = _load_rows(v_ptr, keys, stride_v_n, valid, offs_d, DIM, MASKED=True)
        acc = _accumulate(acc, weights, decay, v)

    if HAS_CONTEXT:
        context_k_ptr += b * stride_ck_b + g * stride_ck_h
        context_v_ptr += b * stride_cv_b + g * stride_cv_h
        for start in range(0, context, BLOCK_N):
            keys = start + offs_n
            valid = keys < context
            if HAS_CONTEXT_MASK:
                valid = tl.load(context_mask_ptr + b * stride_mask_b + keys, mask=valid, other=0) != 0
            k = _load_rows(context_k_ptr, keys, stride_ck_n, valid, offs_d, DIM, MASKED=True)
            scores = _scores(q, k)
            weights, decay, row_max, row_sum = _softmax(scores, valid, scale_log2, row_max, row_sum, MASKED=True)
            v = _load_rows(context_v_ptr, keys, stride_cv_n, valid, offs_d, DIM, MASKED=True)
            acc = _accumulate(acc, weights, decay, v)

    # A row that attends to nothing has sum 0 and maximum -inf: it gets 0 and -inf.
    acc = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    lse = (row_max + tl.log2(tl.where(row_sum == 0, 1.0, row_sum))) * LN_2
    tl.store(lse_ptr + bh * tokens + rows, lse, mask=inside)
    out_rows = out_ptr + b * stride_out_b + h * stride_out_h + rows.to(tl.int64) * stride_out_n
    out_ptrs = out_rows[:, None] + offs_d[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (offs_d < DIM)[None, :])


def block_sparse_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    keep: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    q_order: Tensor | None,
    scale: float,
    tiles: AttentionTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``block_sparse_attention_reference`` for fp16, bf16 and fp32 in two launches, blind to what is kept.

    Besides its results it allocates the work list, mostly 4 bytes per query cluster, head and 16 keys. No device
    synchronisation; keys that are not kept are not read. ``tiles`` None takes what ``tuning`` says.
    """
    q, k, v = (_rows_of_unit_stride(x) for x in (q, k, v))
    if scale < 0:
        # The kernel takes the maximum before it scales.
        q, scale = -q, -scale
    batch, heads, tokens, dim = q.shape
    if tiles is None:
        major, minor = torch.cuda.get_device_capability(q.device)
        tiles = attention_tiles(10 * major + minor, padded_power_of_two(dim), q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if q_order is None else empty_token_major(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    work = work_list_triton(q_sizes, k_sizes, keep, tokens, k.shape[2], tiles.block_m, tiles.piece)
    has_context = context_k is not None and context_v is not None
    # Without a context its arguments are never read.
    context_keys = k if context_k is None else _rows_of_unit_stride(context_k)
    context_values = v if context_v is None else _rows_of_unit_stride(context_v)
    mask = work.counts if context_mask is None else _rows_of_unit_stride(context_mask).view(torch.uint8)
    with torch.cuda.device_of(q):
        _attention_kernel[(batch * heads * work.tiles.shape[2],)](
            q,
            k,
            v,
            context_keys,
            context_values,
            mask,
            None if q_order is None else q_order.contiguous(),
            out,
            lse,
            work.tiles,
            work.pieces,
            work.counts,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *context_keys.stride()[:3],
            *context_values.stride()[:3],
            *out.stride()[:3],
            0 if mask.shape[0] == 1 else mask.stride(0),
            scale * LOG2_E,
            heads,
            heads // k.shape[1],
            tokens,
            context_keys.shape[2],
            keep.shape[2],
            work.tiles.shape[2],
            work.pieces.shape[3],
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **_constexprs(dim, tiles, has_context, context_mask is not None),
        )
    return out, lse


def _rows_of_unit_stride(x: Tensor) -> Tensor:
    """Return ``x``, copied if its last axis is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _constexprs(dim: int, tiles: AttentionTiles, has_context: bool, has_context_mask: bool) -> dict[str, int | bool]:
    """Return the compile-time arguments."""
    return {
        "DIM": dim,
        "BLOCK_D": padded_power_of_two(dim),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PIECE": tiles.piece,
        "LENGTH_BITS": LENGTH_BITS,
        "HAS_CONTEXT": has_context,
        "HAS_CONTEXT_MASK": has_context_mask,
    }


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel as launched on a compute capability such as 90, with everything in it and with the least."""
    variants = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        for dim, has_context in ((64, True), (64, False), (128, True), (128, False)):
            tiles = attention_tiles(capability, padded_power_of_two(dim), dtype)
            constexprs = _constexprs(dim, tiles, has_context, has_context)
            types = dict.fromkeys(_attention_kernel.arg_names, "i32") | {"scale_log2": "fp32", "lse_ptr": "*fp32"}
            types |= dict.fromkeys(("order_ptr", "tiles_ptr", "pieces_ptr", "counts_ptr"), "*i32") | {
                "context_mask_ptr": "*u8"
            }
            rows = ("q_ptr", "k_ptr", "v_ptr", "context_k_ptr", "context_v_ptr", "out_ptr")
            types |= dict.fromkeys(rows, f"*{name}")
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
