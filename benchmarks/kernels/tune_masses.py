"""`svg2::block_masses` on an NVIDIA GPU: milliseconds with all its launches, for tiles of queries and key clusters.

    python -P benchmarks/kernels/tune_masses.py --out tune_masses.json

bf16, tokens and labels at random, as many in every cluster. Every tile is also compared with the first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from shapes import HUNYUAN_720P, NARROW, WAN_14B_720P

from svg2_compile.environment import describe_environment
from svg2_compile.kernels import block_masses_triton
from svg2_compile.kernels.sort_labels import sort_labels_reference

SHAPES = (WAN_14B_720P, replace(HUNYUAN_720P, clusters=HUNYUAN_720P.clusters[:1]), NARROW)
TILES = [
    {"BLOCK_M": queries, "BLOCK_C": key_clusters, "num_warps": warps, "num_stages": stages}
    for queries, key_clusters, warps, stages in (
        (128, 64, 4, 2),
        (128, 64, 4, 3),
        (128, 64, 4, 4),
        (256, 64, 8, 2),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (64, 64, 4, 2),
        (128, 32, 4, 3),
    )
]


def main() -> None:
    """Time every tile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device; nothing was timed")
        return
    from triton.testing import do_bench

    rows: list[dict[str, object]] = []
    record = {"environment": describe_environment(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
    for shape, clusters in ((each, clusters) for each in SHAPES for clusters in each.clusters):
        arguments = make_arguments(shape.heads, shape.tokens, shape.dim, clusters)
        expected = None
        for tile in TILES:
            with patch.object(block_masses_triton, "_tile", lambda *_, tile=tile: dict(tile)):
                masses = block_masses_triton.block_masses_triton(*arguments)
                ms = do_bench(partial(block_masses_triton.block_masses_triton, *arguments))
            expected = masses if expected is None else expected
            difference = float((masses - expected).abs().max())
            print(
                f"{tuple(shape.size[1:])} {clusters} {tuple(tile.values())} {ms:.3f} ms, off {difference:.1e}",
                flush=True,
            )
            rows.append(
                {"q": shape.size, "clusters": clusters, "tile": tile, "ms": ms, "largest_difference": difference}
            )
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def make_arguments(
    heads: int, tokens: int, dim: int, clusters: tuple[int, int], device: str = "cuda"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """Return what the op takes."""
    q = torch.randn(1, heads, tokens, dim, device=device, dtype=torch.bfloat16)
    means = torch.randn(1, heads, clusters[1], dim, device=device)
    (order, q_sizes), (_, k_sizes) = (
        sort_labels_reference(torch.randint(count, (1, heads, tokens), device=device, dtype=torch.int32), count)
        for count in clusters
    )
    return q, order, means, q_sizes, k_sizes, dim**-0.5


if __name__ == "__main__":
    main()
