"""How a kernel is cut up."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """How block-sparse attention is cut up."""

    block_m: int
    """Query rows of a tile."""
    block_n: int
    """Keys of a tile."""
    piece: int
    """Keys of a full piece: small ones pad less, and more of them are needed."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Stages of the software pipeline."""
