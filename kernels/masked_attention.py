"""Masked softmax attention written out: what both attention ops mean. Not an op of its own."""

import math

import torch
from torch import Tensor

from svg2_compile.kernels.checks import accumulation_dtype


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale * q k^T + bias) v over the keys that ``mask`` admits, and the log-sum-exp of their scores.

    Args:
        q: [B, H, N, D], floating point.
        k: [B, G, N_k, D]; query head h uses key head h // (H / G).
        v: [B, G, N_k, D], finite.
        mask: bool, broadcastable to [B, H, N, N_k], True where a query attends to a key; None attends everywhere.
        scale: factor of the scores.
        bias: broadcastable to [B, H, N, N_k], added to the scaled scores, in the dtype that is computed in; or None.

    Returns:
        out: [B, H, N, D] in the dtype of ``q``, computed in fp32 (fp64 for fp64); 0 for a row that attends to nothing.
        lse: fp32 (fp64 for fp64) [B, H, N], natural logarithm; -inf for a row that attends to nothing.
    """
    repeats = q.shape[1] // k.shape[1]
    dtype = accumulation_dtype(q)
    k, v = (x.repeat_interleave(repeats, dim=1).to(dtype) for x in (k, v))
    scores = q.to(dtype) @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1))
    return (weights @ v).to(q.dtype), lse
