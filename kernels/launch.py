"""What the Triton launchers share. Imports without Triton."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

# The kernels use bf16 arithmetic and assume the shared memory of this generation.
MIN_CAPABILITY = (8, 0)
# What the tiles are made for: a whole row of either kind lies in the registers of one program.
MAX_HEAD_DIM = 256
MAX_CLUSTERS = 1024


@dataclass(frozen=True, slots=True)
class AotVariant:
    """One kernel as its launcher compiles it, so that a machine without a GPU can compile it too."""

    name: str
    """Unique in its module."""
    fn: Any
    """The ``triton.jit`` function."""
    signature: Mapping[str, str]
    """Type of every runtime argument, such as ``*bf16``, ``i32`` or ``fp32``."""
    constexprs: Mapping[str, object]
    """Value of every argument known at compile time: ``tl.constexpr`` ones, strides of 1, absent pointers."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Stages of the software pipeline."""
    divisible_by_16: tuple[str, ...] = ()
    """Runtime arguments that are multiples of 16: aligned pointers and most strides."""

    def source_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of ``triton.compiler.ASTSource``."""
        names = self.fn.arg_names
        types = {**self.signature, **dict.fromkeys(self.constexprs, "constexpr")}
        return {
            "fn": self.fn,
            "signature": {name: types[name] for name in names},
            "constexprs": {(names.index(name),): value for name, value in self.constexprs.items()},
            "attrs": {(names.index(name),): [["tt.divisibility", 16]] for name in self.divisible_by_16},
        }


def use_triton(tensor: Tensor) -> bool:
    """Return whether the Triton kernels can take ``tensor``: not in fp64, which is for judging only."""
    if tensor.dtype == torch.float64 or not _triton_is_installed():
        return False
    return torch.cuda.get_device_capability(tensor.device) >= MIN_CAPABILITY


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def cdiv(numerator: int, denominator: int) -> int:
    """Return the quotient, rounded up."""
    return -(-numerator // denominator)


def padded_power_of_two(size: int, at_least: int = 16) -> int:
    """Return the smallest power of two that is no less than either argument; tiles have such sides."""
    return max(at_least, 1 << (size - 1).bit_length())


def persistent_grid(device: torch.device, tiles: int, programs_per_processor: int) -> tuple[int]:
    """Return a grid that fills the device and no more; its programs share the ``tiles`` between them.

    A launch that turns out to have nothing to do then costs microseconds, whatever the size of the problem.
    """
    return (max(1, min(tiles, programs_per_processor * _processors(device))),)


@cache
def _processors(device: torch.device) -> int:
    """Return the number of multiprocessors; 1 for a CPU, where only Triton's interpreter runs the kernels."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
