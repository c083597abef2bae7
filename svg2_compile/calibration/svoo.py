"""SVOO's profile of an attention and its two rules (arXiv 2603.18636, and the code at Mutual-Luo/SVOO@e4ae67b).

The profile of a head is the smallest share of its keys that holds 0.95 of the softmax of a query, a mean over queries.
Keys that are no video are kept in any case, so their mass counts first, and they are in no share.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

PROFILE_MASS = 0.95
PROFILE_ROWS = 128
"""Queries of a head that are looked at, in equal distances; SVOO takes all by default, and so many where told."""
THRESHOLD = 0.1
"""Heads above it are wide: the paper keeps less of them, and more of the others."""
GAUSSIAN_QUANTILE = statistics.NormalDist().inv_cdf(0.95)
WAN_BAND = (0.15, 0.20)
"""Where the code clips the profile of Wan 2.1 from text to video; it has other bands for other models."""


def profile(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    context_k: Tensor | None,
    context_mask: Tensor | None,
    scale: float,
    rows: int = PROFILE_ROWS,
) -> Tensor:
    """Return the profile of every head, fp32 [H], a mean over the batch.

    Args:
        q: queries [B, H, N, D].
        k: video keys [B, G, N_k, D].
        key_mask: bool [B or 1, 1, 1, N_k], False for a key that is hidden.
        context_k: keys [B, G, M, D] that every query sees.
        context_mask: bool [B, 1, 1, M], False for one that is hidden.
        scale: of the scores.
        rows: queries of a head that are looked at.
    """
    batch, heads, tokens, _ = q.shape
    repeats = heads // k.shape[1]
    chosen = torch.linspace(0, tokens - 1, min(rows, tokens), dtype=torch.float64, device=q.device).round().long()
    shares = torch.zeros(batch, heads, dtype=torch.float32, device=q.device)
    for b in range(batch):
        for h in range(heads):
            asking, group = q[b, h, chosen].float(), h // repeats
            scores = asking @ k[b, group].float().T * scale  # [R, N_k]
            visible = scores.shape[1]
            if key_mask is not None:
                is_visible = key_mask[b % key_mask.shape[0], 0, 0]
                scores = scores.masked_fill(~is_visible, -math.inf)
                visible = int(is_visible.sum())
            held = scores.new_zeros(len(chosen), 0)
            if context_k is not None:
                held = asking @ context_k[b, group].float().T * scale
                if context_mask is not None:
                    held = held.masked_fill(~context_mask[b, 0, 0], -math.inf)
            probability = torch.cat((held, scores), 1).softmax(-1)
            before = probability[:, : held.shape[1]].sum(-1, keepdim=True)
            ranked = probability[:, held.shape[1] :].sort(-1, descending=True).values
            # a key is needed as long as the mass before it does not suffice
            needed = (before + ranked.cumsum(-1) - ranked < PROFILE_MASS).sum(-1)
            shares[b, h] = needed.clamp(max=visible).float().mean() / max(1, visible)
    return shares.mean(0)


def by_papers_rule(profiles: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Return floors and caps of the heads, from the profiles of every run.

    s is the 0.95 quantile of a normal distribution over the runs. A head with s above 0.1 keeps the smaller of what
    top-p says and s, another one the larger.
    """
    floors, caps = [], []
    for head in zip(*profiles, strict=True):
        spread = statistics.stdev(head) if len(head) > 1 else 0.0
        share = min(1.0, max(0.0, statistics.fmean(head) + GAUSSIAN_QUANTILE * spread))
        is_wide = share > THRESHOLD
        floors.append(0.0 if is_wide else share)
        caps.append(share if is_wide else 1.0)
    return floors, caps


def by_codes_rule(profiles: Sequence[Sequence[float]], band: tuple[float, float]) -> list[float]:
    """Return floors of the heads: the largest profile of all runs, clipped to a band."""
    low, high = band
    return [min(high, max(low, *head)) for head in zip(*profiles, strict=True)]
