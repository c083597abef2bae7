"""Block-sparse attention for Hopper: warps that load and warps that multiply, over the same work list as in Triton.

One program per tile of 128 queries. A warp walks the pieces of 16 keys and lets the tensor memory accelerator put
eight of them into one tile of keys, wherever they lie; two groups of four warps each attend from 64 queries. Tensor
cores work on the values of one tile while the exponentials of the next are computed.
"""

# Gluon has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"
# mypy: disable-error-code="assignment"

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from svg2_compile.kernels.launch import AotVariant
from svg2_compile.kernels.permute import empty_token_major
from svg2_compile.kernels.tuning import GLUON
from svg2_compile.kernels.work_list import LENGTH_BITS
from svg2_compile.kernels.work_list_triton import work_list_triton

# Gluon renames as it grows: Triton 3.6 has the second names.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
LOG2_E = math.log2(math.e)
LN_2 = gl.constexpr(math.log(2))
CONSUMER_REGISTERS = 232
PRODUCER_REGISTERS = 40


@gluon.jit
def _key_row(pieces_ptr, slot, num_pieces, LENGTH_BITS: gl.constexpr):
    """Return the first key of a piece; of slots past the last one, any key."""
    piece = gl.load(pieces_ptr + slot, mask=slot < num_pieces, other=0)
    return piece >> LENGTH_BITS


@gluon.jit
def _load_tile(desc, row, smem, barrier, tile, PIECE: gl.constexpr, PIECES: gl.constexpr):
    """Fill a tile of keys or values with consecutive rows."""
    for i in gl.static_range(PIECES):
        load_box(desc, [row + i * PIECE, 0], barrier, smem.index(tile).slice(i * PIECE, PIECE))


@gluon.jit
def _produce(
    k_desc,
    v_desc,
    context_k_desc,
    context_v_desc,
    pieces_ptr,
    k_smem,
    v_smem,
    bars,
    first_key,
    first_context_key,
    num_pieces,
    piece_tiles,
    tiles,
    STAGES: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PIECE: gl.constexpr,
    LENGTH_BITS: gl.constexpr,
):
    """Load the tiles of keys and values in the order in which they are used."""
    PIECES: gl.constexpr = BLOCK_N // PIECE
    BYTES: gl.constexpr = k_smem.dtype.primitive_bitwidth // 8 * BLOCK_N * k_smem.shape[2]
    for tile in range(piece_tiles):
        stage = tile % STAGES
        phase = (tile // STAGES) & 1
        rows = ()
        for i in gl.static_range(PIECES):
            rows = rows + (first_key + _key_row(pieces_ptr, tile * PIECES + i, num_pieces, LENGTH_BITS),)  # noqa: RUF005
        mbarrier.wait(bars.index(STAGES + stage), phase ^ 1)
        mbarrier.expect(bars.index(stage), BYTES)
        for i in gl.static_range(PIECES):
            load_box(k_desc, [rows[i], 0], bars.index(stage), k_smem.index(stage).slice(i * PIECE, PIECE))
        mbarrier.wait(bars.index(3 * STAGES + stage), phase ^ 1)
        mbarrier.expect(bars.index(2 * STAGES + stage), BYTES)
        for i in gl.static_range(PIECES):
            load_box(v_desc, [rows[i], 0], bars.index(2 * STAGES + stage), v_smem.index(stage).slice(i * PIECE, PIECE))
    for tile in range(piece_tiles, tiles):
        stage = tile % STAGES
        phase = (tile // STAGES) & 1
        row = first_context_key + (tile - piece_tiles) * BLOCK_N
        mbarrier.wait(bars.index(STAGES + stage), phase ^ 1)
        mbarrier.expect(bars.index(stage), BYTES)
        _load_tile(context_k_desc, row, k_smem, bars.index(stage), stage, PIECE, PIECES)
        mbarrier.wait(bars.index(3 * STAGES + stage), phase ^ 1)
        mbarrier.expect(bars.index(2 * STAGES + stage), BYTES)
        _load_tile(context_v_desc, row, v_smem, bars.index(2 * STAGES + stage), stage, PIECE, PIECES)


@gluon.jit
def _is_valid(
    tile,
    piece_tiles,
    num_pieces,
    pieces_ptr,
    context,
    context_mask_ptr,
    layout: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PIECE: gl.constexpr,
    LENGTH_BITS: gl.constexpr,
):
    """Return which keys of a tile may be attended to."""
    offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    slot = tile * (BLOCK_N // PIECE) + offs_n // PIECE
    piece = gl.load(pieces_ptr + slot, mask=slot < num_pieces, other=0)
    in_piece = (offs_n % PIECE) < (piece & ((1 << LENGTH_BITS) - 1))
    key = (tile - piece_tiles) * BLOCK_N + offs_n
    is_context = (tile >= piece_tiles) & (key < context)
    if context_mask_ptr is not None:
        is_context = gl.load(context_mask_ptr + key, mask=is_context, other=0) != 0
    return in_piece | is_context


@gluon.jit
def _softmax(scores, valid, scale_log2, row_max, row_sum, MASKED: gl.constexpr):
    """Return the weights of a tile, the factor of what was accumulated before, and the new maximum and sum."""
    if MASKED:
        scaled = gl.where(valid[None, :], scores * scale_log2, -float("inf"))
        new_max = gl.maximum(row_max, gl.max(scaled, 1))
        shift = gl.where(new_max == -float("inf"), 0.0, new_max)
        weights = gl.exp2(scaled - shift[:, None])
    else:
        new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
        shift = new_max
        weights = gl.exp2(scores * scale_log2 - shift[:, None])
    decay = gl.exp2(row_max - shift)
    return weights, decay, new_max, row_sum * decay + gl.sum(weights, 1)


@gluon.jit
def _step(
    tile,
    piece_tiles,
    num_pieces,
    pieces_ptr,
    context,
    context_mask_ptr,
    q,
    k_smem,
    v_smem,
    bars,
    acc,
    weights,
    row_max,
    row_sum,
    scale_log2,
    s_layout: gl.constexpr,
    o_layout: gl.constexpr,
    STAGES: gl.constexpr,
    PIECE: gl.constexpr,
    LENGTH_BITS: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Score tile ``tile`` and accumulate the one before it."""
    stage = tile % STAGES
    phase = (tile // STAGES) & 1
    before = (tile - 1) % STAGES
    mbarrier.wait(bars.index(stage), phase)
    ROWS: gl.constexpr = q.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    scores = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    acc = warpgroup_mma(weights, v_smem.index(before), acc, is_async=True)
    valid = None
    if MASKED:
        valid = _is_valid(
            tile, piece_tiles, num_pieces, pieces_ptr, context, context_mask_ptr, s_layout, BLOCK_N, PIECE, LENGTH_BITS
        )
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(bars.index(STAGES + stage), count=1)
    new_weights, decay, row_max, row_sum = _softmax(scores, valid, scale_log2, row_max, row_sum, MASKED)
    operand_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    new_weights = gl.convert_layout(new_weights.to(v_smem.dtype), operand_layout)
    # Standing here, this wait keeps the assembler from finishing the product before the exponentials.
    mbarrier.wait(bars.index(2 * STAGES + stage), phase)
    acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
    mbarrier.arrive(bars.index(3 * STAGES + before), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
    return acc, new_weights, row_max, row_sum


@gluon.jit
def _consume(
    half,
    q_ptr,
    order_ptr,
    out_ptr,
    lse_ptr,
    pieces_ptr,
    context_mask_ptr,
    q_smem,
    k_smem,
    v_smem,
    bars,
    stride_q_n,
    stride_out_n,
    first_row,
    last_row,
    num_pieces,
    full_tiles,
    piece_tiles,
    tiles,
    context,
    scale_log2,
    STAGES: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PIECE: gl.constexpr,
    LENGTH_BITS: gl.constexpr,
):
    """Attend from 64 queries to every tile of keys."""
    ROWS: gl.constexpr = q_smem.shape[1]
    DIM: gl.constexpr = q_smem.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    operand_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)

    offs_m = first_row + half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, load_layout))
    offs_d = gl.arange(0, DIM, gl.SliceLayout(0, load_layout))
    rows = offs_m
    if order_ptr is not None:
        rows = gl.load(order_ptr + offs_m, mask=offs_m < last_row, other=0)
    q_ptrs = q_ptr + rows.to(gl.int64)[:, None] * stride_q_n + offs_d[None, :]
    q = q_smem.index(half)
    q.store(gl.load(q_ptrs, mask=(offs_m < last_row)[:, None], other=0.0))
    fence_async_shared()
    thread_barrier()

    row_max = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, s_layout))
    row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
    acc = gl.zeros([ROWS, DIM], gl.float32, o_layout)
    if tiles > 0:
        mbarrier.wait(bars.index(0), 0)
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
        scores = warpgroup_mma(q, k_smem.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
        valid = _is_valid(
            0, piece_tiles, num_pieces, pieces_ptr, context, context_mask_ptr, s_layout, BLOCK_N, PIECE, LENGTH_BITS
        )
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(bars.index(STAGES), count=1)
        weights, _, row_max, row_sum = _softmax(scores, valid, scale_log2, row_max, row_sum, True)
        weights = gl.convert_layout(weights.to(v_smem.dtype), operand_layout)
        mbarrier.wait(bars.index(2 * STAGES), 0)
        for tile in range(1, full_tiles):
            acc, weights, row_max, row_sum = _step(
                tile,
                piece_tiles,
                num_pieces,
                pieces_ptr,
                context,
                context_mask_ptr,
                q,
                k_smem,
                v_smem,
                bars,
                acc,
                weights,
                row_max,
                row_sum,
                scale_log2,
                s_layout,
                o_layout,
                STAGES,
                PIECE,
                LENGTH_BITS,
                False,
            )
        for tile in range(gl.maximum(full_tiles, 1), tiles):
            acc, weights, row_max, row_sum = _step(
                tile,
                piece_tiles,
                num_pieces,
                pieces_ptr,
                context,
                context_mask_ptr,
                q,
                k_smem,
                v_smem,
                bars,
                acc,
                weights,
                row_max,
                row_sum,
                scale_log2,
                s_layout,
                o_layout,
                STAGES,
                PIECE,
                LENGTH_BITS,
                True,
            )
        acc = warpgroup_mma(weights, v_smem.index((tiles - 1) % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))

    # A row that attends to nothing has sum 0 and maximum -inf: it gets 0 and -inf.
    divisor = gl.where(row_sum == 0, 1.0, row_sum)
    lse = (row_max + gl.log2(divisor)) * LN_2
    acc = acc / gl.convert_layout(divisor, gl.SliceLayout(1, o_layout))[:, None]
    out_m = first_row + half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, o_layout))
    lse_m = first_row + half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    out_rows = out_m
    lse_rows = lse_m
    if order_ptr is not None:
        out_rows = gl.load(order_ptr + out_m, mask=out_m < last_row, other=0)
        lse_rows = gl.load(order_ptr + lse_m, mask=lse_m < last_row, other=0)
    gl.store(lse_ptr + lse_rows, lse, mask=lse_m < last_row)
    out_d = gl.arange(0, DIM, gl.SliceLayout(0, o_layout))
    out_ptrs = out_ptr + out_rows.to(gl.int64)[:, None] * stride_out_n + out_d[None, :]
    gl.store(out_ptrs, acc.to(v_smem.dtype), mask=(out_m < last_row)[:, None])


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
        "piece_slots",
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
    pieces_ptr,
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
    piece_slots,
    DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PIECE: gl.constexpr,
    STAGES: gl.constexpr,
    LENGTH_BITS: gl.constexpr,
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
    pieces_ptr += row * piece_slots
    PIECES: gl.constexpr = BLOCK_N // PIECE
    num_full = gl.load(counts_ptr + row * 2)
    num_pieces = gl.load(counts_ptr + row * 2 + 1)
    # A slot that is left over has no rows and shall cost nothing.
    is_used = (first_row < last_row).to(gl.int32)
    full_tiles = num_full // PIECES * is_used
    piece_tiles = (num_pieces + PIECES - 1) // PIECES * is_used
    tiles = piece_tiles + (context + BLOCK_N - 1) // BLOCK_N * is_used

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
    # Keys arrived, keys used, values arrived, values used; of every stage.
    bars = gl.allocate_shared_memory(gl.int64, [4 * STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(bars.index(stage), count=1)
        mbarrier.init(bars.index(STAGES + stage), count=2)
        mbarrier.init(bars.index(2 * STAGES + stage), count=1)
        mbarrier.init(bars.index(3 * STAGES + stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0,
                    q_ptr,
                    order_ptr,
                    out_ptr,
                    lse_ptr,
                    pieces_ptr,
                    context_mask_ptr,
                    q_smem,
                    k_smem,
                    v_smem,
                    bars,
                    stride_q_n,
                    stride_out_n,
                    first_row,
                    last_row,
                    num_pieces,
                    full_tiles,
                    piece_tiles,
                    tiles,
                    context,
                    scale_log2,
                    STAGES,
                    BLOCK_N,
                    PIECE,
                    LENGTH_BITS,
                ),
            ),
            (
                _consume,
                (
                    1,
                    q_ptr,
                    order_ptr,
                    out_ptr,
                    lse_ptr,
                    pieces_ptr,
                    context_mask_ptr,
                    q_smem,
                    k_smem,
                    v_smem,
                    bars,
                    stride_q_n,
                    stride_out_n,
                    first_row,
                    last_row,
                    num_pieces,
                    full_tiles,
                    piece_tiles,
                    tiles,
                    context,
                    scale_log2,
                    STAGES,
                    BLOCK_N,
                    PIECE,
                    LENGTH_BITS,
                ),
            ),
            (
                _produce,
                (
                    k_desc,
                    v_desc,
                    context_k_desc,
                    context_v_desc,
                    pieces_ptr,
                    k_smem,
                    v_smem,
                    bars,
                    key_head * k_tokens,
                    key_head * context,
                    num_pieces,
                    piece_tiles,
                    tiles,
                    STAGES,
                    BLOCK_N,
                    PIECE,
                    LENGTH_BITS,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def block_sparse_attention_gluon(
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
) -> tuple[Tensor, Tensor]:
    """Compute ``block_sparse_attention_reference`` for fp16 and bf16 rows of 64 or 128 on Hopper.

    Allocates what the Triton implementation does, and contiguous copies of keys, values and context that are not yet.
    No device synchronisation. Beside what is kept it reads up to 15 keys after a run of kept clusters; their weight is
    0, so they must be finite.
    """
    if scale < 0:
        # The kernel takes the maximum before it scales.
        q, scale = -q, -scale
    q = q if q.stride(-1) == 1 else q.contiguous()
    batch, heads, tokens, dim = q.shape
    groups, k_tokens = k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if q_order is None else empty_token_major(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    work = work_list_triton(q_sizes, k_sizes, keep, tokens, k_tokens, GLUON.block_m, GLUON.piece)
    keys, values = _rows(k), _rows(v)
    # Without a context its arguments are never read.
    context = 0 if context_k is None else context_k.shape[2]
    context_keys = keys if context_k is None or context == 0 else _rows(context_k)
    context_values = values if context_v is None or context == 0 else _rows(context_v)
    mask = None if context_mask is None or context == 0 else context_mask.contiguous().view(torch.uint8)
    with torch.cuda.device_of(q):
        _attention_kernel[(batch * heads * work.tiles.shape[2],)](
            q,
            keys,
            values,
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
            *out.stride()[:3],
            0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
            scale * LOG2_E,
            heads,
            heads // groups,
            tokens,
            k_tokens,
            context,
            keep.shape[2],
            work.tiles.shape[2],
            work.pieces.shape[3],
            num_warps=GLUON.num_warps,
            **_constexprs(dim),
        )
    return out, lse


def _rows(x: Tensor) -> TensorDescriptor:
    """Return [B, G, N, D] as rows of all heads, to be loaded piece by piece."""
    rows = x.contiguous().view(-1, x.shape[3])
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    block = [GLUON.piece, x.shape[3]]
    return TensorDescriptor.from_tensor(rows, block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def _constexprs(dim: int) -> dict[str, int]:
    """Return the compile-time arguments."""
    return {
        "DIM": dim,
        "BLOCK_M": GLUON.block_m,
        "BLOCK_N": GLUON.block_n,
        "PIECE": GLUON.piece,
        "STAGES": GLUON.num_stages,
        "LENGTH_BITS": LENGTH_BITS,
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
            layout = gl.NVMMASharedLayout.get_default_for([GLUON.piece, dim], dtype)
            constexprs: dict[str, object] = {**_constexprs(dim)}
            if not has_context_mask:
                constexprs["context_mask_ptr"] = None
            types = dict.fromkeys(_attention_kernel.arg_names, "i32") | {"scale_log2": "fp32", "lse_ptr": "*fp32"}
            types |= dict.fromkeys(("order_ptr", "tiles_ptr", "pieces_ptr", "counts_ptr"), "*i32")
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
