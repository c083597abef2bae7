"""Tell video rows from context rows, and decide which candidates become sparse.

    value ◄── ... ◄── cat([text, video], dim=1)   →   AttentionSite(segments=(77 context, 8192 video))
    query ◄── ... ◄── video, value ◄── ... ◄── audio   →   Rejection("cross-attention ...")
    query ◄── ... ◄── video, value ◄── ... ◄── cat([text, video], dim=1)   →   the first, context rows being keys only

The rows are told apart by following the sequence axis of ``value`` back to the nearest ``cat`` (``trace_axis``): the
longest operand is the video, the rest is context. The graph is only read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch.fx import Node

from svg2_compile.passes.config import MAX_CLUSTERS, SparseConfig
from svg2_compile.passes.decide_by_size import decide, fix, is_guarded
from svg2_compile.passes.match import Candidate
from svg2_compile.passes.nodes import first_argument, permutation_of, same_size, shape_of, target_name, tensor_of
from svg2_compile.passes.read_cache import UNKNOWN_ROWS, trace_values
from svg2_compile.passes.read_mask import is_true
from svg2_compile.passes.records import AttentionSite, Rejection, Segment, Size, size_hint, told
from svg2_compile.passes.split_exact_rows import split_exact_rows
from svg2_compile.passes.trace_axis import AxisOrigin, Piece, asking_piece, same_lengths, shares_rows, trace_axis

MADE_OF_OTHER_AXES = ("split axis", "conv")
TRUSTED_ORIGINS = ("placeholder", "cat", *MADE_OF_OTHER_AXES)
REARRANGES = ("view", "reshape", "unflatten", "flatten", "contiguous", "squeeze", "unsqueeze")


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

    origin = trace_values(candidate.value, 2, candidate.node)
    queries = trace_axis(candidate.query, 2)
    if origin.pieces[0].kind == UNKNOWN_ROWS:
        reason = "its keys are a cache written in place, and the graph does not tell which rows were written"
        return decline(reason, "write the new rows by slices with numbers, or concatenate them to the cached ones")
    if not same_size(candidate.sequence, candidate.keys):
        segments = _asking_segments(candidate, queries, origin)
        if not segments:
            lengths = f"{told(candidate.sequence)} queries, {told(candidate.keys)} keys"
            return decline(f"cross-attention: {lengths}", by_design=True)
        segments = tuple(replace(segment, asks=segment.is_video) for segment in segments)
        if _is_mostly_context(segments, config):
            lengths = f"{told(candidate.sequence)} queries are among {told(candidate.keys)} keys"
            reason = f"more context than max_context_ratio={config.max_context_ratio}: {lengths}"
            return decline(reason, "raise max_context_ratio to include it")
    elif _different_streams(candidate, queries, origin):
        if _are_made_outside(candidate, origin):
            reason = "its queries and values are computed outside this graph, so what their rows are is unknown"
            return decline(reason, "compile projections and attention together: hooks on each layer come between them")
        sources = f"{queries.pieces[0].node.name} and {origin.pieces[0].node.name}"
        return decline(f"cross-attention: queries and values come from {sources}", by_design=True)
    else:
        segments = _segments(candidate, origin if origin.joined or not queries.joined else queries, config)
    if config.exact_rows:
        split = split_exact_rows(segments, config.exact_rows)
        is_symbolic = any(not isinstance(segment.length, int) for segment in segments)
        if split is None or (is_symbolic and not all(segment.asks for segment in segments)):
            reason = "its length is symbolic, and which rows exact_rows names is known only at run time"
            return decline(reason, "compile with dynamic=False, or mark the length static")
        segments = split
        if not any(segment.is_video for segment in segments):
            return decline("exact_rows names all of its video rows", "name fewer rows to include it", True)
    video = _video_of(segments)
    hint = size_hint(video.length)
    if hint is None:
        return decline("its length is known only at run time", "compile with fullgraph=True and static lengths")
    if decide(lambda n: n < config.min_tokens, video.length):
        return decline(f"short: {hint} video tokens", f"lower min_tokens={config.min_tokens} to include it", True)
    query = shape_of(candidate.query)
    if not fixes_batch and query is not None and not isinstance(query[0], int):
        return decline("its batch size is dynamic, and state has a row per batch element", "export a fixed batch size")
    return _site(candidate, segments, video, hint, config)


def _different_streams(candidate: Candidate, queries: AxisOrigin, values: AxisOrigin) -> bool:
    """True when queries and values are rows of different tensors, although their lengths agree."""
    if queries.joined and values.joined and not same_lengths(queries, values):
        return True
    query, value, first = candidate.query, candidate.value, values.pieces[0]
    if shares_rows(query, 2, value, 2) or shares_rows(value, 2, query, 2):
        return False
    if shares_rows(query, 2, first.node, first.axis):  # what was written into a cache is not on the way from the value
        return False
    return _name_a_stream(queries) and _name_a_stream(values) and not _meet_upstream(queries, values)


def _meet_upstream(queries: AxisOrigin, values: AxisOrigin) -> bool:
    """True where what the axes were made of, by a convolution or by merging axes, comes from one tensor."""
    firsts = [set(_upstream(piece)) for piece in (queries.pieces[0], values.pieces[0])]
    return bool(firsts[0] & firsts[1])


def _upstream(piece: Piece) -> Iterator[Node]:
    node: Node | None = piece.node
    while node is not None and piece.kind.startswith(MADE_OF_OTHER_AXES):
        yield node
        node = next((each for each in node.all_input_nodes if shape_of(each)), None)


def _are_made_outside(candidate: Candidate, values: AxisOrigin) -> bool:
    """True where keys and values are two inputs, and no projection stands between the values and the attention."""
    node: Node | None = candidate.value
    while node is not None and (target_name(node) in REARRANGES or permutation_of(node)):
        node = first_argument(node)
    is_given = node is not None and node.op == "placeholder"
    return is_given and trace_axis(candidate.key, 2).pieces[0].node is not values.pieces[0].node


def _name_a_stream(origin: AxisOrigin) -> bool:
    """True where every piece names a stream; an input with heads already is an operand made before a graph break."""
    return all(
        piece.kind.startswith(TRUSTED_ORIGINS) and (piece.kind != "placeholder" or len(shape_of(piece.node) or ()) != 4)
        for piece in origin.pieces
    )


def _asking_segments(candidate: Candidate, queries: AxisOrigin, values: AxisOrigin) -> tuple[Segment, ...]:
    """Return the segments of the keys, the rows that ask being video; empty where they are no rows of the keys."""
    if not values.joined:
        return _segments_around(queries, values)
    position = asking_piece(candidate.query, 2, values)
    return () if position is None else _pieces_as_segments(values, position)


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


def _video_of(segments: tuple[Segment, ...]) -> Segment:
    """Return the video rows as one run; exact rows may lie between them."""
    video = [segment for segment in segments if segment.is_video]
    length: Size = 0
    for segment in video:
        length = length + segment.length
    return replace(video[0], length=length) if len(video) > 1 else video[0]


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
        is_mask_checked=candidate.is_mask_checked,
        may_hide_video=may_hide_video,
        is_for_one_length=(shortest, longest) != (0, None) and not is_guarded(video.length),
    )


def _may_hide_video(candidate: Candidate, segments: tuple[Segment, ...]) -> bool:
    if candidate.key_mask is None or candidate.is_mask_checked:
        return candidate.is_mask_checked
    first: Size = 0
    for segment in segments:
        if segment.is_video and not is_true(candidate.key_mask, candidate.node, (first, segment.length)):
            return True
        first = first + segment.length
    return False
