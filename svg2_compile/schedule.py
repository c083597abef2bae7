"""Dense or sparse? The first steps and the first layers stay dense (section 5.1 and the released settings)."""

from __future__ import annotations

import math

from svg2_compile.clock import ASSUMED_STEPS, Tick
from svg2_compile.passes.config import SparseConfig

ROUNDING = 1e-9
"""Keeps 0.3 * 10 steps from becoming 2."""


def dense_step_count(config: SparseConfig, total: int | None) -> int:
    """Return how many first steps of a generation of ``total`` steps stay dense; 50 steps are assumed if unknown."""
    if isinstance(config.dense_steps, int):
        return config.dense_steps
    return math.floor(config.dense_steps * (total or ASSUMED_STEPS) + ROUNDING)


def is_dense(config: SparseConfig, now: Tick, layer: int | None) -> bool:
    """Say whether a layer runs dense at this tick.

    Args:
        config: the schedule.
        now: the current step.
        layer: ordinal of the layer in the model, where layers are compiled one by one; ``None`` where one graph holds
            them all and the first ones were left out of it.
    """
    if layer is not None and layer < config.dense_layers:
        return True
    return now.step < dense_step_count(config, now.total)
