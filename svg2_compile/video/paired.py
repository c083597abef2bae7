"""Dense and sparse steps that ran side by side: how much faster, and whether the machine was quiet enough to say."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from svg2_compile.passes.errors import ConfigError

BUSY_SPREAD = 0.15
"""Dense steps compute the same. If they differ by more than this share of their median, something else was running."""


@dataclass(frozen=True, slots=True)
class PairedSteps:
    """The steps of two generations that took turns, in seconds.

    Args:
        dense: of the dense model, every step.
        sparse: of the sparse model, every step; the last ``sparse_count`` are sparse.
        sparse_count: at least 1.

    Raises:
        ConfigError: the two do not pair.
    """

    dense: tuple[float, ...]
    sparse: tuple[float, ...]
    sparse_count: int

    def __post_init__(self) -> None:
        if len(self.dense) != len(self.sparse) or not 1 <= self.sparse_count <= len(self.dense):
            raise ConfigError(
                f"steps must come in pairs, at least one of them sparse, got {len(self.dense)} dense, "
                f"{len(self.sparse)} of the sparse model, {self.sparse_count} sparse"
            )

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times longer the dense step took than the sparse step beside it, for every sparse step."""
        pairs = zip(self.dense[-self.sparse_count :], self.sparse[-self.sparse_count :], strict=True)
        return tuple(dense / sparse for dense, sparse in pairs)

    @property
    def step_speedup(self) -> float:
        """The median of ``ratios``."""
        return statistics.median(self.ratios)

    @property
    def generation_speedup(self) -> float:
        """All dense steps over all steps of the sparse model, those that stay dense included."""
        return sum(self.dense) / sum(self.sparse)

    @property
    def dense_step_seconds(self) -> float:
        """The median dense step beside a sparse one."""
        return statistics.median(self.dense[-self.sparse_count :])

    @property
    def sparse_step_seconds(self) -> float:
        """The median sparse step."""
        return statistics.median(self.sparse[-self.sparse_count :])

    @property
    def dense_spread(self) -> float:
        """Longest less shortest step of the dense model, as a share of the median."""
        return spread(self.dense)

    @property
    def is_busy(self) -> bool:
        """Whether the dense steps differ too much for a ratio to be exact."""
        return self.dense_spread > BUSY_SPREAD

    def said_of_step(self) -> str:
        """Return the gain of a step in words: a figure with its range, or only a range on a busy machine."""
        low, high = min(self.ratios), max(self.ratios)
        if self.is_busy:
            return f"{low:.1f} to {high:.1f}×"
        return f"{self.step_speedup:.2f}×" + (f" ({low:.2f} to {high:.2f})" if self.sparse_count > 1 else "")

    def said_of_generation(self) -> str:
        """Return the gain of the whole generation in words."""
        return f"about {self.generation_speedup:.1f}×" if self.is_busy else f"{self.generation_speedup:.2f}×"

    def warning(self) -> str | None:
        """Return what to tell a user whose machine was busy, ``None`` where it was quiet."""
        if not self.is_busy:
            return None
        return (
            "The machine is busy: dense steps compute the same, yet took "
            f"{min(self.dense):.2f} to {max(self.dense):.2f} s (a spread of {100 * self.dense_spread:.0f} %, "
            f"{100 * BUSY_SPREAD:.0f} % at most is quiet). The speed-ups are not exact; run it again when nothing else "
            "runs. Quality and density do not depend on it."
        )


def spread(values: Sequence[float]) -> float:
    """Return the longest less the shortest of ``values``, as a share of their median."""
    return (max(values) - min(values)) / statistics.median(values)
