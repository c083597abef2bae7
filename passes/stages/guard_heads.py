"""Let heads that keep too little of the true attention mass keep everything, to the end of the generation.

recall += judge_heads_(found, k_calls, dense_heads, min_recall)
runs, counts = keep_dense_heads_(runs, counts, q_sizes, k_sizes, dense_heads, call_statistics, statistics)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from svg2_compile.kernels.judge_heads import DENSE_HEADS
from svg2_compile.passes.records import StateSpec
from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.stage import Stage, States

if TYPE_CHECKING:
    from svg2_compile.passes.plan import SitePlan


@dataclass(frozen=True, slots=True)
class GuardHeads(Stage):
    """Which heads are dense, and since when, is state of a generation; ``MeasureRecall`` measures before."""

    def state(self, site: SitePlan) -> tuple[StateSpec, ...]:
        """Return the heads' verdicts."""
        shape = (site.batch, site.q_heads, len(DENSE_HEADS))
        return (StateSpec(site.index, "dense_heads", shape, torch.float32, "generation"),)

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the verdict and the replacement of the selection; the state's statistics hold what is true after it."""
        state = writer.state
        judge = torch.ops.svg2.judge_heads_.default
        judged = writer.emit(judge, flow.recall, state["k_calls"], state["dense_heads"], writer.site.min_recall)
        writer.emit(torch.ops.aten.add_.Tensor, state["recall"], judged)
        runs, counts = writer.parts(
            torch.ops.svg2.keep_dense_heads_.default,
            flow.runs,
            flow.counts,
            flow.q_sizes,
            flow.k_sizes,
            state["dense_heads"],
            flow.statistics,
            state["statistics"],
            count=2,
        )
        return replace(flow, recall=judged, runs=runs, counts=counts, statistics=state["statistics"])

    def shows(self, site: SitePlan, states: States) -> Mapping[str, Any]:
        """Return (place among ``states``, batch element, head, since call, recall) of every head that is dense."""
        return {
            "dense_heads": [
                (place, batch, head, int(since_call), recall)
                for place, tensors in enumerate(states)
                for batch, heads in enumerate(tensors["dense_heads"].tolist() if "dense_heads" in tensors else ())
                for head, (since_call, recall) in enumerate(heads)
                if since_call
            ]
        }
