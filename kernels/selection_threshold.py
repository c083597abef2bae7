"""Which key clusters a selection keeps: those above a threshold, found by bisection, without a sort.

Whether a cluster is kept depends on the mass and on the number of the likelier ones, and both fall as the cluster gets
likelier. Where errors choose, bisection is done three times: by mass, which says how many keys; by mass again, for the
clusters that are kept in any case; and by error per key, with keys in the place of mass. Where a head has a floor in
keys, a second bisection by mass has keys in its place too.

Tiles are [T, ROWS, 32], as ``selection_scratch`` says.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from svg2_compile.kernels.selection_scratch import LARGEST, per_row

# Halving the range of values isolates one of a thousand clusters in about a dozen steps; equal and nearly equal ones
# take the other way, which halves the range of bit patterns and ends after 32 more.
VALUE_STEPS = tl.constexpr(18)
# Between two looks at whether every row of a tile is done.
STEPS_PER_ROUND = tl.constexpr(3)
ROUNDS = tl.constexpr(17)


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
def _mass_and_count(keep, weights):
    # Products, not selections: a comparison gives 1 or 0 in one instruction, and a product is added in one.
    ones = keep.to(tl.float32)
    return per_row(ones * weights), per_row(ones)


@triton.jit
def threshold(
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
def _budget(logits, low, sizes, least_ptr):
    """Return how many keys are to be kept: as many as above ``low``, and as the floor says; a half less.

    Sums of sizes are whole numbers, and as many keys are enough.
    """
    keys = per_row((logits > low[None, :, None]).to(tl.float32) * sizes)
    if least_ptr is not None:
        keys = tl.maximum(keys, tl.load(least_ptr).to(tl.float32))
    return keys - 0.5


@triton.jit
def threshold_of_keys(
    logits,
    low,
    logits_ptrs,
    edges_ptrs,
    cluster,
    smallest,
    largest,
    filled,
    least_ptr,
    BLOCK_K: tl.constexpr,
    INDEX_BITS: tl.constexpr,
):
    """Return a threshold of logits that enough keys are above, the mass above it, and the logits."""
    sizes = _sizes(_again(edges_ptrs))
    budget = _budget(logits, low, sizes, least_ptr)
    logits = _again(logits_ptrs)
    low, _, logits = threshold(
        logits, sizes, cluster, smallest, largest, budget, filled, 1.0, 1, None, BLOCK_K, INDEX_BITS
    )
    weights = tl.exp2(_again(logits_ptrs) - largest[None, :, None])
    mass, _ = _mass_and_count(logits > low[None, :, None], weights)
    return low, mass, logits


@triton.jit
def threshold_of_errors(
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
    least_ptr,
    BLOCK_K: tl.constexpr,
    INDEX_BITS: tl.constexpr,
):
    """Return a threshold of errors, the mass above it, and the errors.

    Above it are as many keys as in the clusters whose ``logits`` are above ``low``, or as the floor says; the likeliest
    ``guaranteed`` clusters, whose errors are raised, are always among them.
    """
    budget = _budget(logits, low, _sizes(_again(edges_ptrs)), least_ptr)
    logits = _again(logits_ptrs)
    weights = tl.exp2(logits - largest[None, :, None])
    low, _, logits = threshold(
        logits, weights, cluster, smallest, largest, total, filled, 0.0, guaranteed, None, BLOCK_K, INDEX_BITS
    )
    errors = tl.load(errors_ptrs)
    highest = tl.max(tl.max(errors, 0), 1) + 1.0
    errors = tl.where(logits > low[None, :, None], highest[None, :, None], errors)
    lowest = tl.min(tl.min(tl.where(errors > float("-inf"), errors, LARGEST), 0), 1)
    sizes = _sizes(_again(edges_ptrs))
    low, _, errors = threshold(
        errors, sizes, cluster, lowest, highest, budget, filled, 1.0, 1, None, BLOCK_K, INDEX_BITS
    )
    weights = tl.exp2(_again(logits_ptrs) - largest[None, :, None])
    mass, _ = _mass_and_count(errors > low[None, :, None], weights)
    return low, mass, errors
