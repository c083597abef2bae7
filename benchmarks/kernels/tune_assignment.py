"""The k-means assignment on an NVIDIA GPU: milliseconds of its kernel, in Gluon where that runs and for Triton tiles.

    python -P benchmarks/kernels/tune_assignment.py --out tune_assignment.json

Wan 720p: 40 heads of 75,600 tokens, head dimension 128, bf16, one iteration from given centroids.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from shapes import WAN_14B_720P

from svg2_compile.environment import describe_environment
from svg2_compile.kernels import clustering
from svg2_compile.kernels.assign_tile import AssignTile
from svg2_compile.kernels.kmeans_triton import kmeans_triton
from svg2_compile.kernels.why_not import why_not_gluon_assign

_, HEADS, TOKENS, DIM = WAN_14B_720P.size
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
    reason = why_not_gluon_assign(torch.device("cuda"), torch.bfloat16, dim=DIM)
    if reason is not None:
        print(f"not in Gluon: {reason}")
    gluon = () if reason else (None,)
    rows = []
    for clusters in CLUSTERS:
        for tile in (*gluon, *TILES):
            kernels_ms = kernel_times_ms(clusters, tile)
            assign_ms = kernels_ms["assign_gluon_kernel" if tile is None else "assign_triton_kernel"]
            tflops = 2 * HEADS * TOKENS * DIM * clusters / assign_ms / 1e9
            name = "Gluon" if tile is None else str(tile)
            print(f"{clusters:>5} {name} {assign_ms:7.3f} ms {tflops:5.0f} TFLOP/s", flush=True)
            rows.append({"clusters": clusters, "tile": name, "kernels_ms": kernels_ms, "tflops": tflops})
    if args.out:
        args.out.write_text(json.dumps({"environment": describe_environment(), "rows": rows}, indent=1) + "\n")


def kernel_times_ms(clusters: int, tile: AssignTile | None) -> dict[str, float]:
    """Return the milliseconds of every kernel of one warm iteration; with no tile, in Gluon."""
    x = torch.randn(1, TOKENS, HEADS, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    centroids = x[:, :, :clusters].float().contiguous()
    calls = torch.ones(1, dtype=torch.int32, device="cuda")
    cluster = partial(kmeans_triton, x, centroids, calls, 1, 1, 0)
    chosen = (
        {}
        if tile is None
        else {"assign_tile": lambda *_: tile, "why_not_gluon_assign": lambda *_, **__: "not asked for"}
    )
    with patch.multiple(clustering, **chosen) if chosen else nullcontext():
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
