"""SVG2 beside what it should beat and what it cannot: quality over density on the trained tiny Wan.

    python -P benchmarks/method/baselines.py --out docs/images

Every method runs in the same rewritten graph, with the same attention op and the same count of what was kept
(``swapped_ops.py``):

  svg2           k-means clusters; top-p over the masses that the centroids estimate
  random         the same clusters; key clusters drawn at random, for every query cluster as many keys as SVG2 keeps
  blocks         equal stretches of the flattened sequence, as many as there are clusters; top-p over their means
  boxes          equal boxes of frames, rows and columns; top-p over their means (a stronger rival than ``blocks``)
  oracle         k-means clusters; top-p over the exact softmax mass of every pair of clusters
  blocks oracle  ``blocks``, chosen by the exact masses
  boxes oracle   ``boxes``, chosen by the exact masses
  queries        k-means clusters; masses estimated from every query and the centroids of the keys
                 (``estimate_by="queries"``)
  keys           k-means clusters; masses estimated from the centroids of the queries and every key
  spread         k-means clusters; masses estimated from the centroids and the variance of the keys

The video is compared with the dense one of the same seed. A method's curve runs over ``top_p``; at the density of an
SVG2 point its PSNR is read from its own curve, linear in the logarithm of the density between two points of the same
video. Prints a table, and writes ``baselines.json`` and ``baselines.png``. Nothing is timed. ``--plot FILE`` draws
again from a file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from swapped_ops import (
    AtRandom,
    ByPosition,
    Point,
    Workbench,
    at_density,
    by_centroids,
    by_keys,
    by_queries,
    by_spread,
    by_true_mass,
    density_at,
    svg2,
)

from svg2_compile import svg2_backend, tiny_wan
from svg2_compile.environment import describe_environment
from svg2_compile.presets import preset
from svg2_compile.video.measure import TINY_OPTIONS, Video, generate
from svg2_compile.video.quality import psnr

TOP_P = (0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
PROMPTS = tiny_wan.example_prompts()[:4]
PRESETS = ("quality", "balanced", "turbo")
RIVALS = ("svg2", "random", "blocks", "boxes", "oracle")
METHODS = (*RIVALS, "blocks oracle", "boxes oracle", "queries", "keys", "spread")
KEYS = tuple(field.name for field in fields(Point))
TOKENS_PER_CLUSTER = (128, 32)
"""Of queries and keys: 64 and 256 clusters of 8192 tokens, as in ``TINY_OPTIONS``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--name", default="baselines", help="of the files, without their ends")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=Video().steps)
    parser.add_argument("--top-p", type=float, nargs="+", default=TOP_P)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=RIVALS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--option", action="append", default=[], help="name=value of SparseConfig, repeatable")
    parser.add_argument(
        "--check", action="store_true", help="compare with the backend left alone, compiled by Inductor"
    )
    parser.add_argument("--plot", type=Path, help="draw the figure of this JSON file, and do nothing else")
    arguments = parser.parse_args()
    if arguments.plot is not None:
        plot(arguments.plot.with_suffix(".png"), json.loads(arguments.plot.read_text()))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.name}.json"

    def write(result: dict[str, Any]) -> None:
        path.write_text(json.dumps(result, indent=1) + "\n")

    result = measure(arguments, device, write)
    write(result)
    plot(path.with_suffix(".png"), result)
    print(table(result))


def measure(
    arguments: argparse.Namespace, device: torch.device, write: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Return everything that goes into the file, which is written after every method too."""
    base = replace(Video(), frames=arguments.frames, steps=arguments.steps)
    videos = [replace(base, prompt=prompt, seed=seed) for prompt in arguments.prompts for seed in arguments.seeds]
    extra = {name: json.loads(value) for name, value in (each.split("=", 1) for each in arguments.option)}
    counts = dict(zip(("q_clusters", "k_clusters"), (base.tokens // each for each in TOKENS_PER_CLUSTER)))
    options = {**TINY_OPTIONS, **counts, "dense_steps": 0.35, **extra}
    bench = Workbench(tiny_wan.load_pipeline(getattr(torch, arguments.dtype), device), videos)
    result: dict[str, Any] = {
        "environment": describe_environment(),
        "date": time.strftime("%Y-%m-%d"),
        "video": asdict(base),
        "tokens": base.tokens,
        "dtype": arguments.dtype,
        "options": options,
        "points": [],
    }
    ops = bench.compile(**options)
    ops.top_p = 1.0
    result["noise_floor_psnr_db"] = bench.measure(ops, 0).psnr_db
    print(f"everything kept: {result['noise_floor_psnr_db']:.1f} dB", flush=True)
    grid = (base.frames, base.height // tiny_wan.model.TOKEN_SIZE, base.width // tiny_wan.model.TOKEN_SIZE)
    selections = {"oracle": by_true_mass, "queries": by_queries, "keys": by_keys, "spread": by_spread}
    for method in arguments.methods:
        clusters, _, selection = method.partition(" ")
        by_position = {"blocks": ByPosition(grid, boxes=False), "boxes": ByPosition(grid, boxes=True)}
        ops.cluster = by_position.get(clusters, svg2.cluster_tokens_)
        for index, video in enumerate(videos):
            for top_p in arguments.top_p:
                at_random = AtRandom(torch.Generator(device).manual_seed(video.seed))
                ops.select = at_random if method == "random" else selections.get(selection or method, by_centroids)
                ops.top_p = top_p
                point = bench.measure(ops, index)
                where = {"method": method, "prompt": video.prompt, "seed": video.seed, "top_p": top_p}
                result["points"].append(where | asdict(point))
                print(where, point, flush=True)
        write(result)
    result["comparison"] = compare(result["points"])
    result["presets"] = presets(bench, options)
    write(result)
    if arguments.check:
        result["check_psnr_db"] = check(bench, options)
    return result


def presets(bench: Workbench, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return where our presets lie, with the cluster counts that this model wants."""
    rows = []
    for name in PRESETS:
        chosen = {**options, **preset(name)}
        ops = bench.compile(**chosen)
        points = [asdict(bench.measure(ops, index)) for index in range(len(bench.videos))]
        row = {key: statistics.mean(point[key] for point in points) for key in points[0]}
        steps = bench.videos[0].steps
        dense = math.floor(chosen["dense_steps"] * steps + 1e-9)
        row["density_with_dense_steps"] = (dense + (steps - dense) * row["density"]) / steps
        rows.append({"name": name, "options": preset(name), "dense_steps": dense, **row, "videos": points})
        print(rows[-1], flush=True)
    return rows


def check(bench: Workbench, options: dict[str, Any]) -> float:
    """Return the PSNR between SVG2 through the replaced ops and through the backend left alone."""
    ops = bench.compile(**options)
    ops_pixels = generate(bench.pipeline, bench.videos[0]).pixels
    torch._dynamo.reset()
    bench.pipeline.transformer = torch.compile(bench.eager, backend=svg2_backend, options=options, fullgraph=True)
    found = psnr(ops_pixels, generate(bench.pipeline, bench.videos[0]).pixels)
    print(
        f"through the replaced ops and through the backend left alone, compiled: {found:.1f} dB, {ops.kept.density:.4f}"
    )
    return found


def compare(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for every operating point of SVG2, by how much it beats each rival at its density, over the videos."""
    curves: dict[str, dict[Any, list[dict[str, Any]]]] = {}
    for point in points:
        curves.setdefault(point["method"], {}).setdefault((point["prompt"], point["seed"]), []).append(point)
    ours = curves.pop("svg2", {})
    rows = []
    for top_p in dict.fromkeys(point["top_p"] for curve in ours.values() for point in curve):
        here = {video: next(each for each in curve if each["top_p"] == top_p) for video, curve in ours.items()}
        row: dict[str, Any] = {"top_p": top_p}
        for key in KEYS:
            row[key] = _spread([point[key] for point in here.values()])
        for method, rivals in curves.items():
            gains, densities = [], []
            for video, point in here.items():
                rival = [_point(each) for each in rivals[video]]
                theirs, needed = at_density(rival, point["density"]), density_at(rival, point["psnr_db"])
                gains += [] if theirs is None else [point["psnr_db"] - theirs]
                densities += [] if needed is None else [needed / point["density"]]
            row[method] = {"gain_db": _spread(gains), "density_ratio": _spread(densities)}
        rows.append(row)
    return rows


def _point(record: dict[str, Any]) -> Point:
    return Point(**{name: record[name] for name in KEYS})


def _spread(values: list[float]) -> dict[str, Any]:
    """Return mean, deviation over the videos, and how many there are."""
    if not values:
        return {"mean": None, "deviation": None, "count": 0}
    return {"mean": statistics.mean(values), "deviation": statistics.pstdev(values), "count": len(values)}


def table(result: dict[str, Any]) -> str:
    environment = result["environment"]
    rows = result["comparison"]
    rivals = (
        [name for name in rows[0] if isinstance(rows[0][name], dict) and "gain_db" in rows[0][name]] if rows else []
    )
    columns = ("top_p", "density", "true mass", "PSNR, dB", "SSIM", *(f"over {name}, dB" for name in rivals))
    lines = [
        f"{result['tokens']} tokens, {result['video']['steps']} steps, {result['dtype']}, {result['options']}; "
        f"{environment['device']}, torch {environment['torch']}, {result['date']}; everything kept: "
        f"{result['noise_floor_psnr_db']:.1f} dB",
        "",
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
    ]
    for row in rows:
        cells = [
            f"{row['top_p']}",
            f"{100 * row['density']['mean']:.1f} %",
            f"{100 * row['true_mass']['mean']:.1f} %",
            f"{row['psnr_db']['mean']:.1f} ± {row['psnr_db']['deviation']:.1f}",
            f"{row['ssim']['mean']:.3f}",
            *(_gain(row[name]["gain_db"]) for name in rivals),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    names = ("preset", "dense steps", "density", "with dense steps", "true mass", "PSNR, dB", "SSIM")
    lines += ["", f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for row in result["presets"]:
        lines.append(
            f"| {row['name']} | {row['dense_steps']} of {result['video']['steps']} | {100 * row['density']:.1f} % "
            f"| {100 * row['density_with_dense_steps']:.1f} % | {100 * row['true_mass']:.1f} % "
            f"| {row['psnr_db']:.1f} | {row['ssim']:.3f} |"
        )
    return "\n".join(lines)


def _gain(spread: dict[str, Any]) -> str:
    return "" if spread["mean"] is None else f"{spread['mean']:+.1f} ± {spread['deviation']:.1f} ({spread['count']})"


def plot(path: Path, result: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    quality, mass = figure.subplots(1, 2)
    by_method = groupby(sorted(result["points"], key=lambda each: METHODS.index(each["method"])), lambda e: e["method"])
    for index, (method, points) in enumerate(by_method):
        by_top_p: dict[float, list[dict[str, Any]]] = {}
        for point in points:
            by_top_p.setdefault(point["top_p"], []).append(point)
        means = [
            {key: statistics.mean(each[key] for each in group) for key in ("density", "psnr_db", "true_mass")}
            for group in by_top_p.values()
        ]
        style = {"color": f"C{index}", "marker": "o", "markersize": 3, "label": method}
        style["linestyle"] = ":" if " " in method else "-"
        density = [100 * each["density"] for each in means]
        quality.plot(density, [each["psnr_db"] for each in means], **style)
        spread = [statistics.pstdev([each["psnr_db"] for each in group]) for group in by_top_p.values()]
        low, high = ([each["psnr_db"] + sign * s for each, s in zip(means, spread)] for sign in (-1, 1))
        quality.fill_between(density, low, high, color=f"C{index}", alpha=0.1, linewidth=0)
        mass.plot(density, [100 * each["true_mass"] for each in means], **style)
    for axis, label in ((quality, "PSNR to dense, whole video, dB"), (mass, "true softmax mass kept, %")):
        axis.set_xscale("log")
        ticks = [10, 15, 20, 30, 40, 60, 80]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("density in the sparse steps, %")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    mass.legend(fontsize=8)
    videos = len({(each["prompt"], each["seed"]) for each in result["points"]})
    figure.suptitle(
        f"tiny Wan, {result['tokens']} tokens, mean and deviation of {videos} videos, {result['dtype']}, "
        f"{result['environment']['device']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
