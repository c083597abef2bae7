"""Which denoising step is this, of which generation, and for which CFG branch?

Asked once per forward of a model. The answer comes, in this order, from ``denoise_step``, from what a diffusers
pipeline announces through ``cache_context``, from the loop's own objects (a pipeline, a scheduler), and from the noise
level among the model's inputs. What had to be guessed is said in ``Recognition``; a wrong guess costs time or a warm
start, never a valid output.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from svg2_compile.announce import Announcement, announcements
from svg2_compile.branches import MOST_BRANCHES, Branches, Identity, is_shared
from svg2_compile.noise_level import Level, NoiseLevel, Reading, nearest

ASSUMED_STEPS = 50
"""Steps of a generation when nobody tells and none has ended: what the diffusers pipelines for video default to."""
REMEMBERED = 64
"""Forwards of a generation that are followed again when another input proves to be the noise level."""
ADVICE = "announce steps with denoise_step"

_runs = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Tick:
    """One forward of a denoising model."""

    run: int
    """Number of the generation, unique in the process; centroids are kept within one."""

    step: int
    """Denoising step, from 0."""

    stream: str
    """CFG branch: the name the pipeline gave it, or the ordinal of the call within the step."""

    total: int | None
    """Denoising steps of the generation, where known."""


@dataclass(frozen=True, slots=True)
class Loop:
    """What the loop's own objects tell: a pipeline that is being called, or a scheduler."""

    kind: str
    """``pipeline`` or ``scheduler``."""
    generation: Hashable
    """Another one for every generation."""
    total: int | None = None
    levels: tuple[float, ...] = ()
    """The noise level of each step of the whole schedule, of which a generation may run the last part alone."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What is seen of one forward when it begins."""

    readings: Mapping[str, Reading] = field(default_factory=dict)
    """The inputs that may be the noise level."""
    objects: Mapping[str, Identity] = field(default_factory=dict)
    """The tensors among the inputs."""
    latents: tuple[Identity, ...] = ()
    """Those that can only be latents; empty where they may be anything."""
    size: tuple[int, ...] = ()
    """The shape of the largest."""
    loop: Loop | None = None


@dataclass(slots=True)
class Recognition:
    """How a model's steps, branches and total were told, for the report."""

    steps: str = ""
    branches: str = ""
    total: str = ""
    guesses: dict[str, int] = field(default_factory=dict)
    """What had to be guessed, and how often."""

    def guess(self, text: str) -> None:
        """Count a guess."""
        self.guesses[text] = self.guesses.get(text, 0) + 1


@dataclass(slots=True)
class _Memory:
    """What a clock knows of one model."""

    branches: Branches = field(default_factory=Branches)
    told: Recognition = field(default_factory=Recognition)
    level: NoiseLevel = field(default_factory=NoiseLevel)
    latents: tuple[Identity, ...] = ()
    """Those of its last forward."""
    spoken: dict[Hashable, tuple[int, Announcement]] = field(default_factory=dict)
    """Of each announced name the generation, and what was said last."""


class _Renumbering:
    """Says whether two ways to number generations tell the same ones apart."""

    def __init__(self) -> None:
        self._pairs: set[tuple[int, int]] = set()

    def same(self, one: int, other: int) -> bool:
        """Add a pair of numbers; return whether each number has had one partner only."""
        self._pairs.add((one, other))
        return len({a for a, _ in self._pairs}) == len({b for _, b in self._pairs}) == len(self._pairs)


@dataclass(slots=True)
class _Position:
    """Where in a generation the clock is."""

    run: int = 0
    step: int = 0
    level: Level | None = None
    start: float = 0.0
    """The noise level with which the generation began."""
    stride: float = 0.0
    """The last step's change of the noise level."""
    goes_back: bool = False
    """The last change was against the direction of the others."""
    first: int = 0
    """Place of the first step in the loop's schedule."""


class DenoiseClock:
    """Turns the forwards of one loop into ticks."""

    def __init__(self) -> None:
        self.now: Tick | None = None
        self.told = Recognition()
        self.generations = 0
        self.last_input: weakref.ref[Any] | None = None
        """The latents of the last forward, which live no longer than the loop needs them."""
        self._at = _Position()
        self._generation: Hashable = None
        self._direction = 0
        self._lengths: list[int] = []
        self._memories: weakref.WeakKeyDictionary[Any, _Memory] = weakref.WeakKeyDictionary()
        self._last_said: Announcement | None = None
        self._past: deque[tuple[weakref.ref[Any], Observation, Tick]] = deque(maxlen=REMEMBERED)

    def tick(self, model: Any, seen: Observation) -> Tick:
        """Advance for one forward of ``model``, which is any object that weak references can hold."""
        explicit, says = announcements()
        memory = self._memory_of(model)
        self.told = memory.told
        said = explicit if explicit is not None and explicit.step is not None else says
        if said is not None and said.step is not None:
            self.told.steps = f"announced by {said.by}"
            run, step = self._announced(memory, said, seen)
        else:
            run, step = self._seen(memory, seen)
        named = (explicit and explicit.stream) or (says and says.stream)
        if named:
            stream, self.told.branches = named, "announced by name"
        else:
            branches = memory.branches
            stream, self.told.branches = branches.stream_of(step, seen.objects)
            if branches.is_uneven:
                branches.is_uneven = False
                self.told.guess(f"branches were told by their order, and not all steps had as many calls; {ADVICE}")
            if branches.has_stranger:
                branches.has_stranger = False
                self.told.guess(
                    f"another prompt at the noise level of the last call was taken for one more branch; {ADVICE}"
                )
            if is_shared(stream):
                run = next(_runs)
                self.told.guess(
                    f"more than {stream[:-1]} calls at one noise level: the further ones keep no centroids; {ADVICE}"
                )
        self.now = Tick(run, step, stream, self._total(explicit, says, seen.loop))
        if said is None or said.step is None:
            self._past.append((weakref.ref(model), seen, self.now))
        return self.now

    @property
    def is_finished(self) -> bool:
        """True where the last step of the generation has begun."""
        return self.now is not None and self.now.total is not None and self.now.step + 1 >= self.now.total

    @property
    def is_idle(self) -> bool:
        """True where the latents of the last forward are gone: the loop that made them has let them go."""
        return self.last_input is None or self.last_input() is None

    def input_of(self, model: Any) -> str | None:
        """Return the input that is known to be the noise level of ``model``; None while that is open."""
        memory = self._memories.get(model)
        return memory.level.chosen if memory is not None and memory.level.is_settled else None

    def would_follow(self, seen: Observation) -> bool:
        """Say whether a forward of a model not seen before may belong to this clock's generation, as an expert's."""
        choice = NoiseLevel()
        choice.choose(seen.readings)
        level, last = seen.readings.get(choice.chosen or ""), self._at.level
        if level is None or last is None:
            return level is None and last is None
        change = level.level[0] - last[0]
        return change == 0 or (self._direction or -1) * change > 0

    def _memory_of(self, model: Any) -> _Memory:
        memory = self._memories.get(model)
        if memory is None:
            memory = self._memories[model] = _Memory()
        return memory

    def _total(self, explicit: Announcement | None, says: Announcement | None, loop: Loop | None) -> int | None:
        for said in (explicit, says):
            if said is not None and said.total is not None:
                self.told.total = f"{said.total}, announced by {said.by}"
                return said.total
        if loop is not None and loop.total is not None:
            total = loop.total - (self._at.first if loop.kind == "scheduler" else 0)
            self.told.total = f"{total}, of the {loop.kind}"
            return total
        if self._lengths:
            learnt = max(self._lengths)
            self.told.total = f"{learnt}, learnt from the last generations"
            return learnt
        self.told.total = f"unknown, {ASSUMED_STEPS} are assumed"
        return None

    # What is announced.

    def _announced(self, memory: _Memory, said: Announcement, seen: Observation) -> tuple[int, int]:
        assert said.step is not None
        if said.by == "denoise_step" and said.stream is not None:
            return self._announced_by_name(memory.spoken, said, (said.stream, seen.size))
        has_failed = self._last_said is not None and self._last_said.has_failed
        if self._is_another(seen.loop) or said.step < self._at.step or has_failed:
            self._begin(None, None)
        self._last_said = said
        self._at.step, self._at.level = said.step, None
        return self._at.run, said.step

    def _is_another(self, loop: Loop | None) -> bool:
        """Say whether the loop's own objects, or the absence of a past, tell that a generation begins."""
        generation, self._generation = self._generation, None if loop is None else loop.generation
        return self._at.run == 0 or generation != self._generation

    def _announced_by_name(
        self, spoken: dict[Hashable, tuple[int, Announcement]], said: Announcement, stream: Hashable
    ) -> tuple[int, int]:
        assert said.step is not None
        run, last = spoken.pop(stream, (0, said))
        assert last.step is not None
        is_first_again = said is not last and said.step == last.step == 0
        if run == 0 or said.step < last.step or last.has_failed or is_first_again:
            run = next(_runs)
        spoken[stream] = (run, said)
        if len(spoken) > MOST_BRANCHES:
            del spoken[next(iter(spoken))]
        return run, said.step

    # What is seen.

    def _seen(self, memory: _Memory, seen: Observation) -> tuple[int, int]:
        same = bool(seen.latents) and memory.latents == seen.latents
        memory.latents = seen.latents
        schedule = () if seen.loop is None else seen.loop.levels
        if memory.level.choose(seen.readings, schedule, latents_are_the_same=same):
            self._follow_again()
        self._follow(memory, seen)
        return self._at.run, self._at.step

    def _follow_again(self) -> None:
        """Follow the last forwards again, with what is now known to be the noise level."""
        run, self._at, self._direction, self._generation, self._lengths = self._at.run, _Position(), 0, None, []
        other, same = _Renumbering(), True
        for reference, seen, was in self._past:
            owner = reference()
            if owner is not None:
                memory = self._memory_of(owner)
                self._follow(memory, seen)
                stream, _ = memory.branches.stream_of(self._at.step, seen.objects)
                same &= (self._at.step, stream) == (was.step, was.stream) and other.same(self._at.run, was.run)
        if same:
            self._at.run = run
        else:
            self.told.guess("which input is the noise level: another one was taken for it at first")

    def _follow(self, memory: _Memory, seen: Observation) -> None:
        at, loop = self._at, seen.loop
        chosen = memory.level.chosen
        reading = seen.readings.get(chosen or "")
        level = reading.level if reading else None
        self.told.steps = f"read from input {chosen}" if level else "guessed: one call a step"
        begins = self._is_another(loop)
        if level is None:
            self.told.guess(f"no noise level was found among the inputs, so each call counts as a step; {ADVICE}")
            if begins:
                self._begin(None, loop)
            else:
                at.step, at.level = at.step + 1, None
        elif begins or at.level is None:
            self._begin(level, loop)
        elif level != at.level:
            self._move(memory.branches, seen, level)

    def _move(self, branches: Branches, seen: Observation, level: Level) -> None:
        """Go on to another noise level, or begin anew where it says so."""
        at = self._at
        assert at.level is not None
        change = level[0] - at.level[0]
        direction = (change > 0) - (change < 0)
        in_pipeline = seen.loop is not None and seen.loop.kind == "pipeline"
        goes_on = None if in_pipeline else branches.goes_on(seen.objects)
        if direction * self._direction < 0 and not at.goes_back:
            if not in_pipeline and self._begins_anew(seen, level, goes_on):
                self._begin(level, seen.loop)
                return
            at.goes_back = True
        elif direction:
            if not in_pipeline and not self._direction and direction > 0:
                self._doubt(f"a noise level that rises, {at.level[0]:g} to {level[0]:g}, was taken to go on")
            elif goes_on is False:
                self._doubt("other prompts in the midst of falling noise levels were taken for the same generation")
            # what goes back twice in a row is the direction
            at.goes_back, at.stride, self._direction = False, abs(change), direction
        place = self._place(level, seen.loop)
        at.step = place if place is not None and place > at.step else at.step + 1
        at.level = level

    def _begins_anew(self, seen: Observation, level: Level, goes_on: bool | None) -> bool:
        """Say whether a noise level that goes back begins another generation, where no pipeline tells.

        A sampler may go back within a generation. The level with which that began tells, or the tensors that stay the
        same within it, or the scheduler; at last, whether it was over.
        """
        at = self._at
        assert at.level is not None
        if (level[0] - at.start) * self._direction <= 1e-6 * abs(at.start):
            return True
        if goes_on is False:
            return True
        back = f"a noise level that goes back, {at.level[0]:g} to {level[0]:g},"
        if goes_on or seen.loop is not None:
            self.told.guess(f"{back} with the same prompts was taken for the same generation; {ADVICE}")
            return False
        is_over = self._direction < 0 and at.level[0] - 1.01 * at.stride <= 0
        if is_over:
            self.told.guess(f"{back} was taken for a new generation; {ADVICE}")
        else:
            self._doubt(f"{back} was taken for the same generation")
        return is_over

    def _doubt(self, guess: str) -> None:
        """Go on with new centroids, as they may be another prompt's."""
        self._at.run = next(_runs)
        self.told.guess(f"{guess}, with new centroids; {ADVICE}")

    def _place(self, level: Level, loop: Loop | None) -> int | None:
        """Return the step of the schedule that has this noise level."""
        place = _nearest(level, loop)
        return None if place is None or place < self._at.first else place - self._at.first

    def _begin(self, level: Level | None, loop: Loop | None) -> None:
        if self._at.run and self._at.level is not None:
            self._lengths = [*self._lengths[-1:], self._at.step + 1]
        first = place = 0
        if level is not None and loop is not None and loop.total is not None:
            place = _nearest(level, loop) or 0
            # a pipeline knows how many of its scheduler's levels it runs; elsewhere the first one seen is the first
            first = max(0, len(set(loop.levels)) - loop.total) if loop.kind == "pipeline" else place
        start = level[0] if level else 0.0
        self._at = _Position(next(_runs), max(0, place - first), level, start, first=first)
        self.generations += 1
        for memory in list(self._memories.values()):
            memory.branches = Branches(memory.branches.expected)


def _nearest(level: Level | None, loop: Loop | None) -> int | None:
    """Return the place of a noise level in the loop's schedule; None where there is none, or one for each frame."""
    return None if level is None or len(level) > 1 or loop is None else nearest(level[0], loop.levels)


class _Thread(threading.local):
    """The clock that ticked last in a thread."""

    resets: ClassVar[int] = 0
    """How often all threads were told to forget."""

    def __init__(self) -> None:
        self.seen_resets = self.resets
        self.clock = DenoiseClock()


_thread = _Thread()


def current_clock() -> DenoiseClock:
    """Return the clock that ticked last in this thread since the last reset."""
    if _thread.seen_resets != _Thread.resets:
        _thread.__init__()  # type: ignore[misc]  # threading.local: makes this thread's clock anew
    return _thread.clock


def set_current(clock: DenoiseClock) -> None:
    """Say that a clock has ticked in this thread."""
    _thread.seen_resets, _thread.clock = _Thread.resets, clock


def resets() -> int:
    """Return how often all threads were told to forget."""
    return _Thread.resets


def forget_clocks() -> None:
    """Let the next clock of each thread be a new one."""
    _Thread.resets += 1
