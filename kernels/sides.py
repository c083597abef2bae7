"""Two sets of heads, queries and keys, that share launches: their sizes, and how a kernel finds its way among them.

Tiles of the first side come before those of the second; so do rows in a buffer of both.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

from dataclasses import dataclass, fields

import triton
import triton.language as tl

from svg2_compile.kernels.launch import padded_power_of_two

# tl.histogram wants a bin for every thread of a warp.
MIN_BLOCK_C = 32


@dataclass(frozen=True, slots=True)
class Sides:
    """The sizes of two sets of heads that share launches; every kernel takes them, in this order."""

    batch: int
    """Batch elements."""
    q_heads: int
    """Heads of the first side."""
    k_heads: int
    """Heads of the second side; 0 where there is none."""
    q_tokens: int
    """Tokens of a head of the first side."""
    k_tokens: int
    """Tokens of a head of the second side."""
    q_clusters: int
    """Clusters of a head of the first side."""
    k_clusters: int
    """Clusters of a head of the second side."""

    @classmethod
    def one(cls, batch: int, heads: int, tokens: int, clusters: int) -> "Sides":
        """Return the sizes of one side alone."""
        return cls(batch, heads, 0, tokens, tokens, clusters, clusters)

    def arguments(self) -> tuple[int, ...]:
        """Return the sizes as the kernels take them."""
        # astuple copies what it returns, field by field, which takes a microsecond each
        return tuple(getattr(self, name) for name in SIZES)

    def total(self, q_row: int, k_row: int) -> int:
        """Return the elements of all heads, given those of one head of either side."""
        return self.batch * (self.q_heads * q_row + self.k_heads * k_row)

    @property
    def tokens_and_clusters(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Tokens and clusters of a head of either side."""
        return (self.q_tokens, self.q_clusters), (self.k_tokens, self.k_clusters)

    @property
    def block_c(self) -> int:
        """A power of two that holds the clusters of either side."""
        return padded_power_of_two(max(self.q_clusters, self.k_clusters), MIN_BLOCK_C)


SIZES = tuple(field.name for field in fields(Sides))


@triton.jit
def tiles_to_do(batch, heads, length, needed_ptr, iteration, TILE: tl.constexpr, SIDE: tl.constexpr):
    """Return the tiles of all heads of a side, or 0 where it needs fewer iterations; without a pointer it needs all."""
    tiles = batch * heads * tl.cdiv(length, TILE)
    if needed_ptr is not None:
        tiles = tl.where(tl.load(needed_ptr + SIDE) > iteration, tiles, 0)
    return tiles


@triton.jit
def locate(tile, q_tiles, q_length, k_length, TILE: tl.constexpr):
    """Return whether a tile of both sides is one of keys, its row (batch element and head), and its place there."""
    is_k = tile >= q_tiles
    tile = tl.where(is_k, tile - q_tiles, tile)
    tiles_per_row = tl.cdiv(tl.where(is_k, k_length, q_length), TILE)
    return is_k, tile // tiles_per_row, tile % tiles_per_row


@triton.jit
def row_start(is_k, row, q_rows, q_length, k_length):
    """Return where a row begins in a buffer of both sides."""
    q_part, k_part = tl.where(is_k, q_rows, row), tl.where(is_k, row, 0)
    return tl.cast(q_part, tl.int64) * q_length + tl.cast(k_part, tl.int64) * k_length
