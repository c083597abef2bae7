"""Compute densely where the mask, once it is there, turns out to do more than to hide keys.

keys, is_key_mask = key_mask(mask)          once a mask, before the first attention under it
...                                         the sparse attention, under keys
redo_densely_(out, calls, is_key_mask, q, k, v, mask, ...)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from svg2_compile.passes.records import StateSpec
from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.stage import Stage, States

if TYPE_CHECKING:
    from svg2_compile.passes.plan import SitePlan


@dataclass(frozen=True, slots=True)
class RedoDensely(Stage):
    """Its counter says how often that happened."""

    refuses: bool = False
    """Raise instead."""

    def state(self, site: SitePlan) -> tuple[StateSpec, ...]:
        """Return the counter."""
        return (StateSpec(site.index, "redone_calls", (1,), torch.int32),)

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the op; it works in place."""
        calls, of = writer.state["redone_calls"], flow.dense
        assert of is not None
        redo = torch.ops.svg2.redo_densely_.default
        scale = writer.site.scale
        writer.emit(redo, flow.out, calls, of.is_key_mask, flow.q, of.k, of.v, of.mask, scale, self.refuses)
        return flow

    def shows(self, site: SitePlan, states: States) -> Mapping[str, Any]:
        """Return how many calls were dense, where any was."""
        calls = sum(int(state["redone_calls"]) for state in states)
        return {"dense_because_of_mask": calls} if calls else {}
