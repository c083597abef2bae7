"""``svg2::probe_rows`` in Triton: every key and every value is read once.

A program takes a stretch of the keys of a head and all rows, or a tile of them, and keeps an online softmax; PyTorch
adds the stretches up, always in the same order.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.attention_steps import load_rows
from svg2_compile.kernels.launch import cdiv, padded_power_of_two, rows_of_unit_stride
from svg2_compile.kernels.measure_recall_triton import LOG2_E, MARK_BLOCK, mark_kernel
from svg2_compile.kernels.probe_rows import key_results_reference, probe_with

KEYS_PER_PROGRAM = 4096
NUM_WARPS, NUM_STAGES = 4, 2
SUMS = ("highest", "total", "mass")
SUM_COLUMNS = tl.constexpr(len(SUMS))


def _tile(dtype: torch.dtype, dim: int, rows: int, measures: bool) -> dict[str, int]:
    """Return rows and keys of a tile: fp32 products keep both operands in registers, and what is kept needs some."""
    if dtype == torch.float32:
        max_rows, keys = 16, 16
    else:
        max_rows, keys = (64, 64) if dim <= 128 and not measures else (32, 32)
    return {"BLOCK_R": min(max_rows, padded_power_of_two(rows)), "BLOCK_N": keys}


@triton.jit(do_not_specialize=["interval", "rows", "tokens", "k_heads", "splits"])
def probe_kernel(
    calls_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    visible_ptr,
    kept_ptr,
    sums_ptr,
    results_ptr,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    stride_v_b,
    stride_v_h,
    stride_v_n,
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
    """Write what the rows have of ``KEYS`` keys: sums, columns named by ``SUMS``, and weights times values.

    Weights are 2^(s - highest), s = scale_log2 * q_r . k; of kept keys the mass is added, if ``kept_ptr`` is given.
    """
    batch_group = tl.program_id(1).to(tl.int64)
    batch, group = batch_group // k_heads, batch_group % k_heads
    # Tiles of rows side by side: they read the same keys.
    tiles = tl.cdiv(rows, BLOCK_R)
    split = tl.program_id(0) // tiles
    offs_r = tl.program_id(0) % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    is_row = offs_r < rows
    row = batch_group * rows + offs_r
    q = load_rows(q_ptr, row, DIM, is_row, offs_d, DIM, True)
    k_ptr += batch * stride_k_b + group * stride_k_h
    v_ptr += batch * stride_v_b + group * stride_v_h
    visible = tl.load(visible_ptr + batch_group)
    looked_at = 0
    if kept_ptr is not None:
        looked_at = tl.where((tl.load(calls_ptr) - 1) % interval == 0, rows, 0)
    highest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    mass = tl.zeros([BLOCK_R], tl.float32)
    result = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    first_key = split * KEYS
    for first in range(first_key, tl.minimum(first_key + KEYS, visible), BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        is_key = offs_n < visible
        k = load_rows(k_ptr, offs_n, stride_k_n, is_key, offs_d, DIM, True)
        v = load_rows(v_ptr, offs_n, stride_v_n, is_key, offs_d, DIM, True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # a row of scores that are all -inf has no highest one
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(highest - shift)
        total = total * shrink + tl.sum(weights, 1)
        if kept_ptr is not None:
            kept_ptrs = kept_ptr + row[:, None] * tokens + offs_n[None, :]
            kept = tl.load(kept_ptrs, mask=(offs_r < looked_at)[:, None] & is_key[None, :], other=0)
            mass = mass * shrink + tl.sum(tl.where(kept > 0, weights, 0.0), 1)
        result = tl.dot(weights.to(v.dtype), v, result * shrink[:, None], input_precision="ieee")
        highest = new_highest
    place = (batch_group * splits + split) * rows + offs_r
    tl.store(sums_ptr + place * SUM_COLUMNS, highest, mask=is_row)
    tl.store(sums_ptr + place * SUM_COLUMNS + 1, total, mask=is_row)
    tl.store(sums_ptr + place * SUM_COLUMNS + 2, mass, mask=is_row)
    is_dim = offs_d < DIM
    tl.store(results_ptr + place[:, None] * DIM + offs_d[None, :], result, mask=is_row[:, None] & is_dim[None, :])


def probe_rows_triton(q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``probe_rows_reference`` for rows of at most ``MAX_HEAD_DIM``; its arguments are right."""
    # no program would write the results of no keys
    return probe_with(key_results_triton if k.numel() > 0 else key_results_reference, q, k, *others)


def key_results_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    runs: Tensor,
    counts: Tensor,
    scale: float,
    k_calls: Tensor,
    interval: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``probe_rows.key_results_reference``; between two looks the second result is anything.

    Args:
        q: [X, R, D], X = B * G.
        k: [B, G, N, D], any strides.
        v: [B, G, N, D], any strides.
        visible: int32 [X], keys of each head, the first ones.
        runs: int32 [X, R, S, 2], the runs that each row attends to.
        counts: int32 [X, R, 4], of which the first column counts them.
        scale: factor of the scores.
        k_calls: int32 [1], calls of this generation with this one.
        interval: kept keys are looked at in the first call and in every so many after it; 0 never.
    """
    k, v = rows_of_unit_stride(k), rows_of_unit_stride(v)
    heads, rows, dim = q.shape
    tokens = k.shape[2]
    splits = cdiv(tokens, KEYS_PER_PROGRAM)
    tile = _tile(q.dtype, dim, rows, interval > 0)
    kept = None if interval == 0 else torch.zeros((heads, rows, tokens), dtype=torch.int8, device=q.device)
    sums = torch.empty((heads, splits, rows, len(SUMS)), dtype=torch.float32, device=q.device)
    results = torch.empty((heads, splits, rows, dim), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        if kept is not None:
            mark_kernel[(heads * rows,)](
                k_calls, runs.contiguous(), counts.contiguous(), kept, interval, runs.shape[2], tokens,
                MARK_BLOCK=MARK_BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
        probe_kernel[(splits * cdiv(rows, tile["BLOCK_R"]), heads)](
            k_calls, q.contiguous(), k, v, visible, kept, sums, results, *k.stride()[:3], *v.stride()[:3],
            scale * LOG2_E, interval, rows, tokens, k.shape[1], splits,
            **tile, DIM=dim, KEYS=KEYS_PER_PROGRAM, BLOCK_D=padded_power_of_two(dim),
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    highest, total, mass = sums.unbind(-1)  # [X, splits, R]
    shift = highest.amax(1, keepdim=True)
    shift = shift.masked_fill(shift == float("-inf"), 0)
    shares = torch.exp2(highest - shift)
    total, mass = (shares * total).sum(1), (shares * mass).sum(1)
    exact = (shares.unsqueeze(-1) * results).sum(1) / total.masked_fill(total == 0, 1).unsqueeze(-1)
    to_base_e = shift[:, 0] / LOG2_E
    return total.log() + to_base_e, mass.log() + to_base_e, exact


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel for the usual rows, with and without recall."""
    variants = []
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for kind, dim, rows, measures in (
        ("bf16", 128, 64, False),
        ("bf16", 128, 64, True),
        ("bf16", 64, 64, False),
        ("bf16", 256, 64, True),
        ("fp16", 80, 16, False),
        ("fp32", 128, 64, True),
    ):
        tile = _tile(dtypes[kind], dim, rows, measures)
        absent: dict[str, object] = {} if measures else {"kept_ptr": None}
        constexprs = {"DIM": dim, "KEYS": KEYS_PER_PROGRAM, "BLOCK_D": padded_power_of_two(dim)} | tile | absent
        types = dict.fromkeys(probe_kernel.arg_names, "i32") | {"scale_log2": "fp32"}
        types |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{kind}")
        types |= {"calls_ptr": "*i32", "visible_ptr": "*i32", "kept_ptr": "*i8"}
        types |= dict.fromkeys(("sums_ptr", "results_ptr"), "*fp32")
        signature = {name: types[name] for name in probe_kernel.arg_names if name not in constexprs}
        variants.append(
            AotVariant(
                name=f"probe_kernel_{kind}_d{dim}_r{rows}{'_recall' if measures else ''}",
                fn=probe_kernel,
                signature=signature,
                constexprs=constexprs,
                num_warps=NUM_WARPS,
                num_stages=NUM_STAGES,
                divisible_by_16=tuple(name for name in signature if name.startswith("stride") or name.endswith("_ptr")),
            )
        )
    return variants
