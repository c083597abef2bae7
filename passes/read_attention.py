"""Read the attention around a softmax that was written by hand.

Upwards from the softmax, casts, scales and masks are read off until the product of queries and keys; downwards, casts,
permutations and inactive dropout until the product with the values. Every product is read as an einsum. Nothing in the
graph is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node
from torch.fx.node import Argument

from svg2_compile.passes.hand_written import Factor, HandWritten, Mask, Obstacle, Operand, Scale
from svg2_compile.passes.nodes import (
    argument,
    dtype_of,
    first_argument,
    is_inplace,
    is_written,
    permutation_of,
    same_size,
    sizes_of,
    target_name,
    tensor_of,
    value_of,
)
from svg2_compile.passes.read_product import Product, read_product
from svg2_compile.passes.read_softmax import read_softmax

CASTS = ("to", "type", "float", "half", "bfloat16", "double", "type_as", "contiguous", "clone")
ARITHMETIC = {
    **dict.fromkeys(("mul", "mul_", "imul", "multiply", "multiply_"), "mul"),
    **dict.fromkeys(("div", "div_", "truediv", "itruediv", "divide", "divide_", "true_divide"), "div"),
    **dict.fromkeys(("add", "add_", "iadd"), "add"),
    **dict.fromkeys(("sub", "sub_", "isub", "subtract"), "sub"),
}
# A chain longer than this is not attention; bounds the search through sums whose two sides could both be the scores.
MAX_STEPS = 12
# Adding a fill at least this low leaves nothing of a score, so filling and adding agree even in fully masked rows.
LARGEST_FILL = -1e9


@dataclass(frozen=True, slots=True)
class _Scores:
    """The way from the product of queries and keys to the softmax."""

    product: Product
    scale: Scale
    masks: tuple[Mask, ...]
    chain: tuple[Node, ...]
    factors: tuple[Factor, ...] = ()

    def then(self, *nodes: Node) -> _Scores:
        return replace(self, chain=(*self.chain, *nodes))

    def scaled(self, factor: Scale) -> _Scores | Obstacle:
        if any(mask.kind != "bias" for mask in self.masks) and (factor.is_symbolic or factor.number <= 0):
            return Obstacle("masked scores are scaled after masking", "scale the scores before masking them")
        masks = tuple(
            replace(mask, weight=mask.weight.times(factor))
            if mask.kind == "bias"
            else replace(mask, fill=mask.fill * factor.number)
            for mask in self.masks
        )
        return replace(self, scale=self.scale.times(factor), masks=masks)

    def masked(self, mask: Mask) -> _Scores:
        return replace(self, masks=(*self.masks, mask))

    def times(self, factor: Factor) -> _Scores | Obstacle:
        if self.masks:
            return Obstacle(
                "masked scores are scaled by a tensor after masking", "scale the scores before masking them"
            )
        return replace(self, factors=(*self.factors, factor))


@dataclass(frozen=True, slots=True)
class _Weights:
    """The way from the softmax to the product with the values."""

    product: Product
    labels: tuple[str, ...]
    chain: tuple[Node, ...]


def read_attention(softmax: Node) -> HandWritten | Obstacle | None:
    """Return the attention around ``softmax``, why it cannot be rewritten, or None if there is none."""
    tensor, written_out = tensor_of(softmax), read_softmax(softmax)
    if tensor is None or written_out is None:
        return None
    dim = written_out.dim
    scores = _read_scores(written_out.source, written_out.reader, dim - tensor.dim())
    if scores is None:
        return None
    if isinstance(scores, _Scores):
        scores = scores.then(*written_out.nodes)
    product = scores.product if isinstance(scores, _Scores) else None
    weights = _read_weights(softmax, product.labels if product else tuple(map(str, range(tensor.dim()))))
    if weights is None:
        return None
    for each in (scores, weights):
        if isinstance(each, Obstacle):
            return each
    assert isinstance(scores, _Scores) and isinstance(weights, _Weights)
    return _arranged(softmax, scores, weights, scores.product.labels[dim])


def _arranged(softmax: Node, scores: _Scores, weights: _Weights, column: str) -> HandWritten | Obstacle | None:
    """Name the axes, order the operands by them and check that nothing else depends on what goes away."""
    first, second = scores.product, weights.product
    sides = [(first.left, first.left_labels), (first.right, first.right_labels)]
    if column in first.left_labels:
        sides.reverse()
    (query, query_labels), (key, key_labels) = sides
    if column in query_labels:
        return None
    rows = [label for label in first.labels if label not in key_labels]
    batch = tuple(label for label in first.labels if label in query_labels and label in key_labels)
    if len(rows) != 1 or len(batch) + 2 != len(first.labels):
        return Obstacle("query and key do not share their batch axes", "expand key and value to the query's heads")

    on_left = second.left is weights.chain[-1]
    local = second.left_labels if on_left else second.right_labels
    names = dict(zip(local, weights.labels))
    value, value_labels = (second.right, second.right_labels) if on_left else (second.left, second.left_labels)
    value_labels = tuple(names.get(label, "channel") for label in value_labels)
    output_labels = tuple(names.get(label, "channel") for label in second.labels)
    if names[second.contracted] != column:
        return None
    if set(value_labels) != {*batch, column, "channel"} or set(output_labels) != {*batch, rows[0], "channel"}:
        return Obstacle("weights and values do not share their batch axes", "expand value to the query's heads")

    query_operand, query_scale = _peeled(query, first.node, second.node)
    key_operand, key_scale = _peeled(key, first.node, second.node)
    wanted = (
        (query_operand, query_labels, (*batch, rows[0], first.contracted)),
        (key_operand, key_labels, (*batch, column, first.contracted)),
        (Operand(value, tuple(range(len(value_labels))), second.node), value_labels, (*batch, column, "channel")),
    )
    sizes = dict(zip(first.labels, sizes_of(softmax)))
    ordered = [_ordered(operand, labels, order, sizes) for operand, labels, order in wanted]
    operands = [operand for operand in ordered if isinstance(operand, Operand)]
    if len(operands) != 3 or not _same_sizes(sizes_of(softmax), sizes_of(first.node)):
        return Obstacle("query, key, value and mask differ in their batch sizes", "expand them to the same batch")

    chain = (*scores.chain, *weights.chain)
    plan = HandWritten(
        output=second.node,
        chain=chain,
        aside=tuple(_aside(chain, second.node)),
        query=operands[0],
        key=operands[1],
        value=operands[2],
        masks=scores.masks,
        mask_axes=tuple(first.labels.index(label) for label in (*batch, rows[0], column)),
        scale=scores.scale.times(query_scale).times(key_scale),
        factors=scores.factors,
        output_axes=tuple((*batch, rows[0], "channel").index(label) for label in output_labels),
        dtype=_compute_dtype(operands, scores.masks, first.node, second.node),
    )
    return _obstacle_around(plan) or plan


def _obstacle_around(plan: HandWritten) -> Obstacle | None:
    """Return why the nodes of ``plan`` cannot go away: another reader, or an operand that is overwritten meanwhile."""
    gone = {plan.output, *plan.chain, *plan.aside}
    reads = [(operand.node, operand.reader) for operand in (plan.query, plan.key, plan.value)]
    reads += [(mask.node, mask.reader) for mask in plan.masks]
    reads += [(factor.node, factor.reader) for factor in plan.factors]
    if any(node in plan.aside for node, _ in reads):
        return Obstacle("a mask or a scale is made of the scores", "make it of the inputs")
    for node in plan.chain:
        for user in node.users:
            if user not in gone:
                use = "returned" if user.op == "output" else f"also used by {user.name}"
                return Obstacle(f"scores or attention weights are {use}", "return the attention's output only")
    for node, reader in reads:
        if is_written(node, reader, plan.output, plan.chain):
            return Obstacle(f"{node.name} is overwritten before the attention ends", "avoid in-place operations")
    return None


def _aside(chain: Sequence[Node], output: Node) -> Iterator[Node]:
    """Yield what reads ``chain`` and leads to it, to ``output``, or nowhere; everything else stays."""
    found: set[Node] = set()
    for node in chain:
        for user in node.users:
            branch = _branch(user, {output, *chain}, found)
            yield from branch - found
            found |= branch


def _branch(node: Node, gone: set[Node], found: set[Node]) -> set[Node]:
    """Return ``node`` and all that it leads to before ``gone``; nothing where it leads elsewhere, or writes."""
    if node in gone or node in found:
        return set()
    branch, waiting = {node}, [node]
    while waiting:
        each = waiting.pop()
        if each.op not in ("call_function", "call_method") or is_inplace(each) or each.is_impure():
            return set()
        ahead = [user for user in each.users if user not in gone and user not in branch]
        branch.update(ahead)
        waiting += ahead
    return branch


def _read_scores(x: Argument, reader: Node, axis: int, steps: int = MAX_STEPS) -> _Scores | Obstacle | None:
    """Read upwards from ``x`` to a product, as ``reader`` sees it: after the last in-place operation before it.

    ``axis`` is that of the softmax, counted from the end.
    """
    if not isinstance(x, Node) or steps == 0:
        return None
    node = x
    while writers := [
        user for user in node.users if user < reader and is_inplace(user) and first_argument(user) is node
    ]:
        node = max(writers)
    if (product := read_product(node)) is not None:
        return _of_product(product)
    if (source := _cast_source(node)) is not None:
        return _extend(_read_scores(source, node, axis, steps - 1), node)
    if (scaling := _scaling(node)) is not None:
        inner = _extend(_read_scores(scaling[0], node, axis, steps - 1), node)
        return inner.scaled(scaling[1]) if isinstance(inner, _Scores) else inner
    obstacle: Obstacle | None = None
    for scaled, factor in _scalings_by_tensors(node, axis):
        inner = _extend(_read_scores(scaled, node, axis, steps - 1), node)
        if isinstance(inner, _Scores):
            return inner.times(factor)
        obstacle = obstacle or inner
    for masked, mask, constants in _maskings(node, axis):
        inner = _extend(_read_scores(masked, node, axis, steps - 1), *constants, node)
        if isinstance(inner, _Scores):
            if mask is not None and mask.kind != "bias" and mask.fill > LARGEST_FILL:
                return Obstacle(f"masked scores are filled with {mask.fill:g}", "fill them with -inf")
            return inner if mask is None else inner.masked(mask)
        obstacle = obstacle or inner
    return obstacle or _unreadable(node, axis, steps)


def _unreadable(node: Node, axis: int, steps: int) -> Obstacle | None:
    """Return an obstacle if scores flow into ``node``, an operation that SDPA cannot express."""
    for source in node.all_input_nodes if steps > 2 and node.op != "placeholder" else ():
        if isinstance(_read_scores(source, node, axis, min(steps - 1, 2)), _Scores):
            if ARITHMETIC.get(target_name(node)) in ("mul", "div"):
                return Obstacle("scores are scaled by a tensor, keys apart", "scale the keys instead")
            return Obstacle(f"{target_name(node)} between the scores and their softmax")
    return None


def _extend(scores: _Scores | Obstacle | None, *nodes: Node) -> _Scores | Obstacle | None:
    return scores.then(*nodes) if isinstance(scores, _Scores) else scores


def _of_product(product: Product) -> _Scores | Obstacle | None:
    """Return the scores that ``product`` is by itself; baddbmm also scales and adds."""
    node = product.node
    scores = _Scores(product, Scale(), (), (node,))
    if target_name(node) != "baddbmm":
        return scores
    alpha = _scale_by(argument(node, 4, "alpha", default=1))
    beta = _scale_by(argument(node, 3, "beta", default=1))
    added = argument(node, 0, "input")
    if alpha is None or beta is None or not isinstance(added, Node):
        return Obstacle("baddbmm with a factor that is not a number")
    scores = replace(scores, scale=alpha)
    if beta == Scale(0.0):
        return scores
    return scores.masked(Mask(added, "bias", node, weight=beta))


def _scalings_by_tensors(node: Node, axis: int) -> Iterator[tuple[Node, Factor]]:
    """Yield the ways to read ``node`` as scores times, or divided by, a tensor that is the same along ``axis``."""
    kind = ARITHMETIC.get(target_name(node))
    if kind not in ("mul", "div") or len(node.args) != 2 or node.kwargs:
        return
    first, second = node.args
    for scores, factor in (
        ((first, second), (second, first)) if kind == "mul" and not is_inplace(node) else ((first, second),)
    ):
        if isinstance(scores, Node) and isinstance(factor, Node) and _is_same_along(axis, factor, scores):
            yield scores, Factor(factor, kind == "div", node)


def _is_same_along(axis: int, tensor: Node, scores: Node) -> bool:
    """True where ``tensor`` does not change along ``axis``, counted from the end, of ``scores``, to which it fits."""
    sizes = sizes_of(tensor)
    is_real = (value := tensor_of(tensor)) is not None and value.is_floating_point()
    return is_real and len(sizes) <= len(sizes_of(scores)) and (len(sizes) < -axis or same_size(sizes[axis], 1))


def _maskings(node: Node, axis: int) -> Iterator[tuple[Argument, Mask | None, tuple[Node, ...]]]:
    """Yield the ways to read ``node`` as masked scores: the scores, the mask (None: no effect), constants used."""
    name = target_name(node)
    kind = ARITHMETIC.get(name)
    if kind in ("add", "sub") and len(node.args) == 2 and node.kwargs.keys() <= {"alpha"}:
        weight = _scale_by(node.kwargs.get("alpha", 1))
        sides = [node.args]
        # What is written in place must be the scores; a negative or weighted score is no score.
        if kind == "add" and not is_inplace(node) and "alpha" not in node.kwargs:
            sides.append((node.args[1], node.args[0]))
        for scores, added in sides:
            if isinstance(_number(added), float):
                # The same number on every score does not change a softmax.
                yield scores, None, _constants(added)
            elif isinstance(scores, Node) and isinstance(added, Node) and _is_same_along(axis, added, scores):
                # Nor does one that is the same along all keys, such as the maximum.
                yield scores, None, ()
            elif isinstance(added, Node) and tensor_of(added) is not None and weight is not None:
                sign = Scale(-1.0 if kind == "sub" else 1.0)
                yield scores, Mask(added, "bias", node, weight=weight.times(sign)), ()
    elif name in ("masked_fill", "masked_fill_"):
        where, fill = argument(node, 1, "mask"), argument(node, 2, "value")
        if isinstance(where, Node) and isinstance(value := _number(fill), float):
            yield argument(node, 0, "input"), Mask(where, "drop", node, value), _constants(fill)
    elif name == "where" and len(node.args) == 3:
        condition, kept, other = node.args
        if node.op == "call_method":
            condition, kept = kept, condition
        if isinstance(condition, Node) and isinstance(value := _number(other), float):
            yield kept, Mask(condition, "keep", node, value), _constants(other)
        elif isinstance(condition, Node) and isinstance(value := _number(kept), float):
            yield other, Mask(condition, "drop", node, value), _constants(kept)


def _read_weights(softmax: Node, labels: tuple[str, ...]) -> _Weights | Obstacle | None:
    """Read downwards from ``softmax`` to a product; ``labels`` names its axes."""
    node, chain = softmax, [softmax]
    obstacle: Obstacle | None = None
    while True:
        for user in node.users:
            if (product := read_product(user)) is not None and (product.left is node) != (product.right is node):
                return obstacle or _Weights(product, labels, tuple(chain))
        for user in node.users:
            if _cast_source(user) is node:
                break
            if (permutation := permutation_of(user)) is not None:
                labels = tuple(labels[axis] for axis in permutation[1])
                break
            if target_name(user) in ("dropout", "dropout_") and first_argument(user) is node:
                if argument(user, 1, "p", default=0.5) != 0 and argument(user, 2, "training", "train", default=True):
                    obstacle = Obstacle("dropout is active on the attention weights", "call model.eval()")
                break
        else:
            for user in node.users:
                if any(read_product(reader) is not None for reader in user.users):
                    return Obstacle(f"{target_name(user)} between the softmax and the values")
            return None
        node = user
        chain.append(node)


def _cast_source(node: Node) -> Node | None:
    """Return what ``node`` casts or copies, if both are real floating tensors on one device."""
    source = first_argument(node)
    before, after = tensor_of(source), tensor_of(node)
    if target_name(node) not in CASTS or before is None or after is None:
        return None
    both_float = before.is_floating_point() and after.is_floating_point()
    return source if both_float and before.device == after.device else None


def _scaling(node: Node) -> tuple[Node, Scale] | None:
    """Read ``node`` as a tensor times, or divided by, a number."""
    kind = ARITHMETIC.get(target_name(node))
    if kind not in ("mul", "div") or len(node.args) != 2 or node.kwargs:
        return None
    tensor, by = node.args
    if kind == "mul" and _number(tensor) is not None:
        tensor, by = by, tensor
    scale = _scale_by(by, divides=kind == "div")
    if scale is None or not isinstance(tensor, Node) or tensor_of(tensor) is None:
        return None
    return tensor, scale


def _scale_by(by: Argument, divides: bool = False) -> Scale | None:
    number = _number(by)
    if isinstance(number, Node):
        return Scale(divisors=(number,)) if divides else Scale(multipliers=(number,))
    if number is None or (divides and number == 0):
        return None
    return Scale(1 / number if divides else number)


def _number(x: Argument) -> float | Node | None:
    """Return ``x`` as a float, as the node of a symbolic number, or None where it is neither."""
    if isinstance(x, (int, float)):
        return float(x)
    if not isinstance(x, Node):
        return None
    if isinstance(value_of(x), (int, float, torch.SymInt, torch.SymFloat)):
        return x
    name = target_name(x)
    if name in ("tensor", "scalar_tensor", "full", "full_like"):
        content = argument(x, 1, "fill_value") if name.startswith("full") else argument(x, 0, "data", "s")
        return float(content) if isinstance(content, (int, float)) else None
    return None


def _constants(x: Argument) -> tuple[Node, ...]:
    """Return the node of a constant that may read the scores only for their shape."""
    return (x,) if isinstance(x, Node) and target_name(x) == "full_like" else ()


def _peeled(node: Node, reader: Node, end: Node) -> tuple[Operand, Scale]:
    """Look through scales and exact casts of an operand that ``reader`` reads, as far as none is overwritten."""
    scale, axes = Scale(), tuple(range(len(sizes_of(node))))
    best, best_scale = Operand(node, axes, reader), scale
    while not is_inplace(node) and not is_written(node, node, end):
        if (permutation := permutation_of(node)) is not None:
            source, order = permutation
            axes = tuple(order[axis] for axis in axes)
        elif (scaling := _scaling(node)) is not None:
            source, factor = scaling
            scale = scale.times(factor)
        elif (cast := _cast_source(node)) is not None and _is_exact(cast, node):
            source = cast
        else:
            break
        if is_written(source, node, end):
            break
        if permutation is None:
            best, best_scale = Operand(source, axes, node), scale
        node = source
    return best, best_scale


def _ordered(
    operand: Operand, labels: tuple[str, ...], order: tuple[str, ...], sizes: dict[str, int | torch.SymInt]
) -> Operand | None:
    """Return ``operand`` with its axes in ``order``, expanded to ``sizes`` on its batch axes; None if it cannot be."""
    axes = tuple(operand.axes[labels.index(label)] for label in order)
    expanded: list[int] = []
    for axis, label in zip(axes, order[:-2]):
        have, want = sizes_of(operand.node)[axis], sizes[label]
        if same_size(have, want):
            expanded.append(-1)
        elif isinstance(have, int) and have == 1 and isinstance(want, int):
            expanded.append(want)
        else:
            return None
    is_full = all(size == -1 for size in expanded)
    return replace(operand, axes=axes, sizes=None if is_full else (*expanded, -1, -1))


def _compute_dtype(operands: Sequence[Operand], masks: Sequence[Mask], scores: Node, output: Node) -> torch.dtype:
    """Return the smallest dtype that holds every operand as the products saw it (autocast may have rounded it)."""
    seen = [(operand.node, dtype_of(product)) for operand, product in zip(operands, (scores, scores, output))]
    dtypes = [dtype_of(node) if torch.promote_types(dtype_of(node), as_) is as_ else as_ for node, as_ in seen]
    dtypes += [dtype_of(mask.node) for mask in masks if mask.kind == "bias" and dtype_of(mask.node).is_floating_point]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _is_exact(source: Node, cast: Node) -> bool:
    return torch.promote_types(dtype_of(source), dtype_of(cast)) is dtype_of(cast)


def _same_sizes(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))
