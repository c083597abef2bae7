"""Copy a Dynamo graph with everything that AOTAutograd reads from it.

Dynamo re-reads the placeholders of its own graph after the backend returns, so inputs may be added to a copy only.
"""

from __future__ import annotations

import copy

from torch.fx import Graph, GraphModule, Node

from svg2_compile.passes.dynamo_graphs import carry_over, codegen_of, copy_source


def clone(gm: GraphModule) -> GraphModule:
    """Return a copy of ``gm`` that shares its parameters and none of its nodes."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    # an exported module's nested inputs and outputs are known to this only
    graph.set_codegen(codegen_of(gm.graph))
    result = GraphModule(gm, graph)
    for old, new in copies.items():
        if old.op == "placeholder":
            copy_source(old, new)
        new.meta = copy.copy(new.meta)
    carry_over(gm, result)
    return result
