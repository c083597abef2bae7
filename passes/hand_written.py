"""What a hand-written attention consists of, once read: operands, masks and a scale; what ``canonicalize`` goes by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why something that looks like attention cannot be an SDPA node."""

    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Scale:
    """A factor: a number, times or divided by numbers known only at run time (a symbolic head dim)."""

    number: float = 1.0
    multipliers: tuple[Node, ...] = ()
    divisors: tuple[Node, ...] = ()

    def times(self, other: Scale) -> Scale:
        """Return the product of both."""
        return Scale(self.number * other.number, self.multipliers + other.multipliers, self.divisors + other.divisors)

    @property
    def is_symbolic(self) -> bool:
        """True where it is not a plain number."""
        return bool(self.multipliers or self.divisors)


@dataclass(frozen=True, slots=True)
class Mask:
    """What is done to the scores besides scaling: a bias is added, or scores are filled where ``node`` says so."""

    node: Node
    kind: Literal["bias", "keep", "drop"]
    reader: Node
    fill: float = -math.inf
    weight: Scale = Scale()


@dataclass(frozen=True, slots=True)
class Factor:
    """A tensor that scores are multiplied with, or divided by, the same along all keys: a learned temperature."""

    node: Node
    divides: bool
    reader: Node


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor with its axes in the order SDPA wants: ``node.permute(axes)``, then ``expand(sizes)``."""

    node: Node
    axes: tuple[int, ...]
    reader: Node
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class HandWritten:
    """Everything needed to write one SDPA node in place of a hand-written attention."""

    output: Node
    chain: tuple[Node, ...]
    aside: tuple[Node, ...]
    """What reads the chain and leads nowhere else: a maximum that is subtracted, a copy that nobody reads."""
    query: Operand
    key: Operand
    value: Operand
    masks: tuple[Mask, ...]
    mask_axes: tuple[int, ...]
    scale: Scale
    factors: tuple[Factor, ...]
    output_axes: tuple[int, ...]
    dtype: torch.dtype
