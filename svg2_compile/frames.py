"""Read, at compile time, whose code is being compiled and who is calling it.

Dynamo hands a backend a graph and no module. The module comes from Dynamo's current translator; the model that runs it
eagerly, when blocks are compiled one by one, from the Python frames that lead here.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.fx import GraphModule, Node

from svg2_compile.dynamo import RESUMED_FORWARD, locals_of_traced_code
from svg2_compile.passes.dynamo_graphs import source_name
from svg2_compile.passes.nodes import value_of

TIMESTEP = re.compile(r"(^|[^a-z])(timesteps?|t|sigmas?)('|\"|\])*$")
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma")


@dataclass(frozen=True, slots=True)
class Compiled:
    """What is being compiled."""

    root: torch.nn.Module | None
    """The module whose forward is traced, or for which a helper such as an attention processor is."""

    parent: torch.nn.Module | None
    """The outermost module that is calling ``root`` right now; ``None`` when ``root`` is the whole model."""

    parent_locals: dict[str, Any]

    @property
    def is_repeated(self) -> bool:
        """True when ``root`` is one of several equal layers of ``parent``, and one graph serves them all."""
        if self.parent is None:
            return False
        return sum(type(module) is type(self.root) for module in self.parent.modules()) > 1


def what_is_compiled(inputs: list[Any]) -> Compiled:
    """Return the module under compilation and its caller; to be called by the backend itself, with its inputs."""
    traced = locals_of_traced_code()
    if traced is None:
        return Compiled(None, None, {})
    callers = _callers()
    modules = (each for each in (traced.get("self"), *traced.values()) if isinstance(each, torch.nn.Module))
    # a hook that goes on after a graph break may hold no module: then it runs for the one whose parameters it uses
    root = next(modules, _smallest_part(callers[0][0], inputs) if callers else None)
    if root is None:
        return Compiled(None, None, {})
    parents = [(module, frame) for module, frame in callers if module is not root and _contains(module, root)]
    if not parents:
        return Compiled(root, None, {})
    parent, frame = parents[-1]
    return Compiled(root, parent, dict(frame.f_locals))


def _callers() -> list[tuple[torch.nn.Module, FrameType]]:
    """Return the modules whose forwards lead here, the innermost first."""
    found: list[tuple[torch.nn.Module, FrameType]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self") if _is_forward(frame) else None
        if isinstance(module, torch.nn.Module):
            found.append((module, frame))
        frame = frame.f_back
    return found


def _smallest_part(module: torch.nn.Module, inputs: list[Any]) -> torch.nn.Module:
    """Return the innermost part of ``module`` that has every parameter among the inputs."""
    used = {id(each) for each in inputs if isinstance(each, torch.nn.Parameter)}
    holders = [part for part in module.modules() if used <= {id(each) for each in part.parameters()}]
    return holders[-1] if used and holders else module


def _contains(module: torch.nn.Module, part: torch.nn.Module) -> bool:
    return any(each is part for each in module.modules())


def _is_forward(frame: FrameType) -> bool:
    name = frame.f_code.co_name
    return name == "forward" or name.startswith(RESUMED_FORWARD)


def timestep_in(values: dict[str, Any]) -> Any:
    """Return the value of the first variable that is called like a timestep."""
    return next((values[name] for name in TIMESTEP_NAMES if values.get(name) is not None), None)


def timestep_position(gm: GraphModule) -> int | None:
    """Return the position of the graph input that holds the timestep of the model's own forward."""
    for position, node in enumerate(placeholders(gm)):
        is_tensor = isinstance(node.meta.get("example_value"), torch.Tensor)
        if is_tensor and not is_weight(node) and TIMESTEP.search(source_name(node)):
            return position
    return None


def owner_position(gm: GraphModule, inputs: list[Any]) -> tuple[int, str] | None:
    """Return the position of the first parameter among the graph's inputs, and its name inside the root module.

    At run time the argument at this position tells which model, or which of its equal layers, is calling.
    """
    for position, (node, value) in enumerate(zip(placeholders(gm), inputs)):
        if isinstance(value, torch.nn.Parameter):
            source = source_name(node).replace("_modules", "").replace("_parameters", "").replace(".__dict__", "")
            # the scope and the variable that holds the root module come first
            parts = [part for part in re.split(r"[.\[\]']+", source) if part]
            return position, ".".join(parts[2:])
    return None


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
