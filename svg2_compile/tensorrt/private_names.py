"""What the lowering with TensorRT uses of private names, of PyTorch and of torch_tensorrt.

The list to go through when either changes. ``tests/test_private_torch.py`` asks for those of PyTorch by name;
torch_tensorrt's are asked for where it is installed, by ``tests/api/test_tensorrt_build.py``. A failure of
torch_tensorrt's becomes a segment that Inductor compiles, and the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch._functorch._aot_autograd.descriptors import BufferAOTInput, ParamAOTInput, PlainAOTInput
from torch._functorch.aot_autograd import aot_module_simplified
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes as without_modes

__all__ = [
    "BufferAOTInput",
    "Interpreter",
    "ParamAOTInput",
    "PlainAOTInput",
    "aot_module_simplified",
    "compilation_settings",
    "converters",
    "folder_of_caches",
    "package_of",
    "refit_engine",
    "rename",
    "without_modes",
]


def folder_of_caches() -> Path:
    """Return the folder of Inductor's caches (torch 2.13.0)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def rename(node: Node, name: str) -> None:
    """Give a node another name, or one like it that is free (torch 2.13.0)."""
    node._rename(name)


def compilation_settings() -> Any:
    """Return the class of torch_tensorrt's settings (torch_tensorrt 2.11 and 2.13)."""
    from torch_tensorrt.dynamo._settings import CompilationSettings

    return CompilationSettings


def converters() -> Any:
    """Return the table of torch_tensorrt's converters (torch_tensorrt 2.13)."""
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_CONVERTERS

    return DYNAMO_CONVERTERS


def refit_engine(lowered: GraphModule, engine: Any, inputs: Any, settings: Any) -> None:
    """Give a deserialized engine the weights of a module (torch_tensorrt 2.13)."""
    from torch_tensorrt.dynamo._refit import _refit_single_trt_engine_with_gm

    _refit_single_trt_engine_with_gm(lowered, engine, inputs, settings)


def package_of(tensorrt: Any) -> str:
    """Return the name of the package behind ``import tensorrt``: TensorRT or TensorRT-RTX (torch_tensorrt 2.13)."""
    return getattr(tensorrt, "_package_name", "") or "tensorrt"


class Interpreter:
    """Makes TensorRT's network of a lowered segment (torch_tensorrt 2.13)."""

    def __init__(self, lowered: GraphModule, inputs: Any, **options: Any) -> None:
        """Args: ``options`` are those of ``TRTInterpreter``."""
        from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter

        self._interpreter: Any = TRTInterpreter(lowered, inputs, **options)

    def build(self, configure: Callable[[Any], None]) -> Any:
        """Return the serialized engine, None where the builder failed; ``configure`` may change its config."""
        self._interpreter._construct_trt_network_def()
        config = self._interpreter._populate_trt_builder_config()
        configure(config)
        return self._interpreter.builder.build_serialized_network(self._interpreter.ctx.net, config)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the bindings, in order."""
        return tuple(self._interpreter._input_names)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the results."""
        return tuple(self._interpreter._output_names)

    @property
    def needs_output_allocator(self) -> bool:
        """Whether sizes of results are known only at run time."""
        return bool(self._interpreter.ctx.requires_output_allocator)
