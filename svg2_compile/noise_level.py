"""Which of a model's inputs is the noise level, told by what it does and not by what it is called.

The noise level is a number, a tensor of equal numbers, or a few numbers (one a frame), that changes from one denoising
step to the next and is the same for every CFG branch of a step. Labels that go to and fro with the branches look alike
for one call or two; what was chosen is chosen again when the calls that follow tell better. Names decide only between
inputs that behave alike.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

USUAL_NAMES = re.compile(r"(^|[^a-z])(t|time|times|timesteps?|sigmas?|noise|snr|noise_?levels?|time_?steps?)([^a-z]|$)")
MOST_NUMBERS = 65_536
"""More than a noise level for each token of a long video would be latents."""
MOST_DIFFERENT = 256
"""A noise level for each frame; more different numbers are latents or embeddings."""
SMALL = 64
"""So many numbers are summed up by the host, more of them by their device."""
FEW = 4
"""So many different numbers may come in any order; more of them rise or fall from frame to frame."""
TOLERANCE = 1 / 128
"""Relative, between a scheduler's noise level and the same one rounded to bfloat16."""
SETTLED = 3
"""Changes after which the choice stays."""
LONG = 64
"""The same, while another input that has not changed looks more like a noise level."""

Level = tuple[float, ...]
"""A noise level in numbers that fit for comparison: the mean first, then what tells it from others of that mean."""


@dataclass(frozen=True, slots=True)
class Reading:
    """An input of one forward that may be the noise level."""

    level: Level
    rank: int
    """How much it looks like one, 0 being the most."""


def may_be_level(value: Tensor) -> bool:
    """Say whether an input may be a noise level, as far as its shape and dtype tell; numbers always may."""
    is_number = value.dtype != torch.bool and not value.dtype.is_complex
    is_data = not isinstance(value, torch.nn.Parameter) and not value.is_meta
    return is_number and is_data and 0 < value.numel() <= MOST_NUMBERS and _axes(value) <= 2


def is_grid(value: Tensor) -> bool:
    """Say whether a tensor can only be latents: channels over frames, rows and columns, or some of these."""
    return value.ndim >= 3 and value.is_floating_point() and _axes(value) >= 3


def _axes(value: Tensor) -> int:
    return len([size for size in value.shape if size > 1])


def read(found: Mapping[str, Any], also: Tensor | None = None) -> tuple[dict[str, Reading], list[float]]:
    """Return what the candidates hold, and the numbers of ``also``, in one copy from each device that has some."""
    if also is None and len(found) == 1:
        # what is left to read when the choice has settled
        ((name, value),) = found.items()
        if isinstance(value, Tensor) and (few := value.numel()) <= SMALL:
            only = _reading(value, [float(value.item())] if few == 1 else [*map(float, value.flatten().tolist())])
            return {} if only is None else {name: only}, []
    readings: dict[str, Reading] = {}
    on: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, value in found.items():
        if isinstance(value, Tensor):
            on.setdefault(value.device, []).append((name, value.detach()))
        else:
            readings[name] = Reading((float(value),), 2 if isinstance(value, int) else 0)
    if also is not None:
        on.setdefault(also.device, []).append(("", also.detach()))
    numbers: list[float] = []
    for tensors in on.values():
        parts = [_summary(each) if name and each.numel() > SMALL else each.flatten() for name, each in tensors]
        copied = torch.cat([each.to(torch.float64) for each in parts]).tolist()
        for (name, tensor), part in zip(tensors, parts):
            values, copied = copied[: part.numel()], copied[part.numel() :]
            if not name:
                numbers = values
            elif (reading := _reading(tensor, values)) is not None:
                readings[name] = reading
    return {name: readings[name] for name in found if name in readings}, numbers


def _summary(value: Tensor) -> Tensor:
    """Return mean, least, largest, a weighted sum, how many differ, and if they are in order, of many numbers."""
    flat = value.flatten().to(torch.float64)
    places = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device)
    ordered = flat.sort().values
    different = 1 + (ordered[1:] != ordered[:-1]).sum()
    in_order = (flat == ordered).all() | (flat == ordered.flip(0)).all()
    sums = [flat.mean(), ordered[0], ordered[-1], (flat * places).sum()]
    return torch.stack([*sums, different.to(torch.float64), in_order.to(torch.float64)])


def _summary_of_few(values: list[float]) -> list[float]:
    """Return the same of few numbers, which are copied as they are: the device would need a kernel for each."""
    ordered = sorted(values)
    weighted = sum(place * value for place, value in enumerate(values, 1))
    in_order = values in (ordered, ordered[::-1])
    return [sum(values) / len(values), ordered[0], ordered[-1], weighted, len(set(values)), in_order]


def _reading(tensor: Tensor, values: list[float]) -> Reading | None:
    whole_numbers = 0 if tensor.is_floating_point() else 1
    if len(values) == 1:
        return Reading((values[0],), whole_numbers)
    if tensor.numel() <= SMALL:
        values = _summary_of_few(values)
    mean, least, largest, weighted, different, in_order = values
    if least == largest:
        return Reading((least,), whole_numbers)
    is_by_frame = _axes(tensor) <= 1 and in_order and different <= MOST_DIFFERENT
    is_few = different <= FEW < tensor.numel() or 2 * different <= min(tensor.numel(), 2 * MOST_DIFFERENT)
    return Reading((mean, least, largest, weighted), 3 + whole_numbers) if is_by_frame or is_few else None


@dataclass(slots=True)
class _Track:
    """What one input has done so far."""

    rank: int
    is_usual: bool
    level: Level
    seen: set[Level] = field(default_factory=set)
    changes: int = 0
    returns: int = 0
    """Changes to a value that it had before."""
    within_steps: int = 0
    """Changes while the latents stayed the same."""
    unchanged: int = 0
    """Calls since it changed."""
    is_of_schedule: bool = True
    """All its values are among the noise levels of the loop's scheduler."""

    def follow(self, reading: Reading, *, within_step: bool) -> None:
        self.rank = max(self.rank, reading.rank)
        self.unchanged += 1
        if reading.level != self.level:
            self.unchanged = 0
            self.changes += 1
            self.returns += reading.level in self.seen
            self.within_steps += within_step
            self.level = reading.level
        if len(self.seen) < 4 * MOST_DIFFERENT:
            self.seen.add(reading.level)

    @property
    def is_label(self) -> bool:
        """True where it goes to and fro, as a class label does that tells branches apart."""
        return 2 * self.returns >= self.changes > 0 and len(self.seen) <= 4


class NoiseLevel:
    """The choice among the inputs of one model."""

    def __init__(self) -> None:
        self.chosen: str | None = None
        self.is_settled = False
        self._tracks: dict[str, _Track] = {}

    def choose(
        self, readings: Mapping[str, Reading], schedule: tuple[float, ...] = (), *, latents_are_the_same: bool = False
    ) -> bool:
        """Follow the inputs of one more forward; return whether the choice has changed.

        Args:
            readings: what the candidates hold.
            schedule: the noise levels of the loop, where its scheduler tells them.
            latents_are_the_same: the large inputs are the same objects as at the last forward: it is the same step.
        """
        if self.is_settled and self.chosen in readings:
            return False
        for name in [each for each in self._tracks if each not in readings]:
            del self._tracks[name]
        for name, reading in readings.items():
            track = self._tracks.get(name)
            if track is None:
                usual = bool(USUAL_NAMES.search(name.lower()))
                track = self._tracks[name] = _Track(reading.rank, usual, reading.level)
                track.seen.add(reading.level)
            else:
                track.follow(reading, within_step=latents_are_the_same)
            track.is_of_schedule &= any(nearest(value, schedule) is not None for value in reading.level[:3])
        before, self.chosen = self.chosen, self._best()
        self.is_settled = self.chosen is not None and self._settles(self._tracks[self.chosen])
        if self.is_settled:
            # the others are read no longer; whoever looks for another one begins anew
            self._tracks.clear()
        return before != self.chosen and before is not None

    def _settles(self, chosen: _Track) -> bool:
        # one that looks more like a noise level may not have changed yet
        waits = any(each.rank < chosen.rank and not each.changes for each in self._tracks.values())
        return chosen.changes >= (LONG if waits else SETTLED) and not chosen.is_label

    def _best(self) -> str | None:
        def order(name: str) -> tuple[Any, ...]:
            track = self._tracks[name]
            likeness = track.is_of_schedule + track.is_usual
            if track.changes and 2 * track.within_steps >= track.changes:
                doubt = 3 if track.changes <= 2 * SETTLED else 1
            elif track.changes:
                doubt = 1 if track.is_label and not track.is_of_schedule else 0
            else:
                # one that looks like it is waited for while others already change
                doubt = 0 if likeness and track.unchanged <= 2 * SETTLED else 2
            return doubt, -likeness, not track.changes, track.rank, -track.changes

        return min(self._tracks, key=order, default=None)


@functools.lru_cache(maxsize=1024)
def nearest(value: float, schedule: tuple[float, ...]) -> int | None:
    """Return the place of a noise level in a schedule, in that's unit or a thousandth of it; None if it has none."""
    levels = list(dict.fromkeys(schedule))
    for scaled in (value, 1000 * value) if levels else ():
        distances = [abs(level - scaled) for level in levels]
        place = distances.index(min(distances))
        gaps = [abs(levels[place] - levels[other]) for other in (place - 1, place + 1) if 0 <= other < len(levels)]
        if distances[place] <= TOLERANCE * abs(levels[place]) and 2 * distances[place] <= min(gaps, default=math.inf):
            return place
    return None
