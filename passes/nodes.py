"""Read and write nodes of Dynamo-level graphs: values, arguments, attention calls.

Dynamo keeps a node's fake value in ``meta["example_value"]``, ``torch.export`` in ``meta["val"]``; both are understood.
Nothing here adds a guard: sizes are compared as ints or as text, values are computed with guards suppressed.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node
from torch.fx.node import Argument, map_arg

from svg2_compile.passes.dynamo_graphs import SDPA, FakeTensor, OpOverload, memory_of, name_of_op, schema_of

VALUE_KEYS = ("example_value", "val")
COPIED_META = ("nn_module_stack", "stack_trace")
SDPA_TARGETS = (
    SDPA,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
INPLACE_FUNCTIONS = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.imatmul,
    operator.setitem,
)

NAMED_LIKE_KEYWORDS = (operator.and_, operator.or_, operator.not_, operator.is_)
"""Their underscore does not say that they write."""


def value_of(node: Node) -> Any:
    """Return what ``node`` produces while tracing (fake tensor, SymInt, number ...), None when unknown."""
    return next((node.meta[key] for key in VALUE_KEYS if key in node.meta), None)


def set_value(node: Node, value: object) -> None:
    """Store ``value`` under the meta keys that the other nodes of the graph use."""
    for other in node.graph.nodes:
        keys = [key for key in VALUE_KEYS if key in other.meta]
        if keys and other is not node:
            break
    else:
        keys = ["example_value"]
    for key in keys:
        node.meta[key] = value


def tensor_of(x: Any) -> Tensor | None:
    """Return the fake tensor that the argument ``x`` stands for, None for anything else."""
    value = value_of(x) if isinstance(x, Node) else x
    return value if isinstance(value, Tensor) else None


def shape_of(x: Any) -> tuple[int | SymInt, ...] | None:
    """Return the sizes of the tensor argument ``x``, None for anything else."""
    tensor = tensor_of(x)
    return None if tensor is None else tuple(tensor.shape)


def sizes_of(x: Any) -> tuple[int | SymInt, ...]:
    """Return the sizes of the tensor argument ``x``, none for anything else."""
    return shape_of(x) or ()


def dtype_of(node: Node) -> torch.dtype:
    """Return the dtype of a node that gives a tensor."""
    tensor = tensor_of(node)
    assert tensor is not None, node
    return tensor.dtype


def same_size(a: int | SymInt, b: int | SymInt) -> bool:
    """Say whether two sizes are known to be equal, without adding a guard; "not known" is False."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


def target_name(node: Node) -> str:
    """Return the bare name of the called function, method or operator; "" for a node that calls nothing."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, OpOverload):
        return name_of_op(node.target).split("::")[-1]
    return str(getattr(node.target, "__name__", node.target))


def argument(node: Node, index: int, *names: str, default: Any = None) -> Any:
    """Return the argument of ``node`` at ``index`` or under the first of ``names`` that is given, else ``default``."""
    if index < len(node.args):
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def is_inplace(node: Node) -> bool:
    """Say whether ``node`` may write into one of its arguments."""
    if isinstance(node.target, OpOverload):
        return bool(schema_of(node.target).is_mutable)
    name = target_name(node)
    if name.endswith("_") and not name.endswith("__") and node.target not in NAMED_LIKE_KEYWORDS:
        return True
    return node.target in INPLACE_FUNCTIONS or node.kwargs.get("out") is not None or bool(node.kwargs.get("inplace"))


def first_argument(node: Node) -> Node | None:
    """Return the node that ``node`` takes first, None where that is no node."""
    first = argument(node, 0, "input", "self")
    return first if isinstance(first, Node) else None


def permutation_of(node: Node) -> tuple[Node, tuple[int, ...]] | None:
    """Read ``node`` as a permutation of axes: its source, and for each axis the source's axis."""
    name, source = target_name(node), first_argument(node)
    rank = len(shape_of(node) or ())
    axes = list(range(rank))
    if source is None or len(shape_of(source) or ()) != rank or rank < 2:
        return None
    if name in ("transpose", "swapaxes", "swapdims"):
        swapped = argument(node, 1, "dim0", "axis0"), argument(node, 2, "dim1", "axis1")
    elif name in ("t", "mT", "matrix_transpose") or (name == "getattr" and node.args[1] == "mT"):
        swapped = -2, -1
    elif name == "permute":
        dims = argument(node, 1, "dims")
        dims = dims if isinstance(dims, (list, tuple)) else node.args[1:]
        numbers = [dim % rank for dim in dims if isinstance(dim, int)]
        return (source, tuple(numbers)) if len(numbers) == rank else None
    else:
        return None
    one, other = swapped
    if not isinstance(one, int) or not isinstance(other, int):
        return None
    axes[one], axes[other] = axes[other], axes[one]
    return source, tuple(axes)


def is_written(node: Node, start: Node, end: Node, own: Sequence[Node] = ()) -> bool:
    """Say whether anything between ``start`` and ``end``, except ``own``, writes into the memory of ``node``."""
    memory = memory_of_node(node)
    between = start.next if start < end else end
    while between is not end:
        is_writer = between not in own and is_inplace(between)
        if is_writer and any(memory_of_node(each) == memory for each in _written_by(between)):
            return True
        between = between.next
    return False


def _written_by(node: Node) -> list[Node]:
    """Return the arguments that an op which works in place may write into."""
    if isinstance(node.target, OpOverload):
        declared = schema_of(node.target).arguments
        given = [
            (each, node.args[place] if place < len(node.args) else node.kwargs.get(each.name))
            for place, each in enumerate(declared)
        ]
        written = [argument for each, argument in given if each.is_write]
    else:
        written = [first_argument(node), node.kwargs.get("out")]
    return [each for each in written if isinstance(each, Node)]


def memory_of_node(node: Node) -> object:
    """Return what is equal for nodes whose tensors share their memory."""
    tensor = tensor_of(node)
    return node if tensor is None else memory_of(tensor)


def module_path(node: Node) -> str:
    """Return the module that issued ``node``, such as ``blocks.0.attn1``; the node's own name where none is known."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    source = str(list(stack.values())[-1][0])
    source = source.replace(".__dict__['_modules']", "").replace("._modules", "")
    source = re.sub(r"\['?(\w+)'?\]", r".\1", source)
    source = re.sub(r"^L\.(?=\w)", "", source)
    source = re.sub(r"^\.?(?:self|module)(?:\.|$)", "", source)
    # a hook that replaced a module's forward is reached through attributes and closures of its own
    source = re.sub(r"(?:^|.*\.)__self__(?:\.|$)", "", source)
    return source or node.name


@dataclass(frozen=True, slots=True)
class SdpaArguments:
    """Arguments of one attention call, in the order of the signature, defaults filled in."""

    query: Node
    key: Node
    value: Node
    attn_mask: Node | None = None
    dropout_p: Argument = 0.0
    is_causal: Argument = False
    scale: Argument = None
    enable_gqa: Argument = False


def is_sdpa(node: Node) -> bool:
    """Say whether ``node`` calls scaled_dot_product_attention."""
    return node.op == "call_function" and node.target in SDPA_TARGETS


def sdpa_arguments(node: Node) -> SdpaArguments:
    """Return the arguments of an attention call, whether positional or keyword."""
    names = [field.name for field in fields(SdpaArguments)]
    given: dict[str, Any] = dict(zip(names, node.args)) | dict(node.kwargs)
    return SdpaArguments(**given)


@contextmanager
def value_mode(like: Tensor | None) -> Iterator[None]:
    """Make ``emit`` compute values in the fake mode of ``like``, recording no guard; a real ``like`` needs no mode."""
    if not isinstance(like, FakeTensor):
        yield
        return
    shape_env = like.fake_mode.shape_env
    with like.fake_mode:
        if shape_env is None:
            yield
        else:
            with shape_env.suppress_guards():
                yield


def emit(
    graph: Graph, target: Callable[..., Any], *args: Argument, like: Node | None = None, **kwargs: Argument
) -> Node:
    """Insert ``target(*args, **kwargs)`` with its value and the provenance of ``like``; call inside ``value_mode``."""
    node = graph.call_function(target, args, kwargs)
    if like is not None:
        node.meta |= {key: like.meta[key] for key in COPIED_META if key in like.meta}
    read: Callable[[Node], Any] = value_of
    values: Any = map_arg((args, kwargs), read)
    set_value(node, target(*values[0], **values[1]))
    return node
