"""Read, at compile time, whose code is being compiled and who is calling it.

Dynamo hands a backend a graph and no module. The module comes from Dynamo's current translator; the model that runs it
eagerly, when blocks are compiled one by one, from the Python frames that lead here.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import ModuleDict, ModuleList, Sequential

from svg2_compile import call_stack
from svg2_compile.dynamo import RESUMED, traced_function
from svg2_compile.passes.dynamo_graphs import source_name
from svg2_compile.passes.nodes import value_of


@dataclass(frozen=True, slots=True)
class Compiled:
    """What is being compiled."""

    root: torch.nn.Module | None
    """The module whose forward is traced, or for which a helper such as an attention processor is."""

    parent: torch.nn.Module | None
    """The outermost module that is calling ``root`` right now; ``None`` when ``root`` is the whole model."""

    code: CodeType | None

    @property
    def is_repeated(self) -> bool:
        """True when ``root`` is one of several equal layers of ``parent``, and one graph serves them all.

        Two equal models side by side, as experts are, are no layers: they have layers of their own.
        """
        if self.parent is None or self.root is None:
            return False
        equals = [each for each in self.parent.modules() if type(each) is type(self.root)]
        lists = (each for each in self.parent.modules() if isinstance(each, ModuleList | Sequential | ModuleDict))
        is_in_list = any(each is self.root for several in lists for each in several.children())
        return len(equals) > 1 and (is_in_list or not _has_layers(self.root))

    @property
    def begins_forward(self) -> bool:
        """True when the code is the first of every forward of the model, not a layer, nor what a graph break left."""
        return not self.is_repeated and (self.code is None or not self.code.co_name.startswith(RESUMED))


def what_is_compiled(inputs: list[Any]) -> Compiled:
    """Return the module under compilation and its caller; to be called by the backend itself, with its inputs."""
    function = traced_function()
    if function is None:
        return Compiled(None, None, None)
    code, traced = function
    called = [module for module, _ in call_stack.called_modules()]
    modules = (each for each in (traced.get("self"), *traced.values()) if isinstance(each, torch.nn.Module))
    # a hook that goes on after a graph break may hold no module: then it runs for the one whose parameters it uses
    root = next(modules, _smallest_part(called[0], inputs) if called else None)
    if root is None:
        return Compiled(None, None, code)
    around = [each for each in called if each is not root and call_stack.holds(each, root)]
    return Compiled(root, around[-1] if around else call_stack.holder_in_locals(root), code)


def _has_layers(module: torch.nn.Module) -> bool:
    for each in module.modules():
        if isinstance(each, ModuleList | Sequential):
            kinds = [type(layer) for layer in each if any(layer.children())]
            if len(kinds) > len(set(kinds)):
                return True
    return False


def _smallest_part(module: torch.nn.Module, inputs: list[Any]) -> torch.nn.Module:
    """Return the innermost part of ``module`` that has every parameter among the inputs."""
    used = {id(each) for each in inputs if isinstance(each, torch.nn.Parameter)}
    holders = [part for part in module.modules() if used <= {id(each) for each in part.parameters()}]
    return holders[-1] if used and holders else module


def owner_position(gm: GraphModule, inputs: list[Any], compiled: Compiled) -> tuple[int, str] | None:
    """Return the position of the first parameter among the graph's inputs, and its name inside the root module.

    At run time the argument at this position tells which model, or which of its equal layers, is calling; a parameter
    that several layers share does not.
    """
    shared = _shared_parameters(compiled.parent)
    for position, (node, value) in enumerate(zip(placeholders(gm), inputs)):
        if isinstance(value, torch.nn.Parameter) and id(value) not in shared:
            source = source_name(node).replace("_modules", "").replace("_parameters", "").replace(".__dict__", "")
            # the scope and the variable that holds the root module come first
            parts = [part for part in re.split(r"[.\[\]']+", source) if part]
            return position, ".".join(parts[2:])
    return None


def _shared_parameters(model: torch.nn.Module | None) -> set[int]:
    if model is None:
        return set()
    # each module once: some wrappers hold each other
    counts = Counter(id(each) for module in model.modules() for each in module.parameters(recurse=False))
    return {each for each, count in counts.items() if count > 1}


def is_weight(node: Node) -> bool:
    """Say whether a graph input is a parameter or a buffer of a module."""
    name = source_name(node)
    return "_parameters" in name or "_buffers" in name


def is_dynamic(gm: GraphModule) -> bool:
    """Say whether a graph has symbolic sizes."""
    for node in gm.graph.nodes:
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            return True
        if isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
            return True
    return False


def placeholders(gm: GraphModule) -> list[Node]:
    """Return the graph's inputs in order."""
    return [node for node in gm.graph.nodes if node.op == "placeholder"]
