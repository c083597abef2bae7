"""What the API room uses of PyTorch's private names: the list to go through when torch changes.

``tests/test_private_torch.py`` asks for each by name. What only the lowering with TensorRT uses stands in its room.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch
import torch._dynamo.eval_frame
import torch._inductor.config
from torch import Tensor
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo import mark_static_address
from torch._dynamo.cache_size import exceeds_recompile_limit
from torch._dynamo.convert_frame import ConvertFrameAssert
from torch._dynamo.eval_frame import innermost_backend
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import get_hook_for_recompile_user_context, register_hook_for_recompile_user_context
from torch._guards import TracingContext
from torch._inductor import list_mode_options
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

__all__ = [
    "COMPILED_CALL",
    "MODULE_CALLS",
    "RESUMED",
    "CompiledCode",
    "Limit",
    "call_before_compiling",
    "code_of_compiled",
    "code_under_compilation",
    "fake_mode_of_fixed_sizes",
    "fake_mode_of_trace",
    "guard_attribute",
    "has_inductor_option",
    "has_pre_hook",
    "is_compiled",
    "is_kept_from_dynamo",
    "load_compile_fx",
    "mark_static_address",
    "options_of_mode",
    "over_all_tensors",
    "reason_of_break",
    "traced_function",
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

NO_REGION = -1
"""Of code that ``torch.compile`` compiles without ``isolate_recompiles``. Read in torch 2.13.0."""

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


def traced_function() -> tuple[CodeType, dict[str, Any]] | None:
    """Return code and variables of the function that Dynamo is tracing (torch 2.13.0); None where it traces nothing."""
    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:  # no translator is current
        return None
    if translator is None:  # the same, in torch 2.11
        return None
    return translator.f_code, translator.f_locals


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


def reason_of_break(gm: torch.fx.GraphModule) -> str:
    """Return why Dynamo ended a graph in the midst of the code (torch 2.13.0); empty where it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return str(reason.reason) if reason is not None and reason.graph_break else ""


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


@dataclass(frozen=True, slots=True)
class Limit:
    """How many graphs of a piece of code Dynamo keeps."""

    setting: str
    """What to set to raise it."""
    value: int


class CompiledCode:
    """A piece of code, as Dynamo keeps its compiled graphs (torch 2.13.0)."""

    def __init__(self, convert_frame: FrameType) -> None:
        """Args: ``convert_frame`` is the call in which Dynamo compiles the code."""
        variables = convert_frame.f_locals
        self._code: weakref.ref[CodeType] = weakref.ref(variables["code"])
        # torch 2.11 knows neither
        self._own_limit: int | None = getattr(variables["self"], "_recompile_limit", None)
        self._region: int = variables.get("isolate_recompiles_id", NO_REGION)
        self._compiling = variables["cache_size"], variables["compile_id"]
        self.name = str(variables["code"].co_name)
        self.root: type[torch.nn.Module] | None = None
        """The class of the module whose method it is."""
        if isinstance(module := variables["frame"].f_locals.get("self"), torch.nn.Module):
            self.root = type(module)
        self.backend: Any = innermost_backend(variables["self"])
        """What ``torch.compile`` made of the backend that it was given."""

    @property
    def code(self) -> CodeType | None:
        """The code itself, which lives as long as its function."""
        return self._code()

    def called(self, backend: Callable[..., Any]) -> dict[str, Any] | None:
        """Return with which keywords ``torch.compile`` calls a backend; None where it calls another one."""
        is_called = getattr(self.backend, "compiler_fn", None) is backend
        return dict(self.backend.kwargs) if is_called else None

    def limit_exceeded(self) -> Limit | None:
        """Return the limit for which Dynamo is about to give this compilation up."""
        is_exceeded, name = exceeds_recompile_limit(*self._compiling)
        return self._limit(name) if is_exceeded else None

    def limit_reached(self, more: int = 1) -> Limit | None:
        """Return the limit that leaves no place for so many more graphs."""
        code = self.code
        if code is None:
            return None
        own, total = self._limit("recompile_limit"), self._limit("accumulated_recompile_limit")
        if len(_kept_graphs(code, self._region)) + more > own.value:
            return own
        return total if _count_of_kept_graphs(code) + more > total.value else None

    @property
    def compilation(self) -> str:
        """Which compilation of the code this is."""
        return str(self._compiling[1])

    def compilations(self) -> set[str]:
        """Return the compilations whose graphs Dynamo keeps."""
        code = self.code
        entries = [] if code is None else _kept_graphs(code, self._region)
        return {str(entry.compile_id) for entry in entries}

    def forget(self) -> None:
        """Drop every graph of the code; it is compiled anew."""
        if (code := self.code) is not None:
            reset_code(code)

    def _limit(self, name: str) -> Limit:
        if name == "recompile_limit" and self._own_limit is not None:
            return Limit("torch.compile(recompile_limit=...)", self._own_limit)
        return Limit(f"torch._dynamo.config.{name}", getattr(torch._dynamo.config, name))


def _kept_graphs(code: CodeType, region: int) -> list[Any]:
    """Return Dynamo's graphs of a piece of code in a region (torch 2.13.0); all of them where it has none (2.11)."""
    if hasattr(torch._dynamo.eval_frame, "_get_cache_entries_for_region"):
        return list(torch._dynamo.eval_frame._get_cache_entries_for_region(code, region))
    return list(torch._dynamo.eval_frame._debug_get_cache_entry_list(code))


def _count_of_kept_graphs(code: CodeType) -> int:
    """Return how many graphs of a piece of code Dynamo keeps, in all regions (torch 2.13.0)."""
    if hasattr(torch._dynamo.eval_frame, "_get_total_cache_entry_count"):
        return int(torch._dynamo.eval_frame._get_total_cache_entry_count(code))
    return len(_kept_graphs(code, NO_REGION))


def code_under_compilation() -> CompiledCode | None:
    """Return the code for which Dynamo called, however deep in its calls (torch 2.13.0); None where it did not."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is ConvertFrameAssert.__call__.__code__:
            return CompiledCode(frame)
        frame = frame.f_back
    return None


def guard_attribute(module: str, *names: str) -> None:
    """Let what Dynamo is compiling hold for the present value of an attribute of a module only (torch 2.13.0).

    The value is a constant, such as text; the attribute may be one of an attribute.
    """
    source: Any = InstructionTranslator.current_tx().import_source(module)
    for name in names:
        source = AttrSource(source, name)
    install_guard(source.make_guard(GuardBuilder.EQUALS_MATCH))


def call_before_compiling(hook: Callable[[], str]) -> None:
    """Let Dynamo call ``hook`` whenever it is about to compile code, before it asks for its limits (torch 2.13.0).

    What the hook raises, the call that wanted to be compiled raises.
    """
    hooks = get_hook_for_recompile_user_context() or []
    if hook not in hooks:
        register_hook_for_recompile_user_context(hook)
