"""Budgets of layers and heads: how much of its attention each one keeps, in the place of one number for all.

They stand for what they were made for, one model or the several of a pipeline, and are found by the path of an
attention inside its model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from svg2_compile.passes.errors import ConfigError

Method = Literal["heart", "svoo", "svoo-clipped"]
"""How budgets are found; ``svg2_compile.calibration`` does it."""
METHODS: tuple[Method, ...] = get_args(Method)
NUMBERS = ("top_p", "min_keep_ratio", "max_keep_ratio")
"""What a file may say of every head; what it does not say is left to the options."""
HeadRow = tuple[float, float, float]
"""The budget of a head as ``svg2::select_blocks`` takes it: share, least and most clusters."""
Setting = str | int | float | bool | None
"""What an option may be in a file."""


@dataclass(frozen=True, slots=True)
class AttentionBudgets:
    """The budgets of one attention, a number for each query head; None where the file says nothing."""

    path: str
    """Of the attention inside its model, such as ``blocks.3.attn1``."""
    heads: int
    top_p: tuple[float, ...] | None = None
    """As the option of that name, in (0, 1]."""
    min_keep_ratio: tuple[float, ...] | None = None
    """As the option of that name, in [0, 1]."""
    max_keep_ratio: tuple[float, ...] | None = None
    """Largest share of the key clusters that a query cluster keeps, in (0, 1], whatever the other two say."""

    @property
    def given(self) -> dict[str, tuple[float, ...]]:
        """What the file says, by name."""
        return {name: getattr(self, name) for name in NUMBERS if getattr(self, name) is not None}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells a model from another one, without reading gigabytes."""

    model_class: str
    parameters: int
    """How many parameters there are, and their elements do not count."""
    shapes: str
    """Digest of their names and shapes."""
    weights: tuple[tuple[str, tuple[float, ...]], ...]
    """A few elements of a few parameters, by the names of these."""


@dataclass(frozen=True, slots=True)
class ModelBudgets:
    """The budgets of one model."""

    name: str
    """What its pipeline calls it, such as ``transformer``."""
    fingerprint: Fingerprint
    attentions: tuple[AttentionBudgets, ...]

    def of(self, path: str) -> AttentionBudgets | None:
        """Return the budgets of an attention; its path may begin with that of the model in what wraps it."""
        fitting = [each for each in self.attentions if path == each.path or path.endswith(f".{each.path}")]
        return max(fitting, key=lambda each: len(each.path), default=None)


@dataclass(frozen=True, slots=True)
class MadeFrom:
    """What budgets were measured on."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    measured_steps: tuple[int, ...]
    """The denoising steps that were looked at, from 0."""
    size: tuple[tuple[str, Setting], ...]
    """Frames, height, width and guidance, as far as they were given."""
    options: tuple[tuple[str, Setting], ...]
    """The options under which the sparse results were compared with the exact ones."""
    environment: tuple[tuple[str, str], ...]
    """Device, dtype and versions, and words that the method was told."""
    outcome: tuple[tuple[str, float], ...]
    """What the method was asked for, and what it expects."""


@dataclass(frozen=True, slots=True, repr=False)
class Budgets:
    """What a file of budgets holds."""

    method: Method
    made_from: MadeFrom
    models: tuple[ModelBudgets, ...]
    source: str
    """The file, by its absolute path."""
    digest: str
    """Of its bytes."""

    def __repr__(self) -> str:
        """Return which file it is, and what is in it: settings are compared by it."""
        names = ", ".join(each.name for each in self.models)
        return f"Budgets({self.source!r}, {self.digest[:16]}, {names})"

    def only(self, name: str) -> Budgets:
        """Return the budgets of one model of several.

        Raises:
            ConfigError: there is no such model.
        """
        chosen = tuple(each for each in self.models if each.name == name)
        if not chosen:
            names = ", ".join(each.name for each in self.models)
            raise ConfigError(f"{self.source} holds budgets of {names}, got {name!r}; give one of these")
        return Budgets(self.method, self.made_from, chosen, self.source, self.digest)

    def of(self, path: str) -> AttentionBudgets | None:
        """Return the budgets of an attention; None where the file has none.

        Raises:
            ConfigError: several models have such an attention, and it is not said which is meant.
        """
        found = [(each.name, budgets) for each in self.models if (budgets := each.of(path)) is not None]
        if len(found) > 1:
            names = ", ".join(name for name, _ in found)
            raise ConfigError(
                f"{self.source} holds budgets of {names}, each with an attention {path}; give "
                f"svg2_compile.passes.read_budgets.read_budgets(path).only({found[0][0]!r}) to say which is meant"
            )
        return found[0][1] if found else None


def rows_of(
    budgets: AttentionBudgets | None, heads: int, k_clusters: int, top_p: float, min_keep_ratio: float
) -> tuple[HeadRow, ...]:
    """Return the budget of every query head of an attention; without any, the same for all.

    A ``top_p`` of 1 keeps everything in all heads: it asks for exactly dense attention.

    Args:
        budgets: of the attention, as far as the file tells.
        heads: query heads.
        k_clusters: key clusters, of which the ratios are shares.
        top_p: what is kept where the file does not say.
        min_keep_ratio: likewise.

    Raises:
        ConfigError: the file has another number of heads.
    """
    if budgets is None:
        return ((top_p, math.floor(min_keep_ratio * k_clusters), k_clusters),) * heads
    if budgets.heads != heads:
        raise ConfigError(
            f"the budgets of {budgets.path} must be of {heads} heads, got {budgets.heads}; they belong to another "
            "model: make them anew with svg2 calibrate"
        )
    shares, floors, caps = (
        getattr(budgets, name) or (otherwise,) * heads
        for name, otherwise in zip(NUMBERS, (top_p, min_keep_ratio, 1.0), strict=True)
    )
    # a share of 1 is exactly dense, whatever stands beside it; that of the options is for all heads
    whole = (1.0, k_clusters, k_clusters)
    return tuple(
        whole
        if max(share, top_p) >= 1
        else (share, math.floor(floor * k_clusters), max(1, math.floor(cap * k_clusters)))
        for share, floor, cap in zip(shares, floors, caps, strict=True)
    )
