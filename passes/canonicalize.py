"""Turn hand-written softmax attention into scaled_dot_product_attention, in place.

Before::

    transpose = k.transpose(-1, -2)
    matmul = q @ transpose
    mul = matmul * 0.125
    masked_fill = mul.masked_fill(mask, -inf)
    softmax = torch.nn.functional.softmax(masked_fill, dim=-1)
    output = softmax @ v

After::

    logical_not = torch.ops.aten.logical_not.default(mask)
    scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention(
        q, k, v, attn_mask=logical_not, scale=0.125)
    output = torch.ops.aten.contiguous.default(scaled_dot_product_attention)

A softmax is the anchor. Upwards, casts, scales and masks are read off until the product of queries and keys; downwards,
casts, permutations and inactive dropout until the product with the values. Every product is read as an einsum, so all
spellings are one case. The output keeps dtype and layout and equals the old one to rounding, except in rows whose keys
are all masked: zeros where the hand-written form gave NaN.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from svg2_compile.passes.nodes import (
    argument,
    emit,
    first_argument,
    is_inplace,
    is_written,
    module_path,
    permutation_of,
    same_size,
    shape_of,
    target_name,
    tensor_of,
    value_mode,
    value_of,
)
from svg2_compile.passes.records import Rejection, size_hint

log = logging.getLogger(__name__)

aten = torch.ops.aten

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
# These give the same result, layout included, however their input lies in memory.
LAYOUT_BLIND = ("reshape", "flatten", "contiguous", "linear")


@dataclass(frozen=True, slots=True)
class CanonicalizeResult:
    """What became an SDPA node, and what looked like attention but did not."""

    rewritten: tuple[str, ...]
    """Names of the new SDPA nodes, in program order."""

    declined: tuple[Rejection, ...]


@dataclass(frozen=True, slots=True)
class _Obstacle:
    """Why something that looks like attention cannot be an SDPA node."""

    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class _Scale:
    """A factor: a number, times or divided by numbers known only at run time (a symbolic head dim)."""

    number: float = 1.0
    multipliers: tuple[Node, ...] = ()
    divisors: tuple[Node, ...] = ()

    def times(self, other: _Scale) -> _Scale:
        return _Scale(self.number * other.number, self.multipliers + other.multipliers, self.divisors + other.divisors)

    @property
    def is_symbolic(self) -> bool:
        return bool(self.multipliers or self.divisors)


@dataclass(frozen=True, slots=True)
class _Mask:
    """What is done to the scores besides scaling: a bias is added, or scores are filled where ``node`` says so."""

    node: Node
    kind: Literal["bias", "keep", "drop"]
    reader: Node
    fill: float = -math.inf
    weight: _Scale = _Scale()


@dataclass(frozen=True, slots=True)
class _Product:
    """A product of two tensors as an einsum: one label per axis, exactly one label contracted."""

    node: Node
    left: Node
    right: Node
    left_labels: tuple[str, ...]
    right_labels: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def contracted(self) -> str:
        return next(label for label in self.left_labels if label not in self.labels)


@dataclass(frozen=True, slots=True)
class _Scores:
    """The way from the product of queries and keys to the softmax."""

    product: _Product
    scale: _Scale
    masks: tuple[_Mask, ...]
    chain: tuple[Node, ...]

    def then(self, *nodes: Node) -> _Scores:
        return replace(self, chain=(*self.chain, *nodes))

    def scaled(self, factor: _Scale) -> _Scores | _Obstacle:
        if any(mask.kind != "bias" for mask in self.masks) and (factor.is_symbolic or factor.number <= 0):
            return _Obstacle("masked scores are scaled after masking", "scale the scores before masking them")
        masks = tuple(
            replace(mask, weight=mask.weight.times(factor))
            if mask.kind == "bias"
            else replace(mask, fill=mask.fill * factor.number)
            for mask in self.masks
        )
        return replace(self, scale=self.scale.times(factor), masks=masks)

    def masked(self, mask: _Mask) -> _Scores:
        return replace(self, masks=(*self.masks, mask))


@dataclass(frozen=True, slots=True)
class _Weights:
    """The way from the softmax to the product with the values."""

    product: _Product
    labels: tuple[str, ...]
    chain: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class _Operand:
    """A tensor with its axes in the order SDPA wants: ``node.permute(axes)``, then ``expand(sizes)``."""

    node: Node
    axes: tuple[int, ...]
    reader: Node
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Attention:
    """Everything needed to write one SDPA node in place of a hand-written attention."""

    output: Node
    chain: tuple[Node, ...]
    query: _Operand
    key: _Operand
    value: _Operand
    masks: tuple[_Mask, ...]
    mask_axes: tuple[int, ...]
    scale: _Scale
    output_axes: tuple[int, ...]
    dtype: torch.dtype


def canonicalize(gm: GraphModule, min_tokens: int = 0) -> CanonicalizeResult:
    """Turn hand-written softmax attention in ``gm`` into SDPA nodes, in place.

    Args:
        gm: a Dynamo-level graph whose nodes carry values in their meta.
        min_tokens: sequences below it are dense by design, so declining them is nothing to complain about.

    Returns:
        The names of the new nodes, and a rejection for each attention that stays as it is written.

    Promises:
        Twice is once; a graph without hand-written attention is not touched; no guard is added; values are true.
    """
    plans: list[_Attention] = []
    declined: list[Rejection] = []
    for node in gm.graph.nodes:
        match _attention_of(node):
            case _Attention() as plan:
                plans.append(plan)
            case _Obstacle(reason, hint):
                log.debug("%s stays hand-written: %s", node.name, reason)
                by_design = _is_short(node, min_tokens)
                declined.append(Rejection(node.name, module_path(node), reason, hint, by_design))
    # Backwards: an earlier output may be an operand of a later attention, whose plan must not hold a replaced node.
    rewritten = [_write(gm.graph, plan) for plan in reversed(plans)]
    if rewritten:
        gm.graph.lint()
        gm.recompile()
    return CanonicalizeResult(tuple(reversed(rewritten)), tuple(declined))


def _is_short(softmax: Node, min_tokens: int) -> bool:
    """Say whether the softmax is over fewer than ``min_tokens`` keys, or has fewer queries."""
    sizes = [size_hint(size) for size in (shape_of(softmax) or ())[-2:]]
    return any(size is not None and size < min_tokens for size in sizes)


# Reading


def _attention_of(softmax: Node) -> _Attention | _Obstacle | None:
    """Return the attention around ``softmax``, why it cannot be rewritten, or None if there is none."""
    tensor = tensor_of(softmax)
    if target_name(softmax) != "softmax" or tensor is None:
        return None
    dim = argument(softmax, 1, "dim")
    if not isinstance(dim, int):
        return None
    scores = _read_scores(argument(softmax, 0, "input"), softmax)
    if scores is None:
        return None
    product = scores.product if isinstance(scores, _Scores) else None
    weights = _read_weights(softmax, product.labels if product else tuple(map(str, range(tensor.dim()))))
    if weights is None:
        return None
    for each in (scores, weights):
        if isinstance(each, _Obstacle):
            return each
    assert isinstance(scores, _Scores) and isinstance(weights, _Weights)
    return _arranged(softmax, scores, weights, scores.product.labels[dim])


def _arranged(softmax: Node, scores: _Scores, weights: _Weights, column: str) -> _Attention | _Obstacle | None:
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
        return _Obstacle("query and key do not share their batch axes", "expand key and value to the query's heads")

    on_left = second.left is weights.chain[-1]
    local = second.left_labels if on_left else second.right_labels
    names = dict(zip(local, weights.labels))
    value, value_labels = (second.right, second.right_labels) if on_left else (second.left, second.left_labels)
    value_labels = tuple(names.get(label, "channel") for label in value_labels)
    output_labels = tuple(names.get(label, "channel") for label in second.labels)
    if names[second.contracted] != column:
        return None
    if set(value_labels) != {*batch, column, "channel"} or set(output_labels) != {*batch, rows[0], "channel"}:
        return _Obstacle("weights and values do not share their batch axes", "expand value to the query's heads")

    query_operand, query_scale = _peeled(query, first.node, second.node)
    key_operand, key_scale = _peeled(key, first.node, second.node)
    wanted = (
        (query_operand, query_labels, (*batch, rows[0], first.contracted)),
        (key_operand, key_labels, (*batch, column, first.contracted)),
        (_Operand(value, tuple(range(len(value_labels))), second.node), value_labels, (*batch, column, "channel")),
    )
    sizes = dict(zip(first.labels, _sizes(softmax)))
    ordered = [_ordered(operand, labels, order, sizes) for operand, labels, order in wanted]
    operands = [operand for operand in ordered if isinstance(operand, _Operand)]
    if len(operands) != 3 or not _same_sizes(_sizes(softmax), _sizes(first.node)):
        return _Obstacle("query, key, value and mask differ in their batch sizes", "expand them to the same batch")

    chain = (*scores.chain, *weights.chain)
    plan = _Attention(
        output=second.node,
        chain=chain,
        query=operands[0],
        key=operands[1],
        value=operands[2],
        masks=scores.masks,
        mask_axes=tuple(first.labels.index(label) for label in (*batch, rows[0], column)),
        scale=scores.scale.times(query_scale).times(key_scale),
        output_axes=tuple((*batch, rows[0], "channel").index(label) for label in output_labels),
        dtype=_compute_dtype(operands, scores.masks, first.node, second.node),
    )
    return _obstacle_around(plan) or plan


def _obstacle_around(plan: _Attention) -> _Obstacle | None:
    """Return why the nodes of ``plan`` cannot go away: another reader, or an operand that is overwritten meanwhile."""
    for node in plan.chain:
        for user in node.users:
            if user is not plan.output and user not in plan.chain:
                return _Obstacle(
                    f"scores or attention weights are also used by {user.name}", "return the attention's output only"
                )
    reads = [(operand.node, operand.reader) for operand in (plan.query, plan.key, plan.value)]
    reads += [(mask.node, mask.reader) for mask in plan.masks]
    for node, reader in reads:
        if is_written(node, reader, plan.output, plan.chain):
            return _Obstacle(f"{node.name} is overwritten before the attention ends", "avoid in-place operations")
    return None


def _read_scores(x: Argument, reader: Node, steps: int = MAX_STEPS) -> _Scores | _Obstacle | None:
    """Read upwards from ``x`` to a product, as ``reader`` sees it: after the last in-place operation before it."""
    if not isinstance(x, Node) or steps == 0:
        return None
    node = x
    while writers := [
        user for user in node.users if user < reader and is_inplace(user) and first_argument(user) is node
    ]:
        node = max(writers)
    if (product := _product(node)) is not None:
        return _of_product(product)
    if (source := _cast_source(node)) is not None:
        return _extend(_read_scores(source, node, steps - 1), node)
    if (scaling := _scaling(node)) is not None:
        inner = _extend(_read_scores(scaling[0], node, steps - 1), node)
        return inner.scaled(scaling[1]) if isinstance(inner, _Scores) else inner
    obstacle: _Obstacle | None = None
    for masked, mask, constants in _maskings(node):
        inner = _extend(_read_scores(masked, node, steps - 1), *constants, node)
        if isinstance(inner, _Scores):
            if mask is not None and mask.kind != "bias" and mask.fill > LARGEST_FILL:
                return _Obstacle(f"masked scores are filled with {mask.fill:g}", "fill them with -inf")
            return inner if mask is None else inner.masked(mask)
        obstacle = obstacle or inner
    return obstacle or _unreadable(node, steps)


def _unreadable(node: Node, steps: int) -> _Obstacle | None:
    """Return an obstacle if scores flow into ``node``, an operation that SDPA cannot express."""
    for source in node.all_input_nodes if steps > 2 and node.op != "placeholder" else ():
        if isinstance(_read_scores(source, node, min(steps - 1, 2)), _Scores):
            if ARITHMETIC.get(target_name(node)) in ("mul", "div"):
                return _Obstacle("scores are scaled by a tensor", "scale them by a number, or scale the query")
            return _Obstacle(f"{target_name(node)} between the scores and their softmax")
    return None


def _extend(scores: _Scores | _Obstacle | None, *nodes: Node) -> _Scores | _Obstacle | None:
    return scores.then(*nodes) if isinstance(scores, _Scores) else scores


def _of_product(product: _Product) -> _Scores | _Obstacle | None:
    """Return the scores that ``product`` is by itself; baddbmm also scales and adds."""
    node = product.node
    scores = _Scores(product, _Scale(), (), (node,))
    if target_name(node) != "baddbmm":
        return scores
    alpha = _scale_by(argument(node, 4, "alpha", default=1))
    beta = _scale_by(argument(node, 3, "beta", default=1))
    added = argument(node, 0, "input")
    if alpha is None or beta is None or not isinstance(added, Node):
        return _Obstacle("baddbmm with a factor that is not a number")
    scores = replace(scores, scale=alpha)
    if beta == _Scale(0.0):
        return scores
    return scores.masked(_Mask(added, "bias", node, weight=beta))


def _maskings(node: Node) -> Iterator[tuple[Argument, _Mask | None, tuple[Node, ...]]]:
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
            elif isinstance(added, Node) and tensor_of(added) is not None and weight is not None:
                sign = _Scale(-1.0 if kind == "sub" else 1.0)
                yield scores, _Mask(added, "bias", node, weight=weight.times(sign)), ()
    elif name in ("masked_fill", "masked_fill_"):
        where, fill = argument(node, 1, "mask"), argument(node, 2, "value")
        if isinstance(where, Node) and isinstance(value := _number(fill), float):
            yield argument(node, 0, "input"), _Mask(where, "drop", node, value), _constants(fill)
    elif name == "where" and len(node.args) == 3:
        condition, kept, other = node.args
        if node.op == "call_method":
            condition, kept = kept, condition
        if isinstance(condition, Node) and isinstance(value := _number(other), float):
            yield kept, _Mask(condition, "keep", node, value), _constants(other)
        elif isinstance(condition, Node) and isinstance(value := _number(kept), float):
            yield other, _Mask(condition, "drop", node, value), _constants(kept)


def _read_weights(softmax: Node, labels: tuple[str, ...]) -> _Weights | _Obstacle | None:
    """Read downwards from ``softmax`` to a product; ``labels`` names its axes."""
    node, chain = softmax, [softmax]
    obstacle: _Obstacle | None = None
    while True:
        for user in node.users:
            if (product := _product(user)) is not None and (product.left is node) != (product.right is node):
                return obstacle or _Weights(product, labels, tuple(chain))
        for user in node.users:
            if _cast_source(user) is node:
                break
            if (permutation := permutation_of(user)) is not None:
                labels = tuple(labels[axis] for axis in permutation[1])
                break
            if target_name(user) in ("dropout", "dropout_") and first_argument(user) is node:
                if argument(user, 1, "p", default=0.5) != 0 and argument(user, 2, "training", "train", default=True):
                    obstacle = _Obstacle("dropout is active on the attention weights", "call model.eval()")
                break
        else:
            for user in node.users:
                if any(_product(reader) is not None for reader in user.users):
                    return _Obstacle(f"{target_name(user)} between the softmax and the values")
            return None
        node = user
        chain.append(node)


def _product(node: Node) -> _Product | None:
    """Read ``node`` as a product of two tensors, in any spelling."""
    name = target_name(node)
    if name == "einsum":
        return _einsum(node)
    if name not in ("matmul", "bmm", "mm", "baddbmm"):
        return None
    first = 1 if name == "baddbmm" else 0
    left, right = argument(node, first, "input", "batch1"), argument(node, first + 1, "other", "mat2", "batch2")
    rank = len(_sizes(left))
    if not isinstance(left, Node) or not isinstance(right, Node) or rank < 2 or rank != len(_sizes(right)):
        return None
    batch = tuple(f"batch{axis}" for axis in range(rank - 2))
    return _Product(node, left, right, (*batch, "i", "c"), (*batch, "c", "j"), (*batch, "i", "j"))


def _einsum(node: Node) -> _Product | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    left, right = operands
    if inputs.count(",") != 1 or not isinstance(left, Node) or not isinstance(right, Node):
        return None
    left_letters, right_letters = inputs.split(",")
    dots = {len(_sizes(x)) - len(s.replace("...", "")) for x, s in ((left, left_letters), (right, right_letters))}
    hidden = max(dots) if "..." in inputs else 0
    labels = [_labels(letters, hidden) for letters in (left_letters, right_letters, output)]
    left_labels, right_labels, output_labels = labels
    if len(left_labels) != len(_sizes(left)) or len(right_labels) != len(_sizes(right)):
        return None
    contracted = (set(left_labels) | set(right_labels)) - set(output_labels)
    is_product = len(contracted) == 1 and contracted <= set(left_labels) & set(right_labels)
    if not is_product or any(len(set(each)) != len(each) for each in labels):
        return None
    return _Product(node, left, right, left_labels, right_labels, output_labels)


def _labels(letters: str, hidden: int) -> tuple[str, ...]:
    """Return one label per axis of an einsum operand; an ellipsis stands for ``hidden`` axes."""
    before, dots, after = letters.partition("...")
    return (*before, *(f"batch{axis}" for axis in range(hidden if dots else 0)), *after)


def _cast_source(node: Node) -> Node | None:
    """Return what ``node`` casts or copies, if both are real floating tensors on one device."""
    source = first_argument(node)
    before, after = tensor_of(source), tensor_of(node)
    if target_name(node) not in CASTS or before is None or after is None:
        return None
    both_float = before.is_floating_point() and after.is_floating_point()
    return source if both_float and before.device == after.device else None


def _scaling(node: Node) -> tuple[Node, _Scale] | None:
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


def _scale_by(by: Argument, divides: bool = False) -> _Scale | None:
    number = _number(by)
    if isinstance(number, Node):
        return _Scale(divisors=(number,)) if divides else _Scale(multipliers=(number,))
    if number is None or (divides and number == 0):
        return None
    return _Scale(1 / number if divides else number)


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


def _peeled(node: Node, reader: Node, end: Node) -> tuple[_Operand, _Scale]:
    """Look through scales and exact casts of an operand that ``reader`` reads, as far as none is overwritten."""
    scale, axes = _Scale(), tuple(range(len(_sizes(node))))
    best, best_scale = _Operand(node, axes, reader), scale
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
            best, best_scale = _Operand(source, axes, node), scale
        node = source
    return best, best_scale


def _ordered(
    operand: _Operand, labels: tuple[str, ...], order: tuple[str, ...], sizes: dict[str, int | torch.SymInt]
) -> _Operand | None:
    """Return ``operand`` with its axes in ``order``, expanded to ``sizes`` on its batch axes; None if it cannot be."""
    axes = tuple(operand.axes[labels.index(label)] for label in order)
    expanded: list[int] = []
    for axis, label in zip(axes, order[:-2]):
        have, want = _sizes(operand.node)[axis], sizes[label]
        if same_size(have, want):
            expanded.append(-1)
        elif isinstance(have, int) and have == 1 and isinstance(want, int):
            expanded.append(want)
        else:
            return None
    is_full = all(size == -1 for size in expanded)
    return replace(operand, axes=axes, sizes=None if is_full else (*expanded, -1, -1))


def _compute_dtype(operands: Sequence[_Operand], masks: Sequence[_Mask], scores: Node, output: Node) -> torch.dtype:
    """Return the smallest dtype that holds every operand as the products saw it (autocast may have rounded it)."""
    seen = [(operand.node, _dtype(product)) for operand, product in zip(operands, (scores, scores, output))]
    dtypes = [_dtype(node) if torch.promote_types(_dtype(node), as_) is as_ else as_ for node, as_ in seen]
    dtypes += [_dtype(mask.node) for mask in masks if mask.kind == "bias" and _dtype(mask.node).is_floating_point]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _is_exact(source: Node, cast: Node) -> bool:
    return torch.promote_types(_dtype(source), _dtype(cast)) is _dtype(cast)


def _tensor(node: Node) -> Tensor:
    tensor = tensor_of(node)
    assert tensor is not None, node
    return tensor


def _dtype(node: Node) -> torch.dtype:
    return _tensor(node).dtype


def _sizes(x: Argument) -> tuple[int | torch.SymInt, ...]:
    tensor = tensor_of(x)
    return () if tensor is None else tuple(tensor.shape)


def _same_sizes(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


# Writing


def _write(graph: Graph, plan: _Attention) -> str:
    """Put an SDPA node in place of ``plan`` and return its name."""
    old = plan.output
    rank = len(plan.query.axes)
    with value_mode(_tensor(old)), graph.inserting_before(old):
        query, key, value = (_write_operand(graph, plan, each) for each in (plan.query, plan.key, plan.value))
        for number in plan.scale.multipliers:
            query = emit(graph, aten.mul.Tensor, query, number, like=old)
        for number in plan.scale.divisors:
            query = emit(graph, aten.div.Tensor, query, number, like=old)
        mask = _write_mask(graph, plan)
        sdpa = emit(
            graph,
            torch._C._nn.scaled_dot_product_attention,
            query,
            key,
            value,
            like=old,
            **({} if mask is None else {"attn_mask": mask}),
            scale=plan.scale.number,
        )
        new = sdpa
        for _ in range(4 - rank):
            new = emit(graph, aten.squeeze.dim, new, 0, like=old)
        new = _cast(graph, _permuted(graph, new, plan.output_axes, old), _dtype(old), old)
        if not _forgets_layout(old):
            new = emit(graph, aten.contiguous.default, new, like=old)
    old.replace_all_uses_with(new)
    _erase(graph, (*plan.chain, old))
    return sdpa.name


def _write_operand(graph: Graph, plan: _Attention, operand: _Operand) -> Node:
    node = _cast(graph, _permuted(graph, operand.node, operand.axes, plan.output), plan.dtype, plan.output)
    if operand.sizes is not None:
        node = emit(graph, aten.expand.default, node, operand.sizes, like=plan.output)
    return _lifted(graph, node, 4, plan.output)


def _write_mask(graph: Graph, plan: _Attention) -> Node | None:
    """Write one mask that does what all masks of ``plan`` do: booleans where possible, else numbers to add."""
    like = plan.output
    lowest = max(torch.finfo(plan.dtype).min, torch.finfo(torch.float32).min)
    keep: Node | None = None
    bias: Node | None = None
    for mask in plan.masks:
        node = mask.node
        is_plain = plan.mask_axes == tuple(range(len(plan.mask_axes)))
        node = _lifted(graph, node, 2 if is_plain else len(plan.mask_axes), like)
        if not is_plain:
            node = _permuted(graph, node, plan.mask_axes, like)
        if mask.kind != "bias" and mask.fill == -math.inf:
            node = emit(graph, aten.logical_not.default, node, like=like) if mask.kind == "drop" else node
            keep = node if keep is None else emit(graph, aten.logical_and.default, keep, node, like=like)
            continue
        if mask.kind != "bias":
            fill = max(mask.fill, lowest)
            values = (fill, 0.0) if mask.kind == "drop" else (0.0, fill)
            node = emit(graph, aten.where.Scalar, node, *values, like=like)
        node = _cast(graph, node, plan.dtype, like)
        if mask.weight.number != 1:
            node = emit(graph, aten.mul.Tensor, node, mask.weight.number, like=like)
        for number in mask.weight.multipliers:
            node = emit(graph, aten.mul.Tensor, node, number, like=like)
        for number in mask.weight.divisors:
            node = emit(graph, aten.div.Tensor, node, number, like=like)
        bias = node if bias is None else emit(graph, aten.add.Tensor, bias, node, like=like)
    if keep is not None and bias is not None:
        return emit(graph, aten.where.ScalarOther, keep, bias, -math.inf, like=like)
    return bias if keep is None else keep


def _permuted(graph: Graph, node: Node, axes: tuple[int, ...], like: Node) -> Node:
    """Permute ``node``; where it undoes a permutation that is already there, return that one's source."""
    source, order = node, axes
    while order != tuple(range(len(order))):
        permutation = permutation_of(source)
        if permutation is None or is_inplace(source):
            return emit(graph, aten.permute.default, node, axes, like=like)
        source, inner = permutation
        order = tuple(inner[axis] for axis in order)
    return source


def _cast(graph: Graph, node: Node, dtype: torch.dtype, like: Node) -> Node:
    return node if _dtype(node) is dtype else emit(graph, aten.to.dtype, node, dtype, like=like)


def _lifted(graph: Graph, node: Node, rank: int, like: Node) -> Node:
    for _ in range(rank - len(_sizes(node))):
        node = emit(graph, aten.unsqueeze.default, node, 0, like=like)
    return node


def _forgets_layout(node: Node) -> bool:
    """Say whether no reader can tell how ``node`` lies in memory."""
    return all(
        target_name(user) in LAYOUT_BLIND or (permutation_of(user) is not None and _forgets_layout(user))
        for user in node.users
    )


def _erase(graph: Graph, nodes: Sequence[Node]) -> None:
    """Erase ``nodes``, then what only they needed; nothing that writes, and nothing that somebody still reads."""
    unneeded = {source: None for node in nodes for source in node.all_input_nodes if source not in nodes}
    for node in sorted(nodes, reverse=True):
        graph.erase_node(node)
    while unneeded:
        node, _ = unneeded.popitem()
        is_call = node.op in ("call_function", "call_method")
        if is_call and not node.users and not is_inplace(node) and not node.is_impure():
            unneeded |= dict.fromkeys(node.all_input_nodes)
            graph.erase_node(node)
