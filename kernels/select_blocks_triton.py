"""``svg2::select_blocks`` in Triton, from centroids to runs in one launch.

The selection needs no sort. Whether a cluster is kept depends on the mass and on the number of the likelier ones, and
both fall as the cluster gets likelier: the kept clusters are those above a threshold, which is found by bisection.

A program first writes the logits of its query clusters to its own part of a scratch tensor. Then every warp selects for
one query cluster at a time: each of its 32 lanes holds a stretch of the key clusters, so that what runs along the
clusters stays within a thread but for one step. Tiles are therefore [T, ROWS, 32], T clusters to each lane, and the
scratch tensor has that order too: key cluster ``lane * T + t`` is at position ``t * 32 + lane`` of a row.

Where errors choose, bisection is done three times: by mass, which says how many keys; by mass again, for the clusters
that are kept in any case; and by error per key, with keys in the place of mass.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.cluster_sizes import sum_of
from svg2_compile.kernels.launch import cdiv, padded_power_of_two
from svg2_compile.kernels.select_blocks import BUDGETS, LEAST_MASS
from svg2_compile.kernels.selection_statistics import STATISTICS, TILE_KEYS
from svg2_compile.kernels.work_list import COUNTS, PIECES, max_runs

BLOCK_Q = 16  # query clusters of a program
BLOCK_N = 128  # key clusters of a tile of scores
BLOCK_D = 16
NUM_WARPS = 4  # and rows of a tile
NUM_STAGES = 3
# Most registers of a thread, by the padded number of key clusters. Told none, the assembler stores some on the stack.
MAX_REGISTERS = {64: 64, 128: 96, 256: 128}
MAX_REGISTERS_BY_ERRORS = {64: 64, 128: 128, 256: 128, 512: 168}
LANES = tl.constexpr(32)
OPTIONAL = ("masses", "errors", "budgets")
UNALIGNED = ["logits_ptr", "edges_ptr", "runs_ptr"]
# Halving the range of values isolates one of a thousand clusters in about a dozen steps; equal and nearly equal ones
# take the other way, which halves the range of bit patterns and ends after 32 more.
VALUE_STEPS = tl.constexpr(18)
# Between two looks at whether every row of a tile is done.
STEPS_PER_ROUND = tl.constexpr(3)
ROUNDS = tl.constexpr(17)
# Logits are finite where there is a key: what overflowed, or is no number, is bounded by this.
LARGEST = tl.constexpr(3.0e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(LEAST_MASS)
# Bounds of errors, to base 2: so near to 0 that one more is another number.
LARGEST_ERROR = tl.constexpr(1.0e6)
SHORT, MEDIUM, LONG = (tl.constexpr(piece) for piece in PIECES)
PIECES_PER_TILE = tl.constexpr(TILE_KEYS // PIECES[0])
COUNT_COLUMNS, STATISTIC_COLUMNS = tl.constexpr(len(COUNTS)), tl.constexpr(len(STATISTICS))
BUDGET_COLUMNS = tl.constexpr(len(BUDGETS))


@triton.jit
def _last(left, left_before, right, right_before):
    """Combine (largest, largest but for the last element) of two neighbouring stretches of numbers."""
    return tl.maximum(left, right), tl.maximum(left, right_before)


@triton.jit
def _sum(left, right):
    return left + right


@triton.jit
def _max_before(x, offs_t):
    """Return the largest element before each one of a tile [T, ROWS, LANES], uint32, and that of every row.

    The order is along T, then along the lanes; there is a 0 before the first.
    """
    of_lanes = tl.max(x, 0)
    _, before_lane = tl.associative_scan((of_lanes, tl.zeros_like(of_lanes)), 1, _last)
    # Each lane starts with what the lanes before it found.
    start = tl.where(offs_t == 0, before_lane[None, :, :], 0)
    _, before = tl.associative_scan((tl.maximum(x, start), start), 0, _last)
    return before, tl.max(of_lanes, 1)


@triton.jit
def _ordered(x):
    """Return an integer in the order of ``x``, for finite numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _number(ordered):
    """Return the number that ``_ordered`` belongs to."""
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _pack(start, stop):
    """Return both in one number of 64 bits, the start first in memory."""
    return start.to(tl.int64) | (stop.to(tl.int64) << 32)


@triton.jit
def _write_edges(k_sizes_ptr, edges_ptr, k_clusters, BLOCK_K: tl.constexpr):
    """Write where every key cluster starts and stops; return the keys of a head, and the clusters that have some."""
    TURNS: tl.constexpr = BLOCK_K // LANES
    offs_t = tl.arange(0, TURNS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    cluster = lane * TURNS + offs_t
    sizes = tl.load(k_sizes_ptr + cluster, mask=cluster < k_clusters, other=0)
    totals = tl.sum(sizes, 0)
    starts = tl.cumsum(sizes, 0) - sizes + (tl.cumsum(totals, 0) - totals)[None, :]
    tl.store(edges_ptr + offs_t * LANES + lane, _pack(starts, starts + sizes))
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
def _write_logits(
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
def _write_logs(
    masses_ptr,
    k_sizes_ptr,
    logits_ptr,
    q_rows,
    k_clusters,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the logarithms of given masses where ``_write_logits`` would write its own."""
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
def _write_errors(
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
def _per_row(x):
    """Return the sum over the key clusters of every row of a tile [T, ROWS, LANES]."""
    return tl.sum(tl.sum(x, 0), 1)


@triton.jit
def _mass_and_count(keep, weights):
    # Products, not selections: a comparison gives 1 or 0 in one instruction, and a product is added in one.
    ones = keep.to(tl.float32)
    return _per_row(ones * weights), _per_row(ones)


@triton.jit
def _threshold(
    logits,
    weights,
    cluster,
    smallest,
    largest,
    total,
    filled,
    top_p,
    min_keep,
    max_keep,
    BLOCK_K: tl.constexpr,
    INDEX_BITS: tl.constexpr,
):
    """Return a number that just enough logits are above, the mass of those, and the logits.

    The clusters above ``low`` are enough, those above ``high`` are not: so it is at first, and so it remains. As many
    as ``max_keep`` are enough whatever their mass, unless that is None. Of equal logits at the threshold, those of the
    clusters that are not needed are lowered.
    """
    enough_mass = top_p * total
    # Two below, as minus zero is not below zero.
    low, high = _number(_ordered(smallest) - 2), largest
    mass_above_low = total
    above_low, above_high = tl.full(low.shape, 1.0, tl.float32) * filled, tl.zeros_like(low)
    # Empty clusters come last in any order, and whether they are kept does not matter.
    at_least = tl.minimum(filled, min_keep).to(tl.float32)
    step = 0
    is_open = 1
    for _round in range(ROUNDS):
        if is_open > 0:
            for _step in tl.static_range(STEPS_PER_ROUND):
                a, b = _ordered(low), _ordered(high)
                middle = tl.where(step < VALUE_STEPS, 0.5 * low + 0.5 * high, _number((a & b) + ((a ^ b) >> 1)))
                mass, count = _mass_and_count(logits > middle[None, :, None], weights)
                is_enough = (mass > enough_mass) & (count >= at_least)
                if max_keep is not None:
                    is_enough = is_enough | (count >= max_keep)
                low, high = tl.where(is_enough, middle, low), tl.where(is_enough, high, middle)
                mass_above_low = tl.where(is_enough, mass, mass_above_low)
                above_low = tl.where(is_enough, count, above_low)
                above_high = tl.where(is_enough, above_high, count)
                step += 1
            is_open = tl.max(((above_low - above_high > 1.0) & (_ordered(high) - 1 > _ordered(low))).to(tl.int32), 0)

    # If there are several between the two, they are equal, and the first ones are kept.
    if tl.max(above_low - above_high, 0) > 1.0:
        is_needed = logits > high[None, :, None]
        is_tied = (logits > low[None, :, None]) & (is_needed == 0)
        before, last = tl.full(low.shape, -1, tl.int32), tl.full(low.shape, BLOCK_K - 1, tl.int32)
        for _step in range(INDEX_BITS):
            middle = (before + last) >> 1
            mass, count = _mass_and_count(is_needed | (is_tied & (cluster <= middle[None, :, None])), weights)
            is_enough = (mass > enough_mass) & (count >= at_least)
            if max_keep is not None:
                is_enough = is_enough | (count >= max_keep)
            before, last = tl.where(is_enough, before, middle), tl.where(is_enough, middle, last)
            mass_above_low = tl.where(is_enough, mass, mass_above_low)
        logits = tl.where(is_tied & (cluster > last[None, :, None]), float("-inf"), logits)
    return low, mass_above_low, logits


@triton.jit
def _again(pointers):
    """Load once more what was loaded before: it need not lie in registers through a threshold."""
    return tl.load(pointers, volatile=True)


@triton.jit
def _sizes(edges):
    return ((edges >> 32).to(tl.int32) - edges.to(tl.int32)).to(tl.float32)


@triton.jit
def _by_errors(
    logits,
    low,
    logits_ptrs,
    errors_ptrs,
    edges_ptrs,
    cluster,
    smallest,
    largest,
    total,
    filled,
    guaranteed,
    BLOCK_K: tl.constexpr,
    INDEX_BITS: tl.constexpr,
):
    """Return a threshold of errors, the mass above it, and the errors.

    Above it are as many keys as in the clusters whose ``logits`` are above ``low``; the likeliest ``guaranteed``
    clusters, whose errors are raised, are always among them.
    """
    # A half less: sums of sizes are whole numbers, and as many keys are enough.
    budget = _per_row((logits > low[None, :, None]).to(tl.float32) * _sizes(_again(edges_ptrs))) - 0.5
    logits = _again(logits_ptrs)
    weights = tl.exp2(logits - largest[None, :, None])
    low, _, logits = _threshold(
        logits, weights, cluster, smallest, largest, total, filled, 0.0, guaranteed, None, BLOCK_K, INDEX_BITS
    )
    errors = tl.load(errors_ptrs)
    highest = tl.max(tl.max(errors, 0), 1) + 1.0
    errors = tl.where(logits > low[None, :, None], highest[None, :, None], errors)
    lowest = tl.min(tl.min(tl.where(errors > float("-inf"), errors, LARGEST), 0), 1)
    sizes = _sizes(_again(edges_ptrs))
    low, _, errors = _threshold(
        errors, sizes, cluster, lowest, highest, budget, filled, 1.0, 1, None, BLOCK_K, INDEX_BITS
    )
    weights = tl.exp2(_again(logits_ptrs) - largest[None, :, None])
    mass, _ = _mass_and_count(errors > low[None, :, None], weights)
    return low, mass, errors


@triton.jit
def _class_shift(length):
    """Return which 8 of 32 bits belong to the class of a run of ``length`` keys."""
    return tl.where(length >= LONG, 0, tl.where(length >= MEDIUM, 8, tl.where(length >= SHORT, 16, 24)))


@triton.jit
def _one(length, shift):
    """Return 1 in the bits of the class of a run, 0 where there is none."""
    return tl.where(length > 0, tl.full((), 1, tl.int32) << shift, 0)


@triton.jit
def _widen(packed):
    """Return four numbers of 8 bits as four of 16 bits."""
    wide = packed.to(tl.int64)
    return (wide & 0xFF) + ((wide & 0xFF00) << 8) + ((wide & 0xFF0000) << 16) + ((wide & 0x7F000000) << 24)


@triton.jit
def _full_pieces(lengths, final_length, PIECE: tl.constexpr):
    return (_per_row(lengths.to(tl.uint32) // PIECE) + final_length.to(tl.uint32) // PIECE).to(tl.int32)


@triton.jit
def _write_runs(keep, edges, k_tokens, offs_t, runs_ptrs, counts_ptrs, is_row):
    """Write the runs of every row and their counts; return the kept keys, the runs and the shortest pieces in full.

    A run ends where a cluster with keys is dropped, and the final one at the last key.
    """
    starts, stops = edges.to(tl.int32), (edges >> 32).to(tl.int32)
    is_dropped = (keep == 0) & (stops > starts)
    run_starts, final_start = _max_before(tl.where(is_dropped, stops, 0).to(tl.uint32), offs_t)
    run_starts, final_start = run_starts.to(tl.int32), final_start.to(tl.int32)
    lengths = tl.where(is_dropped, starts - run_starts, 0)
    final_length = k_tokens - final_start

    shifts, final_shift = _class_shift(lengths), _class_shift(final_length)
    ones = _one(lengths, shifts)
    # The runs that end in a lane are counted in 8 bits for each class, those of a row, at most 512, in 16.
    of_lanes = _widen(tl.sum(ones, 0))
    totals = tl.sum(of_lanes, 1)
    with_final = totals + _widen(_one(final_length, final_shift))
    # A class begins after all longer ones.
    first_slots = (with_final << 16) + (with_final << 32) + (with_final << 48)
    lane_slots = tl.cumsum(of_lanes, 1) - of_lanes + first_slots[:, None]
    # A run counts itself, so slots are numbered from 1.
    ranks = (tl.associative_scan(ones, 0, _sum) >> shifts) & 0xFF
    slots = ranks + ((lane_slots[None, :, :] >> (shifts * 2)).to(tl.int32) & 0xFFFF)
    run_ptrs = tl.max_contiguous((runs_ptrs - 1)[None, :, None] + slots, [1, 2, LANES])
    # Subtracting once more spares the registers that would hold the starts until here.
    tl.store(run_ptrs, _pack(starts - lengths, starts), mask=(lengths > 0) & is_row[None, :, None])
    final_slot = ((totals + first_slots) >> (final_shift * 2)).to(tl.int32) & 0xFFFF
    final_run = _pack(final_start, final_start + final_length)
    tl.store(runs_ptrs + final_slot, final_run, mask=(final_length > 0) & is_row)

    runs = (with_final + (with_final >> 32)).to(tl.int32)
    runs = (runs + (runs >> 16)) & 0xFFFF
    full_pieces = _full_pieces(lengths, final_length, SHORT)
    tl.store(counts_ptrs, runs, mask=is_row)
    tl.store(counts_ptrs + 1, full_pieces, mask=is_row)
    tl.store(counts_ptrs + 2, _full_pieces(lengths, final_length, MEDIUM), mask=is_row)
    tl.store(counts_ptrs + 3, _full_pieces(lengths, final_length, LONG), mask=is_row)
    return _per_row(lengths) + final_length, runs, full_pieces


@triton.jit
def _add(pointers, update, mask):
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + update, mask=mask)


@triton.jit
def _add_statistics(pointers, is_row, q_sizes, q_tokens, k_tokens, kept_keys, mass, runs, full_pieces):
    """Add what one call adds to the rows of ``statistics``, columns named by ``STATISTICS``."""
    q_share = q_sizes.to(tl.float32) / q_tokens.to(tl.float32)
    full_tiles = full_pieces // PIECES_PER_TILE
    last_tiles = (full_pieces - full_tiles * PIECES_PER_TILE + runs + PIECES_PER_TILE - 1) // PIECES_PER_TILE
    issued_keys = (full_tiles + last_tiles).to(tl.float32) * (SHORT * PIECES_PER_TILE)
    keys = k_tokens.to(tl.float32)
    _add(pointers, 1.0, is_row)
    _add(pointers + 1, q_share * kept_keys.to(tl.float32) / keys, is_row)
    _add(pointers + 2, q_share * mass, is_row)
    _add(pointers + 3, tl.where(q_sizes == 0, 1.0, mass), is_row)
    _add(pointers + 4, q_share * issued_keys / keys, is_row)


# A tile lies in the threads as its accesses to memory want it. Here a warp is to have a row, and a lane one of every 32
# neighbours. Pointers known to be aligned would give a lane four of them. `max_contiguous` tells in which order to take
# the axes, where versions of Triton differ; nothing else follows from it, as the pointers are not aligned.
@triton.jit(
    do_not_specialize=["min_keep", "guaranteed", "repeats", "q_clusters", "k_clusters", "run_slots", "stride_edges_r"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def select_kernel(
    q_ptr,
    k_ptr,
    q_sizes_ptr,
    k_sizes_ptr,
    logits_ptr,
    edges_ptr,
    runs_ptr,
    counts_ptr,
    statistics_ptr,
    masses_ptr,
    errors_ptr,
    budgets_ptr,
    scale,
    top_p,
    min_keep,
    guaranteed,
    repeats,
    q_clusters,
    k_clusters,
    run_slots,
    stride_edges_r,
    DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
):
    """Select for ``BLOCK_Q`` query clusters of a head."""
    TURNS: tl.constexpr = BLOCK_K // LANES
    program = tl.program_id(0).to(tl.int64)
    blocks = (q_clusters + BLOCK_Q - 1) // BLOCK_Q
    head = program // blocks
    group = head // repeats
    first_row = (program % blocks).to(tl.int32) * BLOCK_Q
    # With errors, these have a part of their own behind that of the logits.
    PARTS: tl.constexpr = 1 if errors_ptr is None else 2
    logits_ptr += program * (PARTS * BLOCK_Q * BLOCK_K)
    edges_ptr += program * BLOCK_K
    k_sizes_ptr += group * k_clusters
    q_sizes_ptr += head * q_clusters
    max_keep = None
    if budgets_ptr is not None:
        budgets_ptr += head * BUDGET_COLUMNS
        top_p = tl.load(budgets_ptr)
        least = tl.load(budgets_ptr + 1).to(tl.int32)
        min_keep = tl.where(top_p >= 1.0, k_clusters, least)
        guaranteed = tl.maximum(least // 2, 1)
        max_keep = tl.maximum(tl.load(budgets_ptr + 2), 1.0)

    k_tokens, filled = _write_edges(k_sizes_ptr, edges_ptr, k_clusters, BLOCK_K)
    if masses_ptr is not None:
        masses_ptr += (head * q_clusters + first_row) * k_clusters
        q_rows = q_clusters - first_row
        _write_logs(masses_ptr, k_sizes_ptr, logits_ptr, q_rows, k_clusters, BLOCK_Q, BLOCK_K, BLOCK_N)
    else:
        _write_logits(
            q_ptr + (head * q_clusters + first_row) * DIM,
            k_ptr + group * k_clusters * DIM,
            k_sizes_ptr,
            logits_ptr,
            scale,
            q_clusters - first_row,
            k_clusters,
            DIM,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_N,
            BLOCK_D,
        )
    if errors_ptr is not None:
        errors_ptr += (head * q_clusters + first_row) * k_clusters
        _write_errors(
            errors_ptr,
            k_sizes_ptr,
            logits_ptr + BLOCK_Q * BLOCK_K,
            q_clusters - first_row,
            k_clusters,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_N,
        )
    q_tokens = sum_of(q_sizes_ptr, q_clusters, 128)
    # What a thread reads now, others have written.
    tl.debug_barrier()

    offs_t = tl.arange(0, TURNS)[:, None, None]
    lane = tl.arange(0, LANES)[None, None, :]
    cluster = lane * TURNS + offs_t
    for block_row in range(0, min(BLOCK_Q, q_clusters - first_row), ROWS):
        offs_r = block_row + tl.arange(0, ROWS)
        is_row = first_row + offs_r < q_clusters
        row = head * q_clusters + first_row + offs_r
        logits_ptrs = logits_ptr + (offs_r * BLOCK_K)[None, :, None] + lane
        logits = tl.load(tl.max_contiguous(logits_ptrs + offs_t * LANES, [1, 2, LANES]))
        largest = tl.max(tl.max(logits, 0), 1)
        smallest = tl.min(tl.min(tl.where(logits > float("-inf"), logits, LARGEST), 0), 1)
        weights = tl.exp2(logits - largest[None, :, None])
        total = _per_row(weights)
        low, mass, logits = _threshold(
            logits, weights, cluster, smallest, largest, total, filled, top_p, min_keep, max_keep, BLOCK_K, INDEX_BITS
        )
        edges_ptrs = edges_ptr + (offs_r * stride_edges_r)[None, :, None] + lane
        if errors_ptr is not None:
            low, mass, logits = _by_errors(
                logits,
                low,
                tl.max_contiguous(logits_ptrs + offs_t * LANES, [1, 2, LANES]),
                tl.max_contiguous(logits_ptrs + BLOCK_Q * BLOCK_K + offs_t * LANES, [1, 2, LANES]),
                tl.max_contiguous(edges_ptrs + offs_t * LANES, [1, 2, LANES]),
                cluster,
                smallest,
                largest,
                total,
                filled,
                guaranteed,
                BLOCK_K,
                INDEX_BITS,
            )
        edges = tl.load(tl.max_contiguous(edges_ptrs + offs_t * LANES, [1, 2, LANES]))
        kept_keys, runs, full_pieces = _write_runs(
            logits > low[None, :, None],
            edges,
            k_tokens,
            offs_t,
            runs_ptr + row * run_slots,
            counts_ptr + row * COUNT_COLUMNS,
            is_row,
        )
        q_sizes = tl.load(q_sizes_ptr + first_row + offs_r, mask=is_row, other=0)
        _add_statistics(
            statistics_ptr + row * STATISTIC_COLUMNS,
            is_row,
            q_sizes,
            q_tokens,
            k_tokens,
            kept_keys,
            mass / total,
            runs,
            full_pieces,
        )


def select_blocks_triton(
    q_centroids: Tensor,
    k_centroids: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    scale: float,
    top_p: float,
    min_keep_ratio: float,
    statistics: Tensor,
    masses: Tensor | None = None,
    errors: Tensor | None = None,
    budgets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``select_blocks_reference`` for at most ``MAX_CLUSTERS`` clusters on either side.

    Scores, sums and logarithms round differently: a cluster may differ from the reference's where the mass before it is
    within rounding of ``top_p``, or where two probabilities, or two errors per key, are within rounding of each other.
    """
    if top_p >= 1 and budgets is None:
        errors = None  # everything is kept
    batch, heads, q_clusters, dim = q_centroids.shape
    k_clusters = k_centroids.shape[2]
    run_slots = max_runs(k_clusters)
    runs = q_sizes.new_empty((batch, heads, q_clusters, run_slots, 2))
    counts = q_sizes.new_empty((batch, heads, q_clusters, len(COUNTS)))
    shape = _constexprs(dim, k_clusters)
    programs = batch * heads * cdiv(q_clusters, BLOCK_Q)
    parts = 1 if errors is None else 2
    logits = q_sizes.new_empty((programs, parts * BLOCK_Q, shape["BLOCK_K"]), dtype=torch.float32)
    edges = q_sizes.new_empty((programs, shape["BLOCK_K"]), dtype=torch.int64)
    sums = statistics.contiguous()
    with torch.cuda.device_of(q_centroids):
        select_kernel[(programs,)](
            q_centroids.contiguous(),
            k_centroids.contiguous(),
            q_sizes.contiguous(),
            k_sizes.contiguous(),
            logits,
            edges,
            runs.view(torch.int64),
            counts,
            sums,
            None if masses is None else masses.contiguous(),
            None if errors is None else errors.contiguous(),
            None if budgets is None else budgets.expand(batch, heads, len(BUDGETS)).contiguous(),
            scale,
            top_p,
            k_clusters if top_p >= 1 else math.floor(min_keep_ratio * k_clusters),
            max(1, math.floor(min_keep_ratio * k_clusters / 2)),
            heads // k_centroids.shape[1],
            q_clusters,
            k_clusters,
            run_slots,
            # All rows have the same edges. The compiler is not to know, or it would load them for another layout.
            0,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            maxnreg=(MAX_REGISTERS if errors is None else MAX_REGISTERS_BY_ERRORS).get(shape["BLOCK_K"]),
            **shape,
        )
    if sums is not statistics:
        statistics.copy_(sums)
    return runs, counts


def _constexprs(dim: int, k_clusters: int) -> dict[str, int]:
    """Return the compile-time arguments."""
    block_k = padded_power_of_two(k_clusters, 64)
    return {
        "DIM": dim,
        "BLOCK_Q": BLOCK_Q,
        "BLOCK_K": block_k,
        "BLOCK_N": min(BLOCK_N, block_k),
        "BLOCK_D": BLOCK_D,
        "ROWS": NUM_WARPS,
        "INDEX_BITS": block_k.bit_length() - 1,
    }


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel for the usual head dims, few and many clusters, and for what else may be given."""
    signature = {"q_ptr": "*fp32", "k_ptr": "*fp32"}
    signature |= dict.fromkeys(("q_sizes_ptr", "k_sizes_ptr"), "*i32")
    signature |= {"logits_ptr": "*fp32", "edges_ptr": "*i64", "runs_ptr": "*i64", "counts_ptr": "*i32"}
    signature |= {"statistics_ptr": "*fp32", "masses_ptr": "*fp32", "errors_ptr": "*fp32", "budgets_ptr": "*fp32"}
    signature |= {"scale": "fp32", "top_p": "fp32"}
    signature |= dict.fromkeys(
        ("min_keep", "guaranteed", "repeats", "q_clusters", "k_clusters", "run_slots", "stride_edges_r"), "i32"
    )
    variants = []
    counts = (32, 100, 200, 512, 1024)
    for dim, clusters, given in (
        *((dim, clusters, ()) for dim in (64, 80, 128, 256) for clusters in counts),
        *((128, clusters, ("masses",)) for clusters in counts),
        *((128, clusters, ("masses", "errors")) for clusters in counts),
        *((128, clusters, ("budgets",)) for clusters in counts),
        (128, 512, ("masses", "errors", "budgets")),
    ):
        absent: dict[str, object] = {f"{name}_ptr": None for name in OPTIONAL if name not in given}
        types = {name: kind for name, kind in signature.items() if name not in absent}
        variants.append(
            AotVariant(
                name="_".join((f"select_kernel_d{dim}_c{clusters}", *(f"given_{name}" for name in given))),
                fn=select_kernel,
                signature=types,
                constexprs={**_constexprs(dim, clusters), **absent},
                num_warps=NUM_WARPS,
                num_stages=NUM_STAGES,
                divisible_by_16=tuple(name for name, kind in types.items() if kind[0] == "*" and name not in UNALIGNED),
                max_registers=(MAX_REGISTERS_BY_ERRORS if "errors" in given else MAX_REGISTERS).get(
                    _constexprs(dim, clusters)["BLOCK_K"]
                ),
            )
        )
    return variants
