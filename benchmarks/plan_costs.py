"""What a work list makes the attention kernel multiply."""

from torch import Tensor

from svg2_compile.kernels.work_list import PIECES


def query_tiles(q_sizes: Tensor, block_m: int) -> Tensor:
    """Return the tiles of rows of every query cluster, [B, H, C_q]."""
    return (q_sizes.long() + block_m - 1) // block_m


def key_tiles(counts: Tensor, block_n: int, piece: int) -> Tensor:
    """Return the tiles of keys that each tile of a query cluster goes through, [B, H, C_q], from the runs' counts.

    Full pieces, then one shorter piece a run, all packed into tiles.
    """
    pieces = counts[..., 1 + PIECES.index(piece)].long() + counts[..., 0]
    return (pieces * piece + block_n - 1) // block_n


def issued_pairs(q_sizes: Tensor, counts: Tensor, rows: int, block_n: int, piece: int) -> int:
    """Return the pairs of query and key that are multiplied, padding included.

    ``rows`` are the queries that are multiplied or not as a whole: of a tile, or of a group of its warps.
    """
    tiles = query_tiles(q_sizes, rows) * key_tiles(counts, block_n, piece)
    return int(tiles.sum()) * rows * block_n


def selected_pairs(q_sizes: Tensor, k_sizes: Tensor, keep: Tensor) -> int:
    """Return the pairs of query and key that are kept; query heads share the key heads."""
    k_sizes = k_sizes.repeat_interleave(q_sizes.shape[1] // k_sizes.shape[1], 1).long()
    return int(((keep * k_sizes.unsqueeze(2)).sum(-1) * q_sizes.long()).sum())
