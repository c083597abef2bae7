"""Replace the attention of each planned site by the nodes of its stages.

    o = scaled_dot_product_attention(q, k, v)

becomes, for a sequence of video rows only and the defaults,

    q_order, q_sizes, k_sizes, k', v' = cluster_tokens_(q, k, v, q_centroids, k_centroids, q_calls, k_calls)
    runs, counts = select_blocks(q_centroids, k_centroids, q_sizes, k_sizes, statistics)
    o, _ = block_sparse_attention(q, k', v', q_sizes, runs, counts, q_order)

What stands between the cut rows and the joined ones is the stages' (``passes/stages``). With context rows, q, k and v
are cut first; the context keys go to the stages, which always keep them, the context queries attend to everything
(``context_attention``), and the outputs are joined in the original order; where context rows are keys only, q stays
whole and nothing is joined. A mask known to show every video key does not reach the stages.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from svg2_compile.kernels import ops as _registers_the_ops  # noqa: F401
from svg2_compile.passes.attach_state import StateNodes
from svg2_compile.passes.errors import InternalError
from svg2_compile.passes.nodes import is_sdpa, sdpa_arguments
from svg2_compile.passes.plan import SitePlan
from svg2_compile.passes.read_mask import key_mask_of
from svg2_compile.passes.stages.flow import Flow, SiteWriter

aten = torch.ops.aten


def rewrite(gm: GraphModule, sites: Sequence[SitePlan], state: StateNodes) -> None:
    """Rewrite ``gm`` in place. The caller runs it inside the fake mode of the graph's example values."""
    attentions = [node for node in gm.graph.nodes if is_sdpa(node)]
    by_name = {node.name: node for node in gm.graph.nodes}
    for site in sites:
        node = attentions[site.index]
        of_site = {name: tensor for (index, name), tensor in state.items() if index == site.index}
        with gm.graph.inserting_before(node):
            replacement = _sparse_attention(SiteWriter(gm, site, node, of_site), by_name)
        node.replace_all_uses_with(replacement)
        gm.graph.erase_node(node)
        by_name[site.node] = replacement
    _erase_unread_results(gm)
    gm.recompile()


def _sparse_attention(writer: SiteWriter, by_name: dict[str, Node]) -> Node:
    """Write the whole replacement of one attention and return its result."""
    site, call = writer.site, sdpa_arguments(writer.node)
    mask: Node | None = key_mask_of(call.attn_mask) if site.has_mask else None
    query, key, value = (writer.in_dtype(each) for each in (call.query, call.key, call.value))
    if len(site.segments) == 1:
        return _run_stages(writer, Flow(query, key, value, key_mask=mask))
    rows = _row_ranges(writer, by_name)
    is_video = [segment.is_video for segment in site.segments]
    video = rows[is_video.index(True)]
    context = [each for each, here in zip(rows, is_video) if not here]
    video_mask = context_mask = None
    if mask is not None:
        mask = writer.emit(aten.expand.default, mask, [site.batch, 1, 1, -1])
        context_mask = writer.join([writer.cut(mask, 3, *each) for each in context], 3)
        video_mask = writer.cut(mask, 3, *video) if site.may_hide_video else None
    output = _run_stages(
        writer,
        Flow(
            q=writer.cut(query, 2, *video) if site.has_context_queries else query,
            k=writer.cut(key, 2, *video),
            v=writer.cut(value, 2, *video),
            key_mask=video_mask,
            context_k=writer.join([writer.cut(key, 2, *each) for each in context], 2),
            context_v=writer.join([writer.cut(value, 2, *each) for each in context], 2),
            context_mask=context_mask,
        ),
    )
    if not site.has_context_queries:
        return output
    attend = torch.ops.svg2.context_attention.default
    pieces = [
        output if here else writer.emit(attend, writer.cut(query, 2, *each), key, value, mask, site.scale)
        for each, here in zip(rows, is_video)
    ]
    # joined along the token axis of (batch, tokens, heads, head dim), the layout that the caller flattens for free
    token_major = [writer.emit(aten.transpose.int, piece, 1, 2) for piece in pieces]
    return writer.emit(aten.transpose.int, writer.join(token_major, 1), 1, 2)


def _run_stages(writer: SiteWriter, flow: Flow) -> Node:
    for stage in writer.site.stages:
        flow = stage.emit(writer, flow)
    if flow.out is None:
        names = ", ".join(type(stage).__name__ for stage in writer.site.stages)
        raise InternalError(f"rewrite: the stages of {writer.site.path} ({names}) give no output; end with Attend()")
    return flow.out


def _row_ranges(writer: SiteWriter, by_name: dict[str, Node]) -> list[tuple[Any, Any]]:
    """Return (start, end) of each segment; symbolic lengths are read off the operand of the joining cat."""
    ranges: list[tuple[Any, Any]] = []
    start: Any = 0
    for segment in writer.site.segments:
        length: Any = segment.length
        if not isinstance(length, int):
            length = writer.emit(aten.sym_size.int, by_name[segment.source], segment.source_axis)
        both_known = isinstance(start, int) and isinstance(length, int)
        end = start + length if both_known else writer.emit(operator.add, start, length)
        ranges.append((start, end))
        start = end
    return ranges


def _erase_unread_results(gm: GraphModule) -> None:
    """Erase results of our ops that nobody reads; the ops themselves may write, and stay."""
    for node in reversed(gm.graph.nodes):
        if node.target is operator.getitem and not node.users and _is_ours(node.args[0]):
            gm.graph.erase_node(node)


def _is_ours(node: object) -> bool:
    return isinstance(node, Node) and str(node.target).startswith("svg2.")
