"""Average the keys and the values of every key cluster: what stands in for a cluster that is dropped.

k_means, v_means = cluster_means(k', k_sizes), cluster_means(v', k_sizes)

The centroids of the clustering would not do for the keys: where a mask hides some, they are means of hidden ones too.
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
class AverageClusters(Stage):
    """Of this call's visible keys, whatever the state says."""

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write both means."""
        average = torch.ops.svg2.cluster_means.default
        k_means, v_means = (writer.emit(average, x, flow.k_sizes) for x in (flow.k_clustered, flow.v_clustered))
        return replace(flow, k_means=k_means, v_means=v_means)

    def work(self, site: SitePlan) -> Work:
        """Count one pass over keys and values."""
        return Work(passed_elements=2.0 * site.batch * site.k_heads * site.token_hint * site.head_dim)
