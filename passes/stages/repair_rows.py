"""Take off every row what a few dense rows of its head tell of its error (not the paper's; SparsePR, arXiv 2608.18484).

found = repair_rows_(out, probes, exact)
repairs += found
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from svg2_compile.kernels.repair_rows import RANK, REPAIRS
from svg2_compile.passes.records import StateSpec
from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.stage import Stage, States, Work, summed

if TYPE_CHECKING:
    from svg2_compile.passes.plan import SitePlan


@dataclass(frozen=True, slots=True)
class RepairRows(Stage):
    """Works on the results in place; what it found adds up in the state. ``ProbeRows`` comes before."""

    def state(self, site: SitePlan) -> tuple[StateSpec, ...]:
        """Return the sums."""
        shape = (site.batch, site.q_heads, len(REPAIRS))
        return (StateSpec(site.index, "repairs", shape, torch.float32, adds_up=True),)

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the repair; the log-sum-exp stays that of the sparse attention."""
        found = writer.emit(torch.ops.svg2.repair_rows_.default, flow.out, flow.probes, flow.exact)
        writer.emit(torch.ops.aten.add_.Tensor, writer.state["repairs"], found)
        return flow

    def work(self, site: SitePlan) -> Work:
        """Count two products with 16 columns a row, and results that are read and written once more."""
        results = site.batch * site.q_heads * site.token_hint * site.head_dim
        return Work(4.0 * results * RANK, passed_elements=2.0 * results)

    def shows(self, site: SitePlan, states: States) -> Mapping[str, Any]:
        """Return the error of the sparse results on the rows, what is left of it, and how many heads were repaired."""
        sums = summed(states, "repairs")
        if sums is None or not bool(sums[:, 0].sum() > 0):
            return {}
        calls, repaired, error, left = sums.sum(0).tolist()
        return {"repaired_heads": repaired / calls, "sparse_error": error / calls, "error_left": left / calls}
