"""The work of the block-sparse attention kernel as lists made on the device: query tiles and key pieces.

Kept key clusters that follow one another merge into runs, because their keys are contiguous; empty clusters do not
break a run. Runs are cut into pieces of at most ``piece`` keys, and the kernel packs pieces of any runs into one tile
of keys: only the last piece of a run pads. A piece is one int32: start * 32 + length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# A piece length, at most 16, takes the low five bits of a piece.
LENGTH_BITS = 5
MAX_PIECE = 16
MAX_KEYS = 1 << (31 - LENGTH_BITS)


@dataclass(frozen=True, slots=True)
class WorkList:
    """What the attention kernel walks through; all int32."""

    tiles: Tensor
    """[B, H, T, 3], (query cluster, first row, row after the last) of every tile of queries; slots left over are 0."""
    pieces: Tensor
    """[B, H, C_q, S], per query cluster its full pieces in order, then the shorter last pieces of runs in order."""
    counts: Tensor
    """[B, H, C_q, 2], the number of full pieces and of all pieces; slots of ``pieces`` past that are undefined."""


def max_tiles(tokens: int, clusters: int, block: int) -> int:
    """Return how many tiles of ``block`` rows any ``clusters`` clusters of ``tokens`` tokens can need.

    A cluster of n rows needs ceil(n / block) <= (n + block - 1) / block tiles; summed and rounded down.
    """
    return (tokens + clusters * (block - 1)) // block


def max_pieces(tokens: int, clusters: int, piece: int) -> int:
    """Return how many pieces any selection out of ``clusters`` key clusters can need: no list can overflow.

    Two runs have a dropped cluster between them, so there are at most ceil(clusters / 2); each is rounded up.
    """
    return max_tiles(tokens, (clusters + 1) // 2, piece)


def work_list_reference(
    q_sizes: Tensor, k_sizes: Tensor, keep: Tensor, q_tokens: int, k_tokens: int, block_m: int, piece: int
) -> WorkList:
    """Return the tiles of queries and, per query cluster, the pieces of keys it attends to.

    Args:
        q_sizes: int32 [B, H, C_q], tokens per query cluster; sums to q_tokens.
        k_sizes: int32 [B, G, C_k], tokens per key cluster; sums to k_tokens.
        keep: bool [B, H, C_q, C_k], True where query cluster i attends to key cluster j.
        q_tokens: queries per head.
        k_tokens: keys per head, less than MAX_KEYS.
        block_m: rows of a tile of queries.
        piece: keys of a full piece, at most MAX_PIECE.

    Returns:
        The work list; ``tiles`` has ``max_tiles`` slots a head and ``pieces`` has ``max_pieces`` a query cluster.

    Promises:
        Every query row lies in exactly one tile, every kept key of a row in exactly one piece, dropped keys in none.
    """
    batch, heads, q_clusters, k_clusters = keep.shape
    repeats = heads // k_sizes.shape[1]
    tiles = q_sizes.new_zeros((batch, heads, max_tiles(q_tokens, q_clusters, block_m), 3))
    pieces = q_sizes.new_zeros((batch, heads, q_clusters, max_pieces(k_tokens, k_clusters, piece)))
    counts = q_sizes.new_zeros((batch, heads, q_clusters, 2))
    for b in range(batch):
        for h in range(heads):
            rows = _tiles(q_sizes[b, h].tolist(), block_m)
            tiles[b, h, : len(rows)] = tiles.new_tensor(rows).view(-1, 3)
            for i in range(q_clusters):
                full, ragged = _pieces(keep[b, h, i].repeat_interleave(k_sizes[b, h // repeats].long()), piece)
                pieces[b, h, i, : len(full) + len(ragged)] = pieces.new_tensor(full + ragged)
                counts[b, h, i] = counts.new_tensor([len(full), len(full) + len(ragged)])
    return WorkList(tiles, pieces, counts)


def _tiles(sizes: list[int], block: int) -> list[tuple[int, int, int]]:
    """Return (cluster, first row, row after the last) of every tile of one head."""
    tiles: list[tuple[int, int, int]] = []
    end = 0
    for cluster, size in enumerate(sizes):
        start, end = end, end + size
        tiles += [(cluster, row, min(row + block, end)) for row in range(start, end, block)]
    return tiles


def _pieces(kept: Tensor, piece: int) -> tuple[list[int], list[int]]:
    """Return the full and the ragged pieces of the keys where ``kept`` [N_k] is True."""
    full: list[int] = []
    ragged: list[int] = []
    for start, stop in runs(kept):
        for key in range(start, stop, piece):
            length = min(piece, stop - key)
            (full if length == piece else ragged).append((key << LENGTH_BITS) + length)
    return full, ragged


def runs(kept: Tensor) -> list[tuple[int, int]]:
    """Return the maximal ranges [start, stop) in which ``kept`` [N_k] is True."""
    edges = torch.diff(kept.int(), prepend=kept.new_zeros(1).int(), append=kept.new_zeros(1).int())
    starts, stops = ((edges == sign).nonzero().flatten().tolist() for sign in (1, -1))
    return list(zip(starts, stops, strict=True))
