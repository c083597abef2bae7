"""Spend one mean density on many heads so that the sum of their errors is least.

Every head has a few candidates, each with a cost and an error. Between two candidates a head may stand anywhere: what
can be reached is the lower convex hull of its points. The sum of the errors is least where the steps along the hulls
are taken in the order of error saved per cost, so a sort is all that it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from svg2_compile.passes.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Place:
    """Where on its hull a head stands."""

    low: int
    """A candidate, by its place among those that were given."""
    high: int
    """The next one on the hull; the same where the head stands on a candidate."""
    share: float = 0.0
    """Which part of the way to ``high``, in [0, 1)."""

    def between(self, values: Sequence[float]) -> float:
        """Return the value at the place, from those of the candidates."""
        return values[self.low] + self.share * (values[self.high] - values[self.low])


def lower_hull(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Return the candidates on the lower convex hull: dearer ones have less error, and save less for each cost."""
    order = sorted(range(len(costs)), key=lambda each: (costs[each], errors[each], each))
    hull: list[int] = []
    for each in order:
        if hull and errors[each] >= errors[hull[-1]]:
            continue
        # of three, the one in the middle goes if it is above the line between the others
        while len(hull) > 1 and _saved(costs, errors, hull[-2], each) > _saved(costs, errors, hull[-2], hull[-1]):
            hull.pop()
        hull.append(each)
    return hull


def allocate(costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], limit: float) -> list[Place]:
    """Return where every head stands.

    Args:
        costs: of every head's candidates; finite, at least 0.
        errors: likewise, in the order of the costs.
        limit: what all heads may cost together.

    Returns:
        One place a head; at most one head stands between two candidates. No choice of places, on or between
        candidates, costs no more than ``limit`` and has a smaller sum of errors. A larger limit moves no head back.

    Raises:
        ConfigError: the cheapest candidates cost more than ``limit``.
    """
    hulls = [lower_hull(*each) for each in zip(costs, errors, strict=True)]
    spent = sum(of_head[hull[0]] for of_head, hull in zip(costs, hulls, strict=True))
    if spent > limit * (1 + 1e-9):
        raise ConfigError(
            f"density must be at least {spent:.4g} here, where every head keeps its least, got {limit:.4g}; give a "
            "larger --density, a smaller min_keep_ratio, or smaller --candidates"
        )
    steps = sorted(
        (
            (-_saved(costs[head], errors[head], low, high), head, order, low, high)
            for head, hull in enumerate(hulls)
            for order, (low, high) in enumerate(pairwise(hull))
        )
    )
    places = [Place(hull[0], hull[0]) for hull in hulls]
    for _, head, _, low, high in steps:
        cost = costs[head][high] - costs[head][low]
        if spent + cost > limit:
            # the first step that is too long is taken in part, and no other one after it
            if (share := (limit - spent) / cost) > 0:
                places[head] = Place(low, high, share)
            break
        spent += cost
        places[head] = Place(high, high)
    return places


def _saved(costs: Sequence[float], errors: Sequence[float], low: int, high: int) -> float:
    """Return the error that a step saves for each cost; a hull's costs all differ."""
    return (errors[low] - errors[high]) / (costs[high] - costs[low])
