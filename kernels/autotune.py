"""Which of a few candidate tiles runs fastest here: timed at the first call of a kind, remembered in the process.

Off by default. Other tiles sum in another order, so which candidate wins can change results by rounding.
"""

# Triton has no types, and CUDA events have none either.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-call"

import importlib.util
import logging
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from svg2_compile.kernels.launch import is_capturing
from svg2_compile.kernels.tiles import AttentionTiles

log = logging.getLogger(__name__)

RUNS = 5
"""Timed runs of a candidate, after one that compiles it and warms the caches."""

Launch = Callable[[], object]


@dataclass(frozen=True, slots=True)
class TuningKey:
    """What the fastest tiles depend on, as far as they are told apart; the number of tokens is not in it."""

    capability: int | None
    """Compute capability, such as 90; None without a GPU."""
    implementation: str
    block_d: int
    """Padded head dimension."""
    dtype: torch.dtype
    has_context: bool
    """Whether context keys are attended to as well."""


_fastest: dict[TuningKey, AttentionTiles] = {}
# Held while candidates are timed: two threads that time at once would time each other.
_lock = threading.Lock()


def fastest(
    key: TuningKey,
    candidates: Sequence[AttentionTiles],
    run: Callable[[AttentionTiles], object],
    time_ms: Callable[[Launch], float] | None = None,
) -> AttentionTiles:
    """Return the candidate that runs fastest, which is timed once per ``key`` and process.

    Args:
        key: what the answer is remembered under.
        candidates: the tiles of the table first; they are the answer, and not remembered, while a CUDA graph records.
        run: launches the kernel with the given tiles on the current device and stream; its results are dropped.
        time_ms: returns the milliseconds of one launch; None times with CUDA events.

    Raises:
        Exception: no candidate can be launched; what the first one raised.

    Promises:
        Thread-safe. A candidate that needs more than the GPU has is skipped, with a line in the log.
    """
    if len(candidates) == 1:
        return candidates[0]
    known = _fastest.get(key)
    if known is not None:
        return known
    if is_capturing():
        return candidates[0]
    with _lock:
        if key not in _fastest:
            _fastest[key] = _time_all(key, candidates, run, time_ms or cuda_ms)
        return _fastest[key]


def clear() -> None:
    """Forget everything that was timed."""
    with _lock:
        _fastest.clear()


def cuda_ms(launch: Launch) -> float:
    """Return the median milliseconds of a launch on the current stream, by CUDA events, after one that is not timed."""
    launch()
    times = []
    for _ in range(RUNS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)))
    return statistics.median(times)


def _time_all(
    key: TuningKey,
    candidates: Sequence[AttentionTiles],
    run: Callable[[AttentionTiles], object],
    time_ms: Callable[[Launch], float],
) -> AttentionTiles:
    times: dict[AttentionTiles, float] = {}
    failures: list[Exception] = []
    cannot_launch = _launch_errors()
    for tiles in candidates:
        try:
            times[tiles] = time_ms(partial(run, tiles))
        except cannot_launch as error:
            log.info("%s: skipped %s: %s", key, tiles, error)
            failures.append(error)
    if not times:
        raise failures[0]
    best = min(times, key=lambda tiles: times[tiles])
    log.info("%s: %s at %.3f ms is the fastest of %d", key, best, times[best], len(times))
    return best


def _launch_errors() -> tuple[type[Exception], ...]:
    """Return what a launch raises that needs more registers, shared or device memory than there is."""
    if importlib.util.find_spec("triton") is None:
        return (torch.OutOfMemoryError,)
    from triton.runtime.errors import OutOfResources, PTXASError

    return (torch.OutOfMemoryError, OutOfResources, PTXASError)
