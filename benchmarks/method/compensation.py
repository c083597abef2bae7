"""What stands in for dropped key clusters, and what is kept beside it: ways side by side on the trained tiny Wan.

    python -P benchmarks/method/compensation.py --out docs/images --seeds 3

Every way has a curve over ``top_p`` for every video, and is read where the density is that of plain SVG2 at the same
``top_p``, video by video (``at_density``). ``centroids``, ``queries``, ``compensation`` and ``routing`` are options of
the backend. So is ``budgets``, with a file of ``svg2 calibrate`` for each ``top_p`` (``--budgets 0.9=FILE``). The
others give the means another weight than ln n: ``second order`` adds half the variance of the scores
of the cluster for the mean query, ``exact weight`` takes what all keys of the cluster weigh for the mean query.
Writes ``compensation.json`` after every video; prints tables.
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

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from swapped_ops import Judge, as_function, at_density, judge, membership

import svg2_compile
from svg2_compile import tiny_wan
from svg2_compile.environment import describe_environment
from svg2_compile.kernels.selection_statistics import per_query_head
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.plan import stages_of
from svg2_compile.passes.records import AttentionSite
from svg2_compile.passes.stages.compensate import Compensate
from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.stage import Stage
from svg2_compile.video.measure import TINY_OPTIONS, Video, generate
from svg2_compile.video.quality import psnr

TOP_P = (0.3, 0.6, 0.9)
PROMPTS = ("rabbit_stretches", "passenger_talks")
Weigh = Callable[..., Tensor]
"""Returns a bias in place of ``log_dropped_sizes``; takes it, the mean queries, keys, their means, sizes and scale."""


@dataclass(frozen=True, slots=True)
class Way:
    """Options, and what the means weigh if not as many keys as they stand for."""

    options: dict[str, Any]
    weigh: Weigh | None = None
    files: dict[float, str] = field(default_factory=dict)
    """Of budgets, by ``top_p``."""


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


def by_exact_weight(bias: Tensor, q_means: Tensor, k: Tensor, k_means: Tensor, k_sizes: Tensor, scale: float) -> Tensor:
    """Let a mean weigh what all keys of its cluster weigh for the mean query; the arguments are the same."""
    scores, members, sizes = _scores(q_means, k, k_sizes, scale)
    of_mean = q_means @ per_query_head(k_means, q_means.shape[1]).float().mT * scale
    cluster = members.argmax(-1)  # [B, H, N_k]
    above = scores - of_mean.gather(-1, cluster.unsqueeze(2).expand_as(scores))
    highest = torch.zeros_like(of_mean).scatter_reduce_(-1, cluster.unsqueeze(2).expand_as(above), above, "amax")
    mean = (above - highest.gather(-1, cluster.unsqueeze(2).expand_as(above))).exp() @ members / sizes
    return bias + torch.where(mean > 0, mean.log() + highest, 0)


def _scores(q_means: Tensor, k: Tensor, k_sizes: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scores of the mean queries with all keys, who is of which cluster, and the sizes, 1 at least."""
    heads = q_means.shape[1]
    scores = q_means @ per_query_head(k, heads).float().mT * scale
    members = per_query_head(membership(k_sizes, k.shape[2]), heads)
    return scores, members, per_query_head(k_sizes, heads).clamp(min=1).float().unsqueeze(2)


BY_QUERIES = {"estimate_by": "queries"}
COMPENSATED = BY_QUERIES | {"compensate": "centroids"}
WAYS = {
    "centroids": Way({}),
    "queries": Way(BY_QUERIES),
    "compensation": Way(COMPENSATED),
    "routing": Way(COMPENSATED | {"route": "error"}),
    "second order": Way(COMPENSATED, by_variance),
    "exact weight": Way(COMPENSATED, by_exact_weight),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One sparse video beside the dense one; the last three are means over the sparse calls and heads."""

    psnr_db: float
    density: float
    weight: float
    """What was attended to weighs, pseudo-keys included, over what all keys weigh, a mean over sampled queries."""
    output_error: float
    """Norm of the error of a head's results over the norm of the exact ones."""


class Bench:
    """The pipeline, one dense video, and one way at a time."""

    def __init__(self, pipeline: Any, options: dict[str, Any]) -> None:
        self.pipeline, self.eager, self.options = pipeline, pipeline.transformer, options
        self.found: list[Tensor] = []

    def dense(self, video: Video) -> Tensor:
        """Return the pixels that dense attention gives."""
        self.pipeline.transformer = self.eager
        return generate(self.pipeline, video).pixels

    def sparse(self, way: Way, top_p: float, video: Video, dense: Tensor) -> Point:
        """Return how far a way is from dense attention."""
        torch._dynamo.reset()
        svg2_compile.reset()
        options = {**self.options, **way.options, "top_p": top_p, "lowering": "eager"}
        if way.files:
            options["budgets"] = way.files[top_p]

        def stages(config: SparseConfig, site: AttentionSite) -> tuple[Stage, ...]:
            usual = stages_of(config, site)
            if way.weigh is not None:
                changed = WeighOtherwise(way.weigh)
                usual = tuple(changed if isinstance(stage, Compensate) else stage for stage in usual)
            return *usual, Judge(self._judge)

        def backend(gm: Any, inputs: list[Any]) -> Any:
            return svg2_compile.svg2_backend(gm, inputs, options=options, stages=stages)

        self.pipeline.transformer = torch.compile(self.eager, backend=backend, fullgraph=True)
        self.found = []
        pixels = generate(self.pipeline, video).pixels
        density, weight, _, error = torch.stack(self.found).mean(0).tolist()
        return Point(psnr(pixels, dense), density, weight, error)

    def _judge(self, out: Tensor, lse: Tensor, *arguments: Any) -> Tensor:
        q, k, v, q_sizes, runs, counts, *_, scale = arguments
        self.found.append(judge(q, k, v, q_sizes, runs, counts, out, lse, scale).cpu())
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--seeds", type=int, default=1, help="videos of a prompt")
    parser.add_argument("--frames", type=int, default=Video().frames)
    parser.add_argument("--height", type=int, default=Video().height)
    parser.add_argument("--width", type=int, default=Video().width)
    parser.add_argument("--steps", type=int, default=Video().steps)
    parser.add_argument("--top-p", type=float, nargs="+", default=TOP_P)
    parser.add_argument("--ways", nargs="+", choices=(*WAYS, "budgets"), default=list(WAYS))
    parser.add_argument("--budgets", nargs="+", default=[], metavar="TOP_P=FILE", help="for the way of that name")
    parser.add_argument("--option", action="append", default=[], help="name=value of SparseConfig, repeatable")
    arguments = parser.parse_args()
    files = {float(top_p): path for top_p, path in (each.split("=", 1) for each in arguments.budgets)}
    if "budgets" in arguments.ways and not {*arguments.top_p} <= {*files}:
        raise SystemExit(
            f"--budgets must name a file for each --top-p, got {sorted(files)}; run svg2 calibrate for each"
        )
    ways = WAYS | {"budgets": Way({}, files=files)}
    extra = {name: json.loads(value) for name, value in (each.split("=", 1) for each in arguments.option)}
    options = {**TINY_OPTIONS, "dense_steps": 0.35, **extra}
    size = {name: getattr(arguments, name) for name in ("frames", "height", "width", "steps")}
    videos = [
        Video(prompt=prompt, seed=seed, **size) for seed in range(arguments.seeds) for prompt in arguments.prompts
    ]
    bench = Bench(tiny_wan.load_pipeline(device="cuda" if torch.cuda.is_available() else "cpu"), options)
    result: dict[str, Any] = {
        "environment": describe_environment(),
        "date": time.strftime("%Y-%m-%d"),
        "tokens": videos[0].tokens,
        "options": options,
        "videos": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for video in videos:
        dense = bench.dense(video)
        points = [
            {"way": name, "top_p": top_p, **asdict(bench.sparse(ways[name], top_p, video, dense))}
            for name in arguments.ways
            for top_p in arguments.top_p
        ]
        result["videos"].append({"video": asdict(video), "points": points})
        (arguments.out / "compensation.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"{video.prompt}, seed {video.seed}", flush=True)
    print(table(result))


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
    shares = list(dict.fromkeys(each["top_p"] for each in videos[0]["points"]))
    lines = [
        f"{result['tokens']} tokens, {len(videos)} videos, {videos[0]['video']['steps']} steps, {result['options']}; "
        f"{environment['device']}, torch {environment['torch']}, {result['date']}",
        "",
        "| way | top_p | density | PSNR, dB | least | weight seen | error of the results |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way in ways:
        for index, top_p in enumerate(shares):
            points = [points_of(video, way)[index] for video in videos]
            density, weight, error = (
                100 * statistics.mean(getattr(point, name) for point in points)
                for name in ("density", "weight", "output_error")
            )
            levels = [point.psnr_db for point in points]
            lines.append(
                f"| {way} | {top_p} | {density:.1f} % | {statistics.mean(levels):.1f} | {min(levels):.1f} "
                f"| {weight:.1f} % | {error:.1f} % |"
            )
    lines += ["", f"Gain over `{ways[0]}` at its own density, dB: mean ± standard deviation (least to most)", ""]
    lines += [f"| way |{''.join(f' {top_p} |' for top_p in shares)}", "| --- |" + " --- |" * len(shares)]
    for way in ways[1:]:
        cells = []
        for index in range(len(shares)):
            gains = [gain(video, ways[0], way, index) for video in videos]
            known = [each for each in gains if each is not None]
            spread = statistics.stdev(known) if len(known) > 1 else 0.0
            cells.append(
                f"{statistics.mean(known):+.1f} ± {spread:.1f} ({min(known):+.1f} to {max(known):+.1f}), {len(known)}"
                if known
                else "off the curve"
            )
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gain(video: dict[str, Any], base: str, way: str, index: int) -> float | None:
    """Return what a way gains over another one's point, at the density of that; None where its curve does not reach."""
    point = points_of(video, base)[index]
    level = at_density(points_of(video, way), point.density)
    return None if level is None else level - point.psnr_db


if __name__ == "__main__":
    main()
