"""Sizes of random clusters: uneven, half of them empty, one that takes all, or one token each."""

import torch


def random_sizes(generator, batch, heads, clusters, tokens, kind):
    """Return int32 [B, H, C] cluster sizes that sum to ``tokens``."""
    if kind == "giant":
        labels = torch.full((batch, heads, tokens), clusters - 1)
    elif kind == "singletons":
        labels = torch.arange(tokens).clamp(max=clusters - 1).expand(batch, heads, tokens)
    else:
        used = max(1, clusters // 2) if kind == "half empty" else clusters
        labels = torch.randint(0, used, (batch, heads, tokens), generator=generator)
    return torch.nn.functional.one_hot(labels, clusters).sum(2).int()
