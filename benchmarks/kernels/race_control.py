"""What racecheck makes of kernels whose shared memory is surely in order: a control for `sanitize.py`.

    compute-sanitizer --tool racecheck python -P benchmarks/kernels/race_control.py

One group of warps writes numbers into shared memory, meets at a barrier, and one of its threads arrives at an mbarrier;
another warp waits there before it reads, and tells the writers in the same way that it has. By PTX's memory model all
of that is ordered. `--histogram` lets the reader count what it read by Triton's own histogram, in one warp. These are
the steps by which `kernels/assign_gluon.py` hands over labels. `--no-wait` leaves the waiting out: a true race.
"""

from __future__ import annotations

import argparse
import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from svg2_compile.kernels.gluon_names import thread_barrier

ITEMS, COUNT, BINS = 8, 128, 16


@gluon.jit
def _write(smem, bars, items):
    COUNT: gl.constexpr = smem.shape[1]
    offs = gl.arange(0, COUNT, gl.BlockedLayout([1], [32], [4], [0]))
    for item in range(items):
        mbarrier.wait(bars.index(2 + item % 2), ((item // 2) & 1) ^ 1)
        smem.index(item % 2).store((offs * 7 + item) % 16)
        thread_barrier()
        mbarrier.arrive(bars.index(item % 2), count=1)


@gluon.jit
def _read(smem, bars, out_ptr, items, WAITS: gl.constexpr, BINS: gl.constexpr):
    COUNT: gl.constexpr = smem.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    offs = gl.arange(0, COUNT, layout)
    for item in range(items):
        if WAITS:
            mbarrier.wait(bars.index(item % 2), (item // 2) & 1)
        numbers = smem.index(item % 2).load(layout)
        thread_barrier()
        mbarrier.arrive(bars.index(2 + item % 2), count=1)
        if BINS:
            gl.store(out_ptr + item * COUNT + gl.arange(0, BINS, layout), gl.histogram(numbers, BINS, layout=layout))
        else:
            gl.store(out_ptr + item * COUNT + offs, numbers)


@gluon.jit
def handover_kernel(out_ptr, items, COUNT: gl.constexpr, WAITS: gl.constexpr, BINS: gl.constexpr):
    """Hand ``items`` rows of ``COUNT`` numbers from four warps to one, which writes them, or counts them."""
    smem = gl.allocate_shared_memory(gl.int32, [2, COUNT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for each in gl.static_range(4):
        mbarrier.init(bars.index(each), count=1)
    fence_async_shared()
    gl.warp_specialize([(_write, (smem, bars, items)), (_read, (smem, bars, out_ptr, items, WAITS, BINS))], [1], [32])


def main() -> int:
    """Run the kernel once and compare what it wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--histogram", action="store_true")
    parser.add_argument("--no-wait", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device; nothing was run")
        return 0
    bins = BINS if args.histogram else 0
    out = torch.zeros((ITEMS, COUNT), dtype=torch.int32, device="cuda")
    handover_kernel[(1,)](out, ITEMS, COUNT, not args.no_wait, bins, num_warps=4)
    numbers = (torch.arange(COUNT, device="cuda") * 7 + torch.arange(ITEMS, device="cuda")[:, None]) % 16
    expected = torch.stack([row.bincount(minlength=bins) for row in numbers]) if bins else numbers
    right = torch.equal(out[:, : expected.shape[1]].long(), expected)
    print("the result is right" if right else "the result is wrong", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
