"""Write one scaled_dot_product_attention in the place of an attention that was written by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from svg2_compile.passes.dynamo_graphs import SDPA
from svg2_compile.passes.hand_written import HandWritten, Operand
from svg2_compile.passes.nodes import (
    dtype_of,
    emit,
    is_inplace,
    permutation_of,
    sizes_of,
    target_name,
    tensor_of,
    value_mode,
)

aten = torch.ops.aten

# These give the same result, layout included, however their input lies in memory.
LAYOUT_BLIND = ("reshape", "flatten", "contiguous", "linear")


def write_attention(graph: Graph, plan: HandWritten) -> str:
    """Put an SDPA node in place of ``plan`` and return its name."""
    old = plan.output
    rank = len(plan.query.axes)
    with value_mode(tensor_of(old)), graph.inserting_before(old):
        query, key, value = (_write_operand(graph, plan, each) for each in (plan.query, plan.key, plan.value))
        for number in plan.scale.multipliers:
            query = emit(graph, aten.mul.Tensor, query, number, like=old)
        for number in plan.scale.divisors:
            query = emit(graph, aten.div.Tensor, query, number, like=old)
        for factor in plan.factors:
            scaled = emit(
                graph,
                aten.div.Tensor if factor.divides else aten.mul.Tensor,
                query,
                _write_factor(graph, plan, factor.node),
                like=old,
            )
            query = _cast(graph, scaled, plan.dtype, old)
        mask = _write_mask(graph, plan)
        sdpa = emit(
            graph,
            SDPA,
            query,
            key,
            value,
            like=old,
            **({} if mask is None else {"attn_mask": mask}),
            scale=plan.scale.number,
        )
        new = sdpa
        for _ in range(4 - rank):
            new = emit(graph, aten.squeeze.dim, new, 0, like=old)
        new = _cast(graph, _permuted(graph, new, plan.output_axes, old), dtype_of(old), old)
        if not _forgets_layout(old):
            new = emit(graph, aten.contiguous.default, new, like=old)
    old.replace_all_uses_with(new)
    _erase(graph, (*plan.chain, *plan.aside, old))
    return sdpa.name


def _write_operand(graph: Graph, plan: HandWritten, operand: Operand) -> Node:
    node = _cast(graph, _permuted(graph, operand.node, operand.axes, plan.output), plan.dtype, plan.output)
    if operand.sizes is not None:
        node = emit(graph, aten.expand.default, node, operand.sizes, like=plan.output)
    return _lifted(graph, node, 4, plan.output)


def _write_factor(graph: Graph, plan: HandWritten, factor: Node) -> Node:
    """Write what scales the scores as what scales the query; its axis of keys has one element."""
    return _permuted(graph, _lifted(graph, factor, len(plan.mask_axes), plan.output), plan.mask_axes, plan.output)


def _write_mask(graph: Graph, plan: HandWritten) -> Node | None:
    """Write one mask that does what all masks of ``plan`` do: booleans where possible, else numbers to add."""
    like = plan.output
    lowest = max(torch.finfo(plan.dtype).min, torch.finfo(torch.float32).min)
    keep: Node | None = None
    bias: Node | None = None
    for mask in plan.masks:
        node = mask.node
        is_plain = plan.mask_axes == tuple(range(len(plan.mask_axes)))
        node = _lifted(graph, node, 2 if is_plain else len(plan.mask_axes), like)
        if not is_plain:
            node = _permuted(graph, node, plan.mask_axes, like)
        if mask.kind != "bias" and mask.fill == -math.inf:
            node = emit(graph, aten.logical_not.default, node, like=like) if mask.kind == "drop" else node
            keep = node if keep is None else emit(graph, aten.logical_and.default, keep, node, like=like)
            continue
        if mask.kind != "bias":
            fill = max(mask.fill, lowest)
            values = (fill, 0.0) if mask.kind == "drop" else (0.0, fill)
            node = emit(graph, aten.where.Scalar, node, *values, like=like)
        node = _cast(graph, node, plan.dtype, like)
        if mask.weight.number != 1:
            node = emit(graph, aten.mul.Tensor, node, mask.weight.number, like=like)
        for number in mask.weight.multipliers:
            node = emit(graph, aten.mul.Tensor, node, number, like=like)
        for number in mask.weight.divisors:
            node = emit(graph, aten.div.Tensor, node, number, like=like)
        bias = node if bias is None else emit(graph, aten.add.Tensor, bias, node, like=like)
    if keep is not None and bias is not None:
        return emit(graph, aten.where.ScalarOther, keep, bias, -math.inf, like=like)
    return bias if keep is None else keep


def _permuted(graph: Graph, node: Node, axes: tuple[int, ...], like: Node) -> Node:
    """Permute ``node``; where it undoes a permutation that is already there, return that one's source."""
    source, order = node, axes
    while order != tuple(range(len(order))):
        permutation = permutation_of(source)
        if permutation is None or is_inplace(source):
            return emit(graph, aten.permute.default, node, axes, like=like)
        source, inner = permutation
        order = tuple(inner[axis] for axis in order)
    return source


def _cast(graph: Graph, node: Node, dtype: torch.dtype, like: Node) -> Node:
    return node if dtype_of(node) is dtype else emit(graph, aten.to.dtype, node, dtype, like=like)


def _lifted(graph: Graph, node: Node, rank: int, like: Node) -> Node:
    for _ in range(rank - len(sizes_of(node))):
        node = emit(graph, aten.unsqueeze.default, node, 0, like=like)
    return node


def _forgets_layout(node: Node) -> bool:
    """Say whether no reader can tell how ``node`` lies in memory."""
    return all(
        target_name(user) in LAYOUT_BLIND or (permutation_of(user) is not None and _forgets_layout(user))
        for user in node.users
    )


def _erase(graph: Graph, nodes: Sequence[Node]) -> None:
    """Erase ``nodes``, then what only they needed; nothing that writes, and nothing that somebody still reads."""
    unneeded = {source: None for node in nodes for source in node.all_input_nodes if source not in nodes}
    for node in sorted(nodes, reverse=True):
        graph.erase_node(node)
    while unneeded:
        node, _ = unneeded.popitem()
        is_call = node.op in ("call_function", "call_method")
        if is_call and not node.users and not is_inplace(node) and not node.is_impure():
            unneeded |= dict.fromkeys(node.all_input_nodes)
            graph.erase_node(node)
