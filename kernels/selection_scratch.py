"""The scratch memory of a selection: what a program writes for its query clusters before it selects.

Then every warp selects for one query cluster at a time: each of its 32 lanes holds a stretch of the key clusters, so
that what runs along the clusters stays within a thread but for one step. Tiles are therefore [T, ROWS, 32], T clusters
to each lane, and the scratch memory has that order too: key cluster ``lane * T + t`` is at place ``t * 32 + lane`` of a
row.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from svg2_compile.kernels.select_blocks import LEAST_MASS

LANES = tl.constexpr(32)
# Logits are finite where there is a key: what overflowed, or is no number, is bounded by this.
LARGEST = tl.constexpr(3.0e38)
# Bounds of errors, to base 2: so near to 0 that one more is another number.
LARGEST_ERROR = tl.constexpr(1.0e6)
LEAST = tl.constexpr(LEAST_MASS)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def pack(start, stop):
    """Return both in one number of 64 bits, the start first in memory."""
    return start.to(tl.int64) | (stop.to(tl.int64) << 32)


@triton.jit
def write_edges(k_sizes_ptr, edges_ptr, k_clusters, BLOCK_K: tl.constexpr):
    """Write where every key cluster starts and stops; return the keys of a head, and the clusters that have some."""
    TURNS: tl.constexpr = BLOCK_K // LANES
    offs_t = tl.arange(0, TURNS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    cluster = lane * TURNS + offs_t
    sizes = tl.load(k_sizes_ptr + cluster, mask=cluster < k_clusters, other=0)
    totals = tl.sum(sizes, 0)
    starts = tl.cumsum(sizes, 0) - sizes + (tl.cumsum(totals, 0) - totals)[None, :]
    tl.store(edges_ptr + offs_t * LANES + lane, pack(starts, starts + sizes))
    return tl.sum(totals, 0), tl.sum((sizes > 0).to(tl.int32))


@triton.jit
def _upper(x):
    """Return ``x`` rounded to the 11 significant bits that a tensor core multiplies."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _clusters_at(first, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return some places of a row of the scratch memory, and the key clusters that lie there."""
    position = first + tl.arange(0, BLOCK_N)
    return position, position % LANES * (BLOCK_K // LANES) + position // LANES


@triton.jit
def write_logits(
    q_ptr,
    k_ptr,
    k_sizes_ptr,
    logits_ptr,
    scale,
    q_rows,
    k_clusters,
    DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the logits of a program's query clusters, to base 2; those of empty and absent clusters are -inf."""
    offs_q = tl.arange(0, BLOCK_Q)
    is_q = offs_q < q_rows
    for block in range(0, BLOCK_K, BLOCK_N):
        position, cluster = _clusters_at(block, BLOCK_K, BLOCK_N)
        is_k = cluster < k_clusters
        scores = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
        for first in range(0, DIM, BLOCK_D):
            offs_d = first + tl.arange(0, BLOCK_D)
            is_dim = offs_d < DIM
            q_pointers = q_ptr + offs_q[:, None] * DIM + offs_d[None, :]
            k_pointers = k_ptr + cluster[None, :] * DIM + offs_d[:, None]
            q = tl.load(q_pointers, mask=is_q[:, None] & is_dim[None, :], other=0.0).to(tl.float32)
            k = tl.load(k_pointers, mask=is_k[None, :] & is_dim[:, None], other=0.0).to(tl.float32)
            # Tensor cores multiply the upper 19 bits of each number; what the product of the lower parts lacks is less
            # than the rounding of the sum.
            q_upper, k_upper = _upper(q), _upper(k)
            scores = tl.dot(q - q_upper, k_upper, scores, input_precision="tf32")
            scores = tl.dot(q_upper, k - k_upper, scores, input_precision="tf32")
            scores = tl.dot(q_upper, k_upper, scores, input_precision="tf32")
        sizes = tl.load(k_sizes_ptr + cluster, mask=is_k, other=0).to(tl.float32)
        logits = scores * (scale * LOG2_E) + tl.log2(tl.maximum(sizes, 1.0))[None, :]
        logits = tl.minimum(tl.maximum(logits, -LARGEST), LARGEST)
        # The centroid of an empty cluster may hold anything, so its score is overwritten, not added to.
        logits = tl.where((sizes > 0.0)[None, :], logits, float("-inf"))
        tl.store(logits_ptr + offs_q[:, None] * BLOCK_K + position[None, :], logits)


@triton.jit
def write_logs(
    masses_ptr,
    k_sizes_ptr,
    logits_ptr,
    q_rows,
    k_clusters,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the logarithms of given masses where ``write_logits`` would write its own."""
    offs_q = tl.arange(0, BLOCK_Q)
    for block in range(0, BLOCK_K, BLOCK_N):
        position, cluster = _clusters_at(block, BLOCK_K, BLOCK_N)
        is_k = cluster < k_clusters
        mask = (offs_q < q_rows)[:, None] & is_k[None, :]
        masses = tl.load(masses_ptr + offs_q[:, None] * k_clusters + cluster[None, :], mask=mask, other=0.0)
        sizes = tl.load(k_sizes_ptr + cluster, mask=is_k, other=0)
        # What is no number is below the least as well, and an infinity bounded.
        logs = tl.minimum(tl.log2(tl.where(masses > LEAST, masses, LEAST)), LARGEST)
        logits = tl.where((sizes > 0)[None, :], logs, float("-inf"))
        tl.store(logits_ptr + offs_q[:, None] * BLOCK_K + position[None, :], logits)


@triton.jit
def write_errors(
    errors_ptr,
    k_sizes_ptr,
    scratch_ptr,
    q_rows,
    k_clusters,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the logarithms of errors per key, to base 2; those of empty and absent clusters are -inf."""
    offs_q = tl.arange(0, BLOCK_Q)
    for block in range(0, BLOCK_K, BLOCK_N):
        position, cluster = _clusters_at(block, BLOCK_K, BLOCK_N)
        is_k = cluster < k_clusters
        mask = (offs_q < q_rows)[:, None] & is_k[None, :]
        errors = tl.load(errors_ptr + offs_q[:, None] * k_clusters + cluster[None, :], mask=mask, other=0.0)
        sizes = tl.load(k_sizes_ptr + cluster, mask=is_k, other=0)
        logs = errors * LOG2_E - tl.log2(tl.maximum(sizes, 1).to(tl.float32))[None, :]
        # What is no number is not above the least.
        logs = tl.minimum(tl.where(logs > -LARGEST_ERROR, logs, -LARGEST_ERROR), LARGEST_ERROR)
        logs = tl.where((sizes > 0)[None, :], logs, float("-inf"))
        tl.store(scratch_ptr + offs_q[:, None] * BLOCK_K + position[None, :], logs)


@triton.jit
def per_row(x):
    """Return the sum over the key clusters of every row of a tile [T, ROWS, LANES]."""
    return tl.sum(tl.sum(x, 0), 1)
