"""``svg2::permute_tokens`` and ``svg2::unpermute_tokens``: to cluster order and back."""

import torch
from torch import Tensor

from svg2_compile.kernels.checks import check_dtype, check_rank, check_shape
from svg2_compile.kernels.why_not import why_not_triton

torch.library.define("svg2::permute_tokens", "(Tensor x, Tensor order) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define("svg2::unpermute_tokens", "(Tensor x, Tensor order) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def _check(x: Tensor, order: Tensor) -> None:
    """Check the arguments of both ops."""
    check_rank("x", x, 4)
    check_shape("order", order, x.shape[:3])
    check_dtype("order", order, torch.int32)


def _rows(order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the index (batch, head, token) that ``order`` stands for."""
    batch = torch.arange(order.shape[0], device=order.device)[:, None, None]
    head = torch.arange(order.shape[1], device=order.device)[None, :, None]
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


torch.library.impl("svg2::permute_tokens", "cpu", permute_tokens_cpu)
torch.library.impl("svg2::unpermute_tokens", "cpu", unpermute_tokens_reference)


@torch.library.impl("svg2::permute_tokens", "cuda")
def _permute_tokens_cuda(x: Tensor, order: Tensor) -> Tensor:
    _check(x, order)
    if why_not_triton("permute_tokens", x.device, x.dtype, dim=x.shape[3]):
        return permute_tokens_reference(x, order)
    from svg2_compile.kernels.permute_triton import permute_tokens_triton

    return permute_tokens_triton(x, order)


@torch.library.impl("svg2::unpermute_tokens", "cuda")
def _unpermute_tokens_cuda(x: Tensor, order: Tensor) -> Tensor:
    _check(x, order)
    if why_not_triton("permute_tokens", x.device, x.dtype, dim=x.shape[3]):
        return unpermute_tokens_reference(x, order)
    from svg2_compile.kernels.permute_triton import unpermute_tokens_triton

    return unpermute_tokens_triton(x, order)


def _permute_tokens_fake(x: Tensor, order: Tensor) -> Tensor:
    _check(x, order)
    return x.new_empty(x.shape)


torch.library.register_fake("svg2::permute_tokens", _permute_tokens_fake)


def _unpermute_tokens_fake(x: Tensor, order: Tensor) -> Tensor:
    _check(x, order)
    return empty_token_major(x)


torch.library.register_fake("svg2::unpermute_tokens", _unpermute_tokens_fake)
