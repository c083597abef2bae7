"""What kernels work out of the sizes of clusters."""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def sum_of(sizes_ptr, clusters, BLOCK: tl.constexpr):
    """Return the tokens of the first ``clusters`` clusters."""
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, clusters, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        total += tl.load(sizes_ptr + offs, mask=offs < clusters, other=0)
    return tl.sum(total, 0)
