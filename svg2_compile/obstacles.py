"""What keeps attention out of the compiled graphs, told by what it does, and what helps.

A cache or an offloader that wraps modules can hide them from Dynamo, and so can a kernel that is no operator; then no
attention is seen, and the report would have nothing to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule

from svg2_compile.dynamo import is_compiled, is_kept_from_dynamo, reason_of_break
from svg2_compile.passes.records import Rejection


def obstacles(model: torch.nn.Module) -> list[tuple[str, Rejection]]:
    """Return (module path, rejection) for each thing that hides attention, at the first module that has it."""
    found: dict[tuple[str, str], tuple[str, Rejection]] = {}
    for path, module in model.named_modules():
        for rejection in (*_out_of_sight(module, path), *_hooks_of_layer(module, path)):
            found.setdefault((rejection.reason, rejection.hint), (path, rejection))
    return list(found.values())


def certain_obstacles(model: torch.nn.Module, root: torch.nn.Module) -> list[Rejection]:
    """Return what hides attention of ``model`` for certain, known while ``root``, a part of it or all, is compiled."""
    outside = [each for path, module in model.named_modules() for each in _out_of_sight(module, path)]
    # hooks that can be traced break nothing; a projection that is compiled on its own has hooks that cannot
    path = next((path for path, module in model.named_modules() if module is root), "")
    return outside + list(_hooks_of_layer(root, path))


def obstacles_behind(gm: GraphModule) -> tuple[Rejection, ...]:
    """Return what hides the attention that comes behind a graph, known while that is compiled."""
    # Dynamo does not go on inside this context; a call of it has no other purpose than attention
    if "<function sdp_kernel " not in reason_of_break(gm):
        return ()
    reason = "torch.backends.cuda.sdp_kernel is around it, a context in which Dynamo compiles nothing"
    return (Rejection("sdp_kernel", "", reason, "use torch.nn.attention.sdpa_kernel"),)


def _hooks(module: torch.nn.Module) -> dict[str, Any]:
    hooks: dict[str, Any] = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return hooks


def _out_of_sight(module: torch.nn.Module, path: str) -> Iterator[Rejection]:
    yield from _forwards_outside(module, path)
    backend = getattr(getattr(module, "processor", None), "_attention_backend", None)
    name = str(getattr(backend, "value", backend or "native"))
    if not name.lstrip("_").startswith("native"):
        reason = f"the attention backend {name!r} is not scaled_dot_product_attention"
        yield Rejection("", path, reason, 'call model.set_attention_backend("native")')


def _forwards_outside(module: torch.nn.Module, path: str) -> Iterator[Rejection]:
    """Hooks that Dynamo may not trace, around a forward that is not compiled by itself."""
    hooks = _hooks(module)
    forwards = (getattr(getattr(hook, "fn_ref", None), "original_forward", None) for hook in hooks.values())
    if any(is_compiled(forward) for forward in forwards):
        return
    for name, hook in hooks.items():
        if is_kept_from_dynamo(getattr(type(hook), "new_forward", None)):
            yield Rejection(
                "",
                path,
                f"the hook {name!r} runs the forward of each {type(module).__name__} outside the compiler",
                "compile that forward before the hook is there: for block in blocks: block.forward = "
                'torch.compile(block.forward, backend="svg2", fullgraph=True)',
            )


def _hooks_of_layer(module: torch.nn.Module, path: str) -> Iterator[Rejection]:
    hooks = _hooks(module)
    if isinstance(module, torch.nn.Linear) and (hooks or hasattr(module, "_hf_hook")):
        names = ", ".join(map(repr, hooks)) or repr(type(module._hf_hook).__name__)
        yield Rejection(
            "",
            path,
            f"hooks on each layer ({names}) break the graph around every projection",
            "choose hooks on whole blocks or models, as enable_group_offload(offload_type='block_level') and "
            "enable_model_cpu_offload() have",
        )
