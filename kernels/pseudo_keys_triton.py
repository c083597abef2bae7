"""Pseudo-keys of ``svg2::block_sparse_attention`` in Triton: a softmax goes on where another kernel left it.

Whichever kernel attended to the kept keys, a row's result and its log-sum-exp are all that is needed to go on: the
result weighs as one key whose score is the log-sum-exp. One program per tile of queries; one whose query cluster drops
nothing leaves its rows as they are.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"
# mypy: disable-error-code="assignment, misc"

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.attention_steps import (
    LN_2,
    LOG2_E,
    accumulate,
    load_rows,
    query_rows,
    scores_of,
    softmax,
    store_results,
)
from svg2_compile.kernels.launch import padded_power_of_two, rows_of_unit_stride
from svg2_compile.kernels.work_list_triton import query_tiles_triton


def _tile(dtype: torch.dtype, block_d: int) -> dict[str, int]:
    """Return queries and pseudo-keys of a tile, warps and stages: fp32 products keep both operands in registers."""
    if dtype == torch.float32:
        queries, keys, warps, stages = 32, 16, 8, 2
    else:
        queries, keys, warps, stages = {64: (128, 64, 8, 2), 128: (64, 32, 4, 3), 256: (64, 32, 8, 2)}[block_d]
    return {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


@triton.jit(do_not_specialize=["heads", "repeats", "tokens", "pseudo", "q_clusters", "tile_slots"])
def pseudo_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    order_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_n,
    stride_out_b,
    stride_out_h,
    stride_out_n,
    scale_log2,
    heads,
    repeats,
    tokens,
    pseudo,
    q_clusters,
    tile_slots,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend from one tile of queries to the pseudo-keys of its cluster, and put what it had into the same softmax."""
    program = tl.program_id(0)
    bh = (program // tile_slots).to(tl.int64)
    b = bh // heads
    h = bh % heads
    tile_ptr = tiles_ptr + (bh * tile_slots + program % tile_slots) * 3
    cluster = tl.load(tile_ptr)
    first_row = tl.load(tile_ptr + 1)
    last_row = tl.load(tile_ptr + 2)
    if first_row == last_row:
        return
    bias_ptr += (bh * q_clusters + cluster) * pseudo
    offs_n = tl.arange(0, BLOCK_N)
    highest = tl.full([BLOCK_N], -float("inf"), tl.float32)
    for first in range(0, pseudo, BLOCK_N):
        keys = first + offs_n
        highest = tl.maximum(highest, tl.load(bias_ptr + keys, mask=keys < pseudo, other=-float("inf")))
    if tl.max(highest, 0) == -float("inf"):
        return

    offs_d = tl.arange(0, BLOCK_D)
    first_key = bh // repeats * pseudo
    k_ptr += first_key * DIM
    v_ptr += first_key * DIM
    lse_ptr += bh * tokens
    out_ptr += b * stride_out_b + h * stride_out_h
    if order_ptr is not None:
        order_ptr += bh * tokens
    rows, inside = query_rows(order_ptr, first_row, last_row, BLOCK_M)
    q = load_rows(q_ptr + b * stride_q_b + h * stride_q_h, rows, stride_q_n, inside, offs_d, DIM, MASKED=True)
    acc = load_rows(out_ptr, rows, stride_out_n, inside, offs_d, DIM, MASKED=True).to(tl.float32)
    row_max = tl.load(lse_ptr + rows, mask=inside, other=-float("inf")) / LN_2
    row_sum = tl.where(row_max == -float("inf"), 0.0, 1.0)
    for first in range(0, pseudo, BLOCK_N):
        keys = first + offs_n
        bias = tl.load(bias_ptr + keys, mask=keys < pseudo, other=-float("inf")) / LN_2
        valid = bias > -float("inf")
        k = load_rows(k_ptr, keys, DIM, valid, offs_d, DIM, MASKED=True)
        scores = scores_of(q, k) * scale_log2 + bias[None, :]
        weights, decay, row_max, row_sum = softmax(scores, valid, 1.0, row_max, row_sum, MASKED=True)
        v = load_rows(v_ptr, keys, DIM, valid, offs_d, DIM, MASKED=True)
        acc = accumulate(acc, weights, decay, v)
    store_results(out_ptr, lse_ptr, acc, row_max, row_sum, rows, inside, stride_out_n, offs_d, DIM)


def attend_pseudo_keys(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    q_sizes: Tensor,
    q_order: Tensor | None,
    pseudo_k: Tensor,
    pseudo_v: Tensor,
    pseudo_bias: Tensor,
    scale: float,
) -> None:
    """Put pseudo-keys into the softmax of an attention, in place; the arguments are those of the op.

    In two launches. A result is rounded once more than if the kernel before had attended to them itself. No device
    synchronisation; what has a bias of -inf is not read.
    """
    if out.numel() == 0 or pseudo_k.shape[2] == 0:
        return
    q, pseudo_k, pseudo_v = rows_of_unit_stride(q), pseudo_k.contiguous(), pseudo_v.contiguous()
    batch, heads, tokens, dim = q.shape
    tile = _tile(q.dtype, max(64, padded_power_of_two(dim)))
    query_tiles = query_tiles_triton(q_sizes, tokens, tile["BLOCK_M"])
    with torch.cuda.device_of(q):
        pseudo_keys_kernel[(batch * heads * query_tiles.shape[2],)](
            q,
            pseudo_k,
            pseudo_v,
            pseudo_bias.contiguous(),
            None if q_order is None else q_order.contiguous(),
            out,
            lse,
            query_tiles,
            *q.stride()[:3],
            *out.stride()[:3],
            scale * LOG2_E,
            heads,
            heads // pseudo_k.shape[1],
            tokens,
            pseudo_k.shape[2],
            q_sizes.shape[2],
            query_tiles.shape[2],
            **_constexprs(dim),
            **tile,
        )


@cache
def _constexprs(dim: int) -> dict[str, int]:
    """Return the compile-time arguments but for the tiles."""
    return {"DIM": dim, "BLOCK_D": padded_power_of_two(dim)}


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel for the usual rows."""
    variants = []
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for kind, dim in (
        ("bf16", 64),
        ("bf16", 128),
        ("bf16", 256),
        ("fp16", 80),
        ("fp16", 128),
        ("fp32", 128),
        ("fp32", 256),
    ):
        tile = _tile(kinds[kind], max(64, padded_power_of_two(dim)))
        warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
        constexprs = _constexprs(dim) | tile
        types = dict.fromkeys(pseudo_keys_kernel.arg_names, "i32") | {"scale_log2": "fp32"}
        types |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{kind}")
        types |= dict.fromkeys(("bias_ptr", "lse_ptr"), "*fp32") | dict.fromkeys(("order_ptr", "tiles_ptr"), "*i32")
        signature = {name: types[name] for name in pseudo_keys_kernel.arg_names if name not in constexprs}
        variants.append(
            AotVariant(
                name=f"pseudo_keys_kernel_{kind}_d{dim}",
                fn=pseudo_keys_kernel,
                signature=signature,
                constexprs=constexprs,
                num_warps=warps,
                num_stages=stages,
                divisible_by_16=tuple(name for name in signature if name.startswith("stride") or name.endswith("_ptr")),
            )
        )
    return variants
