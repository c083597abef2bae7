"""Read a softmax in any spelling.

softmax(x, dim)
exp(x) / exp(x).sum(dim, keepdim=True)
exp(x - x.logsumexp(dim, keepdim=True))
exp(log_softmax(x, dim))
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node
from torch.fx.node import Argument

from svg2_compile.passes.nodes import argument, first_argument, sizes_of, target_name


@dataclass(frozen=True, slots=True)
class Softmax:
    """What a softmax is of, and the nodes that it consists of but for the last."""

    source: Argument
    dim: int
    """Counted from the front."""
    reader: Node
    """The first node that reads ``source``."""
    nodes: tuple[Node, ...] = ()


def read_softmax(node: Node) -> Softmax | None:
    """Return the softmax whose result ``node`` is, None where it is none."""
    name = target_name(node)
    if name == "softmax":
        return _of(node, node)
    if name in ("truediv", "div"):
        return _divided(node)
    if name != "exp":
        return None
    inner = first_argument(node)
    if inner is None:
        return None
    if target_name(inner) == "log_softmax":
        return _of(inner, inner, inner)
    if target_name(inner) == "sub" and len(inner.args) == 2:
        source, total = inner.args
        if isinstance(total, Node) and target_name(total) == "logsumexp" and first_argument(total) is source:
            return _of(total, inner, total, inner)
    return None


def _divided(node: Node) -> Softmax | None:
    exponential, total = argument(node, 0, "input"), argument(node, 1, "other")
    if not isinstance(exponential, Node) or not isinstance(total, Node) or target_name(exponential) != "exp":
        return None
    if target_name(total) != "sum" or first_argument(total) is not exponential or node.kwargs:
        return None
    return _of(total, exponential, exponential, total, source=first_argument(exponential))


def _of(over: Node, reader: Node, *nodes: Node, source: Node | None = None) -> Softmax | None:
    """Return the softmax along the axis that ``over`` names; one that is summed over must stay."""
    dim = argument(over, 1, "dim")
    rank = len(sizes_of(over))
    if isinstance(dim, list | tuple) and len(dim) == 1:
        (dim,) = dim
    keeps = target_name(over) in ("softmax", "log_softmax") or argument(over, 2, "keepdim", default=False) is True
    if not isinstance(dim, int) or not keeps:
        return None
    return Softmax(first_argument(over) if source is None else source, dim % rank, reader, nodes)
