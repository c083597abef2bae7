"""``svg2::block_sparse_attention``: exact attention restricted to the kept blocks."""

import itertools
import math

import torch
from torch import Tensor

from svg2_compile.kernels.card import FAST_DTYPES, MAX_CLUSTERS, MAX_HEAD_DIM, Kernels, Limits, same_dtype
from svg2_compile.kernels.checks import (
    FLOATING,
    accumulation_dtype,
    check_dtype,
    check_head_groups,
    check_rank,
    check_shape,
    check_value,
)
from svg2_compile.kernels.launch_attention import launch_attention
from svg2_compile.kernels.masked_attention import masked_attention
from svg2_compile.kernels.op import define, function_of
from svg2_compile.kernels.permute import (
    empty_token_major,
    permute_tokens_cpu,
    permute_tokens_reference,
    unpermute_tokens_reference,
)
from svg2_compile.kernels.private_torch import flash_attention_for_cpu
from svg2_compile.kernels.why_not import ATTENTIONS, choose_attention
from svg2_compile.kernels.work_list import COUNTS, MAX_KEYS, kept_keys

# Fewer rows than this are not worth sharing between threads. Left alone, the flash attention deals blocks of 32 rows.
MIN_ROWS_PER_PART = 16


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sizes: Tensor,
    runs: Tensor,
    counts: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    q_order: Tensor | None,
    implementation: str,
    tiles: list[int] | None,
    pseudo_k: Tensor | None,
    pseudo_v: Tensor | None,
    pseudo_bias: Tensor | None,
) -> None:
    """Check the arguments of ``svg2::block_sparse_attention``."""
    for name, x, rank in (("q", q, 4), ("k", k, 4), ("q_sizes", q_sizes, 3), ("runs", runs, 5)):
        check_rank(name, x, rank)
    batch, heads, _, dim = q.shape
    k_heads, k_tokens = k.shape[1:3]
    q_clusters, slots = runs.shape[2:4]
    check_head_groups(heads, k_heads)
    check_shape("k", k, (batch, k_heads, k_tokens, dim))
    check_shape("v", v, (batch, k_heads, k_tokens, dim))
    check_shape("runs", runs, (batch, heads, q_clusters, slots, 2))
    check_shape("counts", counts, (batch, heads, q_clusters, len(COUNTS)))
    check_shape("q_sizes", q_sizes, (batch, heads, q_clusters))
    check_dtype("q", q, *FLOATING)
    check_dtype("k", k, q.dtype)
    check_dtype("v", v, q.dtype)
    check_dtype("q_sizes", q_sizes, torch.int32)
    check_dtype("runs", runs, torch.int32)
    check_dtype("counts", counts, torch.int32)
    if q_order is not None:
        check_shape("q_order", q_order, q.shape[:3])
        check_dtype("q_order", q_order, torch.int32)
    check_value(
        implementation in ("auto", *ATTENTIONS),
        lambda: f"implementation must be 'auto' or one of {', '.join(map(repr, ATTENTIONS))}, got {implementation!r}",
    )
    check_value(
        tiles is None or (len(tiles) == 4 and implementation != "auto"),
        lambda: f"tiles must be 4 numbers for an implementation that is named, got {tiles} for {implementation!r}",
    )
    check_value(
        (context_k is None) == (context_v is None) and (context_mask is None or context_k is not None),
        lambda: "context_k and context_v must be given together, and context_mask only with them",
    )
    check_value(
        (pseudo_k is None) == (pseudo_v is None) == (pseudo_bias is None),
        lambda: "pseudo_k, pseudo_v and pseudo_bias must be given together",
    )
    if pseudo_k is not None and pseudo_v is not None and pseudo_bias is not None:
        check_rank("pseudo_k", pseudo_k, 4)
        pseudo = pseudo_k.shape[2]
        check_shape("pseudo_k", pseudo_k, (batch, k_heads, pseudo, dim))
        check_shape("pseudo_v", pseudo_v, (batch, k_heads, pseudo, dim))
        check_shape("pseudo_bias", pseudo_bias, (batch, heads, q_clusters, pseudo))
        check_dtype("pseudo_k", pseudo_k, q.dtype)
        check_dtype("pseudo_v", pseudo_v, q.dtype)
        check_dtype("pseudo_bias", pseudo_bias, torch.float32)
    if context_k is None or context_v is None:
        return
    check_rank("context_k", context_k, 4)
    context = context_k.shape[2]
    check_shape("context_k", context_k, (batch, k_heads, context, dim))
    check_shape("context_v", context_v, (batch, k_heads, context, dim))
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
    runs: Tensor,
    counts: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    q_order: Tensor | None,
    scale: float,
    implementation: str = "auto",
    tiles: list[int] | None = None,
    autotune: bool = False,
    pseudo_k: Tensor | None = None,
    pseudo_v: Tensor | None = None,
    pseudo_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return exact attention over the kept blocks, renormalised, and its log-sum-exp.

    Section 1.4: O'_r = softmax over the keys k' in the runs of cluster(r) of scale * Q'_r . K'_k', times V'.
    Section 1.6: context keys are visible to every query. Not the paper's: pseudo-keys, such as means of the clusters
    that are dropped, enter the same softmax with scale * q . k + bias; a bias of -inf leaves one out.

    Args:
        q: fp16, bf16, fp32 or fp64 [B, H, N, D], any strides; clusters contiguous and in order, unless ``q_order``
            says where they are.
        k: [B, G, N_k, D] in the dtype of ``q``, likewise; query head h uses key head h // (H / G).
        v: [B, G, N_k, D] in the dtype of ``q``, in the order of ``k``; finite for this reference.
        q_sizes: int32 [B, H, C_q], tokens per query cluster; sums to N.
        runs: int32 [B, H, C_q, R, 2], the ranges of keys that each query cluster attends to, as ``KeptRuns`` has them.
        counts: int32 [B, H, C_q, 4], how many of them there are, and of their pieces.
        context_k: [B, G, M, D] in the dtype of ``q``, or None.
        context_v: [B, G, M, D] in the dtype of ``q``, or None.
        context_mask: bool [B or 1, 1, 1, M], True where a context key may be attended to; None admits all.
        q_order: int32 [B, H, N], a permutation for every head, or None. Given, row ``q_order[b, h, i]`` of ``q`` is the
            one at place i of the cluster order, and the results are in the order of ``q``: the same as
            ``unpermute_tokens`` of the attention of ``permute_tokens(q, q_order)``.
        scale: factor of the scores.
        implementation: which CUDA kernel computes it: ``auto``, or one of ``ATTENTIONS``; the CPU has only one.
        tiles: query rows and keys of a tile, warps, stages, for a CUDA kernel that is named; None takes the tuned ones.
        autotune: whether a CUDA kernel may time its candidate tiles at the first call of every kind.
        pseudo_k: [B, G, P, D] in the dtype of ``q``, or None; its rows are finite for this reference.
        pseudo_v: [B, G, P, D] in the dtype of ``q``, likewise.
        pseudo_bias: fp32 [B, H, C_q, P], what is added to the scores of the queries of a cluster; below inf.

    Returns:
        out: [B, H, N, D] in the dtype of ``q``, contiguous, or with ``q_order`` stored as (B, N, H, D); 0 for a row
            that attends to nothing.
        lse: fp32 (fp64 for fp64) [B, H, N], contiguous, natural logarithm; -inf for a row that attends to nothing.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, H is no multiple of G, or the context or pseudo-key arguments are incomplete.

    Promises:
        Deterministic (on the CPU, for a given number of threads), no aliasing. In the CPU op and the CUDA kernels, keys
        outside the runs, masked context keys and pseudo-keys with a bias of -inf cannot influence the result, not even
        with NaN. Where every bias is -inf, the bits are those without pseudo-keys.
    """
    pseudo = (pseudo_k, pseudo_v, pseudo_bias)
    _check(q, k, v, q_sizes, runs, counts, context_k, context_v, context_mask, q_order, implementation, tiles, *pseudo)
    if q_order is not None:
        rows = permute_tokens_reference(q, q_order)
        clustered = (rows, k, v, q_sizes, runs, counts, context_k, context_v, context_mask, None, scale)
        out, lse = block_sparse_attention_reference(*clustered, "auto", None, False, *pseudo)
        return _in_token_order(out, lse, q_order)
    batch, heads, tokens, _ = q.shape
    b = torch.arange(batch, device=q.device, dtype=torch.int64)[:, None, None]
    h = torch.arange(heads, device=q.device, dtype=torch.int64)[:, None]
    cluster = _cluster_of_tokens(q_sizes, tokens)
    mask = kept_keys(runs, counts, k.shape[2])[b, h, cluster]  # [B, H, N, N_k]
    if context_k is not None and context_v is not None:
        k, v = torch.cat((k, context_k), dim=2), torch.cat((v, context_v), dim=2)
        visible = mask.new_ones((1, 1, 1, context_k.shape[2])) if context_mask is None else context_mask
        mask = torch.cat((mask, visible.expand(batch, heads, tokens, -1)), dim=-1)
    if pseudo_k is None or pseudo_v is None or pseudo_bias is None:
        return masked_attention(q, k, v, mask, scale)
    biases = pseudo_bias[b, h, cluster]  # [B, H, N, P]
    k, v = torch.cat((k, pseudo_k), dim=2), torch.cat((v, pseudo_v), dim=2)
    bias = torch.cat((biases.new_zeros(mask.shape), biases), dim=-1)  # [B, H, N, N_k + M + P]
    return masked_attention(q, k, v, torch.cat((mask, biases > -math.inf), dim=-1), scale, bias)


def _cluster_of_tokens(sizes: Tensor, tokens: int) -> Tensor:
    """Return the cluster of every token, int64 [B, H, tokens], from the cluster sizes."""
    token = torch.arange(tokens, device=sizes.device, dtype=torch.int64).expand(*sizes.shape[:2], tokens).contiguous()
    return torch.searchsorted(sizes.long().cumsum(-1), token, right=True)


def block_sparse_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sizes: Tensor,
    runs: Tensor,
    counts: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    q_order: Tensor | None,
    scale: float,
    implementation: str = "auto",
    tiles: list[int] | None = None,
    autotune: bool = False,
    pseudo_k: Tensor | None = None,
    pseudo_v: Tensor | None = None,
    pseudo_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``block_sparse_attention_reference`` in time proportional to the kept blocks.

    Query clusters that keep the same keys, and add the same to the scores of pseudo-keys, share one call of PyTorch's
    CPU flash attention, on the gathered keys.
    """
    pseudo = (pseudo_k, pseudo_v, pseudo_bias)
    _check(q, k, v, q_sizes, runs, counts, context_k, context_v, context_mask, q_order, implementation, tiles, *pseudo)
    _check_sizes(q_sizes, q.shape[2])
    # The flash attention reads rows of unit stride, whatever it is given.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=accumulation_dtype(q), device=q.device)
    if q_order is not None:
        q = permute_tokens_cpu(q, q_order)
    repeats = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        keys, values = k[b], v[b]
        visible: slice | Tensor = slice(0)
        if context_k is not None and context_v is not None:
            visible = slice(None) if context_mask is None else context_mask[b % context_mask.shape[0], 0, 0]
            keys = torch.cat((keys, context_k[b][:, visible]), dim=1)
            values = torch.cat((values, context_v[b][:, visible]), dim=1)
        context = torch.arange(k.shape[2], keys.shape[1], dtype=torch.int64, device=k.device)
        before = keys.shape[1]
        if pseudo_k is not None and pseudo_v is not None:
            keys, values = torch.cat((keys, pseudo_k[b]), dim=1), torch.cat((values, pseudo_v[b]), dim=1)
        # One buffer for every gather: it stays in the cache, fresh memory would cost a page fault every few rows.
        gathered_keys, gathered_values = keys.new_empty((2, *keys.shape[1:]))
        for h in range(q.shape[1]):
            g = h // repeats
            biases = None if pseudo_bias is None else pseudo_bias[b, h].contiguous()
            for rows, kept, bias in _selections(q_sizes[b, h], runs[b, h], counts[b, h, :, 0], biases):
                kept = torch.cat((kept, context))
                if bias is not None:
                    pseudo_keys = (bias > -math.inf).nonzero()[:, 0]
                    # without any, the same call as without pseudo-keys
                    bias = torch.cat((bias.new_zeros(len(kept)), bias[pseudo_keys])) if len(pseudo_keys) else None
                    kept = torch.cat((kept, before + pseudo_keys))
                if len(kept) == 0:
                    continue
                head_keys, head_values = keys[g], values[g]
                if len(kept) < keys.shape[1]:
                    head_keys = torch.index_select(head_keys, 0, kept, out=gathered_keys[: len(kept)])
                    head_values = torch.index_select(head_values, 0, kept, out=gathered_values[: len(kept)])
                attended = _flash_attention(q[b, h, rows], head_keys, head_values, scale, bias)
                out[b, h, rows], lse[b, h, rows] = attended
    return (out, lse) if q_order is None else _in_token_order(out, lse, q_order)


def _in_token_order(out: Tensor, lse: Tensor, q_order: Tensor) -> tuple[Tensor, Tensor]:
    """Return results in cluster order in the order of the queries."""
    return unpermute_tokens_reference(out, q_order), torch.empty_like(lse).scatter_(2, q_order.long(), lse)


def _selections(
    q_sizes: Tensor, runs: Tensor, num_runs: Tensor, biases: Tensor | None
) -> list[tuple[slice, Tensor, Tensor | None]]:
    """Return, for one head, the stretches of query rows that share a selection, each with the keys it keeps.

    And with their bias of the pseudo-keys, where there are any.
    """
    is_run = torch.arange(runs.shape[1], dtype=torch.int64, device=runs.device) < num_runs.unsqueeze(-1)
    ranges = (runs * is_run.unsqueeze(-1))[q_sizes > 0].long()
    told_apart = ranges.flatten(1)
    if biases is not None:
        biases = biases[q_sizes > 0]
        told_apart = torch.cat((told_apart, biases.view(torch.int32)), dim=-1)
    _, stretch = torch.unique_consecutive(told_apart, dim=0, return_inverse=True)
    first = (torch.nn.functional.pad(stretch, (1, 0), value=-1).diff() > 0).nonzero()[:, 0]
    ranges = ranges[first]
    row_counts = q_sizes.new_zeros(len(ranges)).index_add_(0, stretch, q_sizes[q_sizes > 0]).tolist()
    starts, stops = ranges.unbind(-1)
    lengths = (stops - starts).flatten()
    before = lengths.cumsum(0) - lengths
    keys = (starts.flatten() - before).repeat_interleave(lengths)
    keys = keys + torch.arange(len(keys), dtype=torch.int64, device=runs.device)
    kept = torch.split(keys, (stops - starts).sum(-1).tolist())
    edges = [0, *itertools.accumulate(row_counts)]
    added: list[Tensor | None] = [None] * len(kept) if biases is None else list(biases[first])
    return [(slice(*edge), keys, bias) for edge, keys, bias in zip(itertools.pairwise(edges), kept, added, strict=True)]


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the attention of one head's rows [N, D] over its keys [M, D], and the log-sum-exp [N].

    ``bias`` [M], if given, is added to the scores.

    The rows are dealt to the threads in equal parts, posing as heads. Left alone, the flash attention deals blocks of
    up to 256 rows, which at the size of a cluster leaves threads idle.
    """
    rows, dim = q.shape
    parts = min(torch.get_num_threads(), max(1, rows // MIN_ROWS_PER_PART))
    q_parts = torch.nn.functional.pad(q, (0, 0, 0, -rows % parts)).view(1, parts, -1, dim)
    k_parts, v_parts = k.expand(1, parts, -1, -1), v.expand(1, parts, -1, -1)
    added = None if bias is None else bias.to(accumulation_dtype(q)).view(1, 1, 1, -1)
    out, lse = flash_attention_for_cpu(q_parts, k_parts, v_parts, attn_mask=added, scale=scale)
    return out.reshape(-1, dim)[:rows], lse.reshape(-1)[:rows]


def _check_sizes(q_sizes: Tensor, tokens: int) -> None:
    """Raise ValueError unless the cluster sizes of every head add up to the tokens."""
    check_value(
        bool((q_sizes.sum(-1) == tokens).all()) and bool((q_sizes >= 0).all()),
        lambda: f"q_sizes must be non-negative and sum to {tokens} in every head, got sums {q_sizes.sum(-1).tolist()}",
    )


def _block_sparse_attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sizes: Tensor,
    runs: Tensor,
    counts: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    q_order: Tensor | None,
    scale: float,
    implementation: str = "auto",
    tiles: list[int] | None = None,
    autotune: bool = False,
    pseudo_k: Tensor | None = None,
    pseudo_v: Tensor | None = None,
    pseudo_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    arguments = (q, k, v, q_sizes, runs, counts, context_k, context_v, context_mask, q_order)
    _check(*arguments, implementation, tiles, pseudo_k, pseudo_v, pseudo_bias)
    sizes = {"dim": q.shape[3], "clusters": max(runs.shape[2:4]), "keys": k.shape[2]}
    rows = k.shape[0] * k.shape[1] * k.shape[2]
    has_pseudo_keys = pseudo_k is not None
    choice = choose_attention(
        q.device, q.dtype, **sizes, rows=rows, pseudo_keys=has_pseudo_keys, implementation=implementation
    )
    if choice.implementation == "reference":
        pseudo = (pseudo_k, pseudo_v, pseudo_bias)
        return block_sparse_attention_reference(*arguments, scale, "auto", None, False, *pseudo)
    out, lse = launch_attention(choice.implementation, arguments, scale, tiles, autotune)
    if pseudo_k is not None and pseudo_v is not None and pseudo_bias is not None:
        attend_further = function_of("pseudo_keys_triton:attend_pseudo_keys")
        attend_further(out, lse, q, q_sizes, q_order, pseudo_k, pseudo_v, pseudo_bias, scale)
    return out, lse


def _empty(q: Tensor, q_order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the empty result."""
    out = q.new_empty(q.shape) if q_order is None else empty_token_major(q)
    return out, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))


define(
    block_sparse_attention_reference,
    name="block_sparse_attention",
    part="attention",
    check=_check,
    fake=_empty,
    cpu=block_sparse_attention_cpu,
    cuda=_block_sparse_attention_cuda,
    kernels=Kernels(
        limits=Limits(FAST_DTYPES, MAX_HEAD_DIM, MAX_CLUSTERS, MAX_KEYS - 1),
        # there is a slot for every second cluster of keys
        seen=lambda q, runs: (q, q.shape[3], runs.shape[2], 2 * runs.shape[3]),
        seen_dtype=same_dtype,
        launch=None,
        self_check="self_check:check_attention",
        modules=(
            "block_sparse_attention_gluon",
            "block_sparse_attention_descriptor",
            "block_sparse_attention_pointer",
            "pseudo_keys_triton",
            "work_list_triton",
        ),
    ),
)
