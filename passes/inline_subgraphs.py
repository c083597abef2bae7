"""Bring what Dynamo keeps in graphs of their own into the graph, in place: only there attention is seen.

    tag_activation_checkpoint(wrap_body_0, x, w)[0]          →   the nodes of wrap_body_0
    invoke_subgraph(subgraph_0, "subgraph_0", x, w)[0]       →   the nodes of subgraph_0, once for every call
    cond(p, true_branch, false_branch, (q, k, v))            →   as it is; a Rejection for each attention in a branch

A checkpoint only says what to keep for gradients: it stays where any are computed. A region that is compiled once and
called for every block is copied for each.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from svg2_compile.passes.dynamo_graphs import HigherOrderOperator, source_name
from svg2_compile.passes.nodes import target_name, tensor_of

INLINED = {"wrap": 1, "tag_activation_checkpoint": 1, "invoke_subgraph": 2}
"""Where the operands begin, after the subgraph and its name."""

Renaming = tuple[list[str], list[str]] | None
"""The path of a module in the first call of a subgraph, and in this one."""


def inline_subgraphs(gm: GraphModule) -> int:
    """Inline what can be inlined; return how many calls that were.

    Promises:
        Twice is once; a graph that calls no subgraphs is not touched; mutations keep their order.
    """
    inlined = 0
    of_first_calls: dict[object, list[Any]] = {}
    waiting = list(gm.graph.nodes)
    while waiting:
        node = waiting.pop(0)
        body = _inlined_body(gm, node)
        if body is None:
            continue
        operands = list(node.args[INLINED[target_name(node)] :])
        renamed = _renaming(of_first_calls.setdefault(body, operands), operands)
        waiting = [*_inline(gm, node, body, operands, renamed), *waiting]
        inlined += 1
    if inlined:
        for node in gm.graph.find_nodes(op="get_attr"):
            if not node.users:
                gm.graph.erase_node(node)
        gm.recompile()
    return inlined


def subgraphs_left(gm: GraphModule) -> Iterator[tuple[Node, GraphModule]]:
    """Yield each call that stays, with each of its subgraphs, those within these included."""
    for node in gm.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            for source in node.all_input_nodes:
                body = _attribute(gm, source)
                if isinstance(body, GraphModule):
                    yield node, body
                    for _, inner in subgraphs_left(body):
                        yield node, inner


def why_not_inlined(call: Node) -> str:
    """Return what helps against a subgraph that stays."""
    if target_name(call) in INLINED:
        return "run under torch.no_grad() or torch.inference_mode(): gradients are computed through it"
    return "decide in Python, or outside of the compiled model, which attention runs"


def _inlined_body(gm: GraphModule, node: Node) -> GraphModule | None:
    """Return the subgraph that ``node`` calls, if that may be inlined."""
    if not isinstance(node.target, HigherOrderOperator) or target_name(node) not in INLINED:
        return None
    name = target_name(node)
    if name == "tag_activation_checkpoint" and _needs_gradients(node):
        return None
    body = _attribute(gm, node.args[0])
    if not isinstance(body, GraphModule):
        return None
    results = body.graph.find_nodes(op="output")[0].args[0]
    takes = len(body.graph.find_nodes(op="placeholder"))
    is_taken_apart = all(_place(user) is not None for user in node.users)
    fits = isinstance(results, Node) or (isinstance(results, list | tuple) and is_taken_apart)
    return body if fits and takes == len(node.args) - INLINED[name] else None


def _needs_gradients(node: Node) -> bool:
    tensors = [tensor_of(each) for each in node.all_input_nodes]
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)


def _place(user: Node) -> int | None:
    """Return which result of a call ``user`` takes; None where it takes the call as a whole."""
    is_item = user.op == "call_function" and getattr(user.target, "__name__", "") == "getitem"
    return user.args[1] if is_item and isinstance(user.args[1], int) else None


def _attribute(gm: GraphModule, source: Any) -> object:
    if not isinstance(source, Node) or source.op != "get_attr":
        return None
    value: object = gm
    for part in str(source.target).split("."):
        value = getattr(value, part, None)
    return value


def _inline(gm: GraphModule, call: Node, body: GraphModule, operands: list[Any], renamed: Renaming) -> list[Node]:
    """Copy the nodes of ``body`` in front of ``call`` and return them; what took the results takes theirs."""
    graph = gm.graph
    copies: dict[Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands))
    added: list[Node] = []
    with graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            copies[node] = _copied_attribute(gm, node, body) if node.op == "get_attr" else _copied(graph, node, copies)
            copies[node].meta = _renamed_meta(node.meta, renamed)
            added.append(copies[node])
    results = map_arg(body.graph.find_nodes(op="output")[0].args[0], copies.__getitem__)
    if isinstance(results, Node):
        call.replace_all_uses_with(results)
    else:
        for user in list(call.users):
            user.replace_all_uses_with(results[_place(user)])
            graph.erase_node(user)
    graph.erase_node(call)
    return added


def _copied(graph: Graph, node: Node, copies: dict[Node, Any]) -> Node:
    args, kwargs = map_arg((node.args, dict(node.kwargs)), copies.__getitem__)
    return graph.create_node(node.op, node.target, args, kwargs, node.name)


def _copied_attribute(gm: GraphModule, node: Node, body: GraphModule) -> Node:
    """Read a constant or subgraph of ``body``, which ``gm`` gets under a name that nothing else has."""
    name = base = str(node.target).replace(".", "_")
    value, number = _attribute(body, node), 0
    while hasattr(gm, name) and getattr(gm, name) is not value:
        number += 1
        name = f"{base}_{number}"
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        gm.register_buffer(name, value)
    else:
        setattr(gm, name, value)
    return gm.graph.get_attr(name)


def _renaming(first: Any, now: Any) -> Renaming:
    """Return how a module of the first call is called in this one, told by the first parameter that differs."""
    for one, other in zip(first, now):
        if isinstance(one, Node) and isinstance(other, Node) and one is not other:
            old, new = (_parts(source_name(each)) for each in (one, other))
            for place, parts in enumerate(zip(old, new)):
                if parts[0] != parts[1]:
                    return old[: place + 1], new[: place + 1]
    return None


def _parts(path: str) -> list[str]:
    return [part for part in re.findall(r"\w+", path) if part != "_modules"]


def _renamed_meta(meta: dict[str, Any], renamed: Renaming) -> dict[str, Any]:
    found = copy.copy(meta)
    if renamed is not None and "nn_module_stack" in meta:
        stack = {key: (_renamed(str(path), *renamed), kind) for key, (path, kind) in meta["nn_module_stack"].items()}
        found["nn_module_stack"] = stack
    return found


def _renamed(path: str, old: list[str], new: list[str]) -> str:
    parts = _parts(path)
    if parts[: len(old)] != old:
        return path
    return ".".join([f"L['{new[1]}']", *new[2:], *parts[len(old) :]])
