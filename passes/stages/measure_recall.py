"""Measure, on a few rows, how much of the true attention mass the selection keeps; changes no picture.

    found = measure_recall(q, k', q_order, q_sizes, k_sizes, runs, counts, context_k, context_mask, k_calls)
    recall += found

Where a stage before it computes some rows densely, it has measured on these, and nothing is computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from svg2_compile.kernels.measure_recall import RECALL
from svg2_compile.passes.records import StateSpec
from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.stage import Stage, States, summed

if TYPE_CHECKING:
    from svg2_compile.passes.plan import SitePlan


@dataclass(frozen=True, slots=True)
class MeasureRecall(Stage):
    """The recall of every head adds up in the state."""

    is_final: bool = True
    """False where a later stage judges the recall and adds it to the state itself."""

    def state(self, site: SitePlan) -> tuple[StateSpec, ...]:
        """Return the sums."""
        return (StateSpec(site.index, "recall", (site.batch, site.q_heads, len(RECALL)), torch.float32, adds_up=True),)

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the measurement."""
        state = writer.state
        found = self._measured(writer, flow) if flow.recall is None else flow.recall
        if self.is_final:
            writer.emit(torch.ops.aten.add_.Tensor, state["recall"], found)
        return replace(flow, recall=found)

    def shows(self, site: SitePlan, states: States) -> Mapping[str, Any]:
        """Return the recall, a mean over heads and measured calls, and how often it was measured."""
        sums = summed(states, "recall")
        if sums is None or not bool(sums[:, 0].sum() > 0):
            return {"recall": None, "recall_per_head": (), "recalls_measured": 0}
        measured, recalls = sums.unbind(-1)
        return {
            "recall": float(recalls.sum() / measured.sum()),
            "recall_per_head": tuple((recalls / measured).tolist()),
            "recalls_measured": int(measured[0]),
        }

    def _measured(self, writer: SiteWriter, flow: Flow) -> Node:
        site = writer.site
        return writer.emit(
            torch.ops.svg2.measure_recall.default,
            flow.q,
            flow.k_clustered,
            flow.q_order,
            flow.q_sizes,
            flow.k_sizes,
            flow.runs,
            flow.counts,
            flow.context_k,
            flow.context_mask,
            writer.state["k_calls"],
            site.scale,
            site.recall_rows,
            site.recall_interval,
            site.seed,
        )
