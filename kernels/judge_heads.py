"""``svg2::judge_heads_``: heads that keep too little of the true attention mass become dense."""

import torch
from torch import Tensor

from svg2_compile.kernels.checks import check_dtype, check_rank, check_shape
from svg2_compile.kernels.measure_recall import RECALL
from svg2_compile.kernels.op import define

DENSE_HEADS = ("since_call", "recall")
"""The last axis of ``dense_heads``: the call of this generation since which a head is dense, 0 for one that is not, and
the recall that its selection had then."""


def _check(found: Tensor, k_calls: Tensor, dense_heads: Tensor) -> None:
    """Check the arguments of ``svg2::judge_heads_``."""
    check_rank("found", found, 3)
    batch, heads = found.shape[:2]
    check_shape("found", found, (batch, heads, len(RECALL)))
    check_shape("k_calls", k_calls, (1,))
    check_shape("dense_heads", dense_heads, (batch, heads, len(DENSE_HEADS)))
    check_dtype("found", found, torch.float32, torch.float64)
    check_dtype("k_calls", k_calls, torch.int32)
    check_dtype("dense_heads", dense_heads, found.dtype)


def judge_heads_reference(found: Tensor, k_calls: Tensor, dense_heads: Tensor, min_recall: float) -> Tensor:
    """Remember which heads kept less than ``min_recall``, and count those that are dense as whole.

    A head that was measured, is not dense yet and has a recall below ``min_recall`` is dense from this call on, to the
    end of the generation.

    Args:
        found: fp32 (fp64 for judging) [B, H, 2], what ``measure_recall`` found in this call.
        k_calls: int32 [1], calls of this generation with this one.
        dense_heads: the dtype of ``found`` [B, H, 2], columns named by ``DENSE_HEADS``; updated.
        min_recall: least recall of a head that stays sparse.

    Returns:
        [B, H, 2] in the dtype of ``found``, contiguous: ``found``, but a recall of 1 for measured heads that are dense.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree.

    Promises:
        Deterministic, no device synchronisation, no aliasing. A head that is dense stays as it was remembered.
    """
    _check(found, k_calls, dense_heads)
    measured, recall = found.unbind(-1)
    falls = (measured > 0) & (dense_heads[..., 0] == 0) & (recall < min_recall)
    since_now = torch.stack((k_calls.expand_as(recall), recall), dim=-1).to(dense_heads.dtype)
    dense_heads.copy_(since_now.where(falls.unsqueeze(-1), dense_heads))
    return torch.stack((measured, measured.where(dense_heads[..., 0] > 0, recall)), dim=-1)


define(
    judge_heads_reference,
    name="judge_heads_",
    part="recall",
    mutates=("dense_heads",),
    check=_check,
    fake=lambda found: found.new_empty(found.shape),
    runs="pytorch",
)
