"""``svg2::context_attention``: the context (text) rows of a joint attention, dense over all keys.

An op of its own and not ``scaled_dot_product_attention``, because that one guards on the number of rows, which is
unknown at compile time in models that drop padded text.
"""

import torch
from torch import Tensor

from svg2_compile.kernels.checks import FLOATING, check_dtype, check_head_groups, check_rank, check_shape
from svg2_compile.kernels.masked_attention import masked_attention
from svg2_compile.kernels.op import define
from svg2_compile.kernels.permute import empty_token_major


def _check(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    """Check the arguments of ``svg2::context_attention``."""
    check_rank("q", q, 4)
    check_rank("k", k, 4)
    batch, heads, _, dim = q.shape
    k_heads, tokens = k.shape[1:3]
    check_head_groups(heads, k_heads)
    check_shape("k", k, (batch, k_heads, tokens, dim))
    check_shape("v", v, (batch, k_heads, tokens, dim))
    check_dtype("q", q, *FLOATING)
    check_dtype("k", k, q.dtype)
    check_dtype("v", v, q.dtype)
    if key_mask is not None:
        check_shape("key_mask", key_mask, (batch, 1, 1, tokens))
        check_dtype("key_mask", key_mask, torch.bool)


def context_attention_reference(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """Return dense attention of the context rows over all keys: softmax(scale * q k^T) v.

    Section 1.6.

    Args:
        q: fp16, bf16, fp32 or fp64 [B, H, M, D], last axis of any stride; M may be 0.
        k: [B, G, N, D] in the dtype of ``q``; query head h uses key head h // (H / G).
        v: [B, G, N, D] in the dtype of ``q``.
        key_mask: bool [B, 1, 1, N], True where a key may be attended to; None admits all.
        scale: factor of the scores.

    Returns:
        [B, H, M, D] in the dtype of ``q``, stored as (B, M, H, D); 0 for a row that attends to nothing.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, or H is no multiple of G.

    Promises:
        Deterministic, no aliasing, no device synchronisation.
    """
    _check(q, k, v, key_mask)
    return empty_token_major(q).copy_(masked_attention(q, k, v, key_mask, scale)[0])


def context_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """Compute ``context_attention_reference`` with PyTorch's fused attention."""
    _check(q, k, v, key_mask)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=key_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return empty_token_major(q).copy_(out)


define(
    context_attention_reference,
    name="context_attention",
    part="attention",
    check=_check,
    fake=lambda q: empty_token_major(q),
    cpu=context_attention,
    runs="sdpa",
)
