"""``svg2 demo``: one video dense and sparse, by the same pipeline, seed and steps; what it cost and what it gained."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import svg2_compile
from svg2_compile import tiny_wan
from svg2_compile.environment import describe_environment
from svg2_compile.passes.errors import ConfigError
from svg2_compile.video.measure import (
    TINY_OPTIONS,
    Generation,
    StepLog,
    Video,
    fastest_attention,
    generate,
    generate_in_turns,
    sparse_step_count,
    time_split,
    warm_up,
)
from svg2_compile.video.paired import PairedSteps
from svg2_compile.video.pictures import frame_strip, heat_map, to_bytes, write_video
from svg2_compile.video.progress import Progress
from svg2_compile.video.quality import psnr, ssim


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
    with Progress(console) as progress, fastest_attention(device):
        noise_floor = generate(pipeline, video, progress.bar("dense, eager", video.steps))

        dense_model: Any = torch.compile(eager, fullgraph=True)
        sparse_model: Any = torch.compile(eager, backend="svg2", options=settings.options, fullgraph=True)
        pipeline.transformer = dense_model
        dense_compile = progress.call("compiling dense", lambda: warm_up(pipeline, video))
        pipeline.transformer = sparse_model
        sparse_compile = progress.call("compiling dense and sparse", lambda: warm_up(pipeline, video))
        densities = StepLog(lambda: svg2_compile.report(sparse_model))
        dense, sparse = _in_turns(progress, pipeline, dense_model, sparse_model, video, densities)
        clustering = progress.call("profiling", lambda: time_split(pipeline, video)).clustering

    report = sparse.report
    paired = PairedSteps(dense.step_seconds, sparse.step_seconds, settings.sparse_steps)
    result = {
        "settings": {**asdict(settings), "out": str(settings.out), "device": str(device)},
        "environment": describe_environment(),
        "tokens": video.tokens,
        "dense_step_seconds": paired.dense_step_seconds,
        "sparse_step_seconds": paired.sparse_step_seconds,
        "step_speedup": paired.step_speedup,
        "step_speedups": paired.ratios,
        "generation_speedup": paired.generation_speedup,
        "dense_step_spread": paired.dense_spread,
        "machine_is_busy": paired.is_busy,
        "dense_compile_seconds": dense_compile,
        "sparse_compile_seconds": sparse_compile,
        "psnr_db": psnr(sparse.pixels, dense.pixels),
        "ssim": ssim(sparse.pixels, dense.pixels),
        "noise_floor_psnr_db": psnr(noise_floor.pixels, dense.pixels),
        "density": report.density,
        "density_with_dense_calls": report.density_with_dense_calls,
        "clustering_share": clustering,
        "step_seconds": {"eager": noise_floor.step_seconds, "dense": dense.step_seconds, "sparse": sparse.step_seconds},
        "density_by_layer_and_step": densities.density_table,
        "report": report.to_dict(),
    }
    _write(settings.out, result, paired, dense.pixels, sparse.pixels)
    console.print(_table(result, paired))
    if (warning := paired.warning()) is not None:
        console.print(warning, style="yellow")
    console.print(f"written to {settings.out}: {', '.join(sorted(path.name for path in settings.out.iterdir()))}")
    return result


def _in_turns(
    progress: Progress,
    pipeline: Any,
    dense: torch.nn.Module,
    sparse: torch.nn.Module,
    video: Video,
    after_sparse_step: StepLog,
) -> list[Generation]:
    bars = [progress.bar(name, video.steps) for name in ("dense, compiled", "sparse")]

    def after_step(index: int) -> None:
        if index == 1:
            after_sparse_step()
        bars[index]()

    return generate_in_turns(pipeline, (dense, sparse), video, after_step)


def _write(out: Path, result: dict[str, Any], paired: PairedSteps, dense: Tensor, sparse: Tensor) -> None:
    (out / "report.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    write_video(out / "dense.mp4", dense)
    write_video(out / "sparse.mp4", sparse)
    title = (
        f"{result['tokens']} tokens: a sparse step {paired.said_of_step()} faster, density "
        f"{100 * (result['density'] or 0):.0f} %, PSNR {result['psnr_db']:.1f} dB to dense"
    )
    strip = frame_strip(dense, {"sparse": sparse}, title)
    (out / "contact_sheet.png").write_bytes(to_bytes(strip, dpi=100))
    densities = heat_map(result["density_by_layer_and_step"], "density, %", "denoising step (blank: dense)")
    (out / "density.png").write_bytes(to_bytes(densities))


def _table(result: dict[str, Any], paired: PairedSteps) -> Any:
    from rich.table import Table

    table = Table(title=f"{result['tokens']} tokens, {result['environment']['device']}")
    for column in ("", "dense", "sparse"):
        table.add_column(column, justify="left" if not column else "right")
    seconds = (f"{result['dense_step_seconds']:.2f} s", f"{result['sparse_step_seconds']:.2f} s")
    table.add_row("time per step", *seconds)
    table.add_row("step speed-up, of steps side by side", "1", paired.said_of_step())
    table.add_row("generation speed-up, dense steps included", "1", paired.said_of_generation())
    table.add_row("spread of the dense steps", f"{100 * paired.dense_spread:.0f} %", "")
    table.add_row(
        "compile time", f"{result['dense_compile_seconds']:.0f} s", f"{result['sparse_compile_seconds']:.0f} s"
    )
    table.add_row("PSNR to dense", f"{result['noise_floor_psnr_db']:.1f} dB (eager)", f"{result['psnr_db']:.1f} dB")
    table.add_row("SSIM to dense", "", f"{result['ssim']:.4f}")
    table.add_row("density, in sparse calls", "100 %", f"{100 * (result['density'] or 0):.1f} %")
    table.add_row("share of time in clustering", "", f"{100 * result['clustering_share']:.1f} %")
    return table
