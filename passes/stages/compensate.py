"""Let every dropped key cluster enter the softmax as one pseudo-key (not the paper's; SVG-EAR, arXiv 2603.08982).

    pseudo_bias = log_dropped_sizes(runs, counts, k_sizes)
    pseudo_bias = log_dropped_weights(pseudo_bias, q_centroids, k', k_means, k_sizes, scale)  # compensate="keys"
    out, lse = block_sparse_attention(..., k_means, v_means, pseudo_bias)

A dropped cluster of n keys weighs exp(scale * q . c) n, c being their mean, and gives the mean of their values. That is
exact where the keys of the cluster are alike, and less than the truth where they are not. With ``compensate="keys"``
(not published) it weighs for the mean query what its keys do; other queries are off by how they differ from their mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.stage import Stage, Work

if TYPE_CHECKING:
    from svg2_compile.passes.plan import SitePlan

PRODUCT_RATE_RATIO = 0.5
"""What the attention to pseudo-keys reaches of a matrix product's rate: a guess, not timed yet."""


@dataclass(frozen=True, slots=True)
class Compensate(Stage):
    """Comes after whatever chooses; ``AverageClusters`` comes before."""

    asks_keys: bool = field(default=False, kw_only=True)
    """Weigh a mean by all keys of its cluster, and not by their number."""

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the weights; the attention takes them."""
        bias = writer.emit(torch.ops.svg2.log_dropped_sizes.default, flow.runs, flow.counts, flow.k_sizes)
        if self.asks_keys:
            keys = flow.k_clustered, flow.k_means, flow.k_sizes
            queries, scale = writer.state["q_centroids"], writer.site.scale
            bias = writer.emit(torch.ops.svg2.log_dropped_weights.default, bias, queries, *keys, scale)
        return replace(flow, pseudo_bias=bias)

    def work(self, site: SitePlan) -> Work:
        """Count the attention to one pseudo-key a cluster, the results once more, and what asking the keys takes."""
        tokens = site.batch * site.token_hint * site.head_dim
        queries = site.q_heads * tokens
        products, passed = 4.0 * queries * site.k_clusters, 3.0 * queries
        if self.asks_keys:
            products, passed = products + 2.0 * queries * site.q_clusters, passed + site.k_heads * tokens
        return Work(products, PRODUCT_RATE_RATIO, passed)
