"""`svg2::block_masses` on an NVIDIA GPU: milliseconds with all its launches, for tiles of queries and key clusters.

    python -P benchmarks/kernels/tune_masses.py --out tune_masses.json

bf16, tokens and labels at random, as many in every cluster. Every tile is also compared with the first.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from svg2_compile.environment import describe_environment
from svg2_compile.kernels import block_masses_triton
from svg2_compile.kernels.sort_labels import sort_labels_reference

# Heads, tokens, head dimension; clusters of queries and keys.
CASES = (
    ((40, 75_600, 128), (100, 500)),
    ((40, 75_600, 128), (300, 1000)),
    ((24, 118_800, 128), (100, 500)),
    ((24, 32_760, 64), (55, 218)),
)
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
    for (heads, tokens, dim), clusters in CASES:
        arguments = make_arguments(heads, tokens, dim, clusters)
        expected = None
        for tile in TILES:
            with patch.object(block_masses_triton, "_tile", lambda *_, tile=tile: dict(tile)):
                masses = block_masses_triton.block_masses_triton(*arguments)
                ms = do_bench(partial(block_masses_triton.block_masses_triton, *arguments))
            expected = masses if expected is None else expected
            difference = float((masses - expected).abs().max())
            print(
                f"{(heads, tokens, dim)} {clusters} {tuple(tile.values())} {ms:.3f} ms, off {difference:.1e}",
                flush=True,
            )
            size = [1, heads, tokens, dim]
            rows.append({"q": size, "clusters": clusters, "tile": tile, "ms": ms, "largest_difference": difference})
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
