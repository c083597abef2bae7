"""Decide by sizes, also by those that a graph leaves open, so that a graph serves only sizes that decide alike.

    while Dynamo waits:   length >= 4096 of s0   →   True, and the guard 4096 <= s0: a shorter video gets its own graph
    in an exported graph: length >= 4096 of s0   →   True, as for the length that was seen: nobody would heed a guard

A guard is about the decision alone: whatever decides nothing stays open.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from svg2_compile.passes.dynamo_graphs import heeds_guards
from svg2_compile.passes.records import Size, size_hint


def decide(question: Callable[..., bool | torch.SymBool], *sizes: Size) -> bool:
    """Answer a question about sizes, and let the answer hold for whatever runs the graph, where that is possible.

    A size that is known only at run time counts as 0, and then nothing is guarded.
    """
    if is_guarded(*sizes):
        return bool(question(*sizes))
    return bool(question(*(size_hint(size) or 0 for size in sizes)))


def fix(*sizes: Size) -> list[int] | None:
    """Return sizes as numbers, for which alone the graph is then good; None where they must stay open."""
    if all(isinstance(size, int) or (is_guarded(size) and heeds_guards(size, fixing=True)) for size in sizes):
        return [int(size) for size in sizes]
    return None


def is_guarded(*sizes: Size) -> bool:
    """Say whether what is decided by these sizes holds whenever the graph runs."""
    return all(isinstance(size, int) or (size_hint(size) is not None and heeds_guards(size)) for size in sizes)
