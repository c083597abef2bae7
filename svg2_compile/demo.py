"""``svg2 demo``: one video dense and sparse, by the same pipeline, seed and steps; what it cost and what it gained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svg2_compile import tiny_wan
from svg2_compile.environment import describe_environment
from svg2_compile.measure import (
    TINY_OPTIONS,
    DensityLog,
    Generation,
    Video,
    clustering_share,
    fastest_attention,
    generate,
    generate_in_turns,
    sparse_step_count,
    warm_up,
)
from svg2_compile.passes.errors import ConfigError
from svg2_compile.quality import psnr, ssim

FRAMES_PER_SECOND = 12


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What to generate, and how sparse."""

    out: Path
    video: Video
    top_p: float
    dense_steps: float
    device: str

    def __post_init__(self) -> None:
        """Refuse what cannot run, before anything is loaded.

        Raises:
            ConfigError: an unknown device, too few steps for a sparse one, or a value that ``SparseConfig`` refuses.
            TinyWanError: a size that cannot be cut into tokens.
        """
        tiny_wan.check_size(self.video.frames, self.video.height, self.video.width)
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, but torch sees no GPU; use cpu")
        if self.sparse_steps < 1:
            raise ConfigError(
                f"at least one step must be sparse, got {self.video.steps} steps and dense_steps={self.dense_steps}"
            )

    @property
    def options(self) -> dict[str, Any]:
        """The backend's options: more and smaller clusters than usual, because the tiny model has few tokens."""
        return {"top_p": self.top_p, "dense_steps": self.dense_steps, **TINY_OPTIONS}

    @property
    def sparse_steps(self) -> int:
        """Denoising steps that are sparse."""
        return sparse_step_count(self.video, self.options)

    @property
    def torch_device(self) -> torch.device:
        """Where the model runs."""
        has_gpu = torch.cuda.is_available()
        return torch.device("cuda" if self.device == "cuda" or (self.device == "auto" and has_gpu) else "cpu")


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Generate eager, dense-compiled and sparse, write everything to ``settings.out``, and return the report."""
    from rich.console import Console

    console = Console()
    device, video = settings.torch_device, settings.video
    settings.out.mkdir(parents=True, exist_ok=True)
    pipeline = tiny_wan.load_pipeline(device=device)
    eager = pipeline.transformer
    with _Progress(console, video.steps) as progress, fastest_attention(device):
        noise_floor = progress.generate("dense, eager", pipeline, video)

        dense_model: Any = torch.compile(eager, fullgraph=True)
        sparse_model: Any = torch.compile(eager, backend="svg2", options=settings.options, fullgraph=True)
        pipeline.transformer = dense_model
        dense_compile = progress.call("compiling dense", lambda: warm_up(pipeline, video))
        pipeline.transformer = sparse_model
        sparse_compile = progress.call("compiling dense and sparse", lambda: warm_up(pipeline, video))
        densities = DensityLog(sparse_model)
        dense, sparse = progress.generate_both(pipeline, dense_model, sparse_model, video, densities)
        clustering = progress.call("profiling", lambda: clustering_share(pipeline, video))

    # of the same steps, because a drifting machine is fair to steps that ran side by side
    report = sparse.report
    dense_step, sparse_step = (each.median_step(settings.sparse_steps) for each in (dense, sparse))
    result = {
        "settings": {**asdict(settings), "out": str(settings.out), "device": str(device)},
        "environment": describe_environment(),
        "tokens": video.tokens,
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
    console.print(_table(result))
    console.print(f"written to {settings.out}: {', '.join(sorted(path.name for path in settings.out.iterdir()))}")
    return result


class _Progress:
    """Progress bars, one a stage."""

    def __init__(self, console: Any, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=console)
        self._steps = steps

    def __enter__(self) -> _Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def generate(self, name: str, pipeline: Any, video: Video) -> Generation:
        task = self._bars.add_task(name, total=self._steps)
        return generate(pipeline, video, lambda: self._bars.advance(task))

    def generate_both(
        self,
        pipeline: Any,
        dense: torch.nn.Module,
        sparse: torch.nn.Module,
        video: Video,
        after_sparse_step: Callable[[], None],
    ) -> list[Generation]:
        tasks = [self._bars.add_task(name, total=self._steps) for name in ("dense, compiled", "sparse")]

        def after_step(index: int) -> None:
            if index == 1:
                after_sparse_step()
            self._bars.advance(tasks[index])

        return generate_in_turns(pipeline, (dense, sparse), video, after_step)

    def call(self, name: str, action: Callable[[], float]) -> float:
        task = self._bars.add_task(name, total=1)
        result = action()
        self._bars.advance(task)
        return result


def _write(out: Path, result: dict[str, Any], dense: Tensor, sparse: Tensor) -> None:
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


def _table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"{result['tokens']} tokens, {result['environment']['device']}")
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
