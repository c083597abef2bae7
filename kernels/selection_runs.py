"""What a selection writes: the runs of kept keys of every query cluster, and their counts.

Tiles are [T, ROWS, 32], as ``selection_scratch`` says.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from svg2_compile.kernels.selection_scratch import LANES, pack, per_row
from svg2_compile.kernels.work_list import PIECES

SHORT, MEDIUM, LONG = (tl.constexpr(piece) for piece in PIECES)


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
    return (per_row(lengths.to(tl.uint32) // PIECE) + final_length.to(tl.uint32) // PIECE).to(tl.int32)


@triton.jit
def write_runs(keep, edges, k_tokens, offs_t, runs_ptrs, counts_ptrs, is_row):
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
    tl.store(run_ptrs, pack(starts - lengths, starts), mask=(lengths > 0) & is_row[None, :, None])
    final_slot = ((totals + first_slots) >> (final_shift * 2)).to(tl.int32) & 0xFFFF
    final_run = pack(final_start, final_start + final_length)
    tl.store(runs_ptrs + final_slot, final_run, mask=(final_length > 0) & is_row)

    runs = (with_final + (with_final >> 32)).to(tl.int32)
    runs = (runs + (runs >> 16)) & 0xFFFF
    full_pieces = _full_pieces(lengths, final_length, SHORT)
    tl.store(counts_ptrs, runs, mask=is_row)
    tl.store(counts_ptrs + 1, full_pieces, mask=is_row)
    tl.store(counts_ptrs + 2, _full_pieces(lengths, final_length, MEDIUM), mask=is_row)
    tl.store(counts_ptrs + 3, _full_pieces(lengths, final_length, LONG), mask=is_row)
    return per_row(lengths) + final_length, runs, full_pieces
