"""Make the weights constants of the graph, so that a compiler may lay them out once.

graph(x, weight) = addmm(x, weight)    →    graph(x) = addmm(x, self.weight_1)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor
from torch.fx import GraphModule

from svg2_compile.passes.clone import clone


def freeze_weights(gm: GraphModule, weights: Mapping[int, Tensor]) -> GraphModule:
    """Return a copy of ``gm`` in which the inputs at the given positions are buffers that share the weights' memory."""
    frozen = clone(gm)
    placeholders = frozen.graph.find_nodes(op="placeholder")
    for position, tensor in weights.items():
        node = placeholders[position]
        name = f"weight_{position}"
        frozen.register_buffer(name, tensor.detach())
        with frozen.graph.inserting_before(node):
            constant = frozen.graph.get_attr(name)
        constant.meta = copy.copy(node.meta)
        node.replace_all_uses_with(constant)
        frozen.graph.erase_node(node)
    frozen.recompile()
    return frozen
