"""Replace the attention of each planned site by the nodes of its stages.

    o = scaled_dot_product_attention(q, k, v)

becomes, for a sequence of video rows only and the defaults,

    q_order, q_sizes, k_sizes, k', v' = cluster_tokens_(q, k, v, q_centroids, k_centroids, q_calls, k_calls)
    runs, counts = select_blocks(q_centroids, k_centroids, q_sizes, k_sizes, statistics)
    o, _ = block_sparse_attention(q, k', v', q_sizes, runs, counts, q_order)

What stands between the cut rows and the joined ones is the stages' (``passes/stages``). With context rows, q, k and v
are cut first; the context keys go to the stages, which always keep them, the context queries attend to everything
(``context_attention``), and the outputs are joined in the original order; where context rows are keys only, q stays
whole and nothing is joined. A mask known to show every video key does not reach the stages. One whose values must tell
whether it only hides keys is read once (``key_mask``); where it does more, ``redo_densely_`` comes after the stages.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from svg2_compile.kernels import ops as _registers_the_ops  # noqa: F401
from svg2_compile.passes.attach_state import StateNodes
from svg2_compile.passes.errors import InternalError
from svg2_compile.passes.nodes import dtype_of, is_sdpa, is_written, same_size, sdpa_arguments, sizes_of
from svg2_compile.passes.plan import SitePlan
from svg2_compile.passes.read_mask import before_new_axes, key_mask_of
from svg2_compile.passes.stages.flow import Dense, Flow, SiteWriter

aten = torch.ops.aten

MasksRead = dict[tuple[Node, str], tuple[Node, Node]]
"""By the mask and its sizes: which keys it shows, and whether that is all that it does."""


def rewrite(gm: GraphModule, sites: Sequence[SitePlan], state: StateNodes) -> None:
    """Rewrite ``gm`` in place. The caller runs it inside the fake mode of the graph's example values."""
    attentions = [node for node in gm.graph.nodes if is_sdpa(node)]
    by_name = {node.name: node for node in gm.graph.nodes}
    masks: MasksRead = {}
    for site in sites:
        node = attentions[site.index]
        of_site = {name: tensor for (index, name), tensor in state.items() if index == site.index}
        with gm.graph.inserting_before(node):
            replacement = _sparse_attention(SiteWriter(gm, site, node, of_site), by_name, masks)
        node.replace_all_uses_with(replacement)
        gm.graph.erase_node(node)
        by_name[site.node] = replacement
    _erase_unread_results(gm)
    gm.recompile()


def _sparse_attention(writer: SiteWriter, by_name: dict[str, Node], masks: MasksRead) -> Node:
    """Write the whole replacement of one attention and return its result; ``masks`` has those that were read before."""
    site, call = writer.site, sdpa_arguments(writer.node)
    query, key, value = (writer.in_dtype(each) for each in (call.query, call.key, call.value))
    mask: Node | None = key_mask_of(call.attn_mask, call.key) if site.has_mask else None
    dense: Dense | None = None
    if site.is_mask_checked and call.attn_mask is not None:
        mask, is_key_mask = _checked(writer, call.attn_mask if mask is None else mask, masks)
        given = call.attn_mask if _is_boolean(call.attn_mask) else writer.in_dtype(call.attn_mask)
        dense = Dense(is_key_mask, key, value, given)
    if len(site.segments) == 1:
        return _run_stages(writer, Flow(query, key, value, key_mask=mask, dense=dense))
    rows = _row_ranges(writer, by_name, key)
    asking = _asking_ranges(site, rows)
    is_video = [segment.is_video for segment in site.segments]
    video, context = ([each for each, here in zip(rows, is_video) if here is wanted] for wanted in (True, False))
    asking_video = None if len(asking) == 1 else [each for place, each in asking.items() if is_video[place]]
    video_mask = context_mask = None
    if mask is not None:
        mask = writer.emit(aten.expand.default, mask, [site.batch, 1, 1, -1])
        context_mask = writer.take(mask, 3, context)
        video_mask = writer.take(mask, 3, video) if site.may_hide_video else None
    output = _run_stages(
        writer,
        Flow(
            q=query if asking_video is None else writer.take(query, 2, asking_video),
            k=writer.take(key, 2, video),
            v=writer.take(value, 2, video),
            key_mask=video_mask,
            context_k=writer.take(key, 2, context),
            context_v=writer.take(value, 2, context),
            context_mask=context_mask,
            dense=None if dense is None else replace(dense, mask=_rows_of_mask(writer, dense.mask, asking_video)),
        ),
    )
    if asking_video is None:
        return output
    pieces: list[Node] = []
    done: Any = 0
    for place, (start, end) in asking.items():
        if not is_video[place]:
            pieces.append(_context_rows(writer, (start, end), query, key, value, mask, dense))
        elif len(asking_video) == 1:
            pieces.append(output)
        else:
            pieces.append(writer.cut(output, 2, done, done := _sum(writer, done, _difference(writer, end, start))))
    # joined along the token axis of (batch, tokens, heads, head dim), the layout that the caller flattens for free
    token_major = [writer.emit(aten.transpose.int, piece, 1, 2) for piece in pieces]
    return writer.emit(aten.transpose.int, writer.join(token_major, 1), 1, 2)


def _asking_ranges(site: SitePlan, rows: list[tuple[Any, Any]]) -> dict[int, tuple[Any, Any]]:
    """Return the (start, end) of each segment that asks on the axis of the queries, by its place among the segments."""
    if site.has_context_queries:
        return dict(enumerate(rows))
    found: dict[int, tuple[Any, Any]] = {}
    start: Any = 0
    for place, segment in enumerate(site.segments):
        if segment.asks:
            # where several ask, exact rows are among them, and all lengths are plain
            end = start + segment.length
            found[place] = start, end
            start = end
    return found


def _checked(writer: SiteWriter, mask: Node, masks: MasksRead) -> tuple[Node, Node]:
    """Return what the values of ``mask`` tell, read once where nothing writes into it between two attentions."""
    read = before_new_axes(mask), str(tuple(sizes_of(mask)))
    if read not in masks or is_written(mask, masks[read][0], writer.node):
        keys, is_key_mask = writer.parts(torch.ops.svg2.key_mask.default, mask, count=2)
        masks[read] = keys, is_key_mask
    return masks[read]


def _context_rows(
    writer: SiteWriter,
    rows: tuple[Any, Any],
    query: Node,
    key: Node,
    value: Node,
    mask: Node | None,
    dense: Dense | None,
) -> Node:
    """Attend densely from context rows; where the mask is checked, under the one that the model gives."""
    asking, scale = writer.cut(query, 2, *rows), writer.site.scale
    if dense is None:
        return writer.emit(torch.ops.svg2.context_attention.default, asking, key, value, mask, scale)
    attend, given = torch.ops.svg2.dense_attention.default, _rows_of_mask(writer, dense.mask, [rows])
    is_grouped = writer.site.q_heads != writer.site.k_heads
    return writer.emit(attend, asking, key, value, given, 0.0, False, scale, is_grouped)


def _is_boolean(mask: Node) -> bool:
    return dtype_of(mask) is torch.bool


def _rows_of_mask(writer: SiteWriter, mask: Node, rows: list[tuple[Any, Any]] | None) -> Node:
    """Return the rows of a mask of four axes, None being all; one row for all stands for each."""
    return mask if rows is None or same_size(sizes_of(mask)[-2], 1) else writer.take(mask, 2, rows)


def _run_stages(writer: SiteWriter, flow: Flow) -> Node:
    for stage in writer.site.stages:
        flow = stage.emit(writer, flow)
    if flow.out is None:
        names = ", ".join(type(stage).__name__ for stage in writer.site.stages)
        raise InternalError(f"rewrite: the stages of {writer.site.path} ({names}) give no output; end with Attend()")
    return flow.out


def _row_ranges(writer: SiteWriter, by_name: dict[str, Node], key: Node) -> list[tuple[Any, Any]]:
    """Return (start, end) of each segment; symbolic lengths are read off operands of the joining cat, or the keys."""
    ranges: list[tuple[Any, Any]] = []
    start: Any = 0
    for segment in writer.site.segments:
        length: Any = segment.length
        if not isinstance(length, int):
            source = (by_name[segment.source], segment.source_axis) if segment.source else (key, 2)
            length = writer.emit(aten.sym_size.int, *source)
            length = writer.emit(operator.sub, length, segment.cut) if segment.cut else length
        end = _sum(writer, start, length)
        ranges.append((start, end))
        start = end
    return ranges


def _sum(writer: SiteWriter, one: Any, other: Any) -> Any:
    """Return the sum of two numbers, or a node that computes it."""
    are_known = isinstance(one, int) and isinstance(other, int)
    return one + other if are_known else writer.emit(operator.add, one, other)


def _difference(writer: SiteWriter, one: Any, other: Any) -> Any:
    """Return the difference of two numbers, or a node that computes it."""
    are_known = isinstance(one, int) and isinstance(other, int)
    return one - other if are_known else writer.emit(operator.sub, one, other)


def _erase_unread_results(gm: GraphModule) -> None:
    """Erase results of our ops that nobody reads; the ops themselves may write, and stay."""
    for node in reversed(gm.graph.nodes):
        if node.target is operator.getitem and not node.users and _is_ours(node.args[0]):
            gm.graph.erase_node(node)


def _is_ours(node: object) -> bool:
    return isinstance(node, Node) and str(node.target).startswith("svg2.")
