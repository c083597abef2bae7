"""Follow one axis of a tensor backwards through the graph to where its rows were joined or made.

    text ──► linear ─┐                                            pieces of value's token axis:
                     cat(dim=1) ──► to_v ──► view ──► permute      (text, 77) then (video, 8192)
    video ─► linear ─┘

The walk starts at an attention's ``value``, which never passes through a rotary embedding, and stops at the nearest
``cat`` along the axis. It changes nothing, and compares symbolic sizes by name so that it adds no guard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.fx import Node

from svg2_compile.passes.nodes import argument, is_sdpa, same_size, sdpa_arguments, shape_of, target_name, value_of
from svg2_compile.passes.records import Size

LONGEST_WALK = 4000
SHORT_WALK = 60


@dataclass(frozen=True, slots=True)
class Window:
    """The rows of the current axis that the walk is about, when they are not all of them."""

    start: Size
    length: Size


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows that came from one place."""

    node: Node
    axis: int
    length: Size
    kind: str
    """``placeholder``, ``cat`` (an operand of the joining cat), or the name of the op at which the walk ended."""
    start: Size = 0
    """First of these rows on the axis of ``node``."""


@dataclass(frozen=True, slots=True)
class AxisOrigin:
    """Where an axis comes from, in the order of its rows."""

    pieces: tuple[Piece, ...]
    joined: bool
    """True when a ``cat`` along the axis put the pieces together."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """The walk's position: an axis of a node, and the rows of it that matter."""

    node: Node
    axis: int
    window: Window | None = None

    @property
    def shape(self) -> tuple[Size, ...]:
        """Sizes of the current node."""
        shape = shape_of(self.node)
        assert shape is not None
        return shape

    @property
    def size(self) -> Size:
        """Size of the current axis."""
        return self.shape[self.axis]

    @property
    def place(self) -> object:
        """What is equal for the same rows; sizes are compared as text, which adds no guard."""
        return self.node, self.axis, None if self.window is None else (str(self.window.start), str(self.window.length))

    def to(self, node: Any, axis: int) -> Cursor | AxisOrigin:
        """Step to an axis of ``node``, or end here when ``node`` is no tensor."""
        if not isinstance(node, Node) or shape_of(node) is None:
            return self.end("constant")
        return replace(self, node=node, axis=axis)

    def end(self, kind: str) -> AxisOrigin:
        """End the walk at the current node."""
        window = Window(0, self.size) if self.window is None else self.window
        return AxisOrigin((Piece(self.node, self.axis, window.length, kind, window.start),), joined=False)


Step = Callable[[Cursor], "Cursor | AxisOrigin"]


def trace_axis(node: Node, axis: int) -> AxisOrigin:
    """Return where the rows of ``axis`` of ``node`` come from.

    Args:
        node: a tensor-valued node; ``meta`` must hold its example value.
        axis: the axis to follow, negative counts from the end.

    Returns:
        The pieces, in row order: several when a ``cat`` joined them, else one, whose ``kind`` says where it ended.
    """
    *_, last = _walk(_cursor_on(node, axis))
    return last if isinstance(last, AxisOrigin) else last.end("too far")


def shares_rows(node: Node, axis: int, other: Node, other_axis: int) -> bool:
    """Say whether the rows of ``axis`` of ``node`` are made, one of one, from rows that the walk from ``other`` passes.

    What is multiplied or added row by row, positions and tables, may lie on the way of either: all ways are searched.
    """
    # nearly always they part a few steps before the attention; only where they do not, the whole graph is searched
    limits = SHORT_WALK, LONGEST_WALK
    return any(_shares_rows(_cursor_on(node, axis), _cursor_on(other, other_axis), limit) for limit in limits)


def _shares_rows(start: Cursor, other: Cursor, limit: int) -> bool:
    steps = list(_walk(other, limit))
    passed = {each.place for each in steps if isinstance(each, Cursor)}
    end = steps[-1]
    for way in _ways(start, limit):
        for each in way:
            if isinstance(each, Cursor):
                if each.place in passed:
                    return True
            elif isinstance(end, AxisOrigin) and _share_pieces(each, end):
                return True
    return False


def asking_piece(query: Node, axis: int, keys: AxisOrigin) -> int | None:
    """Return which piece of a joined sequence the rows of ``query`` are, None where they are none."""
    shape = shape_of(query)
    for place, piece in enumerate(keys.pieces if keys.joined and shape else ()):
        if same_size(piece.length, shape[axis]) and shares_rows(query, axis, piece.node, piece.axis):  # type: ignore[index]
            return place
    return None


def same_lengths(a: AxisOrigin, b: AxisOrigin) -> bool:
    """Say whether two sequences were joined of pieces of the same lengths."""
    return len(a.pieces) == len(b.pieces) and all(same_size(x.length, y.length) for x, y in zip(a.pieces, b.pieces))


def _share_pieces(a: AxisOrigin, b: AxisOrigin) -> bool:
    """Say whether two joined sequences have a piece in common; queries and values may each be joined by themselves."""
    if not a.joined or not b.joined or not same_lengths(a, b):
        return False
    for mine, theirs in zip(a.pieces, b.pieces):
        passed = {each.place for each in _walk(_cursor_on(theirs.node, theirs.axis)) if isinstance(each, Cursor)}
        ways = _ways(_cursor_on(mine.node, mine.axis))
        if any(each.place in passed for way in ways for each in way if isinstance(each, Cursor)):
            return True
    return False


def _cursor_on(node: Node, axis: int) -> Cursor:
    return Cursor(node, axis % len(shape_of(node) or ()))


def _walk(start: Cursor, limit: int = LONGEST_WALK) -> Iterator[Cursor | AxisOrigin]:
    """Yield the steps of the walk, where it ended last."""
    at: Cursor | AxisOrigin = start
    for _ in range(limit):
        yield at
        if isinstance(at, AxisOrigin):
            return
        at = _step(at)
    yield at


def _ways(start: Cursor, limit: int = LONGEST_WALK) -> Iterator[list[Cursor | AxisOrigin]]:
    """Yield the walk, then those that take other operands of what is elementwise; no step is walked twice."""
    waiting, seen = deque([start]), set[object]()
    while waiting and len(seen) < limit:
        way: list[Cursor | AxisOrigin] = []
        for each in _walk(waiting.popleft(), limit):
            if isinstance(each, Cursor):
                if each.place in seen:
                    break
                seen.add(each.place)
                waiting.extend(_side_ways(each))
            way.append(each)
        yield way


def _side_ways(at: Cursor) -> list[Cursor]:
    is_elementwise = at.node.op.startswith("call") and not is_sdpa(at.node) and target_name(at.node) not in STEPS
    return [replace(at, node=node, axis=axis) for node, axis in _carriers(at)[1:]] if is_elementwise else []


def _step(at: Cursor) -> Cursor | AxisOrigin:
    if at.node.op in ("placeholder", "get_attr"):
        return at.end(at.node.op)
    if is_sdpa(at.node):
        return _through_attention(at)
    return STEPS.get(target_name(at.node), _through_pointwise)(at)


def _first(at: Cursor) -> Node | None:
    operand = argument(at.node, 0, "input", "self", "x")
    return operand if isinstance(operand, Node) and shape_of(operand) is not None else None


def _through_attention(at: Cursor) -> Cursor | AxisOrigin:
    """An attention's output rows are its query rows."""
    if at.axis != len(at.shape) - 2:
        return at.end("attention")
    return at.to(sdpa_arguments(at.node).query, at.axis)


def _through_cat(at: Cursor) -> Cursor | AxisOrigin:
    operands = [each for each in argument(at.node, 0, "tensors") if isinstance(each, Node)]
    dim = argument(at.node, 1, "dim", "axis", default=0) % len(at.shape)
    if dim != at.axis:
        return at.to(operands[0], at.axis)
    pieces = [(each, shape) for each in operands if (shape := shape_of(each)) and not same_size(shape[dim], 0)]
    if at.window is not None:
        start: Size = 0
        for each, shape in pieces:
            if same_size(start, at.window.start) and same_size(shape[dim], at.window.length):
                return Cursor(each, dim)
            start = start + shape[dim]
        return at.end("part of a cat")
    if len(pieces) == 1:
        return at.to(pieces[0][0], dim)
    return AxisOrigin(tuple(Piece(each, dim, shape[dim], "cat") for each, shape in pieces), joined=True)


def _through_stack(at: Cursor) -> Cursor | AxisOrigin:
    dim = argument(at.node, 1, "dim", default=0) % len(at.shape)
    if dim == at.axis:
        return at.end("stack")
    return at.to(argument(at.node, 0, "tensors")[0], at.axis - (at.axis > dim))


def _through_getitem(at: Cursor) -> Cursor | AxisOrigin:
    source, index = at.node.args
    if not isinstance(source, Node):
        return at.end("constant")
    if shape_of(source) is None:
        return _through_tuple(at, source, index)
    return _through_indexing(at, source, index if isinstance(index, tuple) else (index,))


def _through_indexing(at: Cursor, source: Node, index: tuple[Any, ...]) -> Cursor | AxisOrigin:
    """Basic indexing: find the input axis, and the slice along it, that became the current axis."""
    shape = shape_of(source)
    assert shape is not None
    taken = sum(1 for each in index if each is not None and each is not Ellipsis)
    rest = [slice(None)] * (len(shape) - taken)
    if Ellipsis in [each for each in index if not isinstance(each, Node)]:
        gap = next(position for position, each in enumerate(index) if each is Ellipsis)
        full = [*index[:gap], *rest, *index[gap + 1 :]]
    else:
        full = [*index, *rest]
    in_axis = out_axis = 0
    for each in full:
        if isinstance(each, Node) and isinstance(value_of(each), torch.Tensor):
            return at.end("gather")
        if each is None or isinstance(each, slice):
            if out_axis == at.axis:
                return at.end("new axis") if each is None else _into_slice(at, source, in_axis, each)
            out_axis += 1
        in_axis += each is not None
    return at.end("indexing")


def _into_slice(at: Cursor, source: Node, axis: int, rows: slice) -> Cursor | AxisOrigin:
    shape = shape_of(source)
    assert shape is not None
    if same_size(shape[axis], at.size):
        return at.to(source, axis)
    if at.window is not None or rows.step not in (None, 1):
        return at.end("slice of a slice")
    start = _size_of(rows.start)
    if isinstance(start, int) and start < 0:
        start = shape[axis] + start
    return Cursor(source, axis, Window(start, at.size))


def _size_of(size: Any) -> Size:
    value = value_of(size) if isinstance(size, Node) else size
    return value if isinstance(value, int | torch.SymInt) else 0


def _through_slice(at: Cursor) -> Cursor | AxisOrigin:
    """``aten.slice`` and ``narrow``: the functional spellings of ``x[:, a:b]``."""
    source = _first(at)
    if source is None:
        return at.end("constant")
    dim = argument(at.node, 1, "dim", default=0) % len(at.shape)
    if dim != at.axis:
        return at.to(source, at.axis)
    step = argument(at.node, 4, "step") if target_name(at.node) == "slice" else None
    return _into_slice(at, source, dim, slice(argument(at.node, 2, "start"), None, step))


def _through_tuple(at: Cursor, source: Node, index: Any) -> Cursor | AxisOrigin:
    """One output of ``chunk``, ``split`` or ``unbind``."""
    kind = target_name(source)
    whole = argument(source, 0, "input", "tensor", "self")
    shape = shape_of(whole)
    if shape is None or not isinstance(index, int):
        return at.end(kind)
    if kind == "unbind":
        dim = argument(source, 1, "dim", default=0) % len(shape)
        return at.to(whole, at.axis + (at.axis >= dim))
    if kind not in ("chunk", "split", "split_with_sizes", "tensor_split"):
        return at.end(kind)
    dim = argument(source, 2, "dim", default=0) % len(shape)
    if dim != at.axis:
        return at.to(whole, at.axis)
    parts = value_of(source)
    if at.window is not None or not isinstance(parts, Sequence):
        return at.end("slice of a slice")
    start = sum((part.shape[dim] for part in parts[:index]), 0)
    return Cursor(whole, dim, Window(start, at.size))


def _through_permute(at: Cursor) -> Cursor | AxisOrigin:
    dims = argument(at.node, 1, "dims")
    if not isinstance(dims, Sequence):
        dims = at.node.args[1:]
    return at.to(_first(at), int(dims[at.axis]) % len(at.shape))


def _through_transpose(at: Cursor) -> Cursor | AxisOrigin:
    rank = len(at.shape)
    first, second = argument(at.node, 1, "dim0", "axis0") % rank, argument(at.node, 2, "dim1", "axis1") % rank
    return at.to(_first(at), {first: second, second: first}.get(at.axis, at.axis))


def _through_view(at: Cursor) -> Cursor | AxisOrigin:
    """A view keeps the axis if some input axis has its size and as many elements before it."""
    source = _first(at)
    shape = shape_of(source)
    if source is None or shape is None:
        return at.end("constant")
    before = prod(at.shape[: at.axis])
    for axis, size in enumerate(shape):
        if same_size(size, at.size) and same_size(prod(shape[:axis]), before):
            return at.to(source, axis)
    return at.end("split axis")


def _through_same_axis(at: Cursor) -> Cursor | AxisOrigin:
    """Ops that keep every axis of their first operand but the last, which they replace."""
    if at.axis == len(at.shape) - 1:
        return at.end(target_name(at.node))
    return at.to(_first(at), at.axis)


def _through_matmul(at: Cursor) -> Cursor | AxisOrigin:
    source = _first(at)
    if at.axis == len(at.shape) - 2 and len(shape_of(source) or ()) == len(at.shape):
        return at.to(source, at.axis)
    return at.end("matmul")


def _through_repeat(at: Cursor) -> Cursor | AxisOrigin:
    source = _first(at)
    shape = shape_of(source) or ()
    axis = at.axis - (len(at.shape) - len(shape))
    if axis >= 0 and same_size(shape[axis], at.size):
        return at.to(source, axis)
    return at.end(target_name(at.node))


def _through_reduction(at: Cursor) -> Cursor | AxisOrigin:
    source = _first(at)
    dims = argument(at.node, 1, "dim")
    if source is None or dims is None:
        return at.end(target_name(at.node))
    axis = at.axis
    if not argument(at.node, 2, "keepdim", default=False):
        rank = len(shape_of(source) or ())
        for dim in sorted(each % rank for each in (dims if isinstance(dims, Sequence) else (dims,))):
            axis += dim <= axis
    return at.to(source, axis)


def _through_pad(at: Cursor) -> Cursor | AxisOrigin:
    source = _first(at)
    shape = shape_of(source) or ()
    if len(shape) == len(at.shape) and same_size(shape[at.axis], at.size):
        return at.to(source, at.axis)
    return at.end("pad")


def _through_pointwise(at: Cursor) -> Cursor | AxisOrigin:
    """Anything elementwise: go to the operand that carries the axis and resembles the output most."""
    carriers = _carriers(at)
    return at.to(*carriers[0]) if carriers else at.end(target_name(at.node))


def _carriers(at: Cursor) -> list[tuple[Node, int]]:
    """Return the operands that carry the axis, with their axis; the one that resembles the output most comes first."""
    found: list[tuple[tuple[int, int], Node, int]] = []
    for operand in at.node.all_input_nodes:
        shape = shape_of(operand)
        if shape is None:
            continue
        axis = at.axis - (len(at.shape) - len(shape))
        if axis < 0 or len(shape) > len(at.shape) or not same_size(shape[axis], at.size):
            continue
        tail = at.shape[len(at.shape) - len(shape) :]
        likeness = (sum(same_size(a, b) for a, b in zip(shape, tail)), len(shape))
        found.append((likeness, operand, axis))
    # a stable sort: of equals, the first operand
    return [(operand, axis) for _, operand, axis in sorted(found, key=lambda each: each[0], reverse=True)]


def _end_here(at: Cursor) -> AxisOrigin:
    return at.end(target_name(at.node))


STEPS: dict[str, Step] = {
    **dict.fromkeys(("cat", "concat", "concatenate"), _through_cat),
    **dict.fromkeys(("permute",), _through_permute),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _through_transpose),
    **dict.fromkeys(("view", "reshape", "unflatten", "flatten", "_unsafe_view", "unsqueeze", "squeeze"), _through_view),
    **dict.fromkeys(("view_as_complex", "view_as_real", "linear"), _through_same_axis),
    **dict.fromkeys(("expand", "repeat", "repeat_interleave"), _through_repeat),
    **dict.fromkeys(("sum", "mean", "amax", "amin"), _through_reduction),
    **dict.fromkeys(("slice", "narrow"), _through_slice),
    **dict.fromkeys(("bmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d", "movedim"), _end_here),
    # these keep the size of the axis and not the order of its rows
    **dict.fromkeys(("roll", "flip", "sort", "gather", "index", "index_select"), _end_here),
    "getitem": _through_getitem,
    "stack": _through_stack,
    "matmul": _through_matmul,
    "pad": _through_pad,
}
