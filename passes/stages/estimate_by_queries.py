"""Estimate the attention mass of every block from each of its queries (not the paper's, which takes their centroid).

masses = block_masses(q, q_order, k_centroids, q_sizes, k_sizes, scale)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.stage import Stage, Work

if TYPE_CHECKING:
    from svg2_compile.passes.plan import SitePlan

PRODUCT_RATE_RATIO = 0.53
"""What `block_masses` reaches of a matrix product's rate (docs/lab, 30)."""


@dataclass(frozen=True, slots=True)
class EstimateByQueries(Stage):
    """Every query is asked; keys go by their centroids."""

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the masses."""
        masses = writer.emit(
            torch.ops.svg2.block_masses.default,
            flow.q,
            flow.q_order,
            writer.state["k_centroids"],
            flow.q_sizes,
            flow.k_sizes,
            writer.site.scale,
        )
        return replace(flow, masses=masses)

    def work(self, site: SitePlan) -> Work:
        """Count the scores, computed twice: for the sum of a row, and for its shares."""
        queries = site.batch * site.q_heads * site.token_hint * site.head_dim
        return Work(4.0 * queries * site.k_clusters, PRODUCT_RATE_RATIO)
