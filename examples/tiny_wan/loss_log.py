"""The log of training: the mean loss of each size and each range of noise levels, a JSON line every few steps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from configurations import Size
from torch import Tensor

LEVELS = 5
"""The loss is logged for as many equal ranges of noise levels."""


class LossLog:
    """The mean loss of each size and each range of noise levels since the last line, added up on the device."""

    def __init__(self, path: Path, sizes: tuple[Size, ...], device: torch.device) -> None:
        self.path = path
        self.sizes = sizes
        # sum of losses and number of videos, for each size and each range of noise levels
        self.totals = torch.zeros(2, len(sizes), LEVELS, device=device)
        self.steps = 0

    def add(self, size: Size, losses: Tensor, sigma: Tensor) -> None:
        """Count one step, without waiting for the device."""
        level = (sigma * LEVELS).long().clamp(max=LEVELS - 1)
        row = self.totals[:, self.sizes.index(size)]
        row.index_add_(1, level, torch.stack([losses, torch.ones_like(losses)]))
        self.steps += 1

    def write(self, progressed: Mapping[str, Any], rate: float, gradient_length: Tensor) -> str:
        """Append a line, start over, and return a short text. This waits for the device.

        Args:
            progressed: ``steps``, ``seconds`` and ``tokens`` so far.
            rate: the learning rate.
            gradient_length: the mean length of the gradient.

        Raises:
            SystemExit: the loss is not finite; the last checkpoint is from before.

        """
        if not self.steps:
            return ""
        sums, counts = self.totals.cpu()
        loss = (sums.sum() / counts.sum()).item()
        by_size = {str(size): _mean(s, c) for size, s, c in zip(self.sizes, sums.sum(1), counts.sum(1)) if c}
        edges = [f"{level / LEVELS:.1f}-{(level + 1) / LEVELS:.1f}" for level in range(LEVELS)]
        by_level = {edge: _mean(s, c) for edge, s, c in zip(edges, sums.sum(0), counts.sum(0)) if c}
        line: dict[str, Any] = {"step": progressed["steps"], "seconds": round(progressed["seconds"], 1)}
        line |= {"loss": round(loss, 5), "learning_rate": round(rate, 8), "tokens": progressed["tokens"]}
        line |= {"gradient_length": round(gradient_length.item(), 5), "by_noise_level": by_level, "by_size": by_size}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if not math.isfinite(loss):
            raise SystemExit(
                f"the loss is {loss} at step {progressed['steps']}; run again with a lower --learning-rate"
            )
        self.totals.zero_()
        self.steps = 0
        return f"step {progressed['steps']} loss {loss:.4f}"


def _mean(total: Tensor, count: Tensor) -> float:
    return round((total / count).item(), 5)


def keep_log_until(path: Path, step: int) -> None:
    """Drop the lines of steps that were taken after the checkpoint and will be taken again."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in lines))


def final_loss(log: Path) -> dict[str, Any]:
    """Return the mean loss of the last ten lines of the log, in all and by noise level."""
    lines = [json.loads(line) for line in log.read_text().splitlines()[-10:]]
    levels = sorted({level for line in lines for level in line["by_noise_level"]})
    by_level = {}
    for level in levels:
        found = [line["by_noise_level"][level] for line in lines if level in line["by_noise_level"]]
        by_level[level] = round(sum(found) / len(found), 5)
    return {"all": round(sum(line["loss"] for line in lines) / len(lines), 5), "by_noise_level": by_level}
