"""From what was measured to budgets, and what is to be expected of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svg2_compile.calibration.allocate import allocate
from svg2_compile.calibration.errors import CalibrationError
from svg2_compile.calibration.samples import Sample
from svg2_compile.calibration.svoo import by_codes_rule, by_papers_rule
from svg2_compile.calibration.try_budgets import MEASURES, Measured
from svg2_compile.passes.budgets import AttentionBudgets
from svg2_compile.passes.errors import ConfigError

if TYPE_CHECKING:
    from svg2_compile.calibration.calibration import CalibrationSettings

DIGITS = 4
Place = tuple[str, str]
"""Model, and path of the attention."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Budgets, and what is expected of them."""

    budgets: dict[str, tuple[AttentionBudgets, ...]]
    """By model."""
    figures: dict[str, float]
    densities: dict[Place, float]
    """Expected of every attention, where that is known."""

    def show(self, console: Any, settings: CalibrationSettings) -> None:
        """Print the budgets of every attention, and what is expected."""
        from rich.table import Table

        names = tuple(dict.fromkeys(name for of in self.budgets.values() for each in of for name in each.given))
        columns = (*(f"{name.replace('_', ' ')}, mean (least to most)" for name in names), "density")
        table = Table("attention", *columns, title=f"Budgets by {settings.method}")
        for model, attentions in self.budgets.items():
            for each in attentions:
                density = self.densities.get((model, each.path))
                cells = (_spread(each.given.get(name)) for name in names)
                told = "" if density is None else f"{density:.1%}"
                table.add_row(each.path if len(self.budgets) == 1 else f"{model}.{each.path}", *cells, told)
        console.print(table)
        figures = self.figures
        if settings.method == "heart":
            console.print(
                f"expected at a mean density of {figures['density']:.1%}: the attentions' results are wrong by "
                f"{figures['error']:.2%}; one top_p of {figures['shared_top_p']:g} for all keeps "
                f"{figures['shared_density']:.1%} and is wrong by {figures['shared_error']:.2%}",
                markup=False,
            )


def find_budgets(settings: CalibrationSettings, by_run: Mapping[tuple[str, int], Sequence[Sample]]) -> Outcome:
    """Return the budgets by the method of the settings.

    Args:
        settings: with method, density, candidates and band.
        by_run: the samples of every prompt and seed, step by step.

    Raises:
        CalibrationError: samples do not fit each other.
        ConfigError: the density cannot be reached.
    """
    runs = [_over_steps(samples) for samples in by_run.values()]
    places = list(dict.fromkeys(place for run in runs for place in run))
    if not places:
        raise CalibrationError("nothing was measured; delete the folder of samples and run the same command again")
    if settings.method == "heart":
        return _by_errors(settings, {place: _total([run[place] for run in runs if place in run]) for place in places})
    return _by_profiles(settings, {place: [run[place] for run in runs if place in run] for place in places})


def _over_steps(samples: Sequence[Sample]) -> dict[Place, Measured]:
    """Return what a run has measured, by attention."""
    found: dict[Place, list[Measured]] = {}
    for sample in samples:
        for model, attentions in sample.items():
            for path, measured in attentions.items():
                found.setdefault((model, path), []).append(measured)
    return {place: _total(each) for place, each in found.items()}


def _total(several: Sequence[Measured]) -> Measured:
    shapes = {each.values.shape for each in several}
    if len(shapes) > 1:
        raise CalibrationError(f"samples of one attention have shapes {shapes}; delete the folder of samples")
    total = Measured(0, several[0].tokens, torch.zeros_like(several[0].values))
    for each in several:
        total.add(each)
    return total


def _mean(measured: Measured) -> Tensor:
    return measured.values / measured.calls


def _by_errors(settings: CalibrationSettings, measured: Mapping[Place, Measured]) -> Outcome:
    """Let the sum of the heads' errors be least under a mean density (HASTE's calibration, on attentions' results)."""
    tried, shared = settings.tried, settings.tried.index(float(settings.resolved.sparse.top_p))
    means = {place: _mean(each) for place, each in measured.items()}  # [3, H, C]
    error, density = MEASURES.index(settings.error_of), MEASURES.index("density")
    # a longer sequence has more pairs, so its density costs more
    pairs = {place: float(each.tokens) ** 2 for place, each in measured.items()}
    whole = sum(pairs[place] * each.shape[1] for place, each in means.items())
    heads = [(place, head) for place, each in means.items() for head in range(each.shape[1])]
    errors = [means[place][error, head].tolist() for place, head in heads]
    densities = [means[place][density, head].tolist() for place, head in heads]
    costs = [[pairs[place] * each / whole for each in of] for (place, _), of in zip(heads, densities, strict=True)]
    shared_density = sum(of_head[shared] for of_head in costs)
    limit = shared_density if settings.density is None else settings.density
    chosen = allocate(costs, errors, limit)
    shares: dict[Place, list[float]] = {}
    expected: dict[Place, list[float]] = {}
    for (place, _), at, of_head in zip(heads, chosen, densities, strict=True):
        # what is rounded down keeps less
        share = math.floor(at.between(tried) * 10**DIGITS + 1e-9) / 10**DIGITS
        shares.setdefault(place, []).append(max(share, 10**-DIGITS))
        expected.setdefault(place, []).append(at.between(of_head))
    figures = {
        "asked_density": limit,
        "density": sum(at.between(of) for at, of in zip(chosen, costs, strict=True)),
        "error": _relative([at.between(of) for at, of in zip(chosen, errors, strict=True)]),
        "shared_top_p": tried[shared],
        "shared_density": shared_density,
        "shared_error": _relative([of[shared] for of in errors]),
    }
    budgets = {place: AttentionBudgets(place[1], len(each), tuple(each)) for place, each in shares.items()}
    means_of = {place: statistics.fmean(each) for place, each in expected.items()}
    return Outcome(_by_model(budgets), _rounded(figures), means_of)


def _by_profiles(settings: CalibrationSettings, measured: Mapping[Place, Sequence[Measured]]) -> Outcome:
    """Let SVOO's profiles be floors, and in the paper's rule caps of wide heads."""
    budgets = {}
    means: list[float] = []
    for place, runs in measured.items():
        profiles = [_mean(each)[0, :, 0].tolist() for each in runs]
        heads = len(profiles[0])
        means += [max(head) for head in zip(*profiles, strict=True)]
        if settings.method == "svoo":
            floors, caps = (tuple(round(each, DIGITS) for each in of) for of in by_papers_rule(profiles))
            budgets[place] = AttentionBudgets(place[1], heads, min_keep_ratio=floors, max_keep_ratio=caps)
        else:
            floors = tuple(round(each, DIGITS) for each in by_codes_rule(profiles, settings.band))
            budgets[place] = AttentionBudgets(place[1], heads, min_keep_ratio=floors)
    figures = {"mean_profile": statistics.fmean(means), "largest_profile": max(means)}
    if settings.method == "svoo-clipped":
        figures |= {"band_low": settings.band[0], "band_high": settings.band[1]}
    return Outcome(_by_model(budgets), _rounded(figures), {})


def _by_model(budgets: Mapping[Place, AttentionBudgets]) -> dict[str, tuple[AttentionBudgets, ...]]:
    models = dict.fromkeys(model for model, _ in budgets)
    return {model: tuple(each for (of, _), each in budgets.items() if of == model) for model in models}


def _relative(errors: Sequence[float]) -> float:
    """Return the norm of what is wrong over the norm of the exact results, from squares of heads."""
    return math.sqrt(statistics.fmean(errors))


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    if wrong := [name for name, each in figures.items() if not math.isfinite(each)]:
        raise ConfigError(
            f"{', '.join(wrong)} must be finite, got no number: the model's results are none; try float32"
        )
    return {name: float(f"{each:.6g}") for name, each in figures.items()}


def _spread(values: Sequence[float] | None) -> str:
    return "" if values is None else f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
