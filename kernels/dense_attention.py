"""``svg2::dense_attention``: scaled_dot_product_attention that compilers leave whole.

AOTAutograd turns PyTorch's own into the kernel of one backend, or into products around a softmax, which an engine would
take in. This one is opaque, and PyTorch chooses its kernel when it runs.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from svg2_compile.kernels.op import define
from svg2_compile.kernels.permute import empty_token_major


def _empty(query: Tensor, value: Tensor) -> Tensor:
    """Return the empty result: rows of the query, features of the value, tokens outside of heads where there are."""
    like = query.new_empty(()).expand(*query.shape[:-1], value.shape[-1])
    return (
        empty_token_major(like) if query.dim() == 4 else torch.empty_like(like, memory_format=torch.contiguous_format)
    )


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Return ``scaled_dot_product_attention`` of the same arguments.

    Args:
        query: floating [..., M, D], any strides.
        key: [..., N, D] in the dtype of ``query``.
        value: [..., N, E] in the dtype of ``query``.
        attn_mask: bool or additive, of a shape that broadcasts to [..., M, N].
        dropout_p: share of the weights to drop.
        is_causal: whether a row sees the keys up to its own place only.
        scale: factor of the scores; None is 1 / sqrt(D).
        enable_gqa: whether there may be fewer key heads than query heads.

    Returns:
        [..., M, E]; of four axes it is stored as (B, M, H, E), of others contiguous.

    Promises:
        Bit for bit what PyTorch's own gives; no aliasing.
    """
    out = scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    wanted = _empty(query, value)
    return out if out.stride() == wanted.stride() else wanted.copy_(out)


define(dense_attention, name="dense_attention", part="attention", fake=_empty, runs="sdpa")
