"""Which part of SVG2's estimate of the attention mass misleads: selections side by side on the very same tokens.

    python -P benchmarks/method/estimates.py --out docs/images

The trained tiny Wan denoises a video with SVG2; in the last step every selection of ``swapped_ops.py`` that takes
k-means clusters is also tried on the same clusters, without touching the video. Density, true mass and the error of the
results are means over layers, heads and CFG branches. Prints a table, and writes ``estimates.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from swapped_ops import (
    Blocks,
    Kept,
    Select,
    SwappedOps,
    by_centroids,
    by_keys,
    by_queries,
    by_spread,
    by_true_mass,
    interpolate,
    judge,
    svg2,
)

from svg2_compile import tiny_wan
from svg2_compile.environment import describe_environment
from svg2_compile.video.measure import TINY_OPTIONS, Video, generate

SELECTIONS: dict[str, Select] = {
    "svg2": by_centroids,
    "spread": by_spread,
    "keys": by_keys,
    "queries": by_queries,
    "oracle": by_true_mass,
}
TOP_P = (0.8, 0.9, 0.95)
USUAL_TOP_P = 0.9


class Trial(SwappedOps):
    """SVG2 as it is, and while ``watching`` every selection tried beside it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.watching = False
        self.found: dict[tuple[str, float], list[Tensor]] = {}
        self.select = self._remember

    def _remember(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        self._blocks = blocks
        return by_centroids(blocks)

    def _judge(self, out: Tensor, lse: Tensor, *arguments: Any) -> Tensor:
        q, k, v, q_sizes, _, _, *rest = arguments
        for name, select in SELECTIONS.items() if self.watching else ():
            for top_p in TOP_P:
                statistics_of_its_own = torch.zeros_like(self._blocks.statistics)
                runs, counts = select(replace(self._blocks, top_p=top_p, statistics=statistics_of_its_own))
                tried = svg2.block_sparse_attention(q, k, v, q_sizes, runs, counts, *rest)
                judged = judge(q, k, v, q_sizes, runs, counts, *tried, rest[-1])
                self.found.setdefault((name, top_p), []).append(judged)
        return super()._judge(out, lse, *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--prompt", default=Video().prompt)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    video = replace(Video(), prompt=arguments.prompt, frames=arguments.frames, steps=arguments.steps)
    options = {**TINY_OPTIONS, "dense_steps": 0.35, "top_p": USUAL_TOP_P}
    pipeline = tiny_wan.load_pipeline(device="cuda" if torch.cuda.is_available() else "cpu")
    trial = Trial(**options)
    pipeline.transformer = trial.compile(pipeline.transformer)
    ended = 0

    def after_step() -> None:
        nonlocal ended
        ended += 1
        trial.watching = ended == video.steps - 1

    generate(pipeline, video, after_step)
    points = [
        {"selection": name, "top_p": top_p, **asdict(Kept(*torch.stack(found).mean(0).tolist()))}
        for (name, top_p), found in trial.found.items()
    ]
    result = {
        "environment": describe_environment(),
        "date": time.strftime("%Y-%m-%d"),
        "video": asdict(video),
        "tokens": video.tokens,
        "options": options,
        "points": points,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "estimates.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['tokens']} tokens, {result['video']}, {result['options']}; {result['environment']['device']}, "
        f"torch {result['environment']['torch']}, {result['date']}",
        "",
        "| selection | density | true mass | lowest tenth | error of the results | error at SVG2's density |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    usual = {each["selection"]: each for each in result["points"] if each["top_p"] == USUAL_TOP_P}
    for name, point in usual.items():
        curve = [
            (math.log(each["density"]), math.log(each["output_error"]))
            for each in result["points"]
            if each["selection"] == name
        ]
        at = interpolate(curve, math.log(usual["svg2"]["density"]))
        lines.append(
            f"| {name} | {100 * point['density']:.1f} % | {100 * point['true_mass']:.1f} % "
            f"| {100 * point['low_true_mass']:.1f} % | {100 * point['output_error']:.2f} % "
            f"| {'off the curve' if at is None else f'{100 * math.exp(at):.2f} %'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
