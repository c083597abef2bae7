"""Cut a graph, in program order, into dense segments and the ops between them that stay in PyTorch.

    graph: norm → linear → split ─┬→ svg2 ops → linear → gelu → linear → output
                                  v
    parent: segment_0(norm, linear) → split → svg2 ops → segment_1(linear, gelu, linear) → output

A segment lies between two kept ops. It has no side effect and holds the weights that it uses, so that a compiler for
inference may take it whole. Reshapes at its edges stay outside, where they cost nothing: an engine would copy to do
them. Runs on a functional ATen graph whose weights are constants (``freeze_weights``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from svg2_compile.passes.dynamo_graphs import OpOverload, name_of_op
from svg2_compile.passes.nodes import value_of

aten = torch.ops.aten

RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten._reshape_copy.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
"""Reshapes with several results."""
VIEWS = (aten.view.default, aten._unsafe_view.default, aten._reshape_copy.default)
"""Become ``reshape``: a compiled segment may return other strides than the traced one."""


@dataclass(frozen=True, slots=True)
class DenseSegment:
    """A run of nodes that one compiler takes."""

    name: str
    """Of the submodule."""
    ops: tuple[str, ...]
    """The nodes' ops, in order."""
    inputs: tuple[str, ...]
    """Nodes of the whole graph that it reads."""
    outputs: tuple[str, ...]
    """Its nodes that are read outside."""
    weights: tuple[str, ...]
    """Constants that it holds."""


@dataclass(frozen=True, slots=True)
class KeptOp:
    """A node that stays in PyTorch and ends a segment."""

    node: str
    op: str
    why: str


@dataclass(frozen=True, slots=True)
class SplitGraph:
    """A graph of submodules and kept ops that computes what the given graph did."""

    gm: GraphModule
    segments: tuple[DenseSegment, ...]
    kept: tuple[KeptOp, ...]


def split_segments(gm: GraphModule) -> SplitGraph:
    """Cut ``gm`` into dense segments and kept ops.

    Args:
        gm: a functional ATen graph with ``meta["val"]``; it is not changed.

    Returns:
        The parent graph, with one submodule per segment, and the records of what went where.

    Promises:
        The nodes that compute are those of ``gm``, in their order, but that views became reshapes.
    """
    program, kept = _plan(gm.graph)
    return _build(gm, program, kept)


def why_kept(node: Node) -> str | None:
    """Return why a node may not be compiled into a segment; None where it may."""
    target = node.target
    if not isinstance(target, OpOverload):
        # arithmetic on sizes, or getitem, which follows its source
        return None if getattr(target, "__module__", "") == "_operator" else "no ATen op"
    if (name := name_of_op(target)) == "svg2::dense_attention" or "scaled_dot_product" in name:
        return "attention"
    if target.namespace == "svg2":
        return "sparse attention"
    if torch.Tag.nondeterministic_seeded in target.tags:
        return "draws random numbers"
    if node.is_impure():
        return "has an effect"
    if torch.Tag.dynamic_output_shape in target.tags:
        return "its size depends on data"
    if target.namespace not in ("aten", "prims"):
        return f"an op of {target.namespace}"
    return None


Program = list[Node | list[Node]]
"""Nodes outside of segments, and segments, in the order in which they run."""


def _plan(graph: Graph) -> tuple[Program, list[KeptOp]]:
    program: Program = []
    kept: list[KeptOp] = []
    constants = _constants(graph)
    inside: dict[Node, None] = {}
    """The open segment."""

    def is_reshape(node: Node) -> bool:
        return node.target in (*RESHAPES, *SPLITS) and node.all_input_nodes[0] not in constants

    def close() -> None:
        sunk = _last_reshapes([*inside], is_reshape)
        left = [node for node in inside if node not in sunk]
        if len(left) == 1:
            # it would be fused with nothing, and an engine copies inputs that are not contiguous
            kept.append(KeptOp(left[0].name, str(left[0].target), "alone between kept ops"))
            program.append(left[0])
        elif left:
            program.append(left)
        program.extend(node for node in inside if node in sunk)
        inside.clear()

    for node in graph.nodes:
        if node.op in ("placeholder", "output") or node in constants:
            continue
        reads_segment = any(source in inside for source in node.all_input_nodes)
        why = why_kept(node) or ("a number, needed by the host" if _is_number(node) and reads_segment else None)
        if why is not None:
            close()
            kept.append(KeptOp(node.name, str(node.target), why))
            program.append(node)
        elif not reads_segment and (_is_number(node) or is_reshape(node) or _is_item(node)):
            program.append(node)
        else:
            inside[node] = None
    close()
    return _with_constants(program, constants), kept


def _is_number(node: Node) -> bool:
    return isinstance(value_of(node), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def _is_item(node: Node) -> bool:
    return node.target is operator.getitem


def _constants(graph: Graph) -> set[Node]:
    """Return the weights, and what is computed from them or from nothing."""
    found: set[Node] = set()
    for node in graph.nodes:
        is_pure = node.op == "call_function" and why_kept(node) is None
        if node.op == "get_attr" or (is_pure and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def _with_constants(program: Program, constants: set[Node]) -> Program:
    """Put what is computed from weights into the one segment that reads it; before all where there are several.

    A table of rotations is large: as a constant of every engine it would take the memory of a layer's weights.
    """
    homes: dict[Node, set[int | None]] = {}
    for place, item in enumerate(program):
        homes |= {node: {place} for node in item} if isinstance(item, list) else {}
    for node in sorted(constants, reverse=True):
        homes[node] = {place for user in node.users for place in homes.get(user, {None})}
    # read by several segments, or outside of them
    before = sorted(
        node for node in constants if node.op != "get_attr" and (len(homes[node]) > 1 or None in homes[node])
    )
    within = constants.difference(before)
    placed = [sorted([*_needed(item, within), *item]) if isinstance(item, list) else item for item in program]
    return [*before, *placed]


def _needed(nodes: Sequence[Node], constants: set[Node]) -> list[Node]:
    """Return the constants that ``nodes`` read and those that these are made of, weights excepted, in order."""
    found: set[Node] = set()
    reached = [*nodes]
    while reached:
        for source in reached.pop().all_input_nodes:
            if source in constants and source.op != "get_attr" and source not in found:
                found.add(source)
                reached.append(source)
    return sorted(found)


def _last_reshapes(inside: Sequence[Node], is_reshape: Callable[[Node], bool]) -> set[Node]:
    """Return the reshapes of a segment whose results nothing in it reads, with the items of those that split."""
    left, sunk = set(inside), set[Node]()
    for node in reversed(inside):
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        follows_split = _is_item(node) and source is not None and source.target in SPLITS
        if (is_reshape(node) or follows_split) and not any(user in left for user in node.users):
            left.remove(node)
            sunk.add(node)
    return {node for node in sunk if not (_is_item(node) and node.all_input_nodes[0] in left)}


def _build(gm: GraphModule, program: Program, kept: list[KeptOp]) -> SplitGraph:
    parent, copies = Graph(), dict[Node, Node]()
    modules: dict[str, GraphModule] = {}
    segments: list[DenseSegment] = []
    constants = _constants(gm.graph)
    named = {node.name: node for node in gm.graph.nodes}
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            copies[node] = parent.node_copy(node)
    for item in program:
        if isinstance(item, Node):
            copies[item] = _copy(parent, item, copies)
            continue
        name = f"segment_{len(segments)}"
        module, segment = _segment(gm, name, item, constants)
        modules[name] = module
        call = parent.call_module(name, tuple(copies[named[each]] for each in segment.inputs))
        for place, output in enumerate(segment.outputs):
            result = copies[named[output]] = parent.call_function(operator.getitem, (call, place))
            result.meta |= named[output].meta
        segments.append(segment)
    (output,) = gm.graph.find_nodes(op="output")
    parent.node_copy(output, copies.__getitem__)
    for node in parent.find_nodes(op="get_attr"):
        if not node.users:
            parent.erase_node(node)
    attributes = {node.target: _attribute(gm, node.target) for node in parent.find_nodes(op="get_attr")}
    split = GraphModule({**attributes, **modules}, parent)
    split.graph.lint()
    return SplitGraph(split, tuple(segments), tuple(kept))


def _segment(gm: GraphModule, name: str, nodes: list[Node], constants: set[Node]) -> tuple[GraphModule, DenseSegment]:
    graph, copies, members = Graph(), dict[Node, Node](), set(nodes)
    sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in members)
    inputs = [source for source in sources if source.op != "get_attr"]
    weights = [source for source in sources if source.op == "get_attr"]
    for source in inputs:
        copies[source] = graph.placeholder(source.name)
        copies[source].meta |= source.meta
    for source in weights:
        copies[source] = graph.node_copy(source)
    for node in nodes:
        copies[node] = _copy(graph, node, copies)
    # others compute the constants again that they read
    outputs = [node for node in nodes if node not in constants and any(user not in members for user in node.users)]
    graph.output(tuple(copies[node] for node in outputs))
    module = GraphModule({str(source.target): _attribute(gm, source.target) for source in weights}, graph, name)
    record = DenseSegment(
        name=name,
        ops=tuple(str(node.target) for node in nodes),
        inputs=tuple(node.name for node in inputs),
        outputs=tuple(node.name for node in outputs),
        weights=tuple(str(node.target) for node in weights),
    )
    return module, record


def _copy(graph: Graph, node: Node, copies: dict[Node, Node]) -> Node:
    copy = graph.node_copy(node, copies.__getitem__)
    if copy.target in VIEWS:
        copy.target = aten.reshape.default
    return copy


def _attribute(gm: GraphModule, name: object) -> object:
    value: object = gm
    for part in str(name).split("."):
        value = getattr(value, part)
    return value
