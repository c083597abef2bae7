"""Tell the rows of a cache that were written in place from those that were there before.

    cache[:, :, 256:512] = v
    values = cache[:, :, :512]          rows of values: (cache, 256) then (v, 256), as if they had been concatenated

What is written and what is read are compared as places in memory, so it does not matter how either is spelled. The
graph is only read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from svg2_compile.passes.nodes import (
    argument,
    first_argument,
    is_inplace,
    memory_of_node,
    shape_of,
    target_name,
    tensor_of,
    value_mode,
)
from svg2_compile.passes.trace_axis import AxisOrigin, Piece, trace_axis

LONGEST_CHAIN = 12
KEEPS_ROWS = ("to", "contiguous", "clone", "float", "half", "bfloat16", "type_as", "detach")
"""Copies, whose rows are as they were when they were made."""
UNKNOWN_ROWS = "written in place"


@dataclass(frozen=True, slots=True)
class _Write:
    start: int
    length: int
    source: Node
    axis: int


def trace_values(value: Node, axis: int, reader: Node) -> AxisOrigin:
    """Return where the rows of ``value`` come from when ``reader`` reads it: ``trace_axis``, and through a cache.

    A piece of the kind ``written in place`` stands for a cache of which the graph does not tell what was written where.
    """
    node = value
    for _ in range(LONGEST_CHAIN):
        origin = _written(node, axis, reader)
        if origin is not None:
            return origin
        source = first_argument(node)
        if target_name(node) not in KEEPS_ROWS or source is None or shape_of(source) != shape_of(node):
            break
        node, reader = source, node
    return trace_axis(value, axis)


def _written(node: Node, axis: int, reader: Node) -> AxisOrigin | None:
    tensor = tensor_of(node)
    if tensor is None or not isinstance(tensor.shape[axis], int):
        return None
    rows = int(tensor.shape[axis])
    writes: list[_Write] = []
    for writer in _writers(node, reader):
        found = _rows_of(writer, tensor, axis)
        if found is None and _root(node).op in ("placeholder", "get_attr"):
            return AxisOrigin((Piece(node, axis, rows, UNKNOWN_ROWS),), joined=False)
        if found is None:
            return None
        # what is written over every row in part, as a rotation in place, makes no rows
        writes = [each for each in writes if (each.start, each.length) != (found.start, found.length)] + [found]
    writes = [each for each in writes if each.length]
    writes.sort(key=lambda each: each.start)
    if not writes:
        return None
    pieces: list[Piece] = []
    at = 0
    for each in writes:
        if each.start < at:
            return AxisOrigin((Piece(node, axis, rows, UNKNOWN_ROWS),), joined=False)
        if each.start > at:
            pieces.append(Piece(node, axis, each.start - at, "cache", at))
        pieces.append(Piece(each.source, each.axis, each.length, "cat"))
        at = each.start + each.length
    if at < rows:
        pieces.append(Piece(node, axis, rows - at, "cache", at))
    if len(pieces) == 1:
        return trace_axis(pieces[0].node, pieces[0].axis)
    return AxisOrigin(tuple(pieces), joined=True)


def _writers(node: Node, reader: Node) -> list[Node]:
    """Return what writes into the memory of ``node`` before ``reader``, in program order."""
    memory, root = memory_of_node(node), _root(node)
    views, waiting, writers = {root}, [root], set[Node]()
    while waiting:
        view = waiting.pop()
        for user in view.users:
            if is_inplace(user) and first_argument(user) is view and user < reader:
                writers.add(user)
            if user not in views and tensor_of(user) is not None and memory_of_node(user) == memory:
                views.add(user)
                waiting.append(user)
    return sorted(writers)


def _root(node: Node) -> Node:
    """Return the node that the memory of ``node`` came with."""
    while (source := first_argument(node)) is not None and memory_of_node(source) == memory_of_node(node):
        node = source
    return node


def _rows_of(writer: Node, read: torch.Tensor, axis: int) -> _Write | None:
    """Return which rows of ``read`` are written, and from where; of no length where none are, None where unknown."""
    place, source = _place_and_source(writer)
    if place is None or not _is_fixed(place) or not _is_fixed(read):
        return None
    mine, theirs = _axes(read), _axes(place)
    stride = read.stride(axis)
    along = next((each for each in range(place.dim()) if place.stride(each) == stride and place.shape[each] > 1), None)
    if along is None:
        return None
    mine.pop(stride, None)
    length = theirs.pop(stride)
    offset = int(place.storage_offset()) - int(read.storage_offset())
    start, rest = divmod(offset, stride)
    if mine != theirs or rest:
        is_all_in_part = length == read.shape[axis] and 0 <= offset < stride
        return _Write(0, 0, writer, 0) if is_all_in_part else None
    first, last = max(start, 0), min(start + length, int(read.shape[axis]))
    if last <= first:
        return _Write(0, 0, writer, 0)
    if (first, last) != (start, start + length):
        return None
    is_rows = source is not None and shape_of(source) == tuple(place.shape)
    return _Write(first, last - first, source, along) if is_rows and source is not None else None


def _is_fixed(tensor: torch.Tensor) -> bool:
    return all(isinstance(each, int) for each in (*tensor.shape, *tensor.stride(), tensor.storage_offset()))


def _axes(tensor: torch.Tensor) -> dict[int, int]:
    """Return the sizes of the axes by their strides; axes of one element lie anywhere."""
    return {int(stride): int(size) for size, stride in zip(tensor.shape, tensor.stride()) if size != 1}


def _place_and_source(writer: Node) -> tuple[torch.Tensor | None, Node | None]:
    """Return the written view and what is written into it."""
    written, name = tensor_of(first_argument(writer)), target_name(writer)
    if written is None:
        return None, None
    if name == "setitem":
        index, source = writer.args[1], writer.args[2]
        if any(isinstance(each, Node) for each in (index if isinstance(index, tuple) else (index,))):
            return None, None
        with value_mode(written):
            place = written[index]  # type: ignore[index]
    elif name == "copy_":
        place, source = written, argument(writer, 1, "src", "other")
    else:
        return None, None
    return place, source if isinstance(source, Node) else None
