"""Argument checks. Implementations and fakes share them, so a mistake reads the same eagerly and under torch.compile.

Only shapes, dtypes and plain numbers are looked at, never tensor values: a check costs no device synchronisation, and
on a symbolic size it becomes a guard or a runtime assertion.
"""

from collections.abc import Callable

import torch
from torch import SymBool, Tensor

from svg2_compile.kernels.private_torch import check_type_of_torch, check_value_of_torch


def check_value(condition: bool | SymBool, message: Callable[[], str]) -> None:
    """Raise ValueError unless ``condition`` holds."""
    # PyTorch's takes microseconds, dozens of times an attention.
    if condition is not True:
        check_value_of_torch(condition, message)


def check_type(condition: bool | SymBool, message: Callable[[], str]) -> None:
    """Raise TypeError unless ``condition`` holds."""
    if condition is not True:
        check_type_of_torch(condition, message)


FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless ``tensor`` has the ``expected`` shape."""

    def message() -> str:
        return f"{name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}"

    check_rank(name, tensor, len(expected))
    for size, wanted in zip(tensor.shape, expected, strict=True):
        check_value(size == wanted, message)


def check_rank(name: str, tensor: Tensor, rank: int) -> None:
    """Raise ValueError unless ``tensor`` has ``rank`` axes."""
    check_value(tensor.dim() == rank, lambda: f"{name} must have {rank} axes, got shape {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, *expected: torch.dtype) -> None:
    """Raise TypeError unless ``tensor`` has one of the ``expected`` dtypes."""
    check_type(
        tensor.dtype in expected,
        lambda: f"{name} must be {' or '.join(map(str, expected))}, got {tensor.dtype}",
    )


def check_head_groups(heads: int, k_heads: int) -> None:
    """Raise ValueError unless every key/value head serves the same number of query heads."""
    check_value(
        k_heads > 0 and heads % k_heads == 0,
        lambda: f"the number of query heads must be a multiple of the key/value heads, got {heads} and {k_heads}",
    )


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype sums over ``tensor`` are held in: fp64 for fp64, else fp32."""
    return torch.promote_types(tensor.dtype, torch.float32)
