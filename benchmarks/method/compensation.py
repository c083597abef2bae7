"""What stands in for dropped key clusters, and what is kept beside it: ways side by side on the trained tiny Wan.

    python -P benchmarks/method/compensation.py --out docs/images --seeds 3
    python -P benchmarks/method/compensation.py --join runs/one.json runs/other.json --out docs/images

Every way has a curve over ``top_p`` for every video, and is read where the density is that of plain SVG2 at the same
``top_p``, video by video (``at_density``). Most ways are options of the backend: ``compensation`` is
``compensate="centroids"`` and ``keys`` is ``compensate="keys"``, both with ``estimate_by="queries"``; ``budgets`` takes
a file of ``svg2 calibrate`` for each ``top_p`` (``--budgets 0.9=FILE``). ``oracle`` is ``centroids`` with the exact
masses, and ``second order`` adds half the variance of the scores of a cluster for the mean query to the weight of its
mean. Rows that are computed densely are not counted in the density.

Videos are the model's examples by default, eight of them or more. Writes ``compensation.json``, or a file of another
``--name``, after every point; prints tables. Ways can be measured by several processes; ``--join`` puts them together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from swapped_ops import (
    Judge,
    Select,
    SwappedSelection,
    as_function,
    at_density,
    blocks_of,
    by_true_mass,
    judge,
    membership,
)

import svg2_compile
from svg2_compile import tiny_wan
from svg2_compile.environment import describe_environment
from svg2_compile.kernels.selection_statistics import per_query_head
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.plan import stages_of
from svg2_compile.passes.records import AttentionSite
from svg2_compile.passes.stages.compensate import Compensate
from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.keep_top_p import KeepTopP
from svg2_compile.passes.stages.stage import Stage
from svg2_compile.tiny_wan import model
from svg2_compile.video.measure import TINY_OPTIONS, Video, generate
from svg2_compile.video.quality import psnr, ssim

TOP_P = (0.3, 0.6, 0.9)
Weigh = Callable[..., Tensor]
"""Returns a bias in place of ``log_dropped_sizes``; takes it, the mean queries, keys, their means, sizes and scale."""


@dataclass(frozen=True, slots=True)
class Way:
    """Options, and what the means weigh if not as many keys as they stand for."""

    options: dict[str, Any]
    weigh: Weigh | None = None
    select: Select | None = None
    """In place of the backend's own selection."""
    files: dict[float, str] = field(default_factory=dict)
    """Of budgets, by ``top_p``."""

    def stages(self, config: SparseConfig, site: AttentionSite) -> tuple[Stage, ...]:
        """Return the stages of a site."""
        return tuple(self._changed(stage) for stage in stages_of(config, site))

    def _changed(self, stage: Stage) -> Stage:
        if self.weigh is not None and isinstance(stage, Compensate):
            return WeighOtherwise(self.weigh)
        if self.select is not None and isinstance(stage, KeepTopP):
            select = self.select
            return SwappedSelection(call=lambda *arguments: select(blocks_of(*arguments)))
        return stage


@dataclass(frozen=True, slots=True)
class WeighOtherwise(Compensate):
    """Changes the weights of the means."""

    weigh: Weigh

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        flow = Compensate.emit(self, writer, flow)
        function = as_function("weigh", self.weigh, lambda bias, *rest: torch.empty_like(bias))
        means = writer.state["q_centroids"], flow.k_clustered, flow.k_means, flow.k_sizes, writer.site.scale
        return replace(flow, pseudo_bias=writer.emit(function, flow.pseudo_bias, *means))


def by_variance(bias: Tensor, q_means: Tensor, k: Tensor, k_means: Tensor, k_sizes: Tensor, scale: float) -> Tensor:
    """Add half the variance of the scores of a cluster, for the mean query: of normal scores, that is their log-mean.

    Args:
        bias: [B, H, C_q, C_k], -inf where no mean is needed.
        q_means: [B, H, C_q, D].
        k: [B, G, N_k, D], in cluster order.
        k_means: [B, G, C_k, D].
        k_sizes: [B, G, C_k].
        scale: of the scores.
    """
    scores, members, sizes = _scores(q_means, k, k_sizes, scale)
    of_mean = q_means @ per_query_head(k_means, q_means.shape[1]).float().mT * scale
    variance = (scores.square() @ members / sizes - of_mean.square()).clamp(min=0)
    return bias + variance / 2


def _scores(q_means: Tensor, k: Tensor, k_sizes: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scores of the mean queries with all keys, who is of which cluster, and the sizes, 1 at least."""
    heads = q_means.shape[1]
    scores = q_means @ per_query_head(k, heads).float().mT * scale
    members = per_query_head(membership(k_sizes, k.shape[2]), heads)
    return scores, members, per_query_head(k_sizes, heads).clamp(min=1).float().unsqueeze(2)


BY_QUERIES = {"estimate_by": "queries"}
COMPENSATED = BY_QUERIES | {"compensate": "centroids"}
BY_KEYS = BY_QUERIES | {"compensate": "keys"}
REPAIRED = {"repair_rows": 64}
FLOORED = {"head_floor": "online"}
WAYS = {
    "centroids": Way({}),
    "queries": Way(BY_QUERIES),
    "compensation": Way(COMPENSATED),
    "routing": Way(COMPENSATED | {"route": "error"}),
    "head floor": Way(BY_QUERIES | FLOORED),
    "head floor, compensation": Way(COMPENSATED | FLOORED),
    "repair": Way(BY_QUERIES | REPAIRED),
    "repair of svg2": Way(REPAIRED),
    "repair, compensation": Way(COMPENSATED | REPAIRED),
    "second order": Way(COMPENSATED, by_variance),
    "keys": Way(BY_KEYS),
    "keys, routing": Way(BY_KEYS | {"route": "error"}),
    "oracle": Way({}, select=by_true_mass),
    "metric of queries": Way(COMPENSATED | {"cluster_metric": "queries"}),
    "keys, metric of queries": Way(BY_KEYS | {"cluster_metric": "queries"}),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One sparse video beside the dense one; the last three are means over the sparse calls and heads."""

    psnr_db: float
    ssim: float
    density: float
    weight: float
    """What was attended to weighs, pseudo-keys included, over what all keys weigh, a mean over sampled queries."""
    output_error: float
    """Norm of the error of a head's results over the norm of the exact ones."""


class Bench:
    """The pipeline, its videos, and one way at a time."""

    def __init__(self, pipeline: Any, videos: list[Video], options: dict[str, Any]) -> None:
        self.pipeline, self.eager, self.options, self.videos = pipeline, pipeline.transformer, options, videos
        self.dense = [generate(pipeline, video).pixels for video in videos]
        self.found: list[Tensor] = []

    def floor(self) -> list[float]:
        """Return the PSNR of each dense video to itself with another rounding: attention as two matrix products."""
        with sdpa_kernel(SDPBackend.MATH):
            return [psnr(generate(self.pipeline, video).pixels, dense) for video, dense in zip(self.videos, self.dense)]

    def sparse(self, way: Way, top_p: float) -> list[Point]:
        """Return how far a way is from dense attention, for every video."""
        torch._dynamo.reset()
        options = {**self.options, **way.options, "top_p": top_p, "lowering": "eager"}
        if way.files:
            options["budgets"] = way.files[top_p]

        def stages(config: SparseConfig, site: AttentionSite) -> tuple[Stage, ...]:
            return *way.stages(config, site), Judge(self._judge)

        def backend(gm: Any, inputs: list[Any]) -> Any:
            return svg2_compile.svg2_backend(gm, inputs, options=options, stages=stages)

        self.pipeline.transformer = torch.compile(self.eager, backend=backend, fullgraph=True)
        points = []
        for video, dense in zip(self.videos, self.dense):
            svg2_compile.reset()
            self.found = []
            pixels = generate(self.pipeline, video).pixels
            density, weight, _, error = torch.stack(self.found).mean(0).tolist()
            points.append(Point(psnr(pixels, dense), ssim(pixels, dense), density, weight, error))
        return points

    def _judge(self, out: Tensor, lse: Tensor, *arguments: Any) -> Tensor:
        q, k, v, q_sizes, runs, counts, *_, scale = arguments
        self.found.append(judge(q, k, v, q_sizes, runs, counts, out, lse, scale).cpu())
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--name", default="compensation", help="of the file")
    parser.add_argument("--folder", type=Path, default=model.FOLDER, help="of the model; the shipped one by default")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--prompts", nargs="+", help="the model's examples by default")
    parser.add_argument("--seeds", type=int, default=1, help="videos of a prompt")
    parser.add_argument("--frames", type=int, default=Video().frames)
    parser.add_argument("--height", type=int, default=Video().height)
    parser.add_argument("--width", type=int, default=Video().width)
    parser.add_argument("--steps", type=int, default=Video().steps)
    parser.add_argument("--top-p", type=float, nargs="+", default=TOP_P)
    parser.add_argument("--ways", nargs="+", choices=(*WAYS, "budgets"), default=list(WAYS))
    parser.add_argument("--budgets", nargs="+", default=[], metavar="TOP_P=FILE", help="for the way of that name")
    parser.add_argument("--option", action="append", default=[], help="name=value of SparseConfig, repeatable")
    parser.add_argument("--join", type=Path, nargs="+", help="put these files of the same videos together, and stop")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.name}.json"
    if arguments.join:
        result = joined([json.loads(each.read_text()) for each in arguments.join])
        path.write_text(json.dumps(result, indent=1) + "\n")
    else:
        result = measured(arguments, path)
    print(table(result))


def measured(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Measure every way of the command line, and write what there is after each point."""
    files = {float(top_p): path for top_p, path in (each.split("=", 1) for each in arguments.budgets)}
    if "budgets" in arguments.ways and not {*arguments.top_p} <= {*files}:
        raise SystemExit(
            f"--budgets must name a file for each --top-p, got {sorted(files)}; run svg2 calibrate for each"
        )
    ways = WAYS | {"budgets": Way({}, files=files)}
    extra = {name: json.loads(value) for name, value in (each.split("=", 1) for each in arguments.option)}
    options = {**TINY_OPTIONS, "dense_steps": 0.35, **extra}
    size = {name: getattr(arguments, name) for name in ("frames", "height", "width", "steps")}
    prompts = arguments.prompts or tiny_wan.example_prompts(arguments.folder)
    videos = [Video(prompt=prompt, seed=seed, **size) for seed in range(arguments.seeds) for prompt in prompts]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = tiny_wan.load_pipeline(getattr(torch, arguments.dtype), device, arguments.folder)
    bench = Bench(pipeline, videos, options)
    result: dict[str, Any] = {
        "environment": describe_environment(),
        "date": time.strftime("%Y-%m-%d"),
        "tokens": videos[0].tokens,
        "dtype": arguments.dtype,
        "options": options,
        "videos": [
            {"video": asdict(video), "floor_db": floor, "points": []} for video, floor in zip(videos, bench.floor())
        ],
    }
    for name in arguments.ways:
        for top_p in arguments.top_p:
            for record, point in zip(result["videos"], bench.sparse(ways[name], top_p)):
                record["points"].append({"way": name, "top_p": top_p, **asdict(point)})
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}, {top_p}", flush=True)
    return result


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one result with the points of all.

    Raises:
        SystemExit: they are of other videos or options.

    """
    first = results[0]
    alike = ("tokens", "dtype", "options")
    of_videos = [[video["video"] for video in result["videos"]] for result in results]
    for result, videos in zip(results, of_videos):
        if videos != of_videos[0] or any(result[name] != first[name] for name in alike):
            raise SystemExit("the files must be of the same videos, type and options; measure one of them again")
    for number, video in enumerate(first["videos"]):
        video["points"] = [point for result in results for point in result["videos"][number]["points"]]
    return first


def points_of(video: dict[str, Any], way: str) -> list[Any]:
    """Return the curve of one way."""
    return [
        Point(**{name: each[name] for name in Point.__dataclass_fields__})
        for each in video["points"]
        if each["way"] == way
    ]


def table(result: dict[str, Any]) -> str:
    """Return two tables: means over the videos at every ``top_p``, and what a way gains at equal density."""
    environment, videos = result["environment"], result["videos"]
    ways = list(dict.fromkeys(each["way"] for each in videos[0]["points"]))
    shares = {way: [each["top_p"] for each in videos[0]["points"] if each["way"] == way] for way in ways}
    lines = [
        f"{result['tokens']} tokens, {len(videos)} videos, {videos[0]['video']['steps']} steps, {result['dtype']}, "
        f"{result['options']}; noise floor {min(video['floor_db'] for video in videos):.1f} dB at least; "
        f"{environment['device']}, torch {environment['torch']}, {result['date']}",
        "",
        "| way | top_p | density | PSNR, dB: mean ± standard deviation (least) | SSIM | weight seen | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way in ways:
        for index, top_p in enumerate(shares[way]):
            points = [points_of(video, way)[index] for video in videos]
            density, weight, error, similarity = (
                statistics.mean(getattr(point, name) for point in points)
                for name in ("density", "weight", "output_error", "ssim")
            )
            levels = [point.psnr_db for point in points]
            lines.append(
                f"| {way} | {top_p} | {density:.1%} | {statistics.mean(levels):.1f} ± {spread(levels):.1f} "
                f"({min(levels):.1f}) | {similarity:.3f} | {weight:.1%} | {error:.1%} |"
            )
    lines += ["", f"Gain over `{ways[0]}` at its own density, dB: mean ± standard deviation (least to most)", ""]
    lines += [
        f"| way |{''.join(f' {top_p} |' for top_p in shares[ways[0]])}",
        "| --- |" + " --- |" * len(shares[ways[0]]),
    ]
    for way in ways[1:]:
        cells = []
        for index in range(len(shares[ways[0]])):
            gains = [gain(video, ways[0], way, index) for video in videos]
            known = [each for each in gains if each is not None]
            cells.append(
                f"{statistics.mean(known):+.1f} ± {spread(known):.1f} "
                f"({min(known):+.1f} to {max(known):+.1f}), {len(known)}"
                if known
                else "off the curve"
            )
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> float:
    """Return the standard deviation of a sample, zero of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def gain(video: dict[str, Any], base: str, way: str, index: int) -> float | None:
    """Return what a way gains over another one's point, at the density of that; None where its curve does not reach."""
    point = points_of(video, base)[index]
    level = at_density(points_of(video, way), point.density)
    return None if level is None else level - point.psnr_db


if __name__ == "__main__":
    main()
