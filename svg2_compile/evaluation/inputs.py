"""From words on the command line to what is evaluated."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from svg2_compile import tiny_wan
from svg2_compile.evaluation.errors import EvaluationError
from svg2_compile.evaluation.evaluation import Configuration
from svg2_compile.evaluation.pipelines import PROMPTS, TINY
from svg2_compile.options import parse_options

DEFAULT_PRESET = "balanced"
PACKAGES = (
    "accelerate",
    "av",
    "diffusers",
    "imageio",
    "jinja2",
    "matplotlib",
    "safetensors",
    "torchmetrics",
    "transformers",
)


def check_packages() -> None:
    """Refuse to start without what will be needed at the end.

    Raises:
        EvaluationError: naming what is missing and how to install it.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise EvaluationError(f'{", ".join(missing)} not installed; run: pip install "svg2-compile[evaluate]"')


def read_prompts(path: Path | None, model: str) -> tuple[str, ...]:
    """Return the prompts of a text file, one a line; a small set where there is no file.

    Raises:
        EvaluationError: the file cannot be read, is not UTF-8, or holds nothing.
    """
    if path is None:
        return tiny_wan.example_prompts()[:1] if model == TINY else PROMPTS
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise EvaluationError(f"cannot read the prompts in {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    prompts = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not prompts:
        raise EvaluationError(f"{path} holds no prompt; write one a line")
    return prompts


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds in ``0,1,2``.

    Raises:
        EvaluationError: something is not a whole number from 0.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise EvaluationError(f"seeds must be whole numbers separated by commas, such as 0,1; got {text!r}")
    return tuple(dict.fromkeys(int(part) for part in parts))


def parse_configurations(presets: Sequence[str], texts: Sequence[str]) -> tuple[Configuration, ...]:
    """Return the presets and the options written as ``name=value,...``; without any, the preset ``balanced``.

    ``mine:top_p=0.9`` gives options a short name.

    Raises:
        ConfigError: a preset or an option is unknown, or a value is out of range.
    """
    from svg2_compile.presets import preset

    names = presets or ([] if texts else [DEFAULT_PRESET])
    return (
        *(Configuration(name, preset(name)) for name in names),
        *(_configuration(text) for text in texts),
    )


def _configuration(text: str) -> Configuration:
    name, colon, options = text.partition(":")
    return Configuration(name.strip(), parse_options(options)) if colon else Configuration(text, parse_options(text))
