"""Cluster sizes and selections made at random, for benchmarks and the planning simulator."""

import math

import torch
from torch import Tensor

# Standard deviation of a cluster's size over the mean.
SIZE_VARIATION = 0.8


def lognormal_sizes(generator: torch.Generator, batch: int, heads: int, clusters: int, tokens: int) -> Tensor:
    """Return int32 [B, H, C] sizes that sum to ``tokens``, lognormal with ``SIZE_VARIATION``."""
    sigma = math.sqrt(math.log(1 + SIZE_VARIATION**2))
    device = generator.device
    edges = (torch.randn((batch, heads, clusters), generator=generator, device=device) * sigma).exp().double()
    edges = edges.cumsum(-1)
    edges = (edges / edges[..., -1:] * tokens).round().int()
    return torch.diff(edges, prepend=torch.zeros_like(edges[..., :1]))


def random_blocks(generator: torch.Generator, density: float | Tensor, k_sizes: Tensor, q_clusters: int) -> Tensor:
    """Return bool [B, H, C_q, C_k]: per query cluster, random key clusters of about that share of the keys.

    The share is one for all, or [B, H, C_q, 1].
    """
    batch, heads, k_clusters = k_sizes.shape
    shape = (batch, heads, q_clusters, k_clusters)
    order = torch.rand(shape, generator=generator, device=k_sizes.device).argsort(-1)
    sizes = k_sizes.unsqueeze(2).expand(shape).gather(-1, order)
    kept = sizes.cumsum(-1) - sizes / 2 < density * sizes.sum(-1, keepdim=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, kept)


def shuffled_labels(generator: torch.Generator, sizes: Tensor) -> Tensor:
    """Return int32 [B, H, N] labels in random order that have the given sizes, [B, H, C]."""
    batch, heads, clusters = sizes.shape
    cluster = torch.arange(clusters, dtype=torch.int32, device=sizes.device)
    labels = [cluster.repeat_interleave(row) for row in sizes.view(-1, clusters)]
    shuffled = [row[torch.randperm(len(row), generator=generator, device=row.device)] for row in labels]
    return torch.stack(shuffled).view(batch, heads, -1)
