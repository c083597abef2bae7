"""Centroids, counters and statistics of every attention, kept from one denoising step to the next.

A set of tensors belongs to a caller (a layer of a model), a clock (a loop), a CFG branch, a site, and a size; each size
keeps its own. It survives a recompilation. What a generation left is used again by the next one; what two generations
in a row have not used is let go, and so is what an idle loop that is over holds, as soon as another one needs room.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch

from svg2_compile.branches import MOST_BRANCHES
from svg2_compile.clock import DenoiseClock
from svg2_compile.dynamo import mark_static_address
from svg2_compile.forwards import Caller
from svg2_compile.passes.plan import SitePlan
from svg2_compile.passes.records import StateSpec

Key = tuple[int, str, str, torch.device, tuple[Any, ...]]
"""Site index, site path, CFG branch, device, and the sizes."""


@dataclass(frozen=True, slots=True)
class GivenBudgets:
    """Which budgets a state holds."""

    digest: str
    """Of the file."""
    model: str
    path: str
    """Of the attention in the model; empty where it cannot be told."""
    why_not: str
    """Why it holds those of all heads alike; empty where the file has its own."""

    def is_like(self, other: GivenBudgets) -> bool:
        """Say whether both are from one place of one file."""
        return self.without("") == other.without("")

    def without(self, why_not: str) -> GivenBudgets:
        """Return the same with a reason why the file has none."""
        return replace(self, why_not=why_not)


@dataclass(slots=True)
class SiteState:
    """The tensors of one site for one caller, clock, CFG branch and size."""

    specs: tuple[StateSpec, ...]
    tensors: dict[str, torch.Tensor]
    run: int
    generation: int = 0
    """The clock's count of generations when it was used last."""
    is_last_step: bool = False
    """The step that used it last was the last one of its generation."""
    calls: int = 0
    """Sparse forwards so far."""
    is_clustered: bool = False
    """Whether a sparse forward of this generation has run."""
    budgets: GivenBudgets | None = None
    """Whose budgets it holds; None where it holds none, or those of all heads alike as it was made with."""

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


States = dict[Key, SiteState]


class StateStore:
    """All state of the process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._callers: weakref.WeakKeyDictionary[Caller, weakref.WeakKeyDictionary[DenoiseClock, States]] = (
            weakref.WeakKeyDictionary()
        )
        self._sums: weakref.WeakKeyDictionary[Caller, dict[Any, SiteState]] = weakref.WeakKeyDictionary()
        """Statistics of what has been let go."""

    def states_for(
        self,
        caller: Caller,
        clock: DenoiseClock,
        run: int,
        stream: str,
        sites: tuple[SitePlan, ...],
        shapes: tuple[Any, ...] = (),
    ) -> list[SiteState]:
        """Return the state of a sparse graph, site by site; as it starts where this generation has not clustered.

        ``shapes`` are those of the graph's inputs where they tell its sizes and the sites do not.
        """
        with self._lock:
            clocks = self._callers.get(caller)
            if clocks is None:
                clocks = self._callers[caller] = weakref.WeakKeyDictionary()
            states = clocks.get(clock)
            if states is None:
                states = clocks[clock] = {}
            found: list[SiteState] = []
            for site in sites:
                size = shapes if shapes else (site.batch, int(site.tokens))
                key = (site.index, site.path, stream, site.device, size)
                state = states.pop(key, None)
                if state is None or state.specs != site.state_specs:
                    self._make_room(caller, clock, found)
                    state = SiteState(site.state_specs, _allocate(site.state_specs, site.device), run)
                elif state.run != run:
                    state.begin_generation(run)
                states[key] = state  # the last one used is the last one in order
                state.calls += 1
                state.generation = clock.generations
                state.is_last_step = clock.is_finished
                found.append(state)
            return found

    def states_of(self, caller: Caller, site: SitePlan, *, of_plan: bool = False) -> dict[str, list[SiteState]]:
        """Return what one site of a caller has, by CFG branch; the statistics of what was let go are without one.

        Args:
            caller: who runs the site.
            site: the site.
            of_plan: only what has run by this very plan, where it was compiled for several sizes or settings.
        """
        found: dict[str, list[SiteState]] = {}
        with self._lock:
            for states in self._callers.get(caller, {}).values():
                for (index, path, stream, _, size), state in states.items():
                    if (index, path) == (site.index, site.path) and not (of_plan and not _is_of(site, size, state)):
                        found.setdefault(stream, []).append(state)
            for (index, path, _, _, size), state in self._sums.get(caller, {}).items():
                if (index, path) == (site.index, site.path) and not (of_plan and not _is_of(site, size, state)):
                    found.setdefault("", []).append(state)
        return found

    def owners(self) -> list[Caller]:
        """Return the layers and models that have state."""
        with self._lock:
            return list(self._callers.keys())

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._callers.clear()
            self._sums.clear()

    def _make_room(self, caller: Caller, clock: DenoiseClock, in_use: list[SiteState]) -> None:
        """Let go what no loop will ask for again, and nothing of the call that asks now."""
        asking = {id(each) for each in in_use}
        for owner, states in self._callers[caller].items():
            for key, state in list(states.items()):
                if id(state) in asking:
                    is_over = False
                elif owner is clock:
                    is_over = state.is_last_step or state.generation < clock.generations - 1
                else:
                    is_over = state.is_last_step and owner.is_idle
                if is_over:
                    self._let_go(caller, key, states.pop(key))
            while len(states) >= MOST_BRANCHES:
                oldest = next(iter(states))
                self._let_go(caller, oldest, states.pop(oldest))

    def _let_go(self, caller: Caller, key: Key, state: SiteState) -> None:
        index, path, _, device, size = key
        size = size if _is_plain(size) else ()  # there is no end of those that one graph serves
        sums = {spec.name: state.tensors[spec.name] for spec in state.specs if spec.adds_up}
        gathered = self._sums.setdefault(caller, {})
        if (kept := gathered.get((index, path, device, state.specs, size))) is None:
            gathered[index, path, device, state.specs, size] = SiteState(
                state.specs, sums, state.run, calls=state.calls
            )
            return
        kept.calls += state.calls
        for name, tensor in sums.items():
            kept.tensors[name].add_(tensor)


def _is_of(site: SitePlan, size: tuple[Any, ...], state: SiteState) -> bool:
    """Say whether a plan made this state, of a size as its key has it."""
    is_static = isinstance(site.tokens, int) and _is_plain(size)
    return state.specs == site.state_specs and (not is_static or size == (site.batch, site.tokens))


def _is_plain(size: tuple[Any, ...]) -> bool:
    """Say whether a key's size is that of a site, and not the shapes of a graph with symbolic sizes."""
    return bool(size) and all(isinstance(each, int) for each in size)


def _allocate(specs: tuple[StateSpec, ...], device: torch.device) -> dict[str, torch.Tensor]:
    # a tensor born in inference mode could not be updated outside it
    with torch.inference_mode(False):
        tensors = {spec.name: spec.create(device) for spec in specs}
    for tensor in tensors.values():
        mark_static_address(tensor)
    return tensors


store = StateStore()
"""The one store."""
