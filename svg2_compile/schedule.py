"""Dense or sparse? The first steps and the first layers stay dense (section 5.1 and the released settings)."""

from __future__ import annotations

import math

from svg2_compile.clock import ASSUMED_STEPS, Tick
from svg2_compile.passes.config import SparseConfig

ROUNDING = 1e-9
"""Keeps 0.3 * 10 steps from becoming 2."""


def dense_step_count(config: SparseConfig, total: int | None) -> int:
    """Return how many first steps of a generation of ``total`` steps stay dense; 50 steps are assumed if unknown.

    A share is rounded down, but one above zero leaves a step dense wherever there are two or more.
    """
    if isinstance(config.dense_steps, int):
        return config.dense_steps
    steps = ASSUMED_STEPS if total is None else total
    count = math.floor(config.dense_steps * steps + ROUNDING)
    return max(1, count) if config.dense_steps > 0 and steps >= 2 else count


def why_dense(config: SparseConfig, now: Tick, layer: int | None) -> str:
    """Return why a layer runs dense at this tick; empty where it is sparse.

    Args:
        config: the schedule.
        now: the current step.
        layer: ordinal of the layer in the model, where layers are compiled one by one; ``None`` where one graph holds
            them all and the first ones were left out of it.
    """
    if layer is not None and layer < config.dense_layers:
        return "first layers"
    return "first steps" if now.step < dense_step_count(config, now.total) else ""
