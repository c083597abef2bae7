"""``svg2::log_dropped_sizes`` in Triton, one launch: a program writes the row of one query cluster.

Whether a cluster is kept is whether any run has its first key. All runs are compared with all clusters, a few runs at a
time; there are far fewer than there may be.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.attention_steps import LN_2, first_and_last_key
from svg2_compile.kernels.launch import padded_power_of_two
from svg2_compile.kernels.work_list import COUNTS

BLOCK_RUNS = 8  # runs compared at a time
NUM_WARPS = 4


@triton.jit(do_not_specialize=["repeats", "q_clusters", "k_clusters", "run_slots"])
def dropped_kernel(
    runs_ptr,
    counts_ptr,
    sizes_ptr,
    logs_ptr,
    repeats,
    q_clusters,
    k_clusters,
    run_slots,
    COUNTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
):
    """Write the logarithms for one query cluster."""
    row = tl.program_id(0).to(tl.int64)  # of [B, H, C_q]
    sizes_ptr += row // q_clusters // repeats * k_clusters
    runs_ptr += row * run_slots
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_RUNS)
    sizes = tl.load(sizes_ptr + offs_k, mask=offs_k < k_clusters, other=0)
    starts = tl.cumsum(sizes, 0) - sizes
    num_runs = tl.load(counts_ptr + row * COUNTS)
    kept = tl.zeros([BLOCK_K], tl.int32)
    for first in range(0, num_runs, BLOCK_RUNS):
        # an empty run has no first key
        runs = tl.load(runs_ptr + first + offs_r, mask=first + offs_r < num_runs, other=0)
        first_key, last_key = first_and_last_key(runs)
        is_in = (first_key[None, :] <= starts[:, None]) & (starts[:, None] < last_key[None, :])
        kept += tl.sum(is_in.to(tl.int32), 1)
    is_dropped = (kept == 0) & (sizes > 0)
    logs = tl.log2(tl.maximum(sizes, 1).to(tl.float32)) * LN_2
    tl.store(logs_ptr + row * k_clusters + offs_k, tl.where(is_dropped, logs, -float("inf")), mask=offs_k < k_clusters)


def log_dropped_sizes_triton(runs: Tensor, counts: Tensor, k_sizes: Tensor) -> Tensor:
    """Compute ``log_dropped_sizes_reference``; logarithms round otherwise."""
    runs, counts, k_sizes = runs.contiguous(), counts.contiguous(), k_sizes.contiguous()
    batch, heads, q_clusters, run_slots, _ = runs.shape
    k_heads, k_clusters = k_sizes.shape[1:]
    logs = torch.empty((batch, heads, q_clusters, k_clusters), dtype=torch.float32, device=runs.device)
    if logs.numel() == 0:
        return logs
    with torch.cuda.device_of(runs):
        dropped_kernel[(batch * heads * q_clusters,)](
            runs.view(torch.int64), counts, k_sizes, logs, heads // k_heads, q_clusters, k_clusters, run_slots,
            num_warps=NUM_WARPS, **_constexprs(k_clusters),
        )  # fmt: skip
    return logs


def _constexprs(k_clusters: int) -> dict[str, int]:
    """Return the compile-time arguments."""
    return {"COUNTS": len(COUNTS), "BLOCK_K": padded_power_of_two(k_clusters), "BLOCK_RUNS": BLOCK_RUNS}


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel for few and many clusters."""
    pointers = {"runs_ptr": "*i64", "counts_ptr": "*i32", "sizes_ptr": "*i32", "logs_ptr": "*fp32"}
    sizes = dict.fromkeys(("repeats", "q_clusters", "k_clusters", "run_slots"), "i32")
    return [
        AotVariant(
            name=f"dropped_kernel_c{clusters}",
            fn=dropped_kernel,
            signature=pointers | sizes,
            constexprs=dict(_constexprs(clusters)),
            num_warps=NUM_WARPS,
            num_stages=3,
            divisible_by_16=tuple(pointers),
        )
        for clusters in (100, 500, 1000)
    ]
