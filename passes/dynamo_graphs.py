"""What the passes use of PyTorch's private names: the list to go through when torch changes.

``tests/test_private_torch.py`` asks for each by name. Everything was read in torch 2.13.0, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._guards import TracingContext
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import RelaxedUnspecConstraint, StrictMinMaxConstraint
from torch.fx.graph import CodeGen

__all__ = [
    "AUTO_FUNCTIONALIZED",
    "SDPA",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "bases_of",
    "carry_over",
    "codegen_of",
    "copy_source",
    "example_of",
    "heeds_guards",
    "mark_sourceless",
    "mark_static_input",
    "memory_of",
    "name_of_op",
    "name_of_packet",
    "place_among_bases",
    "schema_of",
    "source_name",
]

SDPA = torch._C._nn.scaled_dot_product_attention
"""What Dynamo writes into its graphs for ``torch.nn.functional.scaled_dot_product_attention``. Read in torch 2.13.0;
users replace the public name with other kernels, and then it is not this one."""

AUTO_FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized_v2
"""What AOTAutograd makes of an op that writes its arguments. Read in torch 2.13.0, as its arguments' names below."""

CARRIED = ("_param_name_to_source", "meta", "_source_to_user_stacks", "compile_subgraph_reason", "shape_env")
"""Attributes that Dynamo gives its GraphModule and AOTAutograd reads from it. Read in torch 2.13.0."""


def schema_of(op: OpOverload) -> Any:
    """Return an op's schema, with ``name``, ``arguments``, ``returns`` and ``is_mutable`` (torch 2.13.0)."""
    return op._schema


def name_of_op(op: OpOverload) -> str:
    """Return the name with its namespace and without the overload, such as ``aten::add`` (torch 2.13.0)."""
    return str(op._schema.name)


def name_of_packet(packet: OpOverloadPacket) -> str:
    """Return the name of an op whose overload is not chosen yet, such as ``aten::add`` (torch 2.13.0)."""
    return str(packet._qualified_op_name)


def copy_source(placeholder: Node, to: Node) -> None:
    """Tell a copy of a graph input where Dynamo found its value, if it did (torch 2.13.0)."""
    if hasattr(placeholder, "_dynamo_source"):
        to._dynamo_source = placeholder._dynamo_source


def example_of(placeholder: Node) -> Tensor | None:
    """Return what a graph input was when it was compiled, while Dynamo compiles (torch 2.13.0); None where unknown."""
    try:
        example = placeholder.meta["grapharg"].example
    except (KeyError, AssertionError):
        return None
    is_real = isinstance(example, Tensor) and not isinstance(example, FakeTensor) and example.device.type != "meta"
    return example if is_real else None


def mark_sourceless(placeholder: Node) -> None:
    """Say that Dynamo knows nothing of a graph input; AOTAutograd asks every one of them (torch 2.13.0)."""
    placeholder._dynamo_source = None


def source_name(placeholder: Node) -> str:
    """Return Dynamo's expression for a graph input, such as ``L['timestep']``; empty where it has none.

    ``name`` is a property in torch 2.13.0; it has been a method.
    """
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    return str(source.name() if callable(source.name) else source.name)


def carry_over(gm: GraphModule, to: GraphModule) -> None:
    """Give a copy of ``gm`` what AOTAutograd reads from Dynamo's module besides its graph (torch 2.13.0)."""
    for name in CARRIED:
        if name in gm.__dict__:
            to.__dict__[name] = gm.__dict__[name]


def codegen_of(graph: Graph) -> CodeGen:
    """Return what knows the nested inputs and outputs of an exported graph (torch 2.13.0)."""
    return graph._codegen


def mark_static_input(placeholder: Node) -> None:
    """Say that a graph input never changes its address: a CUDA graph may then write it in place (torch 2.13.0)."""
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def memory_of(tensor: Tensor) -> object:
    """Return what is equal for tensors that share their memory, fake ones too (torch 2.13.0)."""
    return tensor.untyped_storage()._cdata


def bases_of(functionalized: Node) -> Sequence[Node]:
    """Return the tensors that a functionalized op updates (torch 2.13.0)."""
    return functionalized.kwargs["_all_bases"]  # type: ignore[return-value]


def place_among_bases(functionalized: Node, argument: str) -> Any:
    """Return which of the bases is that argument of the op; None where it is none (torch 2.13.0)."""
    return functionalized.kwargs.get(f"_{argument}_base_index")


def heeds_guards(size: SymInt, *, fixing: bool = False) -> bool:
    """Say whether a guard on a size would reach Dynamo, and break no promise about it (torch 2.13.0).

    Dynamo listens while its backend runs. Who marked a dimension as dynamic wants no guard that fixes it (``fixing``),
    and who gave bounds none within them.
    """
    context = TracingContext.try_get()
    shape_env = None if context is None or context.fake_mode is None else context.fake_mode.shape_env
    if shape_env is None or size.node.shape_env is not shape_env:
        return False
    promises = (StrictMinMaxConstraint, RelaxedUnspecConstraint) if fixing else StrictMinMaxConstraint
    promised = {
        symbol
        for each in shape_env.tracked_fakes or ()
        if isinstance(each.fake, Tensor) and each.symbolic_context is not None
        for length, constraint in zip(tuple[int | SymInt, ...](each.fake.shape), each.symbolic_context.constraint_sizes)
        if isinstance(constraint, promises) and not constraint.warn_only and isinstance(length, SymInt)
        for symbol in length.node.expr.free_symbols
    }
    return not promised & size.node.expr.free_symbols
