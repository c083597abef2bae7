"""Read what an attention mask means: which key mask it is, and which keys it shows whatever the inputs are.

    mask = zeros(1, 1, N, N), or ones of bool                    has no effect
    mask = cat([ones(B, video), text_mask], 1)[:, None, None]    shows every video key
    mask = pad(text_mask, (video, 0), value=True)                the same
    mask = ones.masked_fill(arange >= video + text_mask.sum(), False)    the same
    mask = a graph input                                         may hide any; its values tell whether it hides keys

The graph is only read.
"""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from svg2_compile.passes.nodes import (
    argument,
    first_argument,
    is_inplace,
    is_written,
    same_size,
    shape_of,
    sizes_of,
    target_name,
    tensor_of,
    value_of,
)
from svg2_compile.passes.records import Size

LONGEST_MASK_CHAIN = 12
FILLED = {"ones": 1, "ones_like": 1, "new_ones": 1, "zeros": 0, "zeros_like": 0, "new_zeros": 0}
FULL = ("full", "full_like", "new_full")
REARRANGES = ("contiguous", "clone", "expand", "repeat", "view", "reshape", "unsqueeze", "squeeze", "flatten", "detach")
KEEPS_VALUES = ("bool", "to", "float", "half", "bfloat16", "type", "type_as", *REARRANGES)
ADDS_AXES = ("unsqueeze", "view", "reshape", "unflatten")
ELEMENTWISE = (
    *("add", "sub", "rsub", "mul", "truediv", "div", "neg"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_not", "invert", "bitwise_not", "where", "masked_fill"),
    *("and", "or", "logical_and", "logical_or", "bitwise_and", "bitwise_or"),
)
"""Each element of the result is made of the elements at its place."""


def key_mask_of(mask: object, key: Node) -> Node | None:
    """Return the (B, 1, 1, S) key mask that ``mask`` means for every valid query row, or ``None``.

    Recognised: a key mask itself; one expanded or repeated over the queries; and, of bool, the outer product
    ``m & m.T`` of a padded key mask, whose rows differ only for padding queries, which nobody reads. Whether one of
    numbers hides keys or weighs them, its values tell. One that was repeated or broadcast along the keys, or along part
    of the batch, means something else.
    """
    first = tensor_of(mask)
    for _ in range(LONGEST_MASK_CHAIN):
        tensor = tensor_of(mask)
        if not isinstance(mask, Node) or tensor is None or first is None or tensor.dim() != 4:
            return None
        is_boolean = tensor.dtype is torch.bool
        if is_boolean != (first.dtype is torch.bool) or not (is_boolean or tensor.is_floating_point()):
            return None
        if same_size(tensor.shape[1], 1) and same_size(tensor.shape[2], 1):
            return mask if _covers_keys(mask, key) else None
        match target_name(mask):
            case "bool" | "contiguous" | "clone" | "to" | "expand" | "repeat":
                mask = argument(mask, 0, "input")
            case "and_" | "logical_and" | "__and__" | "bitwise_and" | "mul" if is_boolean:
                mask = _outer_factor(mask)
            case _:
                return None
    return None


def before_new_axes(mask: Node) -> Node:
    """Return what ``mask`` shows with more axes of one element: each layer may write its own ``[:, None]``."""
    node = mask
    while (source := first_argument(node)) is not None and target_name(node) in (*ADDS_AXES, "getitem"):
        sizes = [[size for size in sizes_of(each) if not same_size(size, 1)] for each in (source, node)]
        if len(sizes[0]) != len(sizes[1]) or not all(map(same_size, *sizes)) or is_inplace(node):
            break
        node = source
    return node


def is_given(mask: Node, end: Node) -> bool:
    """Say whether what ``mask`` hides from whom is decided outside the graph: it is made of inputs, place by place."""
    waiting, is_of_inputs = [mask], False
    for _ in range(LONGEST_MASK_CHAIN):
        node = waiting.pop()
        if is_inplace(node) or not _has_last_axes_of(node, mask) or is_written(node, node, end):
            return False
        name = _plain_name(node)
        is_of_inputs |= node.op == "placeholder"
        if name in (*KEEPS_VALUES, *ELEMENTWISE, "slice", "getitem"):
            waiting += [each for each in node.all_input_nodes if prod(shape_of(each) or ()) != 1]
        elif node.op != "placeholder" and name not in (*FILLED, *FULL):
            return False
        if not waiting:
            return is_of_inputs
    return False


def _has_last_axes_of(node: Node, mask: Node) -> bool:
    sizes, wanted = sizes_of(node)[-2:], sizes_of(mask)[-2:]
    return len(sizes) == len(wanted) and all(map(same_size, sizes, wanted))


def has_no_effect(mask: object, end: Node) -> bool:
    """Say whether ``mask`` hides nothing and weighs all keys alike, whatever the inputs are."""
    value = value_everywhere(mask, end)
    if value is None:
        return False
    return bool(value) if value.dtype is torch.bool else bool(value.isfinite())


def value_everywhere(x: object, end: Node, steps: int = LONGEST_MASK_CHAIN) -> torch.Tensor | None:
    """Return the value that every element of ``x`` has when ``end`` reads it, in its dtype; None if unknown."""
    tensor = tensor_of(x)
    if not isinstance(x, Node) or tensor is None or steps == 0 or is_inplace(x) or x.op == "placeholder":
        return None
    if tensor.dtype.is_complex or is_written(x, x, end):
        return None
    name = _plain_name(x)
    value: Any = None
    if name in FILLED:
        value = FILLED[name]
    elif name in FULL:
        value = argument(x, 2 if name == "new_full" else 1, "fill_value")
    elif name in ("tensor", "scalar_tensor"):
        value = argument(x, 0, "data", "s")
    elif name in KEEPS_VALUES or _adds_axes(x):
        value = value_everywhere(first_argument(x), x, steps - 1)
    elif name in ELEMENTWISE:
        value = _computed(x, steps)
    if isinstance(value, torch.Tensor):
        return value.to(tensor.dtype)
    return torch.full((), value, dtype=tensor.dtype, device="cpu") if isinstance(value, int | float) else None


def _computed(node: Node, steps: int) -> torch.Tensor | None:
    """Compute one element of what is made of elements that are the same everywhere."""
    values = {each: value_everywhere(each, node, steps - 1) for each in node.all_input_nodes}
    if any(value is None for value in values.values()):
        return None
    args, kwargs = map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    method = getattr(args[0], str(node.target), None) if node.op == "call_method" and args else None
    call = node.target if node.op == "call_function" else method
    result = None
    if callable(call):
        result = call(*args, **kwargs) if method is None else call(*args[1:], **kwargs)
    return result if isinstance(result, torch.Tensor) else None


def _plain_name(node: Node) -> str:
    """Return the name of what is called, ``and`` for ``__and__`` as for ``operator.and_``."""
    return target_name(node).strip("_")


def _covers_keys(mask: Node, key: Node) -> bool:
    (batch, *_, columns), sizes = sizes_of(mask), sizes_of(key)
    return same_size(columns, sizes[2]) and (same_size(batch, sizes[0]) or same_size(batch, 1))


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
        value = value_everywhere(node, end)
        name = target_name(node)
        if value is not None or (rows is not None and name == "pad" and _is_padded_with_true(node, rows)):
            return (value is None or bool(value)) and not any(is_written(each, each, end) for each in trail)
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
