"""The scores of ``svg2::measure_recall`` in Triton: every key is read once, and nothing at all between two looks."""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.launch import cdiv, padded_power_of_two
from svg2_compile.kernels.measure_recall import key_masses_reference, measure_with
from svg2_compile.kernels.work_list import COUNTS

LOG2_E = math.log2(math.e)
KEYS_PER_PROGRAM = 4096
MARK_BLOCK = 1024
NUM_WARPS, NUM_STAGES = 4, 2
COUNT_COLUMNS = tl.constexpr(len(COUNTS))


def _tile(dtype: torch.dtype, rows: int) -> dict[str, int]:
    """Return rows and keys of a tile: fp32 products keep both operands in registers."""
    max_rows, keys = (16, 32) if dtype == torch.float32 else (32, 64)
    return {"BLOCK_R": min(max_rows, padded_power_of_two(rows)), "BLOCK_N": keys}


@triton.jit
def _is_measured(calls_ptr, interval):
    return (tl.load(calls_ptr) - 1) % interval == 0


@triton.jit(do_not_specialize=["interval", "slots", "tokens"])
def mark_kernel(calls_ptr, runs_ptr, counts_ptr, kept_ptr, interval, slots, tokens, MARK_BLOCK: tl.constexpr):
    """Set kept[x, j] where key j lies in one of the runs of row x."""
    if _is_measured(calls_ptr, interval):
        row = tl.program_id(0).to(tl.int64)
        offs = tl.arange(0, MARK_BLOCK)
        ones = tl.full([MARK_BLOCK], 1, tl.int8)
        for run in range(tl.load(counts_ptr + row * COUNT_COLUMNS)):
            start = tl.load(runs_ptr + (row * slots + run) * 2)
            stop = tl.load(runs_ptr + (row * slots + run) * 2 + 1)
            for first in range(start, stop, MARK_BLOCK):
                tl.store(kept_ptr + row * tokens + first + offs, ones, mask=first + offs < stop)


@triton.jit(do_not_specialize=["interval", "rows", "tokens", "k_heads", "splits"])
def recall_masses_kernel(
    calls_ptr,
    q_ptr,
    k_ptr,
    visible_ptr,
    kept_ptr,
    masses_ptr,
    stride_k_b,
    stride_k_g,
    stride_k_n,
    stride_k_d,
    scale_log2,
    interval,
    rows,
    tokens,
    k_heads,
    splits,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the largest score of every row among ``KEYS`` keys, and sums of exp2 less it: of all, and of kept keys.

    masses[x, split, r] = (m, sum of 2^(s - m) over visible keys, the same over kept ones), s = scale_log2 * q_r . k.
    """
    if _is_measured(calls_ptr, interval):
        batch_group = tl.program_id(1).to(tl.int64)
        batch, group = batch_group // k_heads, batch_group % k_heads
        split = tl.program_id(0)
        offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
        offs_d = tl.arange(0, BLOCK_D)
        is_row, is_dim = offs_r < rows, offs_d < DIM
        row = batch_group * rows + offs_r
        q = tl.load(q_ptr + row[:, None] * DIM + offs_d[None, :], mask=is_row[:, None] & is_dim[None, :], other=0.0)
        k_head = k_ptr + batch * stride_k_b + group * stride_k_g
        visible = tl.load(visible_ptr + batch_group)
        highest = tl.full([BLOCK_R], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        mass = tl.zeros([BLOCK_R], tl.float32)
        first_key = split * KEYS
        for first in range(first_key, tl.minimum(first_key + KEYS, visible), BLOCK_N):
            offs_n = first + tl.arange(0, BLOCK_N)
            is_key = offs_n < visible
            k_rows = k_head + offs_n.to(tl.int64) * stride_k_n
            k = tl.load(
                k_rows[:, None] + (offs_d * stride_k_d)[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0
            )
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            scores = tl.where(is_key[None, :], scores, float("-inf"))
            kept = tl.load(
                kept_ptr + row[:, None] * tokens + offs_n[None, :], mask=is_row[:, None] & is_key[None, :], other=0
            )
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            # a row of scores that are all -inf has no highest one
            shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weights = tl.exp2(scores - shift[:, None])
            shrink = tl.exp2(highest - shift)
            total = total * shrink + tl.sum(weights, 1)
            mass = mass * shrink + tl.sum(tl.where(kept > 0, weights, 0.0), 1)
            highest = new_highest
        out = masses_ptr + ((batch_group * splits + split) * rows + offs_r) * 3
        tl.store(out, highest, mask=is_row)
        tl.store(out + 1, total, mask=is_row)
        tl.store(out + 2, mass, mask=is_row)


def measure_recall_triton(q: Tensor, k: Tensor, *others: Any) -> Tensor:
    """Compute ``measure_recall_reference`` for rows of at most ``MAX_HEAD_DIM``; its arguments are right."""
    # no program would write the masses of no keys
    return measure_with(key_masses_triton if k.numel() > 0 else key_masses_reference, q, k, *others)


def key_masses_triton(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    runs: Tensor,
    counts: Tensor,
    scale: float,
    k_calls: Tensor,
    interval: int,
) -> tuple[Tensor, Tensor]:
    """Compute ``measure_recall.key_masses_reference``; between two looks it computes nothing and returns anything.

    Args:
        q: [X, R, D], X = B * G.
        k: [B, G, N, D], any strides.
        visible: int32 [X], keys of each head, the first ones.
        runs: int32 [X, R, S, 2], the runs that each row attends to.
        counts: int32 [X, R, 4], of which the first column counts them.
        scale: factor of the scores.
        k_calls: int32 [1], calls of this generation with this one.
        interval: it computes at the first call, and at every so many after it.
    """
    heads, rows, dim = q.shape
    tokens = k.shape[2]
    splits = cdiv(tokens, KEYS_PER_PROGRAM)
    tile = _tile(q.dtype, rows)
    kept = torch.zeros((heads, rows, tokens), dtype=torch.int8, device=q.device)
    masses = torch.empty((heads, splits, rows, 3), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        mark_kernel[(heads * rows,)](
            k_calls, runs.contiguous(), counts.contiguous(), kept, interval, runs.shape[2], tokens,
            MARK_BLOCK=MARK_BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
        recall_masses_kernel[(splits, heads, cdiv(rows, tile["BLOCK_R"]))](
            k_calls, q.contiguous(), k, visible, kept, masses, *k.stride(), scale * LOG2_E, interval, rows, tokens,
            k.shape[1], splits, **tile, DIM=dim, KEYS=KEYS_PER_PROGRAM, BLOCK_D=padded_power_of_two(dim),
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    highest, *sums = masses.unbind(-1)
    total, mass = (((highest + each.log2()) / LOG2_E).logsumexp(1) for each in sums)
    return total, mass


def aot_variants(capability: int) -> list[AotVariant]:
    """Return both kernels, for the usual rows and for odd ones with a strided last axis."""
    variants = [
        AotVariant(
            name="mark",
            fn=mark_kernel,
            signature={"calls_ptr": "*i32", "runs_ptr": "*i32", "counts_ptr": "*i32", "kept_ptr": "*i8"}
            | dict.fromkeys(("interval", "slots", "tokens"), "i32"),
            constexprs={"MARK_BLOCK": MARK_BLOCK},
            num_warps=NUM_WARPS,
            num_stages=3,
            divisible_by_16=("calls_ptr", "runs_ptr", "counts_ptr", "kept_ptr"),
        )
    ]
    strides = ("stride_k_b", "stride_k_g", "stride_k_n")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, dtype, dim, rows, strided in (
        ("masses_bf16_d128_r32", "bf16", 128, 32, False),
        ("masses_fp16_d64_r8", "fp16", 64, 8, False),
        ("masses_fp32_d80_r32_strided", "fp32", 80, 32, True),
        ("masses_bf16_d256_r32", "bf16", 256, 32, False),
    ):
        pointers = {"calls_ptr": "*i32", "q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "visible_ptr": "*i32"}
        pointers |= {"kept_ptr": "*i8", "masses_ptr": "*fp32"}
        variants.append(
            AotVariant(
                name=name,
                fn=recall_masses_kernel,
                signature=pointers
                | dict.fromkeys(strides, "i32")
                | ({"stride_k_d": "i32"} if strided else {})
                | {"scale_log2": "fp32"}
                | dict.fromkeys(("interval", "rows", "tokens", "k_heads", "splits"), "i32"),
                constexprs=({} if strided else {"stride_k_d": 1})
                | _tile(dtypes[dtype], rows)
                | {"DIM": dim, "KEYS": KEYS_PER_PROGRAM, "BLOCK_D": padded_power_of_two(dim)},
                num_warps=NUM_WARPS,
                num_stages=NUM_STAGES,
                divisible_by_16=(*pointers, *strides),
            )
        )
    return variants
