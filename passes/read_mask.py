"""Read what a boolean attention mask means: which key mask it is, and which keys it shows whatever the inputs are.

    mask = cat([ones(B, video), text_mask], 1)[:, None, None]    shows every video key
    mask = pad(text_mask, (video, 0), value=True)                the same
    mask = ones.masked_fill(arange >= video + text_mask.sum(), False)    the same
    mask = a graph input                                         may hide any

The graph is only read.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from svg2_compile.passes.nodes import (
    argument,
    first_argument,
    is_inplace,
    is_written,
    same_size,
    shape_of,
    target_name,
    tensor_of,
    value_of,
)
from svg2_compile.passes.records import Size

LONGEST_MASK_CHAIN = 12
ONES = ("ones", "ones_like", "new_ones")
KEEPS_VALUES = ("bool", "contiguous", "clone", "to", "expand", "repeat", "view", "reshape", "unsqueeze", "flatten")


def key_mask_of(mask: object) -> Node | None:
    """Return the boolean (B, 1, 1, S) key mask that ``mask`` means for every valid query row, or ``None``.

    Recognised: a key mask itself; one expanded or repeated over the queries; and the outer product ``m & m.T`` of a
    padded key mask, whose rows differ only for padding queries, which nobody reads.
    """
    for _ in range(LONGEST_MASK_CHAIN):
        tensor = tensor_of(mask)
        if not isinstance(mask, Node) or tensor is None or tensor.dtype is not torch.bool or tensor.dim() != 4:
            return None
        if same_size(tensor.shape[1], 1) and same_size(tensor.shape[2], 1):
            return mask
        match target_name(mask):
            case "bool" | "contiguous" | "clone" | "to" | "expand" | "repeat":
                mask = argument(mask, 0, "input")
            case "and_" | "logical_and" | "__and__" | "bitwise_and" | "mul":
                mask = _outer_factor(mask)
            case _:
                return None
    return None


def _outer_factor(product: Node) -> Node | None:
    left, right = argument(product, 0, "input"), argument(product, 1, "other")
    for factor, other in ((left, right), (right, left)):
        swaps = isinstance(other, Node) and target_name(other) == "transpose" and other.args[0] is factor
        if swaps and isinstance(other, Node) and {int(str(axis)) % 4 for axis in other.args[1:3]} == {2, 3}:
            return factor if isinstance(factor, Node) else None
    return None


def is_true(mask: object, end: Node, rows: tuple[Size, Size] | None = None) -> bool:
    """Say whether ``mask`` is true whatever the inputs are, and nothing overwrites it before ``end``.

    Args:
        mask: a node; of any dtype, what is not zero being true.
        end: where the mask is read.
        rows: (first, how many) on the last axis, where the others do not matter; all of them if absent.
    """
    node, trail = mask, list[Node]()
    for _ in range(LONGEST_MASK_CHAIN):
        if not isinstance(node, Node) or tensor_of(node) is None or is_inplace(node):
            return False
        trail.append(node)
        name = target_name(node)
        if name in ONES or (rows is not None and name == "pad" and _is_padded_with_true(node, rows)):
            return not any(is_written(each, each, end) for each in trail)
        if rows is not None and name in ("cat", "concat", "concatenate"):
            node, rows = _operand_with(node, rows), None
        elif rows is not None and name == "masked_fill":
            node = first_argument(node) if _lies_beyond(argument(node, 1, "mask"), node, rows) else None
        elif (name in KEEPS_VALUES or _adds_axes(node)) and (rows is None or _keeps_last_axis(node)):
            node = first_argument(node)
        else:
            return False
    return False


def _keeps_last_axis(node: Node) -> bool:
    """Elements are row-major: where the last axis is as long before and after, its rows are the same."""
    source, shape = shape_of(first_argument(node)), shape_of(node)
    return bool(source and shape and same_size(source[-1], shape[-1]))


def _adds_axes(node: Node) -> bool:
    """True for ``x[:, None, None, :]``."""
    index = node.args[1] if node.target is operator.getitem and tensor_of(first_argument(node)) is not None else None
    return isinstance(index, tuple) and all(each in (None, Ellipsis, slice(None)) for each in index)


def _operand_with(cat: Node, rows: tuple[Size, Size]) -> Node | None:
    """Return the operand that is exactly ``rows`` of the last axis."""
    axis = argument(cat, 1, "dim", "axis", default=0)
    if axis not in (-1, len(shape_of(cat) or ()) - 1):
        return None
    start: Size = 0
    for operand in argument(cat, 0, "tensors"):
        shape = shape_of(operand)
        if shape is None:
            return None
        if same_size(start, rows[0]) and same_size(shape[-1], rows[1]):
            return operand if isinstance(operand, Node) else None
        start = start + shape[-1]
    return None


def _is_padded_with_true(pad: Node, rows: tuple[Size, Size]) -> bool:
    widths, mode = argument(pad, 1, "pad"), argument(pad, 2, "mode", default="constant")
    value, shape = argument(pad, 3, "value", default=None), shape_of(pad)
    if shape is None or mode != "constant" or value != 1 or not isinstance(widths, list | tuple) or len(widths) != 2:
        return False
    before, after = (_number(each) for each in widths)
    first, length = rows
    is_front = same_size(first, 0) and same_size(length, before)
    return is_front or (same_size(length, after) and same_size(first + length, shape[-1]))


def _lies_beyond(condition: Any, end: Node, rows: tuple[Size, Size]) -> bool:
    """Say whether ``condition`` is ``arange >= length + count``, ``rows`` being the first ``length`` of its rows."""
    if not isinstance(condition, Node) or target_name(condition) not in ("ge", "__ge__", "greater_equal"):
        return False
    places, limits = argument(condition, 0, "input"), argument(condition, 1, "other")
    positions, bound = _without_new_axes(places), _without_new_axes(limits)
    if positions is None or bound is None or target_name(positions) != "arange" or target_name(bound) != "add":
        return False
    is_plain = len(positions.args) == 1 and not {"start", "step"} & {*positions.kwargs} and not bound.kwargs
    shape, places_shape, limits_shape = shape_of(condition), shape_of(places), shape_of(limits)
    if not is_plain or not shape or not places_shape or not limits_shape or not same_size(rows[0], 0):
        return False
    if not same_size(places_shape[-1], shape[-1]) or not same_size(limits_shape[-1], 1):
        return False
    counts = [each for each in bound.args if isinstance(each, Node) and _is_count(each)]
    lengths = [value for each in bound.args if isinstance(value := _number(each), int | torch.SymInt)]
    made = ((condition, end), (positions, condition), (bound, condition), *((each, bound) for each in counts))
    return (
        len(counts) == len(lengths) == 1
        and same_size(lengths[0], rows[1])
        and not any(is_written(node, node, read) for node, read in made)
    )


def _is_count(node: Node) -> bool:
    """A whole number that sums up a mask is not negative."""
    tensor = tensor_of(node)
    return target_name(node) == "sum" and tensor is not None and not tensor.is_floating_point()


def _number(x: Any) -> Any:
    return value_of(x) if isinstance(x, Node) else x


def _without_new_axes(node: Any) -> Node | None:
    while isinstance(node, Node) and target_name(node) in ("unsqueeze", "view", "reshape"):
        node = first_argument(node)
    return node if isinstance(node, Node) else None
