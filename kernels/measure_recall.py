"""``svg2::measure_recall``: how much of the true attention mass the selection keeps, on a few rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from svg2_compile.kernels.card import FAST_DTYPES, MAX_HEAD_DIM, Kernels, Limits, same_dtype
from svg2_compile.kernels.checks import (
    FLOATING,
    accumulation_dtype,
    check_dtype,
    check_head_groups,
    check_rank,
    check_shape,
    check_value,
)
from svg2_compile.kernels.op import define
from svg2_compile.kernels.work_list import COUNTS, kept_keys

RECALL = ("calls", "recall_sum")
"""The last axis of what is measured, per head and to be summed over calls: 1, and the recall; both are 0 in a call that
does not measure."""
CHUNK_BYTES = 2**28
"""Heads are taken together as long as their keys and scores fit into this."""
# 2^32 over the golden ratio: multiples of it, taken modulo 2^32, spread evenly however many there are.
GOLDEN_STEP = 2654435769


def _check(
    q: Tensor,
    k: Tensor,
    q_order: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    runs: Tensor,
    counts: Tensor,
    context_k: Tensor | None,
    context_mask: Tensor | None,
    k_calls: Tensor,
    rows: int,
    interval: int,
) -> None:
    """Check the arguments of ``svg2::measure_recall``."""
    check_selection(q, k, q_order, q_sizes, k_sizes, runs, counts, context_k, context_mask, k_calls)
    check_value(rows >= 1, lambda: f"rows must be at least 1, got {rows}")
    check_value(interval >= 1, lambda: f"interval must be at least 1, got {interval}")


def check_selection(
    q: Tensor,
    k: Tensor,
    q_order: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    runs: Tensor,
    counts: Tensor,
    context_k: Tensor | None,
    context_mask: Tensor | None,
    k_calls: Tensor,
) -> None:
    """Check tokens, their clusters, what is kept and the context."""
    for name, x, rank in (("q", q, 4), ("k", k, 4), ("k_sizes", k_sizes, 3), ("runs", runs, 5)):
        check_rank(name, x, rank)
    batch, heads, _, dim = q.shape
    k_heads = k.shape[1]
    q_clusters, slots = runs.shape[2:4]
    check_head_groups(heads, k_heads)
    check_shape("k", k, (batch, k_heads, k.shape[2], dim))
    check_shape("q_order", q_order, q.shape[:3])
    check_shape("q_sizes", q_sizes, (batch, heads, q_clusters))
    check_shape("k_sizes", k_sizes, (batch, k_heads, k_sizes.shape[2]))
    check_shape("runs", runs, (batch, heads, q_clusters, slots, 2))
    check_shape("counts", counts, (batch, heads, q_clusters, len(COUNTS)))
    check_shape("k_calls", k_calls, (1,))
    check_dtype("q", q, *FLOATING)
    check_dtype("k", k, q.dtype)
    integers = {"q_order": q_order, "q_sizes": q_sizes, "k_sizes": k_sizes, "runs": runs, "counts": counts}
    for name, x in {**integers, "k_calls": k_calls}.items():
        check_dtype(name, x, torch.int32)
    check_value(
        context_mask is None or context_k is not None, lambda: "context_mask must come with context_k, got it alone"
    )
    if context_k is None:
        return
    check_rank("context_k", context_k, 4)
    context = context_k.shape[2]
    check_shape("context_k", context_k, (batch, k_heads, context, dim))
    check_dtype("context_k", context_k, q.dtype)
    if context_mask is not None:
        check_rank("context_mask", context_mask, 4)
        check_shape("context_mask", context_mask, (1 if context_mask.shape[0] == 1 else batch, 1, 1, context))
        check_dtype("context_mask", context_mask, torch.bool)


KeyMasses = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor, int], tuple[Tensor, Tensor]]


def measure_recall_reference(
    q: Tensor,
    k: Tensor,
    q_order: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    runs: Tensor,
    counts: Tensor,
    context_k: Tensor | None,
    context_mask: Tensor | None,
    k_calls: Tensor,
    scale: float,
    rows: int,
    interval: int,
    seed: int,
) -> Tensor:
    """Return each head's recall, the mean of some of its rows, at every ``interval``-th call of a generation.

    With s = scale * q_r . k over the visible keys and the context keys, the recall of row r is the sum of exp(s) over
    the keys that its cluster keeps and the context keys, divided by the sum over all of them: the share of the row's
    softmax that the sparse attention sees. The rows lie evenly in the order of the clusters, other ones at each call.

    Args:
        q: fp16, bf16, fp32 or fp64 [B, H, N, D], any strides, in token order.
        k: [B, G, N_k, D] in the dtype of ``q``, clusters contiguous; query head h uses key head h // (H / G).
        q_order: int32 [B, H, N], the query found at each sorted position.
        q_sizes: int32 [B, H, C_q], tokens per query cluster; sums to N.
        k_sizes: int32 [B, G, C_k], tokens per key cluster; keys behind the last cluster are hidden.
        runs: int32 [B, H, C_q, R, 2], the ranges of keys that each query cluster attends to, as ``KeptRuns`` has them.
        counts: int32 [B, H, C_q, 4], columns named by ``COUNTS``.
        context_k: [B, G, M, D] in the dtype of ``q``, keys that every query attends to; None where there are none.
        context_mask: bool [B or 1, 1, 1, M], True where a context key may be attended to; None admits all.
        k_calls: int32 [1], calls of this generation with this one.
        scale: factor of the scores.
        rows: rows per head, at least 1; more than N are N.
        interval: 1 measures at every call, n at the first, then at every n-th after it.
        seed: chooses the rows; any integer.

    Returns:
        fp32 (fp64 for fp64) [B, H, 2], contiguous, columns named by ``RECALL``; 0 in a call that does not measure.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, H is no multiple of G, or a number is out of range.

    Promises:
        Deterministic, in fp32 (fp64 for fp64), no synchronisation with a GPU. Plain PyTorch takes at most about
        ``CHUNK_BYTES`` or what one key head takes of memory, and on a GPU works at every call, whatever the interval;
        the kernel takes a byte for every row and key, and between two looks reads nothing. 1 where everything is kept,
        and for a row that attends to nothing. Hidden keys and values do not influence it.
    """
    tensors = (q, k, q_order, q_sizes, k_sizes, runs, counts, context_k, context_mask, k_calls)
    _check(*tensors, rows, interval)
    # a GPU would have to be waited for
    if not k_calls.is_cuda and not bool((k_calls - 1) % interval == 0):
        return q.new_zeros((*q.shape[:2], len(RECALL)), dtype=accumulation_dtype(q))
    return measure_with(key_masses_reference, *tensors, scale, rows, interval, seed)


def measure_with(
    key_masses: KeyMasses,
    q: Tensor,
    k: Tensor,
    q_order: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    runs: Tensor,
    counts: Tensor,
    context_k: Tensor | None,
    context_mask: Tensor | None,
    k_calls: Tensor,
    scale: float,
    rows: int,
    interval: int,
    seed: int,
) -> Tensor:
    """Do what ``measure_recall_reference`` does, with ``key_masses`` for the sums over keys; arguments are right."""
    batch, heads, tokens = q.shape[:3]
    is_measured = (k_calls - 1) % interval == 0
    positions = sampled_positions(tokens, rows, k_calls, seed)
    sampled, runs, counts = sampled_rows(q, q_order, q_sizes, runs, counts, positions, k.shape[1])
    visible = k_sizes.flatten(0, 1).sum(-1, dtype=torch.int32)
    # a model under autocast would have the scores rounded
    with torch.autocast(q.device.type, enabled=False):
        total, mass = key_masses(sampled, k, visible, runs, counts, scale, k_calls, interval)
        if context_k is not None:
            always = context_scores(sampled, context_k, context_mask, scale).logsumexp(-1)
            total, mass = total.logaddexp(always), mass.logaddexp(always)
    return recall_of(total, mass, (batch, heads)).where(is_measured, 0)


def recall_of(total: Tensor, mass: Tensor, heads: tuple[int, int]) -> Tensor:
    """Return what ``RECALL`` names of [B, H] heads, from the log-sum-exps of their rows over all and over kept keys."""
    attends_to_nothing = total == float("-inf")
    shares = (mass - total).exp().masked_fill(attends_to_nothing, 1.0).clamp(max=1.0)
    of_heads = shares.reshape(*heads, -1).mean(-1)
    return torch.stack((torch.ones_like(of_heads), of_heads), dim=-1)


def key_masses_reference(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    runs: Tensor,
    counts: Tensor,
    scale: float,
    k_calls: Tensor,
    interval: int,
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of the scores of every row [X, R], X = B * G: over visible keys, and over kept ones.

    The arguments are those of ``measure_recall_triton.key_masses_triton``; this one measures at every call.
    """
    dtype, tokens = accumulation_dtype(q), k.shape[2]
    keys, hidden = k.flatten(0, 1), torch.arange(tokens, device=k.device, dtype=torch.int64) >= visible[:, None, None]
    masses = []
    for part in parts(len(q), tokens * (4 * q.shape[2] + 24 * q.shape[1])):
        kept = kept_keys(runs[part].unsqueeze(1), counts[part].unsqueeze(1), tokens)[:, 0]
        scores = (q[part].to(dtype) @ keys[part].to(dtype).mT * scale).masked_fill_(hidden[part], float("-inf"))
        masses.append((scores.logsumexp(-1), scores.masked_fill(~kept, float("-inf")).logsumexp(-1)))
    total, mass = (torch.cat(each) for each in zip(*masses))
    return total, mass


def context_scores(q: Tensor, context_k: Tensor, context_mask: Tensor | None, scale: float) -> Tensor:
    """Return the scores of rows [X, R, D] over the context keys [B, G, M, D]: [X, R, M], -inf where one is hidden."""
    dtype = accumulation_dtype(q)
    scores = q.to(dtype) @ context_k.flatten(0, 1).to(dtype).mT * scale
    if context_mask is not None:
        hidden = ~context_mask.expand(*context_k.shape[:2], 1, -1).flatten(0, 1)
        scores = scores.masked_fill_(hidden, float("-inf"))
    return scores


def sampled_positions(tokens: int, rows: int, calls: Tensor, seed: int) -> Tensor:
    """Return ``rows`` different positions in 0 ... tokens - 1, or all, int64, equally far apart."""
    rows = min(rows, tokens)
    phase = (calls.long() + seed) * GOLDEN_STEP % 2**32
    return (torch.arange(rows, device=calls.device, dtype=torch.int64) * tokens + (phase * tokens >> 32)) // rows


def sampled_rows(
    q: Tensor, q_order: Tensor, q_sizes: Tensor, runs: Tensor, counts: Tensor, positions: Tensor, k_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries [X, R, D] at some positions of the cluster order, and the runs and counts of their clusters.

    X = B * G: the rows of all query heads of a key head stand beside each other, R = H / G * len(positions).
    """
    batch, heads, _, dim = q.shape
    sampled = q.gather(2, q_order[:, :, positions].long().unsqueeze(-1).expand(-1, -1, -1, dim))
    clusters = torch.searchsorted(q_sizes.cumsum(-1), positions.expand(batch, heads, -1).contiguous(), right=True)
    runs = runs.gather(2, clusters[..., None, None].expand(-1, -1, -1, *runs.shape[3:]))
    counts = counts.gather(2, clusters.unsqueeze(-1).expand(-1, -1, -1, counts.shape[3]))
    sampled, runs, counts = (x.reshape(batch * k_heads, -1, *x.shape[3:]) for x in (sampled, runs, counts))
    return sampled, runs, counts


def parts(count: int, bytes_each: int) -> list[slice]:
    """Return slices of 0 ... count - 1 that each take about ``CHUNK_BYTES`` at most."""
    step = max(1, CHUNK_BYTES // bytes_each)
    return [slice(start, start + step) for start in range(0, count, step)]


define(
    measure_recall_reference,
    name="measure_recall",
    part="recall",
    check=_check,
    fake=lambda q: q.new_empty((*q.shape[:2], len(RECALL)), dtype=accumulation_dtype(q)),
    kernels=Kernels(
        limits=Limits(FAST_DTYPES, MAX_HEAD_DIM),
        seen=lambda q, q_sizes, k_sizes: (q, q.shape[3], q_sizes.shape[2], k_sizes.shape[2]),
        seen_dtype=same_dtype,
        launch="measure_recall_triton:measure_recall_triton",
        self_check="self_check:check_measure_recall",
        modules=("measure_recall_triton",),
    ),
)
