"""Copy a Dynamo graph with everything that AOTAutograd reads from it.

Dynamo re-reads the placeholders of its own graph after the backend returns, so inputs may be added to a copy only.
"""

from __future__ import annotations

import copy

from torch.fx import Graph, GraphModule, Node

CARRIED = ("_param_name_to_source", "meta", "_source_to_user_stacks", "compile_subgraph_reason", "shape_env")


def clone(gm: GraphModule) -> GraphModule:
    """Return a copy of ``gm`` that shares its parameters and none of its nodes."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    # an exported module's nested inputs and outputs are known to this only
    graph.set_codegen(gm.graph._codegen)
    result = GraphModule(gm, graph)
    for old, new in copies.items():
        if old.op == "placeholder" and hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        new.meta = copy.copy(new.meta)
    for name in CARRIED:
        if name in gm.__dict__:
            result.__dict__[name] = gm.__dict__[name]
    return result
