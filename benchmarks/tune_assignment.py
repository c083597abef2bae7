"""The k-means assignment on an NVIDIA GPU: milliseconds of its kernel for every tile, by the profiler.

    python -P benchmarks/tune_assignment.py --out tune_assignment.json

Wan 720p: 40 heads of 75,600 tokens, head dimension 128, bf16, one iteration from given centroids.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from svg2_compile.environment import describe_environment
from svg2_compile.kernels import kmeans_triton
from svg2_compile.kernels.centroids_triton import AssignTile

HEADS, TOKENS, DIM = 40, 75_600, 128
CLUSTERS = (100, 500, 1000)
CALLS = 4
TILES = [
    AssignTile(block_n, block_c, num_warps, num_stages)
    for block_n, block_c, num_warps, num_stages in (
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (256, 64, 8, 2),
        (64, 128, 4, 2),
        (64, 128, 4, 3),
        (64, 64, 4, 3),
        (128, 64, 4, 2),
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
    rows = []
    for clusters in CLUSTERS:
        for tile in TILES:
            kernels_ms = kernel_times_ms(clusters, tile)
            padded = -(-clusters // tile.block_c) * tile.block_c
            tflops = 2 * HEADS * TOKENS * DIM * padded / kernels_ms["assign_kernel"] / 1e9
            print(f"{clusters:>5} {tile} {kernels_ms['assign_kernel']:7.3f} ms {tflops:5.0f} TFLOP/s", flush=True)
            rows.append({"clusters": clusters, "tile": str(tile), "kernels_ms": kernels_ms, "tflops": tflops})
    if args.out:
        args.out.write_text(json.dumps({"environment": describe_environment(), "rows": rows}, indent=1) + "\n")


def kernel_times_ms(clusters: int, tile: AssignTile) -> dict[str, float]:
    """Return the milliseconds of every kernel of one warm iteration."""
    x = torch.randn(1, TOKENS, HEADS, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    centroids = x[:, :, :clusters].float().contiguous()
    calls = torch.ones(1, dtype=torch.int32, device="cuda")
    kmeans_triton.assign_tile = lambda dtype, block_d: tile

    def cluster() -> None:
        kmeans_triton.kmeans_triton(x, centroids, calls, 1, 1, 0)

    for _ in range(2):
        cluster()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as measured:
        for _ in range(CALLS):
            cluster()
        torch.cuda.synchronize()
    events = [event for event in measured.key_averages() if event.device_time_total > 0]
    return {event.key: event.device_time_total / 1e3 / CALLS for event in events}


if __name__ == "__main__":
    main()
