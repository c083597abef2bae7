"""Let every dropped key cluster enter the softmax as one pseudo-key (not the paper's; SVG-EAR, arXiv 2603.08982).

    pseudo_bias = log_dropped_sizes(runs, counts, k_sizes)
    out, lse = block_sparse_attention(..., k_means, v_means, pseudo_bias)

A dropped cluster of n keys weighs exp(scale * q . c) n, c being their mean, and gives the mean of their values. That is
exact where the keys of the cluster are alike, and less than the truth where they are not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the weights; the attention takes them."""
        bias = writer.emit(torch.ops.svg2.log_dropped_sizes.default, flow.runs, flow.counts, flow.k_sizes)
        return replace(flow, pseudo_bias=bias)

    def work(self, site: SitePlan) -> Work:
        """Count the attention to one pseudo-key a cluster, and the results that are read and written once more."""
        queries = site.batch * site.q_heads * site.token_hint * site.head_dim
        return Work(4.0 * queries * site.k_clusters, PRODUCT_RATE_RATIO, 3.0 * queries)
