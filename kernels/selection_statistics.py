"""What a selection adds to its statistics: density and kept mass, per query cluster. Not an op of its own."""

import torch
from torch import Tensor

from svg2_compile.kernels.work_list import PIECES

STATISTICS = (
    # 1.
    "calls",
    # Its part of the head's density, which is kept pairs over all pairs.
    "density_sum",
    # Its part of the head's kept probability mass, a mean over query tokens.
    "kept_mass_sum",
    # Its own kept mass; 1 where the cluster is empty.
    "own_kept_mass_sum",
    # Its part of the pairs multiplied, when pieces of ``PIECES[0]`` keys fill tiles of ``TILE_KEYS``.
    "issued_sum",
)
"""The last axis of ``statistics``: what each query cluster adds in a call, summed over calls."""
TILE_KEYS = 128


def statistics_of(counts: Tensor, kept_tokens: Tensor, mass: Tensor, q_sizes: Tensor, k_sizes: Tensor) -> Tensor:
    """Return what one call adds to the statistics, from the kept keys and their mass, both [B, H, C_q]."""
    dtype = mass.dtype
    runs, full_pieces, *_ = counts.to(dtype).unbind(-1)
    k_tokens = per_query_head(k_sizes.sum(-1, keepdim=True), q_sizes.shape[1]).to(dtype)
    pieces_per_tile = TILE_KEYS // PIECES[0]
    full_tiles = (full_pieces / pieces_per_tile).floor()
    last_tiles = ((full_pieces + runs) / pieces_per_tile - full_tiles).ceil()
    q_share = q_sizes.to(dtype) / q_sizes.sum(-1, keepdim=True)
    return torch.stack(
        (
            torch.ones_like(mass),
            q_share * kept_tokens / k_tokens,
            q_share * mass,
            mass.masked_fill(q_sizes == 0, 1.0),
            q_share * (full_tiles + last_tiles) * TILE_KEYS / k_tokens,
        ),
        dim=-1,
    )


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """Return what belongs to a key head once for every query head that uses it."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)
