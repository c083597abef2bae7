"""What a lowering that cuts graphs into segments made of each, told to the report.

The report knows no lowering: each hands in its graphs here, and they are asked when a report is wanted.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """One dense segment of a graph."""

    graph: str
    """``sparse`` or ``dense``: the variant that it belongs to."""
    name: str
    ops: int
    compiler: str
    """``tensorrt`` or ``inductor``."""
    engine: str
    """Where the engine came from: ``built``, ``from disk``, ``refitted`` or ``shared``; empty for Inductor."""
    why_not: str
    """Why it is no engine; empty where it is one."""
    seconds: float
    """Spent on the engine."""


class CutGraph(Protocol):
    """A lowered graph that knows its segments."""

    def segments_of(self, tensors: set[int]) -> list[SegmentReport]:
        """Return the segments of what ran for a model, given the ids of the model's parameters and buffers."""


_cut: weakref.WeakSet[CutGraph] = weakref.WeakSet()


def hand_in(graph: CutGraph) -> None:
    """Let the report ask this graph for its segments, as long as it lives."""
    _cut.add(graph)


def segments_of(model: torch.nn.Module) -> tuple[SegmentReport, ...]:
    """Return the segments of every graph that ran for ``model``; none where no lowering cuts graphs."""
    tensors = {id(each) for each in [*model.parameters(), *model.buffers()]}
    return tuple(segment for each in list(_cut) for segment in each.segments_of(tensors))
