"""Tile sizes of the kernels, per GPU. They change the time only."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """How block-sparse attention is cut up."""

    block_m: int
    """Query rows of a tile."""
    block_n: int
    """Keys of a tile."""
    piece: int
    """Keys of a full piece: small ones pad less, and their list is longer."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Stages of the software pipeline."""


# What spills no register on any GPU from compute capability 8.0 on, by the largest padded head dimension it is for.
SAFE = {
    64: AttentionTiles(block_m=128, block_n=32, piece=16, num_warps=8, num_stages=3),
    128: AttentionTiles(block_m=64, block_n=32, piece=16, num_warps=4, num_stages=3),
    256: AttentionTiles(block_m=64, block_n=32, piece=16, num_warps=8, num_stages=2),
}
# fp32 is multiplied exactly, without tensor cores.
SAFE_FP32 = AttentionTiles(block_m=32, block_n=32, piece=16, num_warps=4, num_stages=2)

# By compute capability and padded head dimension, for 16-bit types.
TUNED: dict[tuple[int, int], AttentionTiles] = {
    (86, 64): AttentionTiles(block_m=128, block_n=64, piece=16, num_warps=8, num_stages=3),
    (89, 64): AttentionTiles(block_m=128, block_n=64, piece=16, num_warps=8, num_stages=3),
    (90, 64): AttentionTiles(block_m=128, block_n=64, piece=16, num_warps=8, num_stages=3),
    (100, 64): AttentionTiles(block_m=128, block_n=64, piece=16, num_warps=8, num_stages=3),
    (90, 128): AttentionTiles(block_m=128, block_n=64, piece=16, num_warps=8, num_stages=3),
    (100, 128): AttentionTiles(block_m=128, block_n=64, piece=16, num_warps=8, num_stages=3),
}

# Of the Gluon attention: warps of one group of 64 queries, and tiles of keys in flight.
GLUON = AttentionTiles(block_m=128, block_n=128, piece=16, num_warps=4, num_stages=2)


def attention_tiles(capability: int, block_d: int, dtype: torch.dtype) -> AttentionTiles:
    """Return the tile sizes for a compute capability such as 90, a padded head dimension and a dtype."""
    if dtype == torch.float32:
        return SAFE_FP32
    safe = next(tiles for dim, tiles in SAFE.items() if block_d <= dim)
    return TUNED.get((capability, block_d), safe)


# Of the attention by descriptors, by the largest padded head dimension: whole tiles of keys, and pieces of the rest.
DESCRIPTOR_SAFE = {
    64: AttentionTiles(block_m=128, block_n=64, piece=16, num_warps=8, num_stages=2),
    128: AttentionTiles(block_m=64, block_n=64, piece=16, num_warps=8, num_stages=2),
}
# By compute capability and padded head dimension.
DESCRIPTOR = {
    (90, 64): AttentionTiles(block_m=128, block_n=128, piece=16, num_warps=8, num_stages=2),
    (90, 128): AttentionTiles(block_m=128, block_n=128, piece=16, num_warps=8, num_stages=2),
    (100, 64): AttentionTiles(block_m=128, block_n=128, piece=16, num_warps=8, num_stages=2),
    (100, 128): AttentionTiles(block_m=128, block_n=128, piece=16, num_warps=8, num_stages=2),
}


def descriptor_tiles(capability: int, block_d: int) -> AttentionTiles:
    """Return the tile sizes for a compute capability such as 90 and a padded head dimension of at most 128."""
    dim, safe = next((dim, tiles) for dim, tiles in DESCRIPTOR_SAFE.items() if block_d <= dim)
    return DESCRIPTOR.get((capability, dim), safe)
