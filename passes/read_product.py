"""Read the product of two tensors, in any spelling, as an einsum."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from svg2_compile.passes.nodes import argument, sizes_of, target_name


@dataclass(frozen=True, slots=True)
class Product:
    """A product of two tensors as an einsum: one label per axis, exactly one label contracted."""

    node: Node
    left: Node
    right: Node
    left_labels: tuple[str, ...]
    right_labels: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def contracted(self) -> str:
        """The label that is summed over."""
        return next(label for label in self.left_labels if label not in self.labels)


def read_product(node: Node) -> Product | None:
    """Read ``node`` as a product of two tensors, in any spelling."""
    name = target_name(node)
    if name == "einsum":
        return _einsum(node)
    if name not in ("matmul", "bmm", "mm", "baddbmm"):
        return None
    first = 1 if name == "baddbmm" else 0
    left, right = argument(node, first, "input", "batch1"), argument(node, first + 1, "other", "mat2", "batch2")
    rank = len(sizes_of(left))
    if not isinstance(left, Node) or not isinstance(right, Node) or rank < 2 or rank != len(sizes_of(right)):
        return None
    batch = tuple(f"batch{axis}" for axis in range(rank - 2))
    return Product(node, left, right, (*batch, "i", "c"), (*batch, "c", "j"), (*batch, "i", "j"))


def _einsum(node: Node) -> Product | None:
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
    dots = {len(sizes_of(x)) - len(s.replace("...", "")) for x, s in ((left, left_letters), (right, right_letters))}
    hidden = max(dots) if "..." in inputs else 0
    labels = [_labels(letters, hidden) for letters in (left_letters, right_letters, output)]
    left_labels, right_labels, output_labels = labels
    if len(left_labels) != len(sizes_of(left)) or len(right_labels) != len(sizes_of(right)):
        return None
    contracted = (set(left_labels) | set(right_labels)) - set(output_labels)
    is_product = len(contracted) == 1 and contracted <= set(left_labels) & set(right_labels)
    if not is_product or any(len(set(each)) != len(each) for each in labels):
        return None
    return Product(node, left, right, left_labels, right_labels, output_labels)


def _labels(letters: str, hidden: int) -> tuple[str, ...]:
    """Return one label per axis of an einsum operand; an ellipsis stands for ``hidden`` axes."""
    before, dots, after = letters.partition("...")
    return (*before, *(f"batch{axis}" for axis in range(hidden if dots else 0)), *after)
