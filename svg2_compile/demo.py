"""``svg2 demo``: one video dense and sparse, by the same pipeline, seed and steps; what it cost and what it gained."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import svg2_compile
from svg2_compile.environment import describe_environment
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.errors import ConfigError
from svg2_compile.quality import psnr, ssim

CLUSTERING_OPS = ("svg2::kmeans_", "svg2::sort_labels", "svg2::permute_tokens", "svg2::select_blocks")
FRAMES_PER_SECOND = 12


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What to generate, and how sparse."""

    out: Path
    prompt: str
    frames: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    seed: int
    top_p: float
    dense_steps: float
    device: str

    def __post_init__(self) -> None:
        """Refuse what cannot run, before anything is loaded.

        Raises:
            ConfigError: fewer than 2 steps, an unknown device, or a value that ``SparseConfig`` refuses.
        """
        if self.steps < 2:
            raise ConfigError(f"steps must be at least 2, one dense and one sparse, got {self.steps}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, but torch sees no GPU; use cpu")
        SparseConfig(**self.options)

    @property
    def options(self) -> dict[str, Any]:
        """The backend's options."""
        return {"top_p": self.top_p, "dense_steps": self.dense_steps, "min_tokens": 1024}

    @property
    def torch_device(self) -> torch.device:
        """Where the model runs."""
        has_gpu = torch.cuda.is_available()
        return torch.device("cuda" if self.device == "cuda" or (self.device == "auto" and has_gpu) else "cpu")


@dataclass(frozen=True, slots=True)
class Generation:
    """One generated video and how long its steps took."""

    pixels: Tensor
    """Float [F, 3, H, W] in [0, 1]."""

    step_seconds: list[float]


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Generate eager, dense-compiled and sparse, write everything to ``settings.out``, and return the report."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from svg2_compile import tiny_wan

    console = Console()
    device = settings.torch_device
    pipeline = tiny_wan.load_pipeline(device=device)
    eager = pipeline.transformer
    columns = (TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, fastest_attention(device):
        noise_floor = _generate(pipeline, settings, progress, "dense, eager")

        pipeline.transformer = torch.compile(eager, fullgraph=True)
        dense_compile = _compile(pipeline, settings, progress, "compiling dense")
        dense = _generate(pipeline, settings, progress, "dense, compiled")

        torch._dynamo.reset()
        pipeline.transformer = torch.compile(eager, backend="svg2", options=settings.options, fullgraph=True)
        sparse_compile = _compile(pipeline, settings, progress, "compiling dense and sparse")
        svg2_compile.reset()
        densities = DensityLog(pipeline.transformer)
        sparse = _generate(pipeline, settings, progress, "sparse", densities)
        report = svg2_compile.report(pipeline.transformer)
        clustering = _clustering_share(pipeline, settings)

    sparse_steps = _sparse_steps(settings)
    dense_step = statistics.median(dense.step_seconds)
    sparse_step = statistics.median(sparse.step_seconds[-sparse_steps:])
    result = {
        "settings": {**asdict(settings), "out": str(settings.out), "device": str(device)},
        "environment": describe_environment(),
        "tokens": tiny_wan.token_count(settings.frames, settings.height, settings.width),
        "dense_step_seconds": dense_step,
        "sparse_step_seconds": sparse_step,
        "step_speedup": dense_step / sparse_step,
        "generation_speedup": sum(dense.step_seconds) / sum(sparse.step_seconds),
        "dense_compile_seconds": dense_compile,
        "sparse_compile_seconds": sparse_compile,
        "psnr_db": psnr(sparse.pixels, dense.pixels),
        "ssim": ssim(sparse.pixels, dense.pixels),
        "noise_floor_psnr_db": psnr(noise_floor.pixels, dense.pixels),
        "density": report.density,
        "density_with_dense_calls": report.density_with_dense_calls,
        "clustering_share": clustering,
        "step_seconds": {"eager": noise_floor.step_seconds, "dense": dense.step_seconds, "sparse": sparse.step_seconds},
        "density_by_layer_and_step": densities.table,
        "report": report.to_dict(),
    }
    _write(settings.out, result, dense.pixels, sparse.pixels)
    console.print(_table(result, settings))
    console.print(f"written to {settings.out}/: {', '.join(sorted(path.name for path in settings.out.iterdir()))}")
    return result


@contextmanager
def fastest_attention(device: torch.device) -> Iterator[None]:
    """Give dense attention the fastest implementation the device has: on NVIDIA's data centre GPUs cuDNN's."""
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


def _sparse_steps(settings: DemoSettings) -> int:
    from svg2_compile.schedule import dense_step_count

    return settings.steps - dense_step_count(SparseConfig(**settings.options), settings.steps)


def _generate(
    pipeline: Any, settings: DemoSettings, progress: Any, name: str, after_step: Callable[[], None] | None = None
) -> Generation:
    from svg2_compile import tiny_wan

    task = progress.add_task(name, total=settings.steps)
    ends: list[float] = []
    paused = 0.0

    def on_step_end(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal paused
        if settings.torch_device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        ends.append(now - paused)
        progress.advance(task)
        if after_step is not None:
            after_step()
        paused += time.perf_counter() - now
        return tensors

    started = time.perf_counter()
    latents = _run_pipeline(pipeline, settings, callback_on_step_end=on_step_end)
    starts = [started, *ends[:-1]]
    seconds = [end - start for start, end in zip(starts, ends)]
    return Generation(tiny_wan.decode_pixels(latents), seconds)


def _run_pipeline(pipeline: Any, settings: DemoSettings, **changes: Any) -> Tensor:
    from svg2_compile import tiny_wan

    arguments: dict[str, Any] = {
        "frames": settings.frames,
        "height": settings.height,
        "width": settings.width,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "seed": settings.seed,
    }
    return tiny_wan.generate(pipeline, settings.prompt, **{**arguments, **changes})


def _compile(pipeline: Any, settings: DemoSettings, progress: Any, name: str) -> float:
    """Run the first and the last step's graph once, so that no generation pays for compilation; return the seconds."""
    task = progress.add_task(name, total=2)
    started = time.perf_counter()
    for step in (0, settings.steps - 1):
        with svg2_compile.denoise_step(step, settings.steps, "compilation"):
            _one_forward(pipeline, settings)
        progress.advance(task)
    return time.perf_counter() - started


def _one_forward(pipeline: Any, settings: DemoSettings) -> None:
    """Run a single step without guidance: one forward of the model at the demo's size."""
    _run_pipeline(pipeline, settings, steps=1, guidance_scale=1.0)


def _clustering_share(pipeline: Any, settings: DemoSettings) -> float:
    """Return the share of a warm sparse forward spent in clustering, permuting and selecting."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = settings.torch_device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with svg2_compile.denoise_step(settings.steps - 1, settings.steps, "profile"):
        _one_forward(pipeline, settings)  # clusters from tokens
        started = time.perf_counter()
        with torch.profiler.profile(activities=activities) as profile:
            _one_forward(pipeline, settings)
        seconds = time.perf_counter() - started
    events = {event.key: event for event in profile.key_averages()}
    spent = sum(
        (events[name].device_time_total if on_gpu else events[name].cpu_time_total)
        for name in CLUSTERING_OPS
        if name in events
    )
    return float(spent) / 1e6 / seconds


def _write(out: Path, result: dict[str, Any], dense: Tensor, sparse: Tensor) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    _write_video(out / "dense.mp4", dense)
    _write_video(out / "sparse.mp4", sparse)
    _contact_sheet(out / "contact_sheet.png", result, dense, sparse)
    _heat_map(out / "density.png", result["density_by_layer_and_step"])


def _write_video(path: Path, pixels: Tensor) -> None:
    import imageio.v3 as iio

    frames = (pixels.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    iio.imwrite(path, frames, plugin="pyav", codec="libx264", fps=FRAMES_PER_SECOND)


def _contact_sheet(path: Path, result: dict[str, Any], dense: Tensor, sparse: Tensor) -> None:
    from matplotlib.figure import Figure

    columns = 4
    chosen = [round(index * (len(dense) - 1) / (columns - 1)) for index in range(columns)]
    figure = Figure(figsize=(3.2 * columns, 5.6), layout="constrained")
    axes = figure.subplots(3, columns)
    difference = 5 * (sparse - dense).abs()
    for row, (name, video) in zip(axes, (("dense", dense), ("sparse", sparse), ("5 × |difference|", difference))):
        for axis, frame in zip(row, chosen):
            axis.imshow(video[frame].clamp(0, 1).permute(1, 2, 0).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"{name}, frame {frame}", fontsize=9)
    figure.suptitle(
        f"{result['tokens']} tokens: sparse step {result['step_speedup']:.2f}× faster, density "
        f"{100 * (result['density'] or 0):.0f} %, PSNR {result['psnr_db']:.1f} dB to dense"
    )
    figure.savefig(path, dpi=100)


def _heat_map(path: Path, table: dict[str, list[float | None]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(1.5 + 0.6 * max(map(len, table.values()), default=1), 1.2 + 0.4 * len(table)), layout="constrained"
    )
    axis = figure.subplots()
    values = [[float("nan") if each is None else 100 * each for each in steps] for steps in table.values()]
    image = axis.imshow(values, vmin=0, vmax=100, aspect="auto", cmap="viridis")
    axis.set_yticks(range(len(table)), list(table))
    axis.set_xlabel("denoising step (blank: dense)")
    for row, steps in enumerate(values):
        for column, value in enumerate(steps):
            if value == value:
                colour = "white" if value < 60 else "black"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, label="density, %")
    figure.savefig(path, dpi=110)


def _table(result: dict[str, Any], settings: DemoSettings) -> Any:
    from rich.table import Table

    table = Table(title=f"{result['tokens']} tokens, {settings.steps} steps, {result['environment']['device']}")
    for column in ("", "dense", "sparse"):
        table.add_column(column, justify="left" if not column else "right")
    seconds = (f"{result['dense_step_seconds']:.2f} s", f"{result['sparse_step_seconds']:.2f} s")
    table.add_row("time per step", *seconds)
    table.add_row("step speed-up", "1", f"{result['step_speedup']:.2f}×")
    table.add_row("generation speed-up, dense steps included", "1", f"{result['generation_speedup']:.2f}×")
    table.add_row(
        "compile time", f"{result['dense_compile_seconds']:.0f} s", f"{result['sparse_compile_seconds']:.0f} s"
    )
    table.add_row("PSNR to dense", f"{result['noise_floor_psnr_db']:.1f} dB (eager)", f"{result['psnr_db']:.1f} dB")
    table.add_row("SSIM to dense", "", f"{result['ssim']:.4f}")
    table.add_row("density, in sparse calls", "100 %", f"{100 * (result['density'] or 0):.1f} %")
    table.add_row("share of time in clustering", "", f"{100 * result['clustering_share']:.1f} %")
    return table
