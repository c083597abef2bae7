"""Centroids, counters and statistics of every attention, kept from one denoising step to the next.

A set of tensors belongs to an owner (the parameter that names the model or layer at run time, because Dynamo runs one
graph for all instances of a class), a clock (a thread and a pipeline), a CFG branch and a site. It survives a
recompilation, and goes when its model, pipeline or thread goes; ``reset`` drops everything.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from svg2_compile.clock import DenoiseClock
from svg2_compile.dynamo import mark_static_address
from svg2_compile.passes.plan import SitePlan
from svg2_compile.passes.records import StateSpec

Key = tuple[int, str, str]
"""Site index, site path, CFG branch."""


@dataclass(slots=True)
class SiteState:
    """The tensors of one site for one owner, clock and CFG branch."""

    specs: tuple[StateSpec, ...]
    tensors: dict[str, torch.Tensor]
    run: int
    calls: int = 0
    """Sparse forwards so far."""
    is_clustered: bool = False
    """Whether a sparse forward of this generation has run."""

    def begin_generation(self, run: int) -> None:
        """Let the next clustering start from tokens and every head be sparse again; statistics go on adding up."""
        for spec in self.specs:
            if spec.lifetime == "generation":
                spec.restart(self.tensors[spec.name])
        self.run = run
        self.is_clustered = False

    def clustering_counters(self) -> list[int]:
        """Return the addresses of the counters of clusterings."""
        return [self.tensors[spec.name].data_ptr() for spec in self.specs if spec.counts_clusterings]


class StateStore:
    """All state of the process."""

    def __init__(self) -> None:
        self._owners: Any = WeakIdKeyDictionary()

    def states_for(
        self, owner: Any, clock: DenoiseClock, run: int, stream: str, sites: tuple[SitePlan, ...]
    ) -> list[SiteState]:
        """Return the state of a sparse graph, site by site; as it starts where this generation has not clustered."""
        states = self._states(owner, clock)
        found: list[SiteState] = []
        for site in sites:
            key = (site.index, site.path, stream)
            specs = site.state_specs
            state = states.get(key)
            if state is None or state.specs != specs:
                state = states[key] = SiteState(specs, _allocate(specs, site.device), run)
            elif state.run != run:
                state.begin_generation(run)
            state.calls += 1
            found.append(state)
        return found

    def states_of(self, owner: Any, site: SitePlan) -> dict[str, list[SiteState]]:
        """Return what one site of ``owner`` has, by CFG branch."""
        found: dict[str, list[SiteState]] = {}
        for states in list(self._owners.get(owner, {}).values()):
            for (index, path, stream), state in states.items():
                if (index, path) == (site.index, site.path):
                    found.setdefault(stream, []).append(state)
        return found

    def owners(self) -> list[Any]:
        """Return the parameters or modules that have state."""
        return list(self._owners.keys())

    def clear(self) -> None:
        """Drop everything."""
        self._owners = WeakIdKeyDictionary()

    def _states(self, owner: Any, clock: DenoiseClock) -> dict[Key, SiteState]:
        if owner not in self._owners:
            self._owners[owner] = weakref.WeakKeyDictionary()
        states: dict[Key, SiteState] = self._owners[owner].setdefault(clock, {})
        return states


def _allocate(specs: tuple[StateSpec, ...], device: torch.device) -> dict[str, torch.Tensor]:
    # a tensor born in inference mode could not be updated outside it
    with torch.inference_mode(False):
        tensors = {spec.name: spec.create(device) for spec in specs}
    for tensor in tensors.values():
        mark_static_address(tensor)
    return tensors


store = StateStore()
"""The one store."""
