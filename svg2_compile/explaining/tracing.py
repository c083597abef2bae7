"""What the backend would do to a model, found by tracing it: nothing is computed or compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from svg2_compile.dynamo import uncompiled
from svg2_compile.fingerprint import budgets_for
from svg2_compile.frames import what_is_compiled
from svg2_compile.options import current_defaults
from svg2_compile.passes.sparsify import Sparsified, sparsify
from svg2_compile.reporting import Report, report_before_running


def explain(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Return what the backend would do to ``model`` for these inputs; traces the model and computes nothing.

    The options are the defaults, so wrap the call in ``with svg2_compile.configure(...)`` to ask about others.

    Args:
        model: a model that is not compiled yet.
        args: the model's positional arguments.
        kwargs: its keyword arguments.

    Returns:
        One entry per attention; densities are unknown before a run.
    """
    return report_before_running(trace(model, args, kwargs))


def trace(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fullgraph: bool = False
) -> list[tuple[str, Sparsified]]:
    """Return (module path, what the passes made of it) for each graph of a model; computes nothing.

    Raises:
        ConfigError: ``budgets`` are those of another model.
    """
    graphs: list[tuple[str, Sparsified]] = []
    options = current_defaults()
    config = options.sparse
    if config.head_budgets is not None:
        config = replace(config, budgets=budgets_for(uncompiled(model), config.head_budgets))

    def describe(gm: GraphModule, example_inputs: list[Any]) -> Any:
        found, compiled = sparsify(gm, config, options.kernel), what_is_compiled(example_inputs)
        modules = {id(module): name for name, module in model.named_modules()}
        graphs.append((modules.get(id(compiled.root), ""), found))
        (output,) = gm.graph.find_nodes(op="output")
        return lambda *_: torch.fx.node.map_arg(output.args[0], _zeros_like_node)

    with torch.no_grad():
        torch.compile(uncompiled(model), backend=describe, dynamic=False, fullgraph=fullgraph)(*args, **kwargs)
    return graphs


def _zeros_like_node(node: torch.fx.Node) -> Any:
    value = node.meta.get("example_value")
    if isinstance(value, torch.Tensor):
        shape = [int(size) for size in value.shape]
        return torch.zeros(shape, dtype=value.dtype, device=value.device)
    return value if not isinstance(value, torch.SymInt) else int(value)
