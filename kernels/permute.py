"""``svg2::permute_tokens`` and ``svg2::unpermute_tokens``: to cluster order and back."""

import torch
from torch import Tensor

from svg2_compile.kernels.card import FAST_DTYPES, MAX_HEAD_DIM, Kernels, Limits, same_dtype
from svg2_compile.kernels.checks import check_dtype, check_rank, check_shape
from svg2_compile.kernels.op import define


def _check(x: Tensor, order: Tensor) -> None:
    """Check the arguments of both ops."""
    check_rank("x", x, 4)
    check_shape("order", order, x.shape[:3])
    check_dtype("order", order, torch.int32)


def _rows(order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the index (batch, head, token) that ``order`` stands for."""
    batch = torch.arange(order.shape[0], device=order.device, dtype=torch.int64)[:, None, None]
    head = torch.arange(order.shape[1], device=order.device, dtype=torch.int64)[None, :, None]
    return batch, head, order.long()


def permute_tokens_reference(x: Tensor, order: Tensor) -> Tensor:
    """Return the tokens of ``x`` in ``order``: y[b, h, i] = x[b, h, order[b, h, i]].

    Section 1.4: Q' = Q[pi].

    Args:
        x: [B, H, N, D], any dtype and strides.
        order: int32 [B, H, N], a permutation of 0 ... N - 1 for every head.

    Returns:
        [B, H, N, D], contiguous.

    Raises:
        TypeError: order is not int32.
        ValueError: x does not have four axes, or order is not [B, H, N].

    Promises:
        Deterministic, bitwise copies, no aliasing.
    """
    _check(x, order)
    return x[_rows(order)].contiguous()


def unpermute_tokens_reference(x: Tensor, order: Tensor) -> Tensor:
    """Undo ``permute_tokens``: y[b, h, order[b, h, i]] = x[b, h, i].

    Section 1.4: O[pi] = O'.

    Args:
        x: [B, H, N, D], any dtype and strides.
        order: int32 [B, H, N], a permutation of 0 ... N - 1 for every head.

    Returns:
        [B, H, N, D], stored as (B, N, H, D): models merge heads next, which then is a view.

    Raises:
        TypeError: order is not int32.
        ValueError: x does not have four axes, or order is not [B, H, N].

    Promises:
        Deterministic, bitwise copies, no aliasing.
    """
    _check(x, order)
    y = empty_token_major(x)
    y[_rows(order)] = x
    return y


def empty_token_major(x: Tensor) -> Tensor:
    """Return an empty tensor shaped like ``x`` (B, H, N, D) and stored as (B, N, H, D)."""
    batch, heads, tokens, dim = x.shape
    return torch.empty((batch, tokens, heads, dim), dtype=x.dtype, device=x.device).transpose(1, 2)


def permute_tokens_cpu(x: Tensor, order: Tensor) -> Tensor:
    """Compute ``permute_tokens_reference`` as one gather of rows, whichever of heads and tokens is the outer axis."""
    _check(x, order)
    _, heads, tokens, dim = x.shape
    b, h, token = _rows(order)
    if x.is_contiguous():
        rows, index = x, (b * heads + h) * tokens + token
    elif x.transpose(1, 2).is_contiguous():
        rows, index = x.transpose(1, 2), (b * tokens + token) * heads + h
    else:
        return permute_tokens_reference(x, order)
    return rows.reshape(-1, dim).index_select(0, index.flatten()).view(x.shape)


def _kernels(op: str) -> Kernels:
    """Return what there is for one of the two directions."""
    return Kernels(
        limits=Limits(FAST_DTYPES, MAX_HEAD_DIM),
        seen=lambda x: (x, x.shape[3], 0, 0),
        seen_dtype=same_dtype,
        launch=f"permute_triton:{op}_triton",
        self_check=f"self_check:check_{op}",
        modules=("permute_triton",),
    )


define(
    permute_tokens_reference,
    name="permute_tokens",
    part="clustering",
    check=_check,
    fake=lambda x: x.new_empty(x.shape),
    cpu=permute_tokens_cpu,
    kernels=_kernels("permute_tokens"),
)
define(
    unpermute_tokens_reference,
    name="unpermute_tokens",
    part="clustering",
    check=_check,
    fake=empty_token_major,
    kernels=_kernels("unpermute_tokens"),
)
