"""Sparse results of a few heads and what is exact for some of their rows: for the op that repairs rows."""

import torch

from svg2_compile.kernels.repair_rows import repair_rows_reference


def random_case(seed=0, dtype=torch.float32, tokens=150, rows=40, dim=24, rank=3, noise=0.02, heads=3, batch=2):
    """Return (out, places, exact): results of ``rank`` directions and some noise, and an error that they tell.

    The error of the last head is noise, which nothing tells.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    out = random(batch, tokens, heads, rank) @ random(batch, 1, rank, dim) + noise * random(batch, tokens, heads, dim)
    out = out.to(dtype).transpose(1, 2)
    places = torch.stack([torch.randperm(tokens, generator=generator)[:rows] for _ in range(batch * heads)])
    places = places.view(batch, heads, rows)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    sparse = out.gather(2, places.unsqueeze(-1).expand(-1, -1, -1, dim)).to(kind)
    exact = sparse + 0.3 * sparse @ random(dim, dim).to(kind) / dim + 0.5 + noise * random(*sparse.shape).to(kind)
    exact[:, -1] = sparse[:, -1] + noise * random(*sparse[:, -1].shape).to(kind)
    return out, places.int(), exact


def judged(out, places, exact):
    """Return what the reference makes of it in fp64: the results, and what is found."""
    result = out.double()
    found = repair_rows_reference(result, places, exact.double())
    return result, found


def other_rows(out, places):
    """Return which rows [B, H, N] are not among the given ones."""
    return torch.ones(out.shape[:3], dtype=torch.bool).scatter_(2, places.long(), False)
