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
    prompt: Annotated[
        str | None, typer.Option(help="A prompt of the tiny model; its first example by default.")
    ] = None,
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
    from svg2_compile.passes.errors import ConfigError
    from svg2_compile.tiny_wan import TinyWanError, example_prompts
    from svg2_compile.video.demo import DemoSettings, run_demo
    from svg2_compile.video.measure import Video

    try:
        video = Video(prompt or example_prompts()[0], frames, height, width, steps, guidance_scale, seed)
        run_demo(DemoSettings(out, video, top_p, dense_steps, device))
    except (ConfigError, TinyWanError) as error:
        typer.secho(f"svg2 demo: {error}", fg="red", err=True)
        raise typer.Exit(2) from None


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="A diffusers model id, the folder of a pipeline, or tiny.")] = "tiny",
    frames: Annotated[int | None, typer.Option(help="Frames; the pipeline's own number by default.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, l40s, 4090, 5090 or b200.")] = "h100",
    preset: Annotated[str | None, typer.Option(help="A named preset; the defaults without one.")] = None,
    config: Annotated[str, typer.Option(help='Options such as "top_p=0.9,k_clusters=256".')] = "",
) -> None:
    """Show what would be sparse in a model, what not and why, and how much faster it should get. Needs no weights."""
    from rich.console import Console

    from svg2_compile.explaining.empty_pipeline import ExplainError
    from svg2_compile.explaining.explanation import ExplainSettings, explain_model, print_explanation
    from svg2_compile.options import parse_options
    from svg2_compile.passes.errors import ConfigError
    from svg2_compile.presets import preset as options_of
    from svg2_compile.tiny_wan import TinyWanError

    try:
        options = (options_of(preset) if preset else {}) | (parse_options(config) if config else {})
        settings = ExplainSettings(model, frames, height, width, steps, gpu, options)
        console = Console()
        with console.status("tracing the model"):
            explanation = explain_model(settings)
        print_explanation(explanation, console)
    except (ConfigError, ExplainError, TinyWanError) as error:
        typer.secho(f"svg2 explain: {error}", fg="red", err=True)
        raise typer.Exit(2) from None


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A diffusers model id, a local folder, or tiny.")] = "tiny",
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0",
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the pipeline's own number by default.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames, for video pipelines.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance.")] = None,
    preset: Annotated[list[str] | None, typer.Option(help="A named preset; may be repeated.")] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(help='Options such as "top_p=0.9,k_clusters=256", or "mine:top_p=0.9"; may be repeated.'),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, frames and report.html.")] = Path(
        "svg2_evaluation"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda; a GPU is used if there is one.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or bfloat16; by default bfloat16 on a GPU, float32 on a CPU.")
    ] = "auto",
    recall_rows: Annotated[int, typer.Option(help="Query rows per head on which recall is measured; 0: none.")] = 16,
    speed_steps: Annotated[int, typer.Option(help="Steps of the measurement of speed, if there are more.")] = 10,
    blocks: Annotated[bool, typer.Option("--blocks", help="Compile one block for all, which is faster.")] = False,
) -> None:
    """Show what sparsity costs and gains for a pipeline, and which layer did it; go on where a run was stopped."""
    from rich.console import Console

    from svg2_compile.evaluation.errors import EvaluationError
    from svg2_compile.evaluation.inputs import check_packages, parse_configurations, parse_seeds, read_prompts
    from svg2_compile.evaluation.pipelines import Size
    from svg2_compile.passes.errors import ConfigError
    from svg2_compile.tiny_wan import TinyWanError

    try:
        check_packages()
        from svg2_compile.evaluation.evaluation import EvaluationSettings
        from svg2_compile.evaluation.page import evaluate_and_show

        settings = EvaluationSettings(
            model=model,
            out=out,
            prompts=read_prompts(prompts, model),
            seeds=parse_seeds(seeds),
            configurations=parse_configurations(preset or [], config or []),
            size=Size(frames, height, width, steps, guidance_scale),
            device=device,
            dtype=dtype,
            recall_rows=recall_rows,
            speed_steps=speed_steps,
            blocks=blocks,
        )
        evaluate_and_show(settings, Console())
    except (ConfigError, EvaluationError, TinyWanError) as error:
        typer.secho(f"svg2 evaluate: {error}", fg="red", err=True)
        raise typer.Exit(2) from None


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="A diffusers model id, a local folder, or tiny.")] = "tiny",
    method: Annotated[str, typer.Option(help="heart, svoo (the paper's rule) or svoo-clipped (its code's).")] = "heart",
    density: Annotated[
        float | None, typer.Option(help="heart: mean density to spend; that of top_p for all heads by default.")
    ] = None,
    error_of: Annotated[
        str, typer.Option(help="heart: errors over the results of the head, or of its attention.")
    ] = "head",
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0",
    levels: Annotated[
        int, typer.Option(help="Steps of a generation that are looked at, spread over the sparse ones.")
    ] = 4,
    candidates: Annotated[
        str, typer.Option(help="heart: values of top_p to try, separated by commas.")
    ] = "0.3,0.5,0.6,0.7,0.8,0.85,0.9,0.95,0.98",
    band: Annotated[str, typer.Option(help="svoo-clipped: lowest and highest floor.")] = "0.15,0.2",
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the pipeline's own number by default.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames, for video pipelines.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance.")] = None,
    preset: Annotated[str | None, typer.Option(help="A named preset; the defaults without one.")] = None,
    config: Annotated[
        str, typer.Option(help='Options that the model will be run with, such as "estimate_by=queries".')
    ] = "",
    out: Annotated[Path, typer.Option(help="The file; what is measured is kept in a folder beside it.")] = Path(
        "budgets.json"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda; a GPU is used if there is one.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or bfloat16; by default bfloat16 on a GPU, float32 on a CPU.")
    ] = "auto",
) -> None:
    """Find budgets for every layer and head, to run with options={"budgets": FILE}; go on where a run was stopped."""
    from rich.console import Console

    from svg2_compile.calibration.errors import CalibrationError
    from svg2_compile.evaluation.errors import EvaluationError
    from svg2_compile.passes.errors import ConfigError
    from svg2_compile.tiny_wan import TinyWanError

    try:
        from svg2_compile.calibration.calibration import Calibration
        from svg2_compile.calibration.inputs import settings_of
        from svg2_compile.evaluation.pipelines import Size

        settings = settings_of(
            model=model,
            out=out,
            method=method,
            prompts=prompts,
            seeds=seeds,
            size=Size(frames, height, width, steps, guidance_scale),
            preset=preset,
            config=config,
            density=density,
            error_of=error_of,
            candidates=candidates,
            band=band,
            levels=levels,
            device=device,
            dtype=dtype,
        )
        Calibration(settings).run(Console())
    except (CalibrationError, ConfigError, EvaluationError, TinyWanError) as error:
        typer.secho(f"svg2 calibrate: {error}", fg="red", err=True)
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
    from svg2_compile.passes.errors import ConfigError

    if dtype not in DTYPES:
        typer.secho(f"svg2 doctor: --dtype must be one of {', '.join(DTYPES)}, got {dtype}", fg="red", err=True)
        raise typer.Exit(2)
    try:
        workload = Workload(default_device(device), DTYPES[dtype], head_dim, clusters, tokens)
        check(workload)
        print_diagnosis(diagnose(workload), Console())
    except ConfigError as error:
        typer.secho(f"svg2 doctor: {error}", fg="red", err=True)
        raise typer.Exit(2) from None


def main() -> None:
    """Run the command line."""
    app()
