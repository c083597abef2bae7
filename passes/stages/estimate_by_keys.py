"""Estimate the attention mass of every block from each of its keys (not the paper's, which takes their centroid).

masses = block_masses_by_keys(q_centroids, k', k_sizes, scale)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.stage import Stage, Work

if TYPE_CHECKING:
    from svg2_compile.passes.plan import SitePlan


@dataclass(frozen=True, slots=True)
class EstimateByKeys(Stage):
    """Every key is asked for; queries go by their centroids."""

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the masses."""
        masses = writer.emit(
            torch.ops.svg2.block_masses_by_keys.default,
            writer.state["q_centroids"],
            flow.k_clustered,
            flow.k_sizes,
            writer.site.scale,
        )
        return replace(flow, masses=masses)

    def work(self, site: SitePlan) -> Work:
        """Count the product of the mean queries with all keys, and one pass over the keys."""
        tokens = site.batch * site.token_hint * site.head_dim
        products = 2.0 * site.q_heads * tokens * site.q_clusters
        return Work(products, passed_elements=site.k_heads * tokens)
