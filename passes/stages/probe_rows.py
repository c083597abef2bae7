"""Compute a few rows densely too, and measure on them how much of the true attention mass is kept.

    probes, exact, found = probe_rows(q, k', v', q_order, q_sizes, k_sizes, runs, counts, context..., k_calls)

What is found is what ``measure_recall`` would find on these rows; one pass over the keys serves both.
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
class ProbeRows(Stage):
    """Comes after whatever chooses first; ``RepairRows`` uses the rows after the attention."""

    measures: bool
    """Whether ``MeasureRecall`` comes next."""

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the dense rows."""
        site = writer.site
        probes, exact, found = writer.parts(
            torch.ops.svg2.probe_rows.default,
            flow.q,
            flow.k_clustered,
            flow.v_clustered,
            flow.q_order,
            flow.q_sizes,
            flow.k_sizes,
            flow.runs,
            flow.counts,
            flow.context_k,
            flow.context_v,
            flow.context_mask,
            writer.state["k_calls"],
            site.scale,
            site.repair_rows,
            site.recall_interval if self.measures else 0,
            site.seed,
            count=3,
        )
        return replace(flow, probes=probes, exact=exact, recall=found if self.measures else None)

    def work(self, site: SitePlan) -> Work:
        """Count both products of the rows with all keys, and one pass over keys and values."""
        keys = site.batch * site.token_hint * site.head_dim
        return Work(4.0 * site.q_heads * site.repair_rows * keys, passed_elements=2.0 * site.k_heads * keys)
