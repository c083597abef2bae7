"""Give every attention operands of four axes (batch, heads, tokens, head dim), in place.

    scaled_dot_product_attention(q, k, v)                      q: (batch·heads, tokens, dim)
    →  scaled_dot_product_attention(q[None], k[None], v[None])[0]

    scaled_dot_product_attention(q, k, v)                      q: (batch, frames, heads, tokens, dim)
    →  scaled_dot_product_attention(q.flatten(0, 1), ...).unflatten(0, (batch, frames))

Attention does not mix its leading axes, so it does not matter which of them is called heads. A mask of fewer axes gets
four as well. What cannot be folded stays as it is, and ``match`` says so.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch.fx import Graph, GraphModule, Node

from svg2_compile.passes.nodes import SdpaArguments, emit, is_sdpa, sdpa_arguments, shape_of, tensor_of, value_mode

aten = torch.ops.aten


def fold_axes(gm: GraphModule) -> int:
    """Fold the attentions of ``gm`` that do not have four axes; return how many.

    Promises:
        Twice is once; results keep their shapes; nothing else in the graph is touched.
    """
    folded = [node for node in gm.graph.nodes if is_sdpa(node) and _can_be_folded(node)]
    for node in folded:
        with gm.graph.inserting_before(node), value_mode(tensor_of(node)):
            result = _fold(gm.graph, node)
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
    if folded:
        gm.recompile()
    return len(folded)


def _can_be_folded(node: Node) -> bool:
    call = sdpa_arguments(node)
    shapes = [shape_of(each) for each in (call.query, call.key, call.value)]
    query, output, mask = shapes[0], shape_of(node), shape_of(call.attn_mask)
    if query is None or output is None or len(query) == 1 or len(output) != len(query):
        return False
    if len(query) == 4:
        return mask is not None and len(mask) < 4
    if any(each is None or len(each) != len(query) for each in shapes):
        return False
    leading = [each[:-3] for each in shapes if each is not None]
    return all(each == leading[0] and all(isinstance(size, int) for size in each) for each in leading)


def _fold(graph: Graph, node: Node) -> Node:
    call = sdpa_arguments(node)
    shape = shape_of(node)
    assert shape is not None
    given = {field.name: getattr(call, field.name) for field in fields(SdpaArguments)[3:]}
    options = {
        field.name: given[field.name] for field in fields(SdpaArguments)[3:] if given[field.name] != field.default
    }
    operands = (_with_four_axes(graph, each, node) for each in (call.query, call.key, call.value))
    if "attn_mask" in options:
        options["attn_mask"] = _mask_with_four_axes(graph, options["attn_mask"], shape[:-3], node)
    result = emit(graph, node.target, *operands, like=node, **options)  # type: ignore[arg-type]
    for _ in range(4 - len(shape)):
        result = emit(graph, aten.squeeze.dim, result, 0, like=node)
    if len(shape) > 4:
        result = emit(graph, aten.unflatten.int, result, 0, list(shape[:-3]), like=node)
    return result


def _with_four_axes(graph: Graph, x: Node, like: Node) -> Node:
    rank = len(shape_of(x) or ())
    for _ in range(4 - rank):
        x = emit(graph, aten.unsqueeze.default, x, 0, like=like)
    return emit(graph, aten.flatten.using_ints, x, 0, rank - 4, like=like) if rank > 4 else x


def _mask_with_four_axes(graph: Graph, mask: Node, leading: tuple[int | torch.SymInt, ...], like: Node) -> Node:
    """Fold the leading axes that ``mask`` has; one that is the same along all of them needs no copy."""
    shape = shape_of(mask) or ()
    if len(leading) > 1 and any(size != 1 for size in shape[:-3]):
        for _ in range(len(leading) + 3 - len(shape)):
            mask = emit(graph, aten.unsqueeze.default, mask, 0, like=like)
        mask = emit(graph, aten.expand.default, mask, [*leading, -1, -1, -1], like=like)
    return _with_four_axes(graph, mask, like)
