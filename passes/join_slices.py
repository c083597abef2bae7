"""Turn writes to slices into concatenations, which every compiler knows.

    slice_scatter(slice_scatter(empty, even, -1, 0, N, 2), odd, -1, 1, N, 2)    →    stack([even, odd], -1).flatten(-2)
    slice_scatter(x, part, 0, 2, 5)                                             →    cat([x[:2], part, x[5:]])

The first is how rotations are written in place. torch_tensorrt makes a scatter of it, whose int64 index is as large as
the data. Where the writes cover everything, what was there before is not read. Any other slice stays as it is.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from svg2_compile.passes.nodes import argument, emit, shape_of, tensor_of, value_mode

aten = torch.ops.aten


def join_slices(gm: GraphModule) -> int:
    """Replace what can be replaced in ``gm``, a functional ATen graph of fixed sizes; return how many."""
    joined = 0
    # what is written last knows what was written before
    for node in reversed(gm.graph.find_nodes(op="call_function", target=aten.slice_scatter.default)):
        if not node.users:
            continue
        with gm.graph.inserting_before(node), value_mode(tensor_of(node)):
            result = _joined(node)
        if result is not None:
            node.replace_all_uses_with(result)
            gm.graph.eliminate_dead_code()
            joined += 1
    gm.recompile()
    return joined


def _joined(node: Node) -> Node | None:
    graph, x, tensor = node.graph, node.args[0], tensor_of(node)
    source, dim, first, last, step = _slice_of(node)
    assert isinstance(x, Node) and tensor is not None
    size = tensor.shape[dim]
    if not isinstance(size, int):
        return None

    def cast(part: Node) -> Node:
        """Return what is written in the dtype of where it is written."""
        if getattr(tensor_of(part), "dtype", None) == tensor.dtype:
            return part
        return emit(graph, aten._to_copy.default, part, dtype=tensor.dtype, like=node)

    if step == 1:
        before = emit(graph, aten.slice.Tensor, x, dim, 0, first, like=node)
        after = emit(graph, aten.slice.Tensor, x, dim, last, size, like=node)
        pieces = ((before, first), (cast(source), last - first), (after, size - last))
        parts = [part for part, length in pieces if length]
        return emit(graph, aten.cat.default, parts, dim, like=node)
    lanes = _lanes(node)
    if len(lanes) < step:
        return None
    columns = [emit(graph, aten.unsqueeze.default, cast(lanes[start]), dim + 1, like=node) for start in range(step)]
    stacked = emit(graph, aten.cat.default, columns, dim + 1, like=node)
    return emit(graph, aten.reshape.default, stacked, list(tensor.shape), like=node)


def _slice_of(node: Node) -> tuple[Node, int, int, int, int]:
    """Return what is written, and the axis, first row, end and step of where; all of them plain numbers."""
    source, tensor = node.args[1], tensor_of(node)
    assert isinstance(source, Node) and tensor is not None
    if source.target is aten.copy.default and shape_of(source.args[1]) == shape_of(source):
        # an assignment copies over what was there, of which only the dtype matters
        source = source.args[1]
    assert isinstance(source, Node)
    dim = argument(node, 2, "dim", default=0) % tensor.dim()
    step = argument(node, 5, "step", default=1)
    ends = slice(argument(node, 3, "start"), argument(node, 4, "end"))
    first, last, _ = ends.indices(int(tensor.shape[dim]))
    return source, dim, first, max(first, last), step


def _lanes(node: Node) -> dict[int, Node]:
    """Return the last writes to every ``step``-th row, by the row at which they begin."""
    _, axis, _, _, stride = _slice_of(node)
    found: dict[int, Node] = {}
    current: object = node
    while isinstance(current, Node) and current.target is aten.slice_scatter.default:
        source, dim, first, last, step = _slice_of(current)
        tensor = tensor_of(current)
        assert tensor is not None
        size = int(tensor.shape[dim])
        if (dim, step) != (axis, stride) or first >= step or last < size or size % step:
            break
        found.setdefault(first, source)
        current = current.args[0]
    return found
