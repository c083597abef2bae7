"""Importing this module registers every ``torch.ops.svg2`` operator and completes ``CARDS``."""

from svg2_compile.kernels import (  # noqa: F401
    block_errors,
    block_masses,
    block_masses_by_keys,
    block_sparse_attention,
    cluster_means,
    cluster_tokens,
    context_attention,
    dense_attention,
    gram,
    judge_heads,
    keep_dense_heads,
    key_mask,
    kmeans,
    least_keys,
    log_dropped_sizes,
    log_dropped_weights,
    measure_recall,
    permute,
    probe_rows,
    redo_densely,
    repair_rows,
    select_blocks,
    sort_labels,
)
from svg2_compile.kernels.card import CARDS

__all__ = ["CARDS"]
