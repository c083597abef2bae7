"""From words on the command line to what is calibrated."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from svg2_compile import tiny_wan
from svg2_compile.calibration.calibration import CalibrationSettings
from svg2_compile.calibration.errors import CalibrationError
from svg2_compile.evaluation.inputs import parse_seeds, read_prompts
from svg2_compile.evaluation.pipelines import TINY
from svg2_compile.options import parse_options
from svg2_compile.passes.errors import ConfigError
from svg2_compile.presets import preset as options_of

PACKAGES = ("diffusers", "safetensors", "transformers")
TINY_PROMPTS = 3


def settings_of(
    *,
    model: str,
    prompts: Path | None,
    seeds: str,
    preset: str | None,
    config: str,
    candidates: str,
    band: str,
    **more: Any,
) -> CalibrationSettings:
    """Return the settings; what is not named here is as ``CalibrationSettings`` has it.

    Raises:
        CalibrationError: a package is missing.
        ConfigError: an option, or a setting, is unknown or out of range.
        EvaluationError: prompts or seeds cannot be read.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise CalibrationError(f'{", ".join(missing)} not installed; run: pip install "svg2-compile[evaluate]"')
    is_tiny = prompts is None and model == TINY
    low_and_high = _numbers("band", band)
    if len(low_and_high) != 2:
        raise ConfigError(f"band must be a lowest and a highest floor, such as 0.15,0.2; got {band!r}")
    return CalibrationSettings(
        model=model,
        prompts=tuple(tiny_wan.example_prompts()[:TINY_PROMPTS]) if is_tiny else read_prompts(prompts, model),
        seeds=parse_seeds(seeds),
        options=(options_of(preset) if preset else {}) | (parse_options(config) if config else {}),
        candidates=_numbers("candidates", candidates),
        band=(low_and_high[0], low_and_high[1]),
        **more,
    )


def _numbers(name: str, text: str) -> tuple[float, ...]:
    """Return the numbers in ``0.85,0.9``."""
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError:
        raise ConfigError(f"{name} must be numbers separated by commas, such as 0.15,0.2; got {text!r}") from None
