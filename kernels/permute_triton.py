"""``svg2::permute_tokens`` and ``svg2::unpermute_tokens`` in Triton: rows gathered and scattered."""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.launch import cdiv, padded_power_of_two
from svg2_compile.kernels.permute import empty_token_major

TILE_BYTES = 16384  # of x, copied by one program
NUM_WARPS = 4


@triton.jit(do_not_specialize=["heads", "tokens"])
def move_rows_kernel(
    x_ptr,
    order_ptr,
    y_ptr,
    stride_x_b,
    stride_x_h,
    stride_x_n,
    stride_x_d,
    stride_y_b,
    stride_y_h,
    stride_y_n,
    heads,
    tokens,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCATTER: tl.constexpr,
):
    """Copy row order[i] of x to row i of y, or with SCATTER row i of x to row order[i] of y."""
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    is_token = offs_n < tokens
    mask = is_token[:, None] & (offs_d < DIM)[None, :]
    there = tl.load(order_ptr + batch_head * tokens + offs_n, mask=is_token, other=0).to(tl.int64)
    if SCATTER:
        source, target = offs_n, there
    else:
        source, target = there, offs_n
    x_rows = x_ptr + batch * stride_x_b + head * stride_x_h + source * stride_x_n
    y_rows = y_ptr + batch * stride_y_b + head * stride_y_h + target * stride_y_n
    rows = tl.load(x_rows[:, None] + (offs_d * stride_x_d)[None, :], mask=mask)
    tl.store(y_rows[:, None] + offs_d[None, :], rows, mask=mask)


def permute_tokens_triton(x: Tensor, order: Tensor) -> Tensor:
    """Compute ``permute_tokens_reference``, with the same result, for rows of at most ``MAX_HEAD_DIM``."""
    return _move_rows(x, order, x.new_empty(x.shape), scatter=False)


def unpermute_tokens_triton(x: Tensor, order: Tensor) -> Tensor:
    """Compute ``unpermute_tokens_reference``, with the same result, for rows of at most ``MAX_HEAD_DIM``."""
    return _move_rows(x, order, empty_token_major(x), scatter=True)


def _move_rows(x: Tensor, order: Tensor, y: Tensor, scatter: bool) -> Tensor:
    """Fill ``y``, whose last axis has stride 1, with the rows of ``x`` and return it."""
    batch, heads, tokens, dim = x.shape
    if x.numel() == 0:
        return y
    block_d = padded_power_of_two(dim)
    block_n = TILE_BYTES // (block_d * x.element_size())
    with torch.cuda.device_of(x):
        move_rows_kernel[(cdiv(tokens, block_n), batch * heads)](
            x,
            order.contiguous(),
            y,
            *x.stride(),
            *y.stride()[:3],
            heads,
            tokens,
            DIM=dim,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            SCATTER=scatter,
            num_warps=NUM_WARPS,
        )
    return y


def aot_variants(capability: int) -> list[AotVariant]:
    """Return both directions for the usual rows, and odd rows with a strided last axis."""
    variants = []
    strides = [f"stride_{name}_{axis}" for name in "xy" for axis in "bhn"]
    for name, dtype, dim, scatter, strided in (
        ("gather_bf16_d128", "bf16", 128, False, False),
        ("scatter_bf16_d128", "bf16", 128, True, False),
        ("gather_fp16_d64", "fp16", 64, False, False),
        ("gather_fp32_d80_strided", "fp32", 80, False, True),
        ("scatter_fp32_d256", "fp32", 256, True, False),
    ):
        block_d = padded_power_of_two(dim)
        stride_d: dict[str, str] = {"stride_x_d": "i32"} if strided else {}
        one: dict[str, object] = {} if strided else {"stride_x_d": 1}
        variants.append(
            AotVariant(
                name=name,
                fn=move_rows_kernel,
                signature={"x_ptr": f"*{dtype}", "order_ptr": "*i32", "y_ptr": f"*{dtype}"}
                | dict.fromkeys(strides, "i32")
                | stride_d
                | {"heads": "i32", "tokens": "i32"},
                constexprs=one
                | {
                    "DIM": dim,
                    "BLOCK_N": TILE_BYTES // (block_d * (4 if dtype == "fp32" else 2)),
                    "BLOCK_D": block_d,
                    "SCATTER": scatter,
                },
                num_warps=NUM_WARPS,
                num_stages=3,
                divisible_by_16=("x_ptr", "order_ptr", "y_ptr", *strides),
            )
        )
    return variants
