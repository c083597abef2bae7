"""Quality of the sparse tiny Wan against dense over a grid of options; no timing.

    python -P benchmarks/method/quality_sweep.py --out quality_sweep.jsonl

One line of JSON a point: the options, PSNR and SSIM of the whole video to dense with the same seed, density, kept mass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import svg2_compile
from svg2_compile import svg2_backend, tiny_wan
from svg2_compile.video.measure import Video, generate
from svg2_compile.video.quality import psnr, ssim

BASE: dict[str, Any] = {"min_tokens": 1024, "dense_steps": 0.25, "top_p": 0.9, "lowering": "eager"}
GRID: dict[str, list[Any]] = {
    "top_p": [0.5, 0.7, 0.8, 0.9, 0.95, 0.99],
    "dense_steps": [0.0, 0.25, 0.5],
}
SINGLE: list[dict[str, Any]] = [
    {"dense_layers": 0},
    {"dense_layers": 2},
    {"q_clusters": 32},
    {"q_clusters": 64},
    {"k_clusters": 128},
    {"k_clusters": 256},
    {"q_clusters": 64, "k_clusters": 256},
    {"kmeans_iters_init": 2},
    {"kmeans_iters_init": 50},
    {"kmeans_iters_step": 1},
    {"kmeans_iters_step": 10},
    {"min_keep_ratio": 0.0},
    {"min_keep_ratio": 0.3},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quality_sweep.jsonl"))
    parser.add_argument("--prompts", nargs="+", default=["rabbit_stretches", "passenger_talks"])
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--frames", type=int, nargs="+", default=[16])
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0])
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--points", type=json.loads, help="a JSON list of option dicts, in place of the grid")
    arguments = parser.parse_args()
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = tiny_wan.load_pipeline(device=device)
    eager = pipeline.transformer
    points = arguments.points or [dict(zip(GRID, values)) for values in itertools.product(*GRID.values())] + SINGLE
    settings = itertools.product(arguments.prompts, arguments.steps, arguments.frames, arguments.guidance)
    with arguments.out.open("w") as lines:
        for prompt, steps, frames, guidance in settings:
            video = replace(Video(), prompt=prompt, steps=steps, frames=frames, guidance_scale=guidance)
            pipeline.transformer = eager
            dense = generate(pipeline, video)
            for point in points:
                if time.monotonic() - started > 60 * arguments.minutes:
                    print("out of time")
                    return
                torch._dynamo.reset()
                pipeline.transformer = torch.compile(eager, backend=svg2_backend, options=BASE | point)
                sparse = generate(pipeline, video)
                report = svg2_compile.report(pipeline.transformer)
                line = {
                    "prompt": prompt,
                    "steps": steps,
                    "tokens": video.tokens,
                    "guidance": guidance,
                    "options": BASE | point,
                    "psnr_db": psnr(sparse.pixels, dense.pixels),
                    "ssim": ssim(sparse.pixels, dense.pixels),
                    "density": report.density,
                    "kept_mass": report.kept_mass,
                    "density_by_layer": {site.path: site.density for site in report.sparse_sites},
                }
                lines.write(json.dumps(line) + "\n")
                lines.flush()
                shown = {name: value for name, value in line["options"].items() if BASE.get(name) != value}
                print(
                    f"{prompt} steps {steps} cfg {guidance} {shown}: {line['psnr_db']:.1f} dB, density "
                    f"{line['density'] or 0:.3f}, mass {line['kept_mass'] or 0:.3f}, {sum(sparse.step_seconds):.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
