"""Tell video rows from context rows, and decide which candidates become sparse.

    value ◄── ... ◄── cat([text, video], dim=1)   →   AttentionSite(segments=(77 context, 8192 video))
    query ◄── ... ◄── video, value ◄── ... ◄── audio   →   Rejection("cross-attention ...")
    query ◄── ... ◄── video, value ◄── ... ◄── cat([text, video], dim=1)   →   the first, context rows being keys only

The rows are told apart by following the sequence axis of ``value`` back to the nearest ``cat`` (``trace_axis``): the
longest operand is the video, the rest is context. The graph is only read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch.fx import Node

from svg2_compile.passes.config import MAX_CLUSTERS, SparseConfig
from svg2_compile.passes.decide_by_size import decide, fix, is_guarded
from svg2_compile.passes.match import Candidate
from svg2_compile.passes.nodes import first_argument, permutation_of, same_size, shape_of, target_name, tensor_of
from svg2_compile.passes.read_mask import is_true
from svg2_compile.passes.records import AttentionSite, Rejection, Segment, Size, size_hint, told
from svg2_compile.passes.trace_axis import AxisOrigin, Piece, trace_axis

TRUSTED_ORIGINS = ("placeholder", "split axis", "conv")
REARRANGES = ("view", "reshape", "unflatten", "flatten", "contiguous", "squeeze", "unsqueeze")
POSITIONS = re.compile(r"rot|rope|freq|pos|cos|sin", re.IGNORECASE)


def classify(
    found: Iterable[Candidate | Rejection], config: SparseConfig, *, fixes_batch: bool = True
) -> list[AttentionSite | Rejection]:
    """Turn each candidate into a site or a rejection; rejections pass through.

    State has a row per batch element: a symbolic batch size becomes a number, or a reason unless ``fixes_batch``.
    """
    decided: list[AttentionSite | Rejection] = []
    layers: list[str] = []
    for each in found:
        result = _classify_one(each, config, fixes_batch) if isinstance(each, Candidate) else each
        if isinstance(result, AttentionSite) and result.layer:
            if result.layer not in layers:
                layers.append(result.layer)
            if layers.index(result.layer) < config.dense_layers:
                reason = f"among the first dense_layers={config.dense_layers} layers"
                result = Rejection(result.node, result.path, reason, "set dense_layers=0 to include it", True)
        decided.append(result)
    return decided


def _classify_one(candidate: Candidate, config: SparseConfig, fixes_batch: bool) -> AttentionSite | Rejection:
    def decline(reason: str, hint: str = "", by_design: bool = False) -> Rejection:
        return Rejection(candidate.node.name, candidate.path, reason, hint, by_design)

    origin = trace_axis(candidate.value, 2)
    queries = trace_axis(candidate.query, 2)
    if not same_size(candidate.sequence, candidate.keys):
        segments = _asking_segments(candidate, queries, origin)
        if not segments:
            lengths = f"{told(candidate.sequence)} queries, {told(candidate.keys)} keys"
            return decline(f"cross-attention: {lengths}", by_design=True)
        if _is_mostly_context(segments, config):
            lengths = f"{told(candidate.sequence)} queries are among {told(candidate.keys)} keys"
            reason = f"more context than max_context_ratio={config.max_context_ratio}: {lengths}"
            return decline(reason, "raise max_context_ratio to include it")
    elif _different_streams(queries, origin) and _are_made_outside(candidate, origin):
        reason = "its queries and values are computed outside this graph, so what their rows are is unknown"
        return decline(reason, "compile projections and attention together: hooks on each layer come between them")
    elif _different_streams(queries, origin):
        sources = f"{queries.pieces[0].node.name} and {origin.pieces[0].node.name}"
        return decline(f"cross-attention: queries and values come from {sources}", by_design=True)
    else:
        segments = _segments(candidate, origin if origin.joined or not queries.joined else queries, config)
    video = next(segment for segment in segments if segment.is_video)
    hint = size_hint(video.length)
    if hint is None:
        return decline("its length is known only at run time", "compile with fullgraph=True and static lengths")
    if decide(lambda n: n < config.min_tokens, video.length):
        return decline(f"short: {hint} video tokens", f"lower min_tokens={config.min_tokens} to include it", True)
    query = shape_of(candidate.query)
    if not fixes_batch and query is not None and not isinstance(query[0], int):
        return decline("its batch size is dynamic, and state has a row per batch element", "export a fixed batch size")
    return _site(candidate, segments, video, hint, config)


def _different_streams(queries: AxisOrigin, values: AxisOrigin) -> bool:
    """True when queries and values are rows of different inputs, although their lengths agree."""
    if queries.joined or values.joined:
        return queries.joined and values.joined and not _same_lengths(queries, values)
    first, second = queries.pieces[0], values.pieces[0]
    if first.node is second.node and first.axis == second.axis:
        return False
    return _is_trusted(first) and _is_trusted(second)


def _are_made_outside(candidate: Candidate, values: AxisOrigin) -> bool:
    """True where keys and values are two inputs, and no projection stands between the values and the attention."""
    node: Node | None = candidate.value
    while node is not None and (target_name(node) in REARRANGES or permutation_of(node)):
        node = first_argument(node)
    is_given = node is not None and node.op == "placeholder"
    return is_given and trace_axis(candidate.key, 2).pieces[0].node is not values.pieces[0].node


def _is_trusted(piece: Piece) -> bool:
    """True where ``piece`` names a stream; an input with heads already is an operand made before a graph break."""
    is_operand = piece.kind == "placeholder" and len(shape_of(piece.node) or ()) == 4
    return piece.kind.startswith(TRUSTED_ORIGINS) and not is_operand and not POSITIONS.search(piece.node.name)


def _same_lengths(a: AxisOrigin, b: AxisOrigin) -> bool:
    return len(a.pieces) == len(b.pieces) and all(same_size(x.length, y.length) for x, y in zip(a.pieces, b.pieces))


def _asking_segments(candidate: Candidate, queries: AxisOrigin, values: AxisOrigin) -> tuple[Segment, ...]:
    """Return the segments of the keys, the rows that ask being video; empty where they are no rows of the keys.

    Positions that are multiplied into queries and keys can lead both walks astray, to one place: keys testify as well.
    """
    if not values.joined:
        return _segments_around(queries, values)
    keys = trace_axis(candidate.key, 2)
    for position, piece in enumerate(values.pieces):
        if same_size(piece.length, candidate.sequence):
            witnesses = [piece, keys.pieces[position]] if _same_lengths(keys, values) else [piece]
            if any(_same_rows(queries, trace_axis(each.node, each.axis)) for each in witnesses):
                return _pieces_as_segments(values, position)
    return ()


def _segments_around(queries: AxisOrigin, values: AxisOrigin) -> tuple[Segment, ...]:
    """Cut the rows of the values before and after the ones that ask, where all are rows of one tensor."""
    asking, rows = queries.pieces[0], values.pieces[0]
    if queries.joined or (asking.node, asking.axis) != (rows.node, rows.axis):
        return ()
    # what is written needs numbers: no operand has these lengths
    edges = fix(rows.start, asking.start, asking.start + asking.length, rows.start + rows.length)
    if edges is None or edges != sorted(edges):
        return ()
    lengths = [end - start for start, end in pairwise(edges)]
    cut = [Segment(length, position == 1, rows.node.name, rows.axis) for position, length in enumerate(lengths)]
    return tuple(segment for segment in cut if segment.length)


def _same_rows(a: AxisOrigin, b: AxisOrigin) -> bool:
    return [(each.node, each.axis) for each in a.pieces] == [(each.node, each.axis) for each in b.pieces]


def _segments(candidate: Candidate, origin: AxisOrigin, config: SparseConfig) -> tuple[Segment, ...]:
    whole = (Segment(candidate.sequence, True, "", 0),)
    if not origin.joined:
        return whole
    video = 0
    for position, piece in enumerate(origin.pieces):
        if decide(lambda n, longest: n > longest, piece.length, origin.pieces[video].length):
            video = position
    segments = _pieces_as_segments(origin, video)
    return whole if _is_mostly_context(segments, config) else segments


def _pieces_as_segments(origin: AxisOrigin, video: int) -> tuple[Segment, ...]:
    return tuple(
        Segment(piece.length, position == video, piece.node.name, piece.axis)
        for position, piece in enumerate(origin.pieces)
    )


def _is_mostly_context(segments: tuple[Segment, ...], config: SparseConfig) -> bool:
    def is_mostly_context(*lengths: Size) -> bool | torch.SymBool:
        context = sum(length for length, segment in zip(lengths, segments) if not segment.is_video)
        return context > config.max_context_ratio * sum(lengths)

    return decide(is_mostly_context, *(segment.length for segment in segments))


def _site(
    candidate: Candidate, segments: tuple[Segment, ...], video: Segment, tokens: int, config: SparseConfig
) -> AttentionSite | Rejection:
    q_clusters, k_clusters = config.clusters_for(tokens)
    may_hide_video = _may_hide_video(candidate, segments)
    if may_hide_video:
        # hidden keys are sorted as one cluster more
        k_clusters = min(k_clusters, MAX_CLUSTERS - 1)
    # another graph where the counts would be others
    shortest, longest = config.lengths_like(tokens)
    decide(lambda n: n >= shortest, video.length)
    decide(lambda n: longest is None or n <= longest, video.length)
    if decide(lambda n: n < max(q_clusters, k_clusters), video.length):
        reason = f"{max(q_clusters, k_clusters)} clusters for {tokens} video tokens"
        return Rejection(candidate.node.name, candidate.path, reason, 'use q_clusters="auto" and k_clusters="auto"')
    query, key = tensor_of(candidate.query), tensor_of(candidate.key)
    assert isinstance(query, torch.Tensor) and isinstance(key, torch.Tensor)
    return AttentionSite(
        index=candidate.index,
        node=candidate.node.name,
        path=candidate.path,
        batch=int(query.shape[0]),  # specialises a symbolic batch on purpose: state has a row per batch element
        q_heads=int(query.shape[1]),
        k_heads=int(key.shape[1]),
        head_dim=int(query.shape[3]),
        tokens=video.length,
        token_hint=tokens,
        dtype=query.dtype if (output := tensor_of(candidate.node)) is None else output.dtype,
        device=query.device,
        segments=segments,
        scale=candidate.scale,
        q_clusters=q_clusters,
        k_clusters=k_clusters,
        has_mask=candidate.key_mask is not None,
        may_hide_video=may_hide_video,
        has_context_queries=same_size(candidate.sequence, candidate.keys),
        is_for_one_length=(shortest, longest) != (0, None) and not is_guarded(video.length),
    )


def _may_hide_video(candidate: Candidate, segments: tuple[Segment, ...]) -> bool:
    if candidate.key_mask is None:
        return False
    first: Size = 0
    for segment in segments:
        if segment.is_video:
            return not is_true(candidate.key_mask, candidate.node, (first, segment.length))
        first = first + segment.length
    return True
