"""What the API room uses of PyTorch's private names: the list to go through when torch changes.

``tests/test_private_torch.py`` asks for each by name. What only the lowering with TensorRT uses stands in its room.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any, TypeVar

import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo import mark_static_address
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import TracingContext
from torch._inductor import list_mode_options
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

__all__ = [
    "COMPILED_CALL",
    "MODULE_CALLS",
    "RESUMED",
    "code_of_compiled",
    "fake_mode_of_fixed_sizes",
    "fake_mode_of_trace",
    "has_inductor_option",
    "has_pre_hook",
    "is_compiled",
    "is_kept_from_dynamo",
    "load_compile_fx",
    "locals_of_traced_code",
    "mark_static_address",
    "options_of_mode",
    "over_all_tensors",
    "traced_code",
    "tracing_with",
    "uncompiled",
    "version_of",
]

RESUMED = "torch_dynamo_resume_in_"
"""How the code begins to be called that goes on after a graph break. Read in torch 2.13.0."""

COMPILED_CALL = "compile_wrapper"
"""The function that calls what ``torch.compile`` made of another one, with its ``args`` and ``kwargs``. Read in torch
2.13.0."""

MODULE_CALLS = ("_call_impl", "_wrapped_call_impl")
"""The functions that call a module's forward, with its ``args`` and ``kwargs``. Read in torch 2.13.0."""

Module = TypeVar("Module", bound=torch.nn.Module)


def load_compile_fx() -> Callable[..., Any]:
    """Return Inductor's compiler of a Dynamo-level graph (torch 2.13.0); loading it takes seconds."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx


def options_of_mode(mode: str) -> dict[str, Any]:
    """Return Inductor's options that a mode of ``torch.compile`` stands for (torch 2.13.0)."""
    return dict(list_mode_options(mode))


def has_inductor_option(name: str) -> bool:
    """Say whether Inductor has an option of that name (torch 2.13.0)."""
    return name.replace("-", "_") in torch._inductor.config.get_config_copy()


def locals_of_traced_code() -> dict[str, Any] | None:
    """Return the variables of the function that Dynamo is tracing (torch 2.13.0); None where it traces nothing."""
    try:
        found: dict[str, Any] = InstructionTranslator.current_tx().f_locals
    except AttributeError:  # no translator is current
        return None
    return found


def traced_code() -> CodeType | None:
    """Return the code of the function that Dynamo is tracing (torch 2.13.0); None where it traces nothing."""
    try:
        found: CodeType = InstructionTranslator.current_tx().f_code
    except AttributeError:  # no translator is current
        return None
    return found


def fake_mode_of_trace() -> FakeTensorMode:
    """Return the mode of the fake tensors of the graph that is being compiled (torch 2.13.0)."""
    context = TracingContext.get()
    assert context.fake_mode is not None
    return context.fake_mode


def fake_mode_of_fixed_sizes() -> FakeTensorMode:
    """Return a mode in which a graph is compiled when Dynamo has returned (torch 2.13.0)."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def tracing_with(fake_mode: FakeTensorMode) -> AbstractContextManager[Any]:
    """Let a compiler find ``fake_mode`` where it looks for Dynamo's (torch 2.13.0)."""
    return torch._guards.tracing(TracingContext(fake_mode))


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module that ``torch.compile`` wrapped; another one as it is (torch 2.13.0)."""
    return getattr(model, "_orig_mod", model)


def is_kept_from_dynamo(function: object) -> bool:
    """Say whether Dynamo may not trace a function: ``torch.compiler.disable`` was there (torch 2.13.0)."""
    return bool(getattr(function, "_torchdynamo_disable", False))


def is_compiled(function: object) -> bool:
    """Say whether a function is what ``torch.compile`` made of another one (torch 2.13.0)."""
    return hasattr(function, "_torchdynamo_orig_callable")


def code_of_compiled(function: object) -> CodeType | None:
    """Return the code of the function of which ``torch.compile`` made this one (torch 2.13.0); None of other things."""
    original = getattr(function, "_torchdynamo_orig_callable", None)
    return getattr(original, "__code__", None)


def has_pre_hook(module: torch.nn.Module, hook: Callable[..., Any]) -> bool:
    """Say whether a module has a forward pre-hook, as a copy has those of its original (torch 2.13.0)."""
    return hook in module._forward_pre_hooks.values()


def version_of(tensor: Tensor) -> int:
    """Return a number that changes when a tensor is written to (torch 2.13.0); 0 where nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def over_all_tensors(model: Module, change: Callable[[Tensor], Tensor]) -> Module:
    """Replace every parameter and buffer of a model, as ``to`` does, and return the model (torch 2.13.0)."""
    changed: Module = model._apply(change)  # type: ignore[no-untyped-call]
    return changed
