"""Tokens in clusters, their means by hand, and selections: for the ops that compensate for what is dropped."""

import torch
from sizes_of_clusters import random_sizes

from svg2_compile.kernels.work_list import kept_runs_reference


def random_tokens(seed=0, dtype=torch.float32, tokens=65, hidden=7, clusters=9, kind="uneven", dim=24):
    """Return tokens, the last of which are hidden, and the sizes of their clusters."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 3, dim, generator=generator).to(dtype).transpose(1, 2)
    return x, random_sizes(generator, 2, 3, clusters, tokens - hidden, kind)


def by_hand(x, sizes):
    """Return the means in fp64, cluster by cluster."""
    means = torch.zeros(*sizes.shape, x.shape[3], dtype=torch.float64)
    for b, g, c in torch.ones(sizes.shape).nonzero().tolist():
        start = int(sizes[b, g, :c].sum())
        members = x[b, g, start : start + int(sizes[b, g, c])].double()
        means[b, g, c] = members.mean(0) if len(members) else 0
    return means


def dropped_arguments(case):
    """Return the arguments of ``svg2::log_dropped_sizes`` for the selection of an attention."""
    kept = kept_runs_reference(case.keep, case.k_sizes)
    return kept.runs, kept.counts, case.k_sizes
