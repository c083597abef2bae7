"""Lets torch_tensorrt be imported where there is no CUDA device; it asks for one four times while it is imported.

For tests only: engines can be built then, and never run.
"""

import torch


def import_without_device() -> None:
    """Import torch_tensorrt, with answers of a GPU of compute capability 9.0."""
    if not torch.cuda.is_available():
        torch.cuda.get_device_capability = lambda *_, **__: (9, 0)
        torch.cuda.current_device = lambda: 0
        torch.cuda.mem_get_info = lambda *_, **__: (1 << 37, 1 << 37)
        if not hasattr(torch._C, "_CudaDeviceProperties"):
            torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})
    from torch_tensorrt.dynamo.lowering import _decompositions

    if not torch.cuda.is_available():
        _decompositions.to_torch_device = lambda _: torch.device("cpu")
