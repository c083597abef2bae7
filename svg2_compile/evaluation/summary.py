"""The figures of one configuration over all prompts and seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from svg2_compile.evaluation.evaluation import Configuration, Evaluation


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, least and greatest of one figure over prompts and seeds."""

    mean: float | None
    least: float | None
    greatest: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        """Summarise what is known."""
        known = [value for value in values if value is not None]
        return cls(statistics.fmean(known), min(known), max(known)) if known else cls(None, None, None)


@dataclass(frozen=True, slots=True)
class Summary:
    """One configuration, or the dense eager pipeline, over all prompts and seeds."""

    name: str
    psnr_db: Spread
    identical: bool
    """No pixel differs anywhere; then there is no PSNR."""
    ssim: Spread
    lpips: Spread
    speed: dict[str, Any] | None
    """Record of the measurement of speed; ``None`` for the eager pipeline."""
    density: float | None
    density_with_dense_calls: float | None
    recall: float | None
    kept_mass: float | None
    """The mass as estimated from the centroids."""


def summarise(evaluation: Evaluation, configuration: Configuration | str) -> Summary:
    """Return what is known about a configuration whose items are all finished."""
    pairs = evaluation.pairs
    qualities = [evaluation.ledger[evaluation.comparison_key(configuration, *pair)] for pair in pairs]
    generations = [evaluation.ledger[evaluation.generation_key(configuration, *pair)] for pair in pairs]
    reports = [each.get("report", {}) for each in generations]
    is_sparse = isinstance(configuration, Configuration)
    return Summary(
        name=configuration.name if isinstance(configuration, Configuration) else configuration,
        psnr_db=Spread.of(each["psnr_db"] for each in qualities),
        identical=all(each["psnr_db"] is None for each in qualities),
        ssim=Spread.of(each["ssim"] for each in qualities),
        lpips=Spread.of(each["lpips"] for each in qualities),
        speed=evaluation.ledger[evaluation.speed_key(configuration)] if is_sparse else None,  # type: ignore[arg-type]
        **{
            name: Spread.of(report.get(name) for report in reports).mean
            for name in ("density", "density_with_dense_calls", "recall", "kept_mass")
        },
    )
