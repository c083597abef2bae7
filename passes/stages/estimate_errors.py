"""Estimate the error that the mean of each key cluster would make in its place (not the paper's; SVG-EAR).

errors = block_errors(q_centroids, k', v', k_means, v_means, k_sizes, scale)
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
class EstimateErrors(Stage):
    """Every key and value is asked for; queries go by their centroids. ``AverageClusters`` comes before."""

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the errors; the selection takes them."""
        errors = writer.emit(
            torch.ops.svg2.block_errors.default,
            writer.state["q_centroids"],
            flow.k_clustered,
            flow.v_clustered,
            flow.k_means,
            flow.v_means,
            flow.k_sizes,
            writer.site.scale,
        )
        return replace(flow, errors=errors)

    def work(self, site: SitePlan) -> Work:
        """Count the product of the mean queries with all keys, and one pass over keys and values."""
        tokens = site.batch * site.token_hint * site.head_dim
        products = 2.0 * site.q_heads * tokens * site.q_clusters
        return Work(products, passed_elements=2.0 * site.k_heads * tokens)
