"""Time and compare generations of the tiny Wan: the measuring side of the demo and of the benchmarks."""

from __future__ import annotations

import copy
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import svg2_compile
from svg2_compile import tiny_wan
from svg2_compile.passes.config import SparseConfig
from svg2_compile.reporting import Report
from svg2_compile.schedule import dense_step_count

TINY_OPTIONS: dict[str, Any] = {
    "q_clusters": 64,
    "k_clusters": 256,
    "kmeans_iters_init": 5,
    "kmeans_iters_step": 1,
    "dense_layers": 0,
    "min_tokens": 1024,
}
"""What suits the tiny Wan: the automatic 16 and 55 clusters of 8192 tokens are too coarse, and more iterations gain
nothing (docs/measurements.md)."""

CLUSTERING_OPS = (
    "svg2::cluster_tokens_",
    "svg2::kmeans_",
    "svg2::sort_labels",
    "svg2::permute_tokens",
    "svg2::select_blocks",
)


@dataclass(frozen=True, slots=True)
class Video:
    """What to generate with the tiny Wan."""

    prompt: str = "rabbit_stretches"
    frames: int = 16
    height: int = 128
    width: int = 256
    steps: int = 6
    guidance_scale: float = 2.0
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Length of the self-attention."""
        return tiny_wan.token_count(self.frames, self.height, self.width)


@dataclass(frozen=True, slots=True)
class Generation:
    """One generated video and how long its steps took."""

    pixels: Tensor
    """Float [F, 3, H, W] in [0, 1]."""

    step_seconds: tuple[float, ...]

    report: Report
    """Of the model, read before its pipeline and thread are gone, and its statistics with them."""

    def median_step(self, last: int | None = None) -> float:
        """Return the median seconds of the last steps, all by default."""
        return statistics.median(self.step_seconds[-last:] if last else self.step_seconds)


def sparse_step_count(video: Video, options: dict[str, Any]) -> int:
    """Return how many denoising steps of ``video`` are sparse under these options."""
    return video.steps - dense_step_count(SparseConfig(**options), video.steps)


def generate_in_turns(
    pipeline: Any, models: Sequence[torch.nn.Module], video: Video, after_step: Callable[[int], None] | None = None
) -> list[Generation]:
    """Generate ``video`` once with each model, one step of each in turn, so that a drifting machine is fair to all.

    ``after_step`` gets the index of the model whose step has ended; what it does is not counted.
    """
    turns = deque(range(len(models)))
    changed = threading.Condition()

    def wait(index: int) -> None:
        changed.wait_for(lambda: turns[0] == index)

    def run(index: int) -> Generation:
        def hand_over() -> None:
            if after_step is not None:
                after_step(index)
            with changed:
                turns.rotate(-1)
                changed.notify_all()
                wait(index)

        scheduler = copy.deepcopy(pipeline.scheduler)
        components = {**pipeline.components, "transformer": models[index], "scheduler": scheduler}
        with changed:
            wait(index)
        try:
            return generate(type(pipeline)(**components), video, hand_over)
        finally:
            with changed:
                turns.popleft()
                changed.notify_all()

    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(run, range(len(models))))


def generate(pipeline: Any, video: Video, after_step: Callable[[], None] | None = None) -> Generation:
    """Generate ``video``, timing each step; what ``after_step`` does is not counted."""
    seconds: list[float] = []
    started = time.perf_counter()

    def on_step_end(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal started
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        if after_step is not None:
            after_step()
        started = time.perf_counter()
        return tensors

    latents = _call(pipeline, video, callback_on_step_end=on_step_end)
    return Generation(tiny_wan.decode_pixels(latents), tuple(seconds), svg2_compile.report(pipeline.transformer))


def warm_up(pipeline: Any, video: Video) -> float:
    """Run one forward of the first and one of the last step, which compiles them; return the seconds.

    Nothing of it remains but the compiled graphs: the state is reset.
    """
    started = time.perf_counter()
    for step in (0, video.steps - 1):
        with svg2_compile.denoise_step(step, video.steps, "warm-up"):
            _one_forward(pipeline, video)
    svg2_compile.reset()
    return time.perf_counter() - started


def clustering_share(pipeline: Any, video: Video) -> float:
    """Return the share of a warm sparse forward spent in clustering, permuting and selecting."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = pipeline.device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=activities)
    started = ended = 0.0

    def on_step_end(_pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal started, ended
        if on_gpu:
            torch.cuda.synchronize()
        if step == 0:  # has clustered from tokens; the next step starts from its centroids
            profile.start()
            started = time.perf_counter()
        else:
            ended = time.perf_counter()
            profile.stop()
        return tensors

    with svg2_compile.denoise_step(video.steps - 1, video.steps, "profile"):
        _call(pipeline, video, steps=2, guidance_scale=1.0, callback_on_step_end=on_step_end)
    events = [event for event in profile.key_averages() if event.key in CLUSTERING_OPS]
    microseconds = sum(event.device_time_total if on_gpu else event.cpu_time_total for event in events)
    return float(microseconds) / 1e6 / (ended - started)


@contextmanager
def fastest_attention(device: torch.device) -> Iterator[None]:
    """Give dense attention the fastest implementation the device has: on Hopper and newer, cuDNN's."""
    if device.type != "cuda" or torch.cuda.get_device_capability()[0] < 9:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        yield


class DensityLog:
    """Density of every sparse attention in every step, from the differences of the running statistics."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.table: dict[str, list[float | None]] = {}
        """By attention path; ``None`` for a dense step."""
        self._model = model
        self._sums: dict[str, tuple[float, int]] = {}

    def __call__(self) -> None:
        """Read the statistics after a step."""
        for site in svg2_compile.report(self._model).sparse_sites:
            total, calls = (site.density or 0.0) * site.sparse_calls, site.sparse_calls
            before, calls_before = self._sums.get(site.path, (0.0, 0))
            self._sums[site.path] = (total, calls)
            in_step = (total - before) / (calls - calls_before) if calls > calls_before else None
            self.table.setdefault(site.path, []).append(in_step)


def _one_forward(pipeline: Any, video: Video) -> None:
    """Run a single step without guidance: one forward of the model."""
    _call(pipeline, video, steps=1, guidance_scale=1.0)


def _call(pipeline: Any, video: Video, **changes: Any) -> Tensor:
    arguments = {
        name: getattr(video, name) for name in ("frames", "height", "width", "steps", "guidance_scale", "seed")
    }
    return tiny_wan.generate(pipeline, video.prompt, **{**arguments, **changes})
