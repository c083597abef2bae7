"""``svg2::block_sparse_attention``: exact attention restricted to the kept blocks."""

import math

import torch
from torch import Tensor

from svg2_compile.kernels.checks import (
    FLOATING,
    accumulation_dtype,
    check_dtype,
    check_head_groups,
    check_rank,
    check_shape,
    check_value,
)
from svg2_compile.kernels.launch import why_not_gluon, why_not_triton
from svg2_compile.kernels.masked_attention import masked_attention
from svg2_compile.kernels.permute import (
    empty_token_major,
    permute_tokens_cpu,
    permute_tokens_reference,
    unpermute_tokens_reference,
)

# Fewer rows than this are not worth sharing between threads. Left alone, the flash attention deals blocks of 32 rows.
MIN_ROWS_PER_PART = 16

torch.library.define(
    "svg2::block_sparse_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor q_sizes, Tensor k_sizes, Tensor keep, Tensor? context_k, Tensor? context_v, "
    "Tensor? context_mask, Tensor? q_order, float scale) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    keep: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    q_order: Tensor | None,
) -> None:
    """Check the arguments of ``svg2::block_sparse_attention``."""
    for name, x in (("q", q), ("k", k), ("keep", keep)):
        check_rank(name, x, 4)
    batch, heads, _, dim = q.shape
    groups, k_tokens = k.shape[1:3]
    q_clusters, k_clusters = keep.shape[2:]
    check_head_groups(heads, groups)
    check_shape("k", k, (batch, groups, k_tokens, dim))
    check_shape("v", v, (batch, groups, k_tokens, dim))
    check_shape("keep", keep, (batch, heads, q_clusters, k_clusters))
    check_shape("q_sizes", q_sizes, (batch, heads, q_clusters))
    check_shape("k_sizes", k_sizes, (batch, groups, k_clusters))
    check_dtype("q", q, *FLOATING)
    check_dtype("k", k, q.dtype)
    check_dtype("v", v, q.dtype)
    check_dtype("q_sizes", q_sizes, torch.int32)
    check_dtype("k_sizes", k_sizes, torch.int32)
    check_dtype("keep", keep, torch.bool)
    if q_order is not None:
        check_shape("q_order", q_order, q.shape[:3])
        check_dtype("q_order", q_order, torch.int32)
    check_value(
        (context_k is None) == (context_v is None) and (context_mask is None or context_k is not None),
        lambda: "context_k and context_v must be given together, and context_mask only with them",
    )
    if context_k is None or context_v is None:
        return
    check_rank("context_k", context_k, 4)
    context = context_k.shape[2]
    check_shape("context_k", context_k, (batch, groups, context, dim))
    check_shape("context_v", context_v, (batch, groups, context, dim))
    check_dtype("context_k", context_k, q.dtype)
    check_dtype("context_v", context_v, q.dtype)
    if context_mask is not None:
        check_rank("context_mask", context_mask, 4)
        mask_batch = 1 if context_mask.shape[0] == 1 else batch
        check_shape("context_mask", context_mask, (mask_batch, 1, 1, context))
        check_dtype("context_mask", context_mask, torch.bool)


def block_sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    keep: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    q_order: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return exact attention over the kept blocks, renormalised, and its log-sum-exp.

    Section 1.4: O'_r = softmax over {k' : keep[cluster(r), cluster(k')]} of scale * Q'_r . K'_k', times V'.
    Section 1.6: context keys are visible to every query.

    Args:
        q: fp16, bf16, fp32 or fp64 [B, H, N, D], any strides; clusters contiguous and in order, unless ``q_order``
            says where they are.
        k: [B, G, N_k, D] in the dtype of ``q``, likewise; query head h uses key head h // (H / G).
        v: [B, G, N_k, D] in the dtype of ``q``, in the order of ``k``; finite for this reference.
        q_sizes: int32 [B, H, C_q], tokens per query cluster; sums to N.
        k_sizes: int32 [B, G, C_k], tokens per key cluster; sums to N_k.
        keep: bool [B, H, C_q, C_k], True where query cluster i attends to key cluster j.
        context_k: [B, G, M, D] in the dtype of ``q``, or None.
        context_v: [B, G, M, D] in the dtype of ``q``, or None.
        context_mask: bool [B or 1, 1, 1, M], True where a context key may be attended to; None admits all.
        q_order: int32 [B, H, N], a permutation for every head, or None. Given, row ``q_order[b, h, i]`` of ``q`` is the
            one at place i of the cluster order, and the results are in the order of ``q``: the same as
            ``unpermute_tokens`` of the attention of ``permute_tokens(q, q_order)``.
        scale: factor of the scores.

    Returns:
        out: [B, H, N, D] in the dtype of ``q``, contiguous, or with ``q_order`` stored as (B, N, H, D); 0 for a row
            that attends to nothing.
        lse: fp32 (fp64 for fp64) [B, H, N], contiguous, natural logarithm; -inf for a row that attends to nothing.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, H is no multiple of G, or the context arguments are incomplete.

    Promises:
        Deterministic (on the CPU, for a given number of threads), no aliasing. In the CPU op and in Triton's, blocks
        that are not kept and masked context keys cannot influence the result, not even with NaN; on Hopper they must
        be finite.
    """
    _check(q, k, v, q_sizes, k_sizes, keep, context_k, context_v, context_mask, q_order)
    if q_order is not None:
        rows = permute_tokens_reference(q, q_order)
        clustered = (rows, k, v, q_sizes, k_sizes, keep, context_k, context_v, context_mask, None, scale)
        out, lse = block_sparse_attention_reference(*clustered)
        return _in_token_order(out, lse, q_order)
    batch, heads, tokens, _ = q.shape
    b = torch.arange(batch, device=q.device)[:, None, None, None]
    h = torch.arange(heads, device=q.device)[:, None, None]
    q_cluster = _cluster_of_tokens(q_sizes, tokens)
    k_cluster = _cluster_of_tokens(k_sizes, k.shape[2]).repeat_interleave(heads // k.shape[1], dim=1)
    mask = keep[b, h, q_cluster.unsqueeze(-1), k_cluster.unsqueeze(-2)]  # [B, H, N, N_k]
    if context_k is not None and context_v is not None:
        k, v = torch.cat((k, context_k), dim=2), torch.cat((v, context_v), dim=2)
        visible = mask.new_ones((1, 1, 1, context_k.shape[2])) if context_mask is None else context_mask
        mask = torch.cat((mask, visible.expand(batch, heads, tokens, -1)), dim=-1)
    return masked_attention(q, k, v, mask, scale)


def _cluster_of_tokens(sizes: Tensor, tokens: int) -> Tensor:
    """Return the cluster of every token, int64 [B, H, tokens], from the cluster sizes."""
    token = torch.arange(tokens, device=sizes.device).expand(*sizes.shape[:2], tokens).contiguous()
    return torch.searchsorted(sizes.long().cumsum(-1), token, right=True)


def block_sparse_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    keep: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    q_order: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute ``block_sparse_attention_reference`` in time proportional to the kept blocks.

    Query clusters that keep the same keys share one call of PyTorch's CPU flash attention, on the gathered keys.
    """
    _check(q, k, v, q_sizes, k_sizes, keep, context_k, context_v, context_mask, q_order)
    _check_sizes("q_sizes", q_sizes, q.shape[2])
    _check_sizes("k_sizes", k_sizes, k.shape[2])
    # The flash attention reads rows of unit stride, whatever it is given.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full(q.shape[:3], -math.inf, dtype=accumulation_dtype(q))
    if q_order is not None:
        q = permute_tokens_cpu(q, q_order)
    repeats = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        keys, values, key_sizes, key_keep = k[b], v[b], k_sizes[b], keep[b]
        if context_k is not None and context_v is not None:
            # The visible context is one more key cluster that everyone keeps.
            visible = slice(None) if context_mask is None else context_mask[b % context_mask.shape[0], 0, 0]
            keys = torch.cat((keys, context_k[b][:, visible]), dim=1)
            values = torch.cat((values, context_v[b][:, visible]), dim=1)
            context_size = keys.shape[1] - k.shape[2]
            key_sizes = torch.nn.functional.pad(key_sizes, (0, 1), value=context_size)
            key_keep = torch.nn.functional.pad(key_keep, (0, 1), value=True)
        # One buffer for every gather: it stays in the cache, fresh memory would cost a page fault every few rows.
        gathered_keys, gathered_values = keys.new_empty((2, *keys.shape[1:]))
        for h in range(q.shape[1]):
            g = h // repeats
            for rows, kept in _runs(q_sizes[b, h], key_sizes[g], key_keep[h]):
                head_keys, head_values = keys[g], values[g]
                if kept is not None:
                    head_keys = torch.index_select(head_keys, 0, kept, out=gathered_keys[: len(kept)])
                    head_values = torch.index_select(head_values, 0, kept, out=gathered_values[: len(kept)])
                out[b, h, rows], lse[b, h, rows] = _flash_attention(q[b, h, rows], head_keys, head_values, scale)
    return (out, lse) if q_order is None else _in_token_order(out, lse, q_order)


def _in_token_order(out: Tensor, lse: Tensor, q_order: Tensor) -> tuple[Tensor, Tensor]:
    """Return results in cluster order in the order of the queries."""
    return unpermute_tokens_reference(out, q_order), torch.empty_like(lse).scatter_(2, q_order.long(), lse)


def _runs(q_sizes: Tensor, k_sizes: Tensor, keep: Tensor) -> list[tuple[slice, Tensor | None]]:
    """Return, for one head, the runs of query rows that share a selection, with the keys they keep (None: all keys).

    Rows that keep no key are left out.
    """
    selections, run = torch.unique_consecutive(keep[q_sizes > 0] & (k_sizes > 0), dim=0, return_inverse=True)
    row_counts = q_sizes.new_zeros(len(selections)).index_add_(0, run, q_sizes[q_sizes > 0]).tolist()
    kept_keys = selections.repeat_interleave(k_sizes, dim=1)  # [runs, N_k]
    key_counts = kept_keys.sum(-1).tolist()
    runs: list[tuple[slice, Tensor | None]] = []
    stop = 0
    for rows, keys, kept in zip(row_counts, key_counts, kept_keys.nonzero()[:, 1].split(key_counts), strict=True):
        start, stop = stop, stop + rows
        if keys > 0:
            runs.append((slice(start, stop), None if keys == kept_keys.shape[1] else kept))
    return runs


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the attention of one head's rows [N, D] over its keys [M, D], and the log-sum-exp [N].

    The rows are dealt to the threads in equal parts, posing as heads. Left alone, the flash attention deals blocks of
    up to 256 rows, which at the size of a cluster leaves threads idle.
    """
    rows, dim = q.shape
    parts = min(torch.get_num_threads(), max(1, rows // MIN_ROWS_PER_PART))
    q_parts = torch.nn.functional.pad(q, (0, 0, 0, -rows % parts)).view(1, parts, -1, dim)
    k_parts, v_parts = k.expand(1, parts, -1, -1), v.expand(1, parts, -1, -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_parts, k_parts, v_parts, scale=scale)
    return out.reshape(-1, dim)[:rows], lse.reshape(-1)[:rows]


def _check_sizes(name: str, sizes: Tensor, tokens: int) -> None:
    """Raise ValueError unless the cluster sizes of every head add up to the tokens."""
    check_value(
        bool((sizes.sum(-1) == tokens).all()) and bool((sizes >= 0).all()),
        lambda: f"{name} must be non-negative and sum to {tokens} in every head, got sums {sizes.sum(-1).tolist()}",
    )


torch.library.impl("svg2::block_sparse_attention", "cpu", block_sparse_attention_cpu)


@torch.library.impl("svg2::block_sparse_attention", "cuda")
def _block_sparse_attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    keep: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    q_order: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    arguments = (q, k, v, q_sizes, k_sizes, keep, context_k, context_v, context_mask, q_order)
    _check(*arguments)
    sizes = {"dim": q.shape[3], "clusters": max(keep.shape[2:]), "keys": k.shape[2]}
    if why_not_triton("block_sparse_attention", q.device, q.dtype, **sizes):
        return block_sparse_attention_reference(*arguments, scale)
    rows = k.shape[0] * k.shape[1] * k.shape[2]
    if why_not_gluon(q.device, q.dtype, dim=q.shape[3], rows=rows) is None:
        from svg2_compile.kernels.block_sparse_attention_gluon import block_sparse_attention_gluon

        return block_sparse_attention_gluon(*arguments, scale)
    from svg2_compile.kernels.block_sparse_attention_triton import block_sparse_attention_triton

    return block_sparse_attention_triton(*arguments, scale)


def _block_sparse_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    keep: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    q_order: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, q_sizes, k_sizes, keep, context_k, context_v, context_mask, q_order)
    out = q.new_empty(q.shape) if q_order is None else empty_token_major(q)
    return out, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))


torch.library.register_fake("svg2::block_sparse_attention", _block_sparse_attention_fake)
