"""Keep the likeliest key clusters of each query cluster until they carry ``top_p`` of the mass (section 4.2, eq. 2).

    runs, counts = select_blocks(q_centroids, k_centroids, q_sizes, k_sizes, scale, top_p, min_keep_ratio, statistics)

Where a stage before it has estimated the masses, they come last among the arguments; where one has estimated errors,
these come after them and choose instead, as many keys as the masses would. A floor in keys comes after these, and
budgets of the heads, which are state so that layers can share a graph, last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from svg2_compile.kernels.select_blocks import BUDGETS
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.passes.records import StateSpec
from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.stage import Stage, States, summed

if TYPE_CHECKING:
    from svg2_compile.passes.plan import SitePlan


@dataclass(frozen=True, slots=True)
class KeepTopP(Stage):
    """Its statistics add up in the state."""

    is_final: bool = True
    """False where a later stage replaces the selection and adds to the statistics itself."""
    by_head: bool = False
    """Whether every head has a budget of its own."""

    def state(self, site: SitePlan) -> tuple[StateSpec, ...]:
        """Return the statistics, and the budgets of the heads where they have some."""
        shape = (site.batch, site.q_heads, site.q_clusters, len(STATISTICS))
        statistics = StateSpec(site.index, "statistics", shape, torch.float32, adds_up=True)
        if not self.by_head:
            return (statistics,)
        assert site.budgets is not None
        shape_of_budgets = (site.q_heads, len(BUDGETS))
        return statistics, StateSpec(site.index, "budgets", shape_of_budgets, torch.float32, initial=site.budgets)

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the selection."""
        statistics = writer.state["statistics"]
        if not self.is_final:
            statistics = writer.emit(torch.ops.aten.zeros_like.default, statistics)
        runs, counts = write_selection(writer, flow, statistics)
        return replace(flow, runs=runs, counts=counts, statistics=statistics)

    def shows(self, site: SitePlan, states: States) -> Mapping[str, Any]:
        """Return density, kept mass and padding, each a mean over the sparse calls."""
        # every query cluster has been called as often; how many there are differs between sizes
        sums = summed(states, "statistics", lambda each: torch.cat([each[:, 0, :1], each.sum(1)[:, 1:]], -1))
        least = summed(states, "statistics", lambda each: each[..., STATISTICS.index("own_kept_mass_sum")].amin(-1))
        if sums is None or least is None or not bool(sums[:, 0].sum() > 0):
            names = ("density", "kept_mass", "lowest_kept_mass", "k_padding")
            return {**dict.fromkeys(names), "density_per_head": (), **self._budgets(states)}
        calls, densities, masses, _, issued = sums.unbind(-1)
        return {
            "density": float(densities.sum() / calls.sum()),
            "kept_mass": float(masses.sum() / calls.sum()),
            "lowest_kept_mass": float(least.sum() / calls.sum()),
            "k_padding": float(issued.sum() / densities.sum()),
            "density_per_head": tuple((densities / calls).tolist()),
            **self._budgets(states),
        }

    def _budgets(self, states: States) -> Mapping[str, Any]:
        """Return the budgets that are in force, of the branch that was asked last."""
        found = [each["budgets"] for each in states if "budgets" in each]
        return {"budgets": BudgetsOfHeads.told(found[-1].tolist())} if found else {}


def write_selection(writer: SiteWriter, flow: Flow, statistics: Node) -> list[Node]:
    """Write a selection that adds to ``statistics``; return its runs and counts."""
    site = writer.site
    given = flow.masses, flow.errors, flow.least_keys, writer.state.get("budgets")
    return writer.parts(
        torch.ops.svg2.select_blocks.default,
        writer.state["q_centroids"],
        writer.state["k_centroids"],
        flow.q_sizes,
        flow.k_sizes,
        site.scale,
        site.top_p,
        site.min_keep_ratio,
        statistics,
        *_given(*given),
        count=2,
    )


@dataclass(frozen=True, slots=True)
class BudgetsOfHeads:
    """The budgets of the heads of an attention, as the selection takes them."""

    top_p: list[float]
    least_clusters: list[float]
    most_clusters: list[float]

    @classmethod
    def told(cls, rows: Sequence[Sequence[float]]) -> BudgetsOfHeads:
        """Return what the rows of ``budgets`` say, one a head."""
        return cls(*(list(each) for each in zip(*rows, strict=True)))

    def __str__(self) -> str:
        """Return mean, least and most over the heads."""
        parts = (_spread(name, getattr(self, name)) for name in BUDGETS)
        return f"({', '.join(parts)} over {len(self.top_p)} heads)"


def _spread(name: str, values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{name.replace('_', ' ')} {mean:.3g} [{min(values):.3g}, {max(values):.3g}]"


def _given(*arguments: Node | None) -> list[Node | None]:
    """Return arguments up to the last one that is given."""
    last = max((place for place, each in enumerate(arguments) if each is not None), default=-1)
    return list(arguments[: last + 1])
