"""Loops for the tests of the clock: what a forward shows of them, and who knows the truth."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from svg2_compile import call_stack
from svg2_compile.clock import DenoiseClock, Loop, Observation, Tick
from svg2_compile.forwards import observe


class Model:
    """Stands for a model: something that weak references can hold."""


def seen(loop: Loop | None = None, **inputs: Any) -> Observation:
    """Return what is seen of a forward with these inputs."""
    return replace(observe(call_stack.leaves(list(inputs.items())), None, None)[0], loop=loop)


@dataclass(frozen=True)
class Call:
    """One forward of a loop, and the truth about it."""

    inputs: dict[str, Any]
    generation: int
    step: int
    branch: int
    prompt: int
    """Another one for another prompt."""
    loop: Loop | None = None


@dataclass
class Followed:
    """What a clock made of calls."""

    clock: DenoiseClock = field(default_factory=DenoiseClock)
    ticks: list[Tick] = field(default_factory=list)

    def follow(self, calls: list[Call], model: Model) -> Followed:
        """Let the clock tick for each call."""
        self.ticks += [self.clock.tick(model, seen(call.loop, **call.inputs)) for call in calls]
        return self

    @property
    def guesses(self) -> dict[str, int]:
        """Return what the clock had to guess."""
        return self.clock.told.guesses
