"""Importing this module registers every ``torch.ops.svg2`` operator."""

from svg2_compile.kernels import (
    block_masses,
    block_sparse_attention,
    cluster_tokens,
    context_attention,
    dense_attention,
    dense_heads,
    kmeans,
    permute,
    recall,
    select_blocks,
    sort_labels,
)

__all__ = [
    "block_masses",
    "block_sparse_attention",
    "cluster_tokens",
    "context_attention",
    "dense_attention",
    "dense_heads",
    "kmeans",
    "permute",
    "recall",
    "select_blocks",
    "sort_labels",
]
