"""``svg2::cluster_means`` in Triton: one pass over the tokens, one launch.

A program takes one cluster, whose tokens are neighbours, and adds them up tile by tile. Nothing is added in memory, so
the order of the sums is always the same.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.attention_steps import load_rows
from svg2_compile.kernels.cluster_sizes import sum_of
from svg2_compile.kernels.launch import padded_power_of_two, rows_of_unit_stride

TILE_BYTES = 16384  # of x, read together by one program
NUM_WARPS, NUM_STAGES = 4, 3
BLOCK_SIZES = 128  # sizes added at a time to find the first token


@triton.jit(do_not_specialize=["heads", "clusters"])
def means_kernel(
    x_ptr,
    sizes_ptr,
    means_ptr,
    stride_x_b,
    stride_x_h,
    stride_x_n,
    heads,
    clusters,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZES: tl.constexpr,
):
    """Write the mean of one cluster; 0 where it is empty."""
    row = tl.program_id(0).to(tl.int64)  # of [B, G, C]
    head = row // clusters
    cluster = (row % clusters).to(tl.int32)
    sizes_ptr += head * clusters
    size = tl.load(sizes_ptr + cluster)
    first_token = sum_of(sizes_ptr, cluster, BLOCK_SIZES)
    x_ptr += head // heads * stride_x_b + head % heads * stride_x_h
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    totals = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, size, BLOCK_N):
        tokens = first_token + first + offs_n
        totals += load_rows(x_ptr, tokens, stride_x_n, first + offs_n < size, offs_d, DIM, True).to(tl.float32)
    mean = tl.div_rn(tl.sum(totals, 0), tl.full([BLOCK_D], 1.0, tl.float32) * tl.maximum(size, 1).to(tl.float32))
    tl.store(means_ptr + row * DIM + offs_d, mean.to(means_ptr.dtype.element_ty), mask=offs_d < DIM)


def cluster_means_triton(x: Tensor, sizes: Tensor) -> Tensor:
    """Compute ``cluster_means_reference``; sums round in another order."""
    x, sizes = rows_of_unit_stride(x), sizes.contiguous()
    means = torch.empty((*sizes.shape, x.shape[3]), dtype=x.dtype, device=x.device)
    if means.numel() == 0:
        return means
    with torch.cuda.device_of(x):
        means_kernel[(sizes.numel(),)](
            x, sizes, means, *x.stride()[:3], sizes.shape[1], sizes.shape[2],
            num_warps=NUM_WARPS, num_stages=NUM_STAGES, **_constexprs(x.dtype, x.shape[3]),
        )  # fmt: skip
    return means


def _constexprs(dtype: torch.dtype, dim: int) -> dict[str, int]:
    """Return the compile-time arguments."""
    block_d = padded_power_of_two(dim)
    block_n = TILE_BYTES // (block_d * dtype.itemsize)
    return {"DIM": dim, "BLOCK_N": block_n, "BLOCK_D": block_d, "BLOCK_SIZES": BLOCK_SIZES}


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel for the usual rows."""
    variants = []
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for kind, dim in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp16", 80), ("fp32", 128)):
        constexprs = _constexprs(kinds[kind], dim)
        types = dict.fromkeys(means_kernel.arg_names, "i32")
        types |= {"x_ptr": f"*{kind}", "means_ptr": f"*{kind}", "sizes_ptr": "*i32"}
        signature = {name: types[name] for name in means_kernel.arg_names if name not in constexprs}
        variants.append(
            AotVariant(
                name=f"means_kernel_{kind}_d{dim}",
                fn=means_kernel,
                signature=signature,
                constexprs=constexprs,
                num_warps=NUM_WARPS,
                num_stages=NUM_STAGES,
                divisible_by_16=tuple(name for name in signature if name.startswith("stride") or name.endswith("_ptr")),
            )
        )
    return variants
