"""svg2_compile: a torch.compile backend that makes long self-attention sparse (SVG2, arXiv 2505.18875).

pipe.transformer = torch.compile(pipe.transformer, backend="svg2")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svg2_compile.announce import denoise_step
    from svg2_compile.backend import svg2_backend
    from svg2_compile.explaining.tracing import explain
    from svg2_compile.options import configure
    from svg2_compile.passes.config import SparseConfig
    from svg2_compile.passes.errors import ConfigError, InternalError, UnsupportedError
    from svg2_compile.passes.kernel_config import KernelConfig
    from svg2_compile.passes.sparsify import sparsify
    from svg2_compile.presets import preset, preset_names
    from svg2_compile.region import reset
    from svg2_compile.reporting import report

__version__ = "0.1.0"

_HOMES = {
    "svg2_backend": "backend",
    "denoise_step": "announce",
    "configure": "options",
    "SparseConfig": "passes.config",
    "KernelConfig": "passes.kernel_config",
    "ConfigError": "passes.errors",
    "InternalError": "passes.errors",
    "UnsupportedError": "passes.errors",
    "sparsify": "passes.sparsify",
    "preset": "presets",
    "preset_names": "presets",
    "reset": "region",
    "explain": "explaining.tracing",
    "report": "reporting",
}

__all__ = [
    "ConfigError",
    "InternalError",
    "KernelConfig",
    "SparseConfig",
    "UnsupportedError",
    "configure",
    "denoise_step",
    "explain",
    "preset",
    "preset_names",
    "report",
    "reset",
    "sparsify",
    "svg2_backend",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
