"""Tile sizes of the kernels, per GPU. They change the time only."""

from collections.abc import Sequence

import torch

from svg2_compile.kernels import tuned
from svg2_compile.kernels.tiles import AttentionTiles

__all__ = ["AttentionTiles", "attention_candidates", "attention_tiles", "chosen_tiles"]

# Keys of a full piece where a tile is packed from several.
PIECE = 16

# What spills no register on any GPU from compute capability 8.0 on, by the largest padded head dimension it is for.
SAFE = {
    64: AttentionTiles(block_m=128, block_n=32, piece=16, num_warps=8, num_stages=3),
    128: AttentionTiles(block_m=64, block_n=32, piece=16, num_warps=4, num_stages=3),
    256: AttentionTiles(block_m=64, block_n=32, piece=16, num_warps=8, num_stages=2),
}
# fp32 is multiplied exactly, without tensor cores.
SAFE_FP32 = AttentionTiles(block_m=32, block_n=32, piece=16, num_warps=4, num_stages=2)

# With tensor descriptors, where no table of the GPU's generation says more; head dimensions up to 128.
SAFE_DESCRIPTOR = {
    64: AttentionTiles(block_m=128, block_n=64, piece=16, num_warps=8, num_stages=2),
    128: AttentionTiles(block_m=64, block_n=64, piece=16, num_warps=8, num_stages=2),
}

# Of the Gluon attention, by head dimension: warps of one group, and tiles of keys in flight.
GLUON = {
    64: AttentionTiles(block_m=192, block_n=128, piece=PIECE, num_warps=4, num_stages=3),
    128: AttentionTiles(block_m=128, block_n=128, piece=PIECE, num_warps=4, num_stages=3),
}
# Queries of one group there.
GLUON_ROWS = 64


def attention_tiles(
    capability: int | None, block_d: int, dtype: torch.dtype, implementation: str = "pointer"
) -> AttentionTiles:
    """Return the tiles of an attention kernel.

    Args:
        capability: compute capability such as 90; None or one without a table gets tiles that fit everywhere.
        block_d: padded head dimension; of ``gluon`` 64 or 128.
        dtype: of the tokens.
        implementation: ``gluon``, ``descriptor`` or ``pointer``.
    """
    if implementation == "gluon":
        return GLUON[block_d]
    if dtype == torch.float32:
        return SAFE_FP32
    safe_tiles = SAFE_DESCRIPTOR if implementation == "descriptor" else SAFE
    safe = next(tiles for dim, tiles in safe_tiles.items() if block_d <= dim)
    return tuned.ATTENTION.get(capability, {}).get((implementation, block_d), safe)


def attention_candidates(
    capability: int | None, block_d: int, dtype: torch.dtype, implementation: str = "pointer"
) -> tuple[AttentionTiles, ...]:
    """Return the tiles worth timing, those of ``attention_tiles`` first; the arguments are the same."""
    chosen = attention_tiles(capability, block_d, dtype, implementation)
    if dtype == torch.float32:
        return (chosen,)
    others = tuned.CANDIDATES.get(capability, {}).get((implementation, block_d), ())
    return tuple(dict.fromkeys((chosen, *others)))


def chosen_tiles(numbers: Sequence[int]) -> AttentionTiles:
    """Return the tiles for block_m, block_n, num_warps and num_stages as a user gives them."""
    block_m, block_n, num_warps, num_stages = numbers
    return AttentionTiles(block_m, block_n, PIECE, num_warps, num_stages)
