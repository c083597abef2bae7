"""What the attention kernels in Triton have in common: their queries, scores, softmax and results."""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"
# mypy: disable-error-code="assignment, misc"

import math

import triton
import triton.language as tl

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def load_rows(base_ptr, rows, stride, valid, offs_d, DIM: tl.constexpr, MASKED: tl.constexpr):
    """Return the rows [BLOCK, BLOCK_D]; 0 in the padding of the head dimension and, if masked, in invalid rows."""
    ptrs = base_ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if MASKED:
        return tl.load(ptrs, mask=valid[:, None] & (offs_d < DIM)[None, :], other=0.0)
    if offs_d.shape[0] != DIM:
        return tl.load(ptrs, mask=(offs_d < DIM)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def query_rows(order_ptr, first_row, last_row, BLOCK_M: tl.constexpr):
    """Return where the rows of a tile lie, of queries as of results, and which of them there are."""
    offs_m = first_row + tl.arange(0, BLOCK_M)
    inside = offs_m < last_row
    rows = offs_m
    if order_ptr is not None:
        rows = tl.load(order_ptr + offs_m, mask=inside, other=0)
    return rows, inside


@triton.jit
def first_and_last_key(run):
    """Return the two halves of a run, (first key, key after the last) as they lie in memory."""
    return run.to(tl.int32), (run >> 32).to(tl.int32)


@triton.jit
def scores_of(q, k):
    """Return q k^T in fp32."""
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def softmax(scores, valid, scale_log2, row_max, row_sum, MASKED: tl.constexpr):
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
def load_runs(runs_ptr, first, num_runs, COUNT: tl.constexpr):
    """Return the runs from the given one; before the first and past the last one, empty ones."""
    runs = ()
    for i in tl.static_range(COUNT):
        runs = runs + (tl.load(runs_ptr + first + i, mask=(first + i >= 0) & (first + i < num_runs), other=0),)  # noqa: RUF005
    return runs


@triton.jit
def spread(values, slot_n, COUNT: tl.constexpr):
    """Return for every column of a tile the value of its piece."""
    spread = tl.where(slot_n == 0, values[0], 0)
    for i in tl.static_range(1, COUNT):
        spread = tl.where(slot_n == i, values[i], spread)
    return spread


@triton.jit
def accumulate(acc, weights, decay, v):
    """Return acc * decay + weights v."""
    return tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")


@triton.jit
def attend_masked(
    q, k_ptr, v_ptr, keys, valid, stride_k_n, stride_v_n, offs_d, scale_log2, acc, row_max, row_sum, DIM: tl.constexpr
):
    """Attend to a tile of keys of which some are invalid; those are not even read."""
    k = load_rows(k_ptr, keys, stride_k_n, valid, offs_d, DIM, MASKED=True)
    scores = scores_of(q, k)
    weights, decay, row_max, row_sum = softmax(scores, valid, scale_log2, row_max, row_sum, MASKED=True)
    v = load_rows(v_ptr, keys, stride_v_n, valid, offs_d, DIM, MASKED=True)
    return accumulate(acc, weights, decay, v), row_max, row_sum


@triton.jit
def attend_context(
    q,
    k_ptr,
    v_ptr,
    mask_ptr,
    context,
    stride_k_n,
    stride_v_n,
    offs_n,
    offs_d,
    scale_log2,
    acc,
    row_max,
    row_sum,
    DIM: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Attend to the context keys of one head."""
    for start in range(0, context, offs_n.shape[0]):
        keys = start + offs_n
        valid = keys < context
        if HAS_MASK:
            valid = tl.load(mask_ptr + keys, mask=valid, other=0) != 0
        acc, row_max, row_sum = attend_masked(
            q, k_ptr, v_ptr, keys, valid, stride_k_n, stride_v_n, offs_d, scale_log2, acc, row_max, row_sum, DIM
        )
    return acc, row_max, row_sum


@triton.jit
def store_results(out_ptr, lse_ptr, acc, row_max, row_sum, rows, inside, stride_n, offs_d, DIM: tl.constexpr):
    """Store rows of the result and their log-sum-exps; a row that attends to nothing gets 0 and -inf."""
    # Of such a row the sum is 0 and the maximum -inf.
    divisor = tl.where(row_sum == 0, 1.0, row_sum)
    tl.store(lse_ptr + rows, (row_max + tl.log2(divisor)) * LN_2, mask=inside)
    out_rows = out_ptr + rows.to(tl.int64) * stride_n
    out = (acc / divisor[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_rows[:, None] + offs_d[None, :], out, mask=inside[:, None] & (offs_d < DIM)[None, :])
