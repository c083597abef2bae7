"""Which denoising step is this, of which generation, and for which CFG branch?

Asked once per forward of the denoised model. The answer comes, in this order, from ``denoise_step``, from what a
diffusers pipeline announces through ``cache_context``, and from the model's own ``timestep``: the step advances when
it changes, and a change against the established direction is a new generation. A wrong answer can shift the dense
steps or cost a warm start; it cannot make an output invalid.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
import threading
import weakref
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

ASSUMED_STEPS = 50
"""Steps of a generation when nobody tells: what the diffusers pipelines for video default to."""

_runs = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Tick:
    """One forward of the denoised model."""

    run: int
    """Number of the generation, unique in the process."""

    step: int
    """Denoising step, from 0."""

    stream: str
    """CFG branch: the name the pipeline gave it, or the ordinal of the call within the step."""

    total: int | None
    """Denoising steps of the generation, where known."""


@dataclass(frozen=True, slots=True)
class _Announced:
    """What the caller said about the coming forwards; absent fields are guessed."""

    step: int | None
    total: int | None
    stream: str | None


_explicit: ContextVar[_Announced | None] = ContextVar("svg2_denoise_step", default=None)
_pipeline_says: ContextVar[_Announced | None] = ContextVar("svg2_cache_context", default=None)


@contextlib.contextmanager
def denoise_step(index: int, total: int | None = None, stream: str | None = None) -> Iterator[None]:
    """Say which denoising step the forwards inside belong to; for loops whose model takes no ``timestep``.

    Args:
        index: the step, from 0; a smaller one than before begins a new generation.
        total: steps of the whole generation, for ``dense_steps`` given as a share.
        stream: name of the CFG branch, such as ``"cond"``; by default branches are told apart by their order.

    Raises:
        ValueError: ``index`` is negative, or not below ``total``.
    """
    if index < 0 or (total is not None and index >= total):
        expected = "at least 0" if total is None else f"in [0, {total})"
        raise ValueError(f"denoise_step index must be {expected}, got {index}; count steps from 0")
    token = _explicit.set(_Announced(index, total, stream))
    try:
        yield
    finally:
        _explicit.reset(token)


def observe_cache_context() -> None:
    """Wrap diffusers' ``CacheMixin.cache_context`` so that the branch names pipelines announce are seen.

    The wrapper calls through. It is the one global this package touches, once, when the backend is imported.
    """
    if importlib.util.find_spec("diffusers") is None:
        return
    from diffusers.models.cache_utils import CacheMixin

    original = CacheMixin.cache_context
    if getattr(original, "observed_by_svg2", False):
        return

    @contextlib.contextmanager
    def cache_context(self: Any, name: str, *args: Any, **info: Any) -> Iterator[None]:
        step, total = info.get("step_index"), info.get("num_inference_steps")
        said = _Announced(None if step is None else int(step), None if total is None else int(total), str(name))
        token = _pipeline_says.set(said)
        try:
            with original(self, name, *args, **info):
                yield
        finally:
            _pipeline_says.reset(token)

    cache_context.observed_by_svg2 = True  # type: ignore[attr-defined]
    CacheMixin.cache_context = cache_context


class DenoiseClock:
    """Turns the forwards of one thread and one pipeline into ticks."""

    def __init__(self) -> None:
        self.now: Tick | None = None
        self._call: int | None = None
        self._timestep: float | None = None
        self._direction = 0
        self._step = 0
        self._run = 0
        self._calls_in_step: dict[Hashable, int] = {}

    def tick(self, model: Hashable, timestep: Any, call: int | None = None, total: int | None = None) -> Tick:
        """Advance for one forward.

        Args:
            model: tells models apart, so that each counts its own CFG branches.
            timestep: the model's timestep, in any unit; ``None`` where it has none. Not read where the step is
                announced: a tensor would make the host wait for the device.
            call: tells the pipeline's calls apart, where a pipeline is on the stack.
            total: steps of this generation, where the pipeline knows.
        """
        explicit, says = _explicit.get(), _pipeline_says.get()
        begins = self._run == 0 or (call is not None and call != self._call)
        self._call = call
        announced = explicit.step if explicit else says.step if says else None
        if announced is not None:
            self._go_to(announced, begins or announced < self._step)
            self._timestep = None
        else:
            self._follow(_to_float(timestep), begins)
        ordinal = self._calls_in_step.get(model, 0)
        self._calls_in_step[model] = ordinal + 1
        stream = (explicit and explicit.stream) or (says and says.stream) or str(ordinal)
        total = (explicit and explicit.total) or (says and says.total) or total
        self.now = Tick(self._run, self._step, stream, total)
        return self.now

    def _go_to(self, step: int, new_run: bool) -> None:
        if new_run:
            self._run = next(_runs)
            self._direction = 0
        if new_run or step != self._step:
            self._calls_in_step = {}
        self._step = step

    def _follow(self, timestep: float | None, begins: bool) -> None:
        if timestep is None:
            # nothing tells steps apart but the calls themselves: one per step
            self._go_to(0 if begins else self._step + 1, begins)
            return
        last, self._timestep = self._timestep, timestep
        if begins or last is None:
            self._go_to(0, True)
        elif timestep != last:
            direction = 1 if timestep > last else -1
            turned = self._direction not in (0, direction)
            self._go_to(0 if turned else self._step + 1, turned)
            self._direction = 0 if turned else direction


class _Clocks(threading.local):
    """The clocks of one thread: one per pipeline on the stack, and one for loops without a pipeline."""

    def __init__(self) -> None:
        self.by_pipeline: weakref.WeakKeyDictionary[Any, DenoiseClock] = weakref.WeakKeyDictionary()
        self.without_pipeline = DenoiseClock()
        self.current = self.without_pipeline


_clocks = _Clocks()


def tick(model: Hashable, timestep: Any) -> None:
    """Advance this thread's clock for one forward of ``model``; may read a tensor ``timestep`` back to the host."""
    pipeline, call, total = _calling_pipeline()
    if pipeline is None:
        clock = _clocks.without_pipeline
    else:
        clock = _clocks.by_pipeline.setdefault(pipeline, DenoiseClock())
    _clocks.current = clock
    clock.tick(model, timestep, call, total)


def current_clock() -> DenoiseClock:
    """Return the clock that ticked last in this thread."""
    return _clocks.current


def forget() -> None:
    """Make the next forward of this thread the first step of a new generation."""
    _clocks.__init__()  # type: ignore[misc]  # threading.local: re-initialises this thread's clocks


def _to_float(timestep: Any) -> float | None:
    if timestep is None:
        return None
    if isinstance(timestep, torch.Tensor):
        # per-token timesteps hold zeros for given frames, so the largest is the noise level
        return float(timestep.detach().float().max()) if timestep.numel() else None
    return float(timestep)


def _calling_pipeline() -> tuple[Any, int | None, int | None]:
    """Return the innermost diffusers pipeline being called in this thread, its call's identity, and its step count."""
    module = sys.modules.get("diffusers.pipelines.pipeline_utils")
    if module is None:
        return None, None, None
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            caller = frame.f_locals.get("self")
            if isinstance(caller, module.DiffusionPipeline):
                total = getattr(caller, "_num_timesteps", None)
                return caller, id(frame), int(total) if total else None
        frame = frame.f_back  # type: ignore[assignment]
    return None, None, None
