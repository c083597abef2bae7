"""Let no query cluster keep fewer keys than those of its head do on average (not the paper's; SCOPE, arXiv 2608.12780).

    runs, counts = select_blocks(..., call_statistics = 0)        as ``KeepTopP`` does it, by mass
    least_keys = least_keys_(call_statistics, k_sizes, floors)

``KeepTopP``, which comes after it, keeps at least that many. A query cluster whose few likely keys seem to carry the
mass is the one whose estimate misleads most easily; its neighbours in the head tell how wide attention is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from svg2_compile.kernels.least_keys import FLOORS
from svg2_compile.passes.records import StateSpec
from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.keep_top_p import write_selection
from svg2_compile.passes.stages.stage import Stage, States, summed

if TYPE_CHECKING:
    from svg2_compile.passes.plan import SitePlan


@dataclass(frozen=True, slots=True)
class FloorHeads(Stage):
    """The floors add up in the state; they are new in every call."""

    def state(self, site: SitePlan) -> tuple[StateSpec, ...]:
        """Return the sums."""
        shape = (site.batch, site.q_heads, len(FLOORS))
        return (StateSpec(site.index, "floors", shape, torch.float32, adds_up=True),)

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write a selection without floor, and the floor; what it keeps nobody reads."""
        statistics = writer.emit(torch.ops.aten.zeros_like.default, writer.state["statistics"])
        write_selection(writer, replace(flow, errors=None), statistics)
        least = torch.ops.svg2.least_keys_.default
        return replace(flow, least_keys=writer.emit(least, statistics, flow.k_sizes, writer.state["floors"]))

    def shows(self, site: SitePlan, states: States) -> Mapping[str, Any]:
        """Return the floor as a share of the keys, a mean over heads and calls."""
        sums = summed(states, "floors")
        if sums is None or not bool(sums[:, 0].sum() > 0):
            return {}
        calls, floors = sums.sum(0).tolist()
        return {"head_floor": floors / calls}
