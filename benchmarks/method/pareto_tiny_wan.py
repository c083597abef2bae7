"""Speed against quality over ``top_p``, on the trained tiny Wan: dense-compiled and sparse, step by step in turns.

    python -P benchmarks/method/pareto_tiny_wan.py --out docs/images

Prints a table, and writes ``pareto_tiny_wan.json`` and ``pareto_tiny_wan.png``, or files of another ``--name``. Run it
on an idle machine. With ``--cuda-graphs``, for a GPU, dense and sparse steps are replayed, one model after the other.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from svg2_compile import svg2_backend, tiny_wan
from svg2_compile.environment import describe_environment
from svg2_compile.tiny_wan import model
from svg2_compile.video.measure import (
    TINY_OPTIONS,
    Generation,
    Video,
    fastest_attention,
    generate,
    generate_in_turns,
    sparse_step_count,
    time_split,
    warm_up,
    with_models,
)
from svg2_compile.video.quality import psnr, ssim

TOP_P = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--name", default="pareto_tiny_wan", help="of the files")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--folder", type=Path, default=model.FOLDER, help="of the model; the shipped one by default")
    parser.add_argument("--prompt", help="the model's first example by default")
    parser.add_argument("--frames", type=int, default=Video().frames)
    parser.add_argument("--steps", type=int, default=Video().steps)
    parser.add_argument("--top-p", type=float, nargs="+", default=TOP_P)
    parser.add_argument("--cuda-graphs", action="store_true", help="replay what was compiled as CUDA graphs")
    parser.add_argument("--option", action="append", default=[], help="name=value of SparseConfig, repeatable")
    arguments = parser.parse_args()
    prompt = arguments.prompt or tiny_wan.example_prompts(arguments.folder)[0]
    video = Video(prompt, frames=arguments.frames, steps=arguments.steps)
    extra = {name: json.loads(value) for name, value in (each.split("=", 1) for each in arguments.option)}
    options = {**TINY_OPTIONS, "dense_steps": 0.35, **extra}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = tiny_wan.load_pipeline(getattr(torch, arguments.dtype), device, arguments.folder)
    eager = pipeline.transformer
    result: dict[str, Any] = {
        "environment": describe_environment(),
        "date": time.strftime("%Y-%m-%d"),
        "video": asdict(video),
        "tokens": video.tokens,
        "options": options,
        "dtype": arguments.dtype,
        "cuda_graphs": arguments.cuda_graphs,
    }
    graphs = {"triton.cudagraphs": True} if arguments.cuda_graphs else {}
    with fastest_attention(device):
        floor = generate(pipeline, video)
        models = [torch.compile(eager, options=graphs, fullgraph=True)]
        for top_p in arguments.top_p:
            chosen = {**options, "top_p": top_p}
            # a copy each: the report adds up whatever ran on the same parameters
            own = copy.deepcopy(eager)
            models.append(torch.compile(own, backend=svg2_backend, options=chosen | graphs, fullgraph=True))
        for each in models:
            pipeline.transformer = each
            warm_up(pipeline, video)
        if arguments.cuda_graphs:
            dense, *sparse = (replay(pipeline, each, video) for each in models)
        else:
            dense, *sparse = generate_in_turns(pipeline, models, video)
        last = sparse_step_count(video, options)
        result["dense_step_seconds"] = dense.median_step(last)
        result["noise_floor_psnr_db"] = psnr(floor.pixels, dense.pixels)
        points = []
        for top_p, own, generation in zip(arguments.top_p, models[1:], sparse, strict=True):
            pipeline.transformer = own
            points.append(sparse_point(top_p, last, generation, dense))
            # of replayed ops nothing has a name
            points[-1]["clustering_share"] = None if graphs else time_split(pipeline, video).clustering
            print(points[-1], flush=True)
    result["points"] = points
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(arguments.out / f"{arguments.name}.png", result)
    print(table(result))


def replay(pipeline: Any, transformer: torch.nn.Module, video: Video) -> Generation:
    """Generate twice, and return the second, whose steps replay what the first recorded."""
    # both branches of classifier-free guidance are one step, and a replay overwrites what the other returned
    handles = (
        transformer.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin()),
        transformer.register_forward_hook(lambda _model, _inputs, outputs: tree_map(torch.clone, outputs)),
    )
    own = with_models(pipeline, transformer)
    generate(own, video)
    generation = generate(own, video)
    for handle in handles:
        handle.remove()
    return generation


def sparse_point(top_p: float, last: int, sparse: Generation, dense: Generation) -> dict[str, Any]:
    report = sparse.report
    step = sparse.median_step(last)
    return {
        "top_p": top_p,
        "density": report.density or 0.0,
        "kept_mass": report.kept_mass or 0.0,
        "step_seconds": step,
        "all_step_seconds": {"dense": dense.step_seconds, "sparse": sparse.step_seconds},
        "step_speedup": dense.median_step(last) / step,
        "generation_speedup": sum(dense.step_seconds) / sum(sparse.step_seconds),
        "psnr_db": psnr(sparse.pixels, dense.pixels),
        "ssim": ssim(sparse.pixels, dense.pixels),
    }


def table(result: dict[str, Any]) -> str:
    environment, columns = result["environment"], ("top_p", "density", "kept mass", "step, s", "step speed-up")
    columns = (*columns, "generation speed-up", "PSNR, dB", "SSIM", "clustering")
    lines = [
        f"{result['tokens']} tokens, {result['video']['steps']} steps, {result['dtype']}, {result['options']}; "
        f"{'CUDA graphs, ' if result['cuda_graphs'] else ''}{environment['device']}, "
        f"torch {environment['torch']}, {result['date']}; dense step {result['dense_step_seconds']:.4f} s; "
        f"noise floor {result['noise_floor_psnr_db']:.1f} dB",
        "",
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
    ]
    for point in result["points"]:
        share = point["clustering_share"]
        lines.append(
            f"| {point['top_p']} | {100 * point['density']:.1f} % | {100 * point['kept_mass']:.1f} % "
            f"| {point['step_seconds']:.4f} | {point['step_speedup']:.2f} | {point['generation_speedup']:.2f} "
            f"| {point['psnr_db']:.1f} | {point['ssim']:.4f} | {'–' if share is None else f'{100 * share:.1f} %'} |"
        )
    return "\n".join(lines)


def plot(path: Path, result: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    points = result["points"]
    axis.plot([each["step_speedup"] for each in points], [each["psnr_db"] for each in points], "o-")
    for each in points:
        label = f"top_p {each['top_p']:g}, density {100 * each['density']:.0f} %"
        axis.annotate(label, (each["step_speedup"], each["psnr_db"]), (6, 4), textcoords="offset points", fontsize=8)
    axis.axhline(30, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xlabel("speed-up of a sparse step over a compiled dense step")
    axis.set_ylabel("PSNR to dense, whole video, dB")
    axis.set_title(f"tiny Wan, {result['tokens']} tokens, {result['environment']['device']}", fontsize=9)
    axis.margins(x=0.2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
