"""The work of block-sparse attention as lists made on the device: ranges of kept keys, and tiles of queries.

Kept key clusters that follow one another merge into one run, because their keys are contiguous; empty clusters do not
break a run. An implementation cuts runs into pieces of one of ``PIECES`` keys: first the full pieces of every run, then
what is left at its end. Long runs come first, so those with a full piece are the first ones, whatever the piece.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PIECES = (16, 64, 128)
"""Keys of a piece, as different implementations want it."""
COUNTS = ("runs", *(f"full_pieces_{piece}" for piece in PIECES))
"""The last axis of ``KeptRuns.counts``."""
MAX_KEYS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class KeptRuns:
    """What every query cluster attends to; all int32."""

    runs: Tensor
    """[B, H, C_q, R, 2], (first key, key after the last) of every run, in key order but for their class: runs of at
    least the largest piece, then of the next, and last those shorter than the smallest. R = ``max_runs(C_k)``; slots
    past the number of runs are undefined."""
    counts: Tensor
    """[B, H, C_q, 4], columns named by ``COUNTS``: the runs, and the pieces of either length that fit into them."""


def max_runs(clusters: int) -> int:
    """Return how many runs any selection out of ``clusters`` key clusters can have: the list cannot overflow.

    Two runs have a dropped cluster between them.
    """
    return (clusters + 1) // 2


def kept_runs_reference(keep: Tensor, k_sizes: Tensor) -> KeptRuns:
    """Return the runs of kept keys of every query cluster.

    Args:
        keep: bool [B, H, C_q, C_k], True where query cluster i attends to key cluster j.
        k_sizes: int32 [B, G, C_k], tokens per key cluster; query head h uses key head h // (H / G).

    Returns:
        The runs: every kept key lies in exactly one, dropped keys in none. Slots left over are 0.
    """
    heads, k_clusters = keep.shape[1], keep.shape[3]
    sizes = k_sizes.repeat_interleave(heads // k_sizes.shape[1], dim=1).unsqueeze(2)  # [B, H, 1, C_k]
    kept, dropped = keep & (sizes > 0), ~keep & (sizes > 0)
    kept_sizes = sizes * kept
    # The clusters of a run have equally many dropped ones before them.
    breaks = dropped.cumsum(-1) + 1
    last_break = torch.nn.functional.pad((breaks * kept).cummax(-1).values, (1, 0))[..., :-1]
    is_first = kept & (last_break < breaks)
    run = is_first.cumsum(-1) - 1  # of kept clusters
    # A slot more than there can be runs takes what belongs to none.
    slots = max_runs(k_clusters)
    starts = torch.zeros((*keep.shape[:3], slots + 1), dtype=torch.int64, device=keep.device)
    lengths = torch.zeros_like(starts)
    starts.scatter_(-1, run.where(is_first, slots), (sizes.cumsum(-1) - sizes).expand(keep.shape))
    lengths.scatter_add_(-1, run.where(kept, slots), kept_sizes.long())
    starts, lengths = starts[..., :slots], lengths[..., :slots]
    rank = sum((lengths < piece).int() for piece in PIECES) + (lengths == 0).int()
    order = rank.sort(dim=-1, stable=True).indices
    starts, lengths = starts.gather(-1, order), lengths.gather(-1, order)
    starts = starts * (lengths > 0)
    columns = [(lengths > 0).sum(-1), *((lengths // piece).sum(-1) for piece in PIECES)]
    runs = torch.stack((starts, starts + lengths), dim=-1)
    return KeptRuns(runs.int(), torch.stack(columns, dim=-1).int())


def kept_keys(runs: Tensor, counts: Tensor, k_tokens: int) -> Tensor:
    """Return who attends to which key, bool [B, H, C_q, N_k], from the tensors of a ``KeptRuns``."""
    is_run = torch.arange(runs.shape[3], device=runs.device, dtype=torch.int64) < counts[..., :1]
    starts, stops = (torch.where(is_run, edge, k_tokens).long() for edge in runs.unbind(-1))
    steps = torch.zeros((*runs.shape[:3], k_tokens + 1), dtype=torch.int32, device=runs.device)
    one = torch.ones_like(starts, dtype=torch.int32)
    steps.scatter_add_(-1, starts, one).scatter_add_(-1, stops, -one)
    return steps[..., :-1].cumsum(-1) > 0


def max_tiles(tokens: int, clusters: int, block: int) -> int:
    """Return how many tiles of ``block`` rows any ``clusters`` clusters of ``tokens`` tokens can need.

    A cluster of n rows needs ceil(n / block) <= (n + block - 1) / block tiles; summed and rounded down.
    """
    return (tokens + clusters * (block - 1)) // block


def query_tiles_reference(q_sizes: Tensor, q_tokens: int, block_m: int) -> Tensor:
    """Return the tiles of queries: (query cluster, first row, row after the last) of each.

    Args:
        q_sizes: int32 [B, H, C_q], tokens per query cluster; sums to q_tokens.
        q_tokens: queries per head.
        block_m: most rows of a tile.

    Returns:
        int32 [B, H, T, 3] with T = ``max_tiles``, cluster by cluster; every row lies in exactly one tile. Slots left
        over are 0.
    """
    batch, heads, clusters = q_sizes.shape
    tiles = q_sizes.new_zeros((batch, heads, max_tiles(q_tokens, clusters, block_m), 3))
    for b in range(batch):
        for h in range(heads):
            end, slot = 0, 0
            for cluster, size in enumerate(q_sizes[b, h].tolist()):
                start, end = end, end + size
                for row in range(start, end, block_m):
                    tiles[b, h, slot] = tiles.new_tensor([cluster, row, min(row + block_m, end)])
                    slot += 1
    return tiles
