"""What the Triton launchers share. Imports without Triton."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


def cdiv(numerator: int, denominator: int) -> int:
    """Return the quotient, rounded up."""
    return -(-numerator // denominator)


def padded_power_of_two(size: int, at_least: int = 16) -> int:
    """Return the smallest power of two that is no less than either argument; tiles have such sides."""
    return max(at_least, 1 << (size - 1).bit_length())


def rows_of_unit_stride(x: Tensor) -> Tensor:
    """Return ``x``, or a copy where the elements of a row are not neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True, slots=True)
class RepeatableLaunch:
    """A launch that can be made again with another value of one argument, without looking its kernel up anew.

    Looking it up, by the kinds of all arguments, takes most of the time of a launch on the host.
    """

    kernel: Any
    """The ``triton.jit`` function."""
    grid: tuple[int]
    arguments: tuple[Any, ...]
    """The first arguments of the kernel, in its order."""
    options: Mapping[str, Any]
    """The others by name, and what is no argument, such as the number of warps."""
    compiled: Any
    """What the first launch ran; None from Triton's interpreter."""

    @classmethod
    def first(cls, kernel: Any, grid: tuple[int], *arguments: Any, **options: Any) -> "RepeatableLaunch":
        """Launch the kernel."""
        return cls(kernel, grid, arguments, options, kernel[grid](*arguments, **options))

    def again(self, name: str, value: int) -> None:
        """Launch it with another value of an argument that the kernel is not specialised on."""
        names = self.kernel.arg_names
        values = list(self.arguments)
        values[names.index(name)] = value
        if self.compiled is None:
            self.kernel[self.grid](*values, **self.options)
            return
        values += (self.options[constant] for constant in names[len(values) :])
        self.compiled[(*self.grid, 1, 1)](*values)


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


def is_capturing() -> bool:
    """Return whether the current stream records a CUDA graph: what is launched now does not run now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
