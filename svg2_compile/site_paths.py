"""Where in its model an attention is, found from who runs a compiled graph."""

from __future__ import annotations

from torch.nn import Module

from svg2_compile.formatting import dotted
from svg2_compile.forwards import Caller


def prefix_of(caller: Caller, model: Module, owner_name: str) -> str | None:
    """Return the path of the compiled root in a model that the caller is part of; None where it is not found.

    Args:
        caller: who runs the graph.
        model: in whose paths to tell.
        owner_name: the parameter that told the caller, by Dynamo's name inside the compiled root.
    """
    layer = caller.layer()
    for path, module in model.named_modules():
        if module is layer:
            return without_common_end(dotted(path, caller.name) if caller.name else path, owner_name)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter is layer:
                return without_common_end(dotted(path, name), owner_name)
    return None


def without_common_end(name: str, inner: str) -> str:
    """Return the path of the root module: ``name`` is its parameter's path in the model, ``inner`` Dynamo's in it.

    Where hooks wrap the module, Dynamo's begins with the attributes that lead through them.
    """
    path, inside = name.split("."), inner.split(".")
    while path and inside and path[-1] == inside[-1]:
        path.pop()
        inside.pop()
    return ".".join(path)
