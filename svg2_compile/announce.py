"""What a loop says about its forwards itself: ``denoise_step``, and diffusers' ``cache_context``."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False, slots=True)
class Announcement:
    """What the caller said about the coming forwards; absent fields are guessed."""

    step: int | None
    total: int | None
    stream: str | None
    by: str
    has_failed: bool = False
    """An exception ended it, and with it the generation."""


_explicit: ContextVar[Announcement | None] = ContextVar("svg2_denoise_step", default=None)
_pipeline_says: ContextVar[Announcement | None] = ContextVar("svg2_cache_context", default=None)


@contextlib.contextmanager
def denoise_step(index: int, total: int | None = None, stream: str | None = None) -> Iterator[None]:
    """Say which denoising step the forwards inside belong to; for loops that nothing else announces.

    Args:
        index: the step, from 0; a smaller one than before begins a new generation.
        total: steps of the whole generation, for ``dense_steps`` given as a share.
        stream: name of the CFG branch, such as ``"cond"``; by default branches are told apart by their order. Each
            name has a generation of its own, so requests that take turns do not disturb each other:
            ``f"{request} cond"``.

    Raises:
        ValueError: ``index`` is negative, or not below ``total``.
    """
    if index < 0 or (total is not None and index >= total):
        expected = "at least 0" if total is None else f"in [0, {total})"
        raise ValueError(f"denoise_step index must be {expected}, got {index}; count steps from 0")
    said = Announcement(index, total, stream, "denoise_step")
    token = _explicit.set(said)
    try:
        yield
    except BaseException:
        said.has_failed = True
        raise
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
        step, total = (None if each is None else int(each) for each in (step, total))
        token = _pipeline_says.set(Announcement(step, total, str(name), "cache_context"))
        try:
            with original(self, name, *args, **info):
                yield
        finally:
            _pipeline_says.reset(token)

    cache_context.observed_by_svg2 = True  # type: ignore[attr-defined]
    CacheMixin.cache_context = cache_context


def is_announced() -> bool:
    """Say whether the coming forward's step is announced, so that no noise level has to be read."""
    explicit, says = announcements()
    return (explicit is not None and explicit.step is not None) or (says is not None and says.step is not None)


def announcements() -> tuple[Announcement | None, Announcement | None]:
    """Return what ``denoise_step`` and what the pipeline says of the coming forward."""
    return _explicit.get(), _pipeline_says.get()
