"""How the assignment of tokens to centroids is cut up. Whatever writes centroids pads them to its tiles."""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found"

from dataclasses import dataclass

import torch
import triton

from svg2_compile.kernels.launch import padded_power_of_two
from svg2_compile.kernels.why_not import GLUON_DIMS, GLUON_DTYPES

# Clusters of a tile of the Gluon assignment: timed with Triton 3.6; with those of later versions 128 would spill.
GLUON_ASSIGN_C = 128 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 64


@dataclass(frozen=True, slots=True)
class AssignTile:
    """The shape of the assignment's product."""

    block_n: int
    """Tokens."""
    block_c: int
    """Clusters."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Tiles of centroids in flight."""
    max_registers: int | None = None
    """Most registers of a thread; None leaves it to the assembler."""


def assign_tile(dtype: torch.dtype, block_d: int, capability: int | None = None) -> AssignTile:
    """Return the tile for tokens of ``dtype`` and rows padded to ``block_d``; only time depends on the capability."""
    if dtype == torch.float32:
        return AssignTile(32, 32, 4, 1, 128)
    if block_d > 128:
        return AssignTile(64, 64, 4, 2, 255)
    # Three programs share a processor; on sm_120 they would spill with Triton 3.9.
    return AssignTile(128, 32, 4, 3, 184 if capability == 120 else 168)


def operand_c(dtype: torch.dtype, dim: int, capability: int) -> int:
    """Return what the centroids of a head are padded to a multiple of, for tokens without gaps."""
    if capability == 90 and dtype in GLUON_DTYPES and dim in GLUON_DIMS:
        return GLUON_ASSIGN_C
    return assign_tile(dtype, padded_power_of_two(dim), capability).block_c
