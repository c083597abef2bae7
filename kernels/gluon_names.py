"""What Gluon calls differently from one Triton to the next, and element types as it calls them."""

# Gluon has no types.
# mypy: disable-error-code="import-untyped, import-not-found"

from functools import cache
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.6 has the second names.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


def element_type(dtype: torch.dtype) -> Any:
    """Return Gluon's name of an element type that ``GLUON_DTYPES`` has."""
    return gl.bfloat16 if dtype == torch.bfloat16 else gl.float16


@cache
def shared_layout(block: tuple[int, ...], dtype: Any) -> Any:
    """Return the layout in shared memory that boxes are loaded to; made once, since it takes microseconds a launch."""
    return gl.NVMMASharedLayout.get_default_for(list(block), dtype)
