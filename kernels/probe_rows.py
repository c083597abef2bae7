"""``svg2::probe_rows``: dense attention of a few queries of every head, and how much of it the selection keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svg2_compile.kernels.card import FAST_DTYPES, MAX_HEAD_DIM, MAX_PROBES, Kernels, Limits, same_dtype
from svg2_compile.kernels.checks import accumulation_dtype, check_dtype, check_shape, check_value
from svg2_compile.kernels.measure_recall import (
    RECALL,
    check_selection,
    context_scores,
    parts,
    recall_of,
    sampled_positions,
    sampled_rows,
)
from svg2_compile.kernels.op import define
from svg2_compile.kernels.sort_labels import sort_labels_reference
from svg2_compile.kernels.work_list import kept_keys, kept_runs_reference

if TYPE_CHECKING:
    from svg2_compile.kernels.self_check import Kind

# The self-check: rows, keys behind the last cluster, and what fp32 sums and weights of 16 bits may be off.
ROWS, HIDDEN_KEYS, TOLERANCE, ROUNDINGS = 19, 5, 1e-3, 4


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    runs: Tensor,
    counts: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    k_calls: Tensor,
    rows: int,
    interval: int,
) -> None:
    """Check the arguments of ``svg2::probe_rows``."""
    check_selection(q, k, q_order, q_sizes, k_sizes, runs, counts, context_k, context_mask, k_calls)
    check_shape("v", v, k.shape)
    check_dtype("v", v, q.dtype)
    check_value(
        (context_k is None) == (context_v is None), lambda: "context_k and context_v must come together, got one alone"
    )
    if context_k is not None and context_v is not None:
        check_shape("context_v", context_v, context_k.shape)
        check_dtype("context_v", context_v, q.dtype)
    check_value(1 <= rows <= MAX_PROBES, lambda: f"rows must be in [1, {MAX_PROBES}], got {rows}")
    check_value(interval >= 0, lambda: f"interval must be at least 0, got {interval}")


KeyResults = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor, int], tuple[Tensor, Tensor, Tensor]
]


def probe_rows_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    runs: Tensor,
    counts: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    k_calls: Tensor,
    scale: float,
    rows: int,
    interval: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the dense attention of some rows of each head, and, at some calls, the head's recall on them.

    The rows are those of ``measure_recall``: they lie evenly in the order of the clusters, other ones at each call. For
    row r, exact_r = sum of exp(s_t) v_t / sum of exp(s_t), s = scale * q_r . k, over the visible keys and the context
    keys. The recall is that of ``measure_recall_reference`` on the same rows.

    Args:
        q: fp16, bf16, fp32 or fp64 [B, H, N, D], any strides, in token order.
        k: [B, G, N_k, D] in the dtype of ``q``, clusters contiguous; query head h uses key head h // (H / G).
        v: [B, G, N_k, D], likewise.
        q_order: int32 [B, H, N], the query found at each sorted position.
        q_sizes: int32 [B, H, C_q], tokens per query cluster; sums to N.
        k_sizes: int32 [B, G, C_k], tokens per key cluster; keys behind the last cluster are hidden.
        runs: int32 [B, H, C_q, R, 2], the ranges of keys that each query cluster attends to, as ``KeptRuns`` has them.
        counts: int32 [B, H, C_q, 4], columns named by ``COUNTS``.
        context_k: [B, G, M, D] in the dtype of ``q``, keys that every query attends to; None where there are none.
        context_v: [B, G, M, D] in the dtype of ``q``, together with ``context_k``.
        context_mask: bool [B or 1, 1, 1, M], True where a context key may be attended to; None admits all.
        k_calls: int32 [1], calls of this generation with this one.
        scale: factor of the scores.
        rows: rows per head, 1 to ``MAX_PROBES``; more than N are N.
        interval: recall is measured at the first call and at every so many after it; 0 never.
        seed: chooses the rows; any integer.

    Returns:
        places: int32 [B, H, R], which queries these are, in token order; R = min(rows, N).
        exact: fp32 (fp64 for fp64) [B, H, R, D], their dense attention; 0 for a row that attends to nothing.
        recall: fp32 (fp64 for fp64) [B, H, 2], columns named by ``RECALL``; 0 in a call that does not measure.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, H is no multiple of G, or a number is out of range.

    Promises:
        Deterministic, in fp32 (fp64 for fp64) but for weights that the kernel rounds to the dtype of ``v``, no
        synchronisation with a GPU. Hidden keys and values do not influence it, nor does what is kept influence the
        dense attention. Plain PyTorch takes at most about ``CHUNK_BYTES`` or what one key head takes of memory; the
        kernel takes a result of every row for each 4,096 keys, and where it measures, a byte for every row and key.
    """
    _check(
        q, k, v, q_order, q_sizes, k_sizes, runs, counts, context_k, context_v, context_mask, k_calls, rows, interval
    )
    return probe_with(
        key_results_reference,
        q,
        k,
        v,
        q_order,
        q_sizes,
        k_sizes,
        runs,
        counts,
        context_k,
        context_v,
        context_mask,
        k_calls,
        scale,
        rows,
        interval,
        seed,
    )


def probe_with(
    key_results: KeyResults,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    runs: Tensor,
    counts: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    k_calls: Tensor,
    scale: float,
    rows: int,
    interval: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what ``probe_rows_reference`` does, with ``key_results`` for the sums over keys; arguments are right."""
    batch, heads, tokens, dim = q.shape
    positions = sampled_positions(tokens, rows, k_calls, seed)
    places = q_order[:, :, positions]
    sampled, of_rows, count_of_rows = sampled_rows(q, q_order, q_sizes, runs, counts, positions, k.shape[1])
    visible = k_sizes.flatten(0, 1).sum(-1, dtype=torch.int32)
    # a model under autocast would have the scores rounded
    with torch.autocast(q.device.type, enabled=False):
        total, mass, exact = key_results(sampled, k, v, visible, of_rows, count_of_rows, scale, k_calls, interval)
        if context_k is not None and context_v is not None:
            scores = context_scores(sampled, context_k, context_mask, scale)
            always = scores.logsumexp(-1)
            values = context_v.flatten(0, 1).to(exact.dtype)
            if context_mask is not None:
                hidden = ~context_mask.expand(*context_v.shape[:2], 1, -1).flatten(0, 1)
                values = values.masked_fill(hidden.mT, 0)
            both = total.logaddexp(always)
            shift = both.masked_fill(both == float("-inf"), 0).unsqueeze(-1)
            exact = (total.unsqueeze(-1) - shift).exp() * exact + (scores - shift).exp() @ values
            total, mass = both, mass.logaddexp(always)
    exact = exact.reshape(batch, heads, -1, dim)
    if interval == 0:
        return places, exact, exact.new_zeros((batch, heads, len(RECALL)))
    recall = recall_of(total, mass, (batch, heads))
    return places, exact, recall.where((k_calls - 1) % interval == 0, 0)


def key_results_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    runs: Tensor,
    counts: Tensor,
    scale: float,
    k_calls: Tensor,
    interval: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what rows [X, R, D], X = B * G, have of the visible keys.

    The arguments are those of ``probe_rows_triton.key_results_triton``; this one measures at every call.

    Returns:
        The log-sum-exp of their scores over visible keys [X, R], over those of them that are kept [X, R], and the
        softmax over visible keys times the values [X, R, D]; -inf, -inf and 0 where there is none.
    """
    dtype, tokens = accumulation_dtype(q), k.shape[2]
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    hidden = torch.arange(tokens, device=k.device, dtype=torch.int64) >= visible[:, None, None]
    found = []
    for part in parts(len(q), tokens * (8 * q.shape[2] + 24 * q.shape[1])):
        kept = kept_keys(runs[part].unsqueeze(1), counts[part].unsqueeze(1), tokens)[:, 0]
        scores = (q[part].to(dtype) @ keys[part].to(dtype).mT * scale).masked_fill_(hidden[part], float("-inf"))
        total = scores.logsumexp(-1)
        weights = (scores - total.masked_fill(total == float("-inf"), 0).unsqueeze(-1)).exp()
        exact = weights @ values[part].to(dtype).masked_fill(hidden[part].mT, 0)
        found.append((total, scores.masked_fill(~kept, float("-inf")).logsumexp(-1), exact))
    total, mass, exact = (torch.cat(each) for each in zip(*found, strict=True))
    return total, mass, exact


def check_probe_rows(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how dense rows or their recall are wrong: of clusters of any size, with hidden keys that are NaN."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, kind.tokens, kind.dim, generator=generator, dtype=torch.float32, device="cpu").to(kind.dtype)
        for _ in range(3)
    )
    labels = [
        torch.randint(count, (1, 2, kind.tokens), generator=generator, dtype=torch.int32, device="cpu")
        for count in (kind.q_clusters, kind.k_clusters)
    ]
    labels[1][:, :, -HIDDEN_KEYS:] = kind.k_clusters
    for x in (k, v):
        x[:, :, -HIDDEN_KEYS:] = float("nan")
    q_order, q_sizes = sort_labels_reference(labels[0], kind.q_clusters)
    k_sizes = sort_labels_reference(labels[1], kind.k_clusters + 1)[1][:, :, :-1].contiguous()
    shape = (1, 2, kind.q_clusters, kind.k_clusters)
    keep = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < 0.5
    kept = kept_runs_reference(keep, k_sizes)
    calls = torch.ones(1, dtype=torch.int32, device="cpu")
    arguments = (q, k, v, q_order, q_sizes, k_sizes, kept.runs, kept.counts, None, None, None, calls)
    numbers = (2 * kind.dim**-0.5, ROWS, 1, 0)
    got = call(*(None if each is None else each.to(kind.device) for each in arguments), *numbers)
    wanted = probe_rows_reference(*arguments, *numbers)
    if not torch.equal(got[0].cpu(), wanted[0]):
        return "other rows"
    # weights of 16 bits
    allowed = max(TOLERANCE, ROUNDINGS * torch.finfo(kind.dtype).eps)
    errors = [float((one.cpu() - other).abs().max()) for one, other in zip(got[1:], wanted[1:], strict=True)]
    for name, error, limit in zip(("rows", "recall"), errors, (allowed, TOLERANCE), strict=True):
        # what is no number is not below either
        if not error <= limit:
            return f"{name} off by {error:.3g}, at most {limit:.3g} is rounding"
    return None


# No guard on a size that is known only at run time.
_smaller: Callable[[int, int], int] = torch.sym_min


def _empty(q: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the empty result."""
    batch, heads, tokens, dim = q.shape
    count, dtype = _smaller(rows, tokens), accumulation_dtype(q)
    return (
        q.new_empty((batch, heads, count), dtype=torch.int32),
        q.new_empty((batch, heads, count, dim), dtype=dtype),
        q.new_empty((batch, heads, len(RECALL)), dtype=dtype),
    )


define(
    probe_rows_reference,
    name="probe_rows",
    part="attention",
    check=_check,
    fake=_empty,
    kernels=Kernels(
        limits=Limits(FAST_DTYPES, MAX_HEAD_DIM),
        seen=lambda q, q_sizes, k_sizes: (q, q.shape[3], q_sizes.shape[2], k_sizes.shape[2]),
        seen_dtype=same_dtype,
        launch="probe_rows_triton:probe_rows_triton",
        self_check="probe_rows:check_probe_rows",
        modules=("probe_rows_triton",),
    ),
)
