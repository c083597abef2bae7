"""The command line, ``svg2``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Sparse attention for diffusion transformers.")


@app.callback()
def root() -> None:
    """Sparse attention for diffusion transformers, as a torch.compile backend."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for videos, pictures and report.json.")] = Path("svg2_demo"),
    prompt: Annotated[str, typer.Option(help="One of the tiny model's prompts.")] = "rabbit_stretches",
    frames: Annotated[int, typer.Option(help="Frames of the video.")] = 16,
    height: Annotated[int, typer.Option(help="Height in pixels, a multiple of 8.")] = 128,
    width: Annotated[int, typer.Option(help="Width in pixels, a multiple of 8.")] = 256,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 6,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 turns it off.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    top_p: Annotated[float, typer.Option(help="Share of the attention mass to keep, in (0, 1].")] = 0.9,
    dense_steps: Annotated[float, typer.Option(help="Share of the steps that stay dense.")] = 0.35,
    device: Annotated[str, typer.Option(help="cpu or cuda; a GPU is used if there is one.")] = "auto",
) -> None:
    """Generate one video twice with the shipped tiny model, dense and sparse, and show the cost and the gain."""
    from svg2_compile.demo import DemoSettings, run_demo
    from svg2_compile.measure import Video
    from svg2_compile.passes.errors import ConfigError
    from svg2_compile.tiny_wan import TinyWanError

    try:
        video = Video(prompt, frames, height, width, steps, guidance_scale, seed)
        run_demo(DemoSettings(out, video, top_p, dense_steps, device))
    except (ConfigError, TinyWanError) as error:
        typer.secho(f"svg2 demo: {error}", fg="red", err=True)
        raise typer.Exit(2) from None


@app.command()
def doctor(
    device: Annotated[str, typer.Option(help="cpu or cuda; a GPU is used if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "bfloat16",
    head_dim: Annotated[int, typer.Option(help="Length of a head's rows.", min=1)] = 128,
    clusters: Annotated[int, typer.Option(help="Clusters per head, the larger of queries and keys.", min=1)] = 500,
    tokens: Annotated[int, typer.Option(help="Tokens of the sequence.", min=1)] = 75_600,
) -> None:
    """Show which implementation of every op runs here, why not a faster one, and what the machine is."""
    from rich.console import Console

    from svg2_compile.doctor import DTYPES, Workload, check, default_device, diagnose, print_diagnosis

    if dtype not in DTYPES:
        typer.secho(f"svg2 doctor: --dtype must be one of {', '.join(DTYPES)}, got {dtype}", fg="red", err=True)
        raise typer.Exit(2)
    try:
        workload = Workload(default_device(device), DTYPES[dtype], head_dim, clusters, tokens)
        check(workload)
        print_diagnosis(diagnose(workload), Console())
    except (AssertionError, RuntimeError) as error:
        typer.secho(f"svg2 doctor: device {device}: {error}", fg="red", err=True)
        raise typer.Exit(2) from None


def main() -> None:
    """Run the command line."""
    app()
