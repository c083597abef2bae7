"""Time and compare generations: the measuring side of the demo, of the evaluation and of the benchmarks."""

from __future__ import annotations

import copy
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

import svg2_compile
from svg2_compile import tiny_wan
from svg2_compile.kernels.card import PARTS, Part
from svg2_compile.kernels.ops import CARDS
from svg2_compile.passes.config import SparseConfig
from svg2_compile.reporting import Report, SiteReport
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
nothing (docs/lab, 3)."""

PYTORCHS_ATTENTION = "aten::_scaled_dot_product"
"""Beginning of the names of its implementations."""


class Request(Protocol):
    """What to generate, and how to ask a pipeline for it."""

    @property
    def steps(self) -> int:
        """Denoising steps."""

    def latents(self, pipeline: Any, *, steps: int | None = None, on_step_end: Any = None) -> Any:
        """Denoise, in other than the usual number of steps if told; ``on_step_end`` is the pipeline's own hook."""

    def pixels(self, pipeline: Any, *, on_step_end: Any = None) -> Tensor:
        """Denoise and decode; return float pixels [F, 3, H, W] in [0, 1] on the CPU."""

    def rehearse(self, pipeline: Any) -> Tensor:
        """Return the pixels that a single step gives."""

    def lean(self) -> Request:
        """Return the request with as few forwards a step as give the same graphs."""


@dataclass(frozen=True, slots=True)
class Video:
    """What to generate with the tiny Wan."""

    prompt: str = field(default_factory=lambda: tiny_wan.example_prompts()[0])
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

    def latents(self, pipeline: Any, *, steps: int | None = None, on_step_end: Any = None) -> Tensor:
        """Denoise with the tiny Wan."""
        return tiny_wan.generate(
            pipeline, self.prompt, frames=self.frames, height=self.height, width=self.width,
            steps=self.steps if steps is None else steps, guidance_scale=self.guidance_scale, seed=self.seed,
            callback_on_step_end=on_step_end,
        )  # fmt: skip

    def pixels(self, pipeline: Any, *, on_step_end: Any = None) -> Tensor:
        """Denoise and decode."""
        return tiny_wan.decode_pixels(self.latents(pipeline, on_step_end=on_step_end), tiny_wan.folder_of(pipeline))

    def rehearse(self, pipeline: Any) -> Tensor:
        """Return the pixels that a single step gives."""
        return tiny_wan.decode_pixels(self.latents(pipeline, steps=1), tiny_wan.folder_of(pipeline))

    def lean(self) -> Video:
        """Return the video without guidance: the tiny Wan's branches run one after the other."""
        return replace(self, guidance_scale=1.0)


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


Models = torch.nn.Module | Mapping[str, torch.nn.Module]
"""The transformer of a pipeline, or its denoising models by their names in the pipeline."""


def with_models(pipeline: Any, models: Models) -> Any:
    """Return a pipeline that shares everything with ``pipeline`` but its denoising models and the scheduler."""
    other = copy.copy(pipeline)
    other.scheduler = copy.deepcopy(pipeline.scheduler)
    for name, model in models.items() if isinstance(models, Mapping) else [("transformer", models)]:
        setattr(other, name, model)
    return other


def denoiser_names(pipeline: Any) -> list[str]:
    """Return the names of the pipeline's denoising models, such as ``transformer`` and ``transformer_2``."""
    names = [name for name in vars(pipeline) if name.startswith(("transformer", "unet"))]
    return [name for name in names if isinstance(getattr(pipeline, name), torch.nn.Module)]


def report_of(pipeline: Any) -> Report:
    """Return the report of all denoising models of a pipeline; the paths of a second one begin with its name."""
    first, *others = [(name, svg2_compile.report(getattr(pipeline, name))) for name in denoiser_names(pipeline)]
    report = first[1]
    for name, other in others:
        sites = (replace(site, path=f"{name}.{site.path}") for site in other.sites)
        seconds = {
            variant: report.compile_seconds.get(variant, 0.0) + other.compile_seconds.get(variant, 0.0)
            for variant in {**report.compile_seconds, **other.compile_seconds}
        }
        report = Report((*report.sites, *sites), report.state_mib + other.state_mib, seconds)
    return report


def generate_in_turns(
    pipeline: Any, models: Sequence[Models], video: Request, after_step: Callable[[int], None] | None = None
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

        own = with_models(pipeline, models[index])
        with changed:
            wait(index)
        try:
            return generate(own, video, hand_over)
        finally:
            with changed:
                turns.popleft()
                changed.notify_all()

    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(run, range(len(models))))


def generate(pipeline: Any, video: Request, after_step: Callable[[], None] | None = None) -> Generation:
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

    pixels = video.pixels(pipeline, on_step_end=on_step_end)
    return Generation(pixels, tuple(seconds), report_of(pipeline))


def warm_up(pipeline: Any, video: Request) -> float:
    """Run one forward of the first and one of the last step, which compiles them; return the seconds.

    Nothing of it remains but the compiled graphs: the state is reset.
    """
    started = time.perf_counter()
    for step in (0, video.steps - 1):
        with svg2_compile.denoise_step(step, video.steps, "warm-up"):
            video.lean().latents(pipeline, steps=1)
    svg2_compile.reset()
    return time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class TimeSplit:
    """Where the time of one warm step of the last ones goes, as shares."""

    attention: float
    clustering: float
    """Clustering, permuting, selecting, and measuring recall."""

    @property
    def rest(self) -> float:
        """Everything else."""
        return 1 - self.attention - self.clustering


def time_split(pipeline: Any, video: Request) -> TimeSplit:
    """Return where the time of a step goes; of a sparse model, a step that starts from centroids."""
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
        video.lean().latents(pipeline, steps=2, on_step_end=on_step_end)

    events: Iterable[Any] = profile.events()  # type: ignore[no-untyped-call]
    seconds = seconds_of_parts(events, on_gpu)
    attention = seconds.pop("attention")
    return TimeSplit(attention / (ended - started), sum(seconds.values()) / (ended - started))


def seconds_of_parts(events: Iterable[Any], on_gpu: bool) -> dict[Part, float]:
    """Return how long the ops of each part of a sparse attention took, PyTorch's attention included.

    What runs inside of an op that is counted is not counted again.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in events:
        part = _part_of(event)
        if part is not None and not any(map(_part_of, _parents(event))):
            seconds[part] += (event.device_time_total if on_gpu else event.cpu_time_total) / 1e6
    return seconds


def _part_of(event: Any) -> Part | None:
    """Return the part that an event of a profile is counted to, None for most."""
    if event.name.startswith(PYTORCHS_ATTENTION):
        return "attention"
    card = CARDS.get(event.name.removeprefix("svg2::")) if event.name.startswith("svg2::") else None
    return None if card is None else card.part


def _parents(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


@contextmanager
def fastest_attention(device: torch.device) -> Iterator[None]:
    """Give dense attention the fastest implementation the device has: on Hopper and newer, cuDNN's."""
    if device.type != "cuda" or torch.cuda.get_device_capability()[0] < 9:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        yield


class StepLog:
    """Density and recall of every head of every sparse attention in every step: differences of the running means."""

    def __init__(self, read: Callable[[], Report]) -> None:
        self.density: dict[str, list[tuple[float, ...] | None]] = {}
        """By attention path, one tuple of heads a step; ``None`` for a dense step."""
        self.recall: dict[str, list[tuple[float, ...] | None]] = {}
        """The same; empty where recall is not measured."""
        self._read, self._steps = read, 0
        self._before: dict[str, SiteReport] = {}

    def __call__(self) -> None:
        """Read the statistics after a step."""
        for site in self._read().sparse_sites:
            before = self._before.get(site.path)
            for name, count in (("density", "sparse_calls"), ("recall", "recalls_measured")):
                values = _of_this_step(site, before, f"{name}_per_head", count)
                # a second model may begin in the middle
                steps = getattr(self, name).setdefault(site.path, [None] * self._steps)
                steps.append(values)
            self._before[site.path] = site
        self._steps += 1

    @property
    def density_table(self) -> dict[str, list[float | None]]:
        """Mean density over heads, by attention path and step."""
        return {path: [_mean(heads) for heads in steps] for path, steps in self.density.items()}


def _mean(heads: tuple[float, ...] | None) -> float | None:
    return statistics.fmean(heads) if heads else None


def _of_this_step(site: SiteReport, before: SiteReport | None, name: str, count: str) -> tuple[float, ...] | None:
    """Undo the running means of ``site`` over ``count``: what its heads had in the calls since ``before``."""
    calls, calls_before = getattr(site, count), getattr(before, count) if before else 0
    means: tuple[float, ...] = getattr(site, name)
    if calls == calls_before:
        return None
    old = (getattr(before, name) if before else ()) or (0.0,) * len(means)
    return tuple((now * calls - then * calls_before) / (calls - calls_before) for now, then in zip(means, old))
