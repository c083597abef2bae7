"""Read which of our ops a graph calls, and with what."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from svg2_compile.passes.dynamo_graphs import OpOverload, name_of_op, schema_of
from svg2_compile.passes.nodes import argument, value_of


def op_calls(graph: Graph) -> list[tuple[str, dict[str, Any]]]:
    """Return every call of an ``svg2`` op: its name, and its arguments by name, fake tensors in place of nodes."""
    found = []
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and node.target.namespace == "svg2":
            given = {
                each.name: argument(node, place, each.name, default=each.default_value)
                for place, each in enumerate(schema_of(node.target).arguments)
            }
            values = {name: value_of(each) if isinstance(each, Node) else each for name, each in given.items()}
            found.append((name_of_op(node.target).partition("::")[2], values))
    return found
