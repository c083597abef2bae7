"""What a sparse attention costs the host, beside what it costs the GPU: the host decides in small models.

    python -P benchmarks/kernels/host_time.py --out host_time.json

Times, for every op of a sparse attention, how long the host takes to launch its kernels, and how long they take on the
GPU once launched. Where the host takes longer, the GPU waits for it, unless CUDA graphs replay the launches. Tokens are
normal, bf16; clustering starts from centroids. Times are medians. Without a GPU it says so and stops.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from shapes import TINY_WAN_64_FRAMES, WAN_1_3B_480P, WAN_14B_720P, Shape
from timing import device_median_ms, host_ms

from svg2_compile.environment import describe_environment
from svg2_compile.kernels import ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.known_state import known_as_clustered
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.passes.config import SparseConfig

SHAPES = (TINY_WAN_64_FRAMES, WAN_1_3B_480P, WAN_14B_720P)
RECALL_ROWS = 32
svg2 = torch.ops.svg2


def main() -> int:
    """Print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device; nothing was timed")
        return 0
    rows = [measure(shape, args.repeats) for shape in SHAPES]
    record = {"environment": describe_environment(), "date": time.strftime("%Y-%m-%d"), "shapes": rows}
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"on {record['environment']}, {record['date']}")
    return 0


def measure(shape: Shape, repeats: int, device: str = "cuda") -> dict[str, object]:
    """Time the ops of one attention, at the first of its numbers of clusters, and print what came out."""
    _, heads, tokens, dim = shape.size
    clusters = shape.clusters[0]
    q, k, v = (torch.randn((1, tokens, heads, dim), device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv")
    config = SparseConfig()
    centroids = [torch.zeros((1, heads, count, dim), device=device) for count in clusters]
    calls = [torch.zeros(1, dtype=torch.int32, device=device) for _ in clusters]
    iterations = config.kmeans_iters_init, config.kmeans_iters_step, config.seed

    def cluster() -> tuple[Tensor, ...]:
        # as a region that has clustered before
        with known_as_clustered(frozenset(each.data_ptr() for each in calls if is_warm)):
            return svg2.cluster_tokens_(q, k, v, *centroids, *calls, *iterations)

    is_warm = False
    q_order, q_sizes, k_sizes, keys, values = cluster()
    is_warm = True
    measured = torch.zeros((1, heads, clusters[0], len(STATISTICS)), device=device)
    scale = dim**-0.5
    select = partial(svg2.select_blocks, *centroids, q_sizes, k_sizes, scale, 0.5, config.min_keep_ratio, measured)
    runs, counts = select()
    estimate = partial(svg2.block_masses, q, q_order, centroids[1], q_sizes, k_sizes, scale)
    attend = partial(
        svg2.block_sparse_attention, q, keys, values, q_sizes, runs, counts, None, None, None, q_order, scale
    )
    selection = (q_order, q_sizes, k_sizes, runs, counts, None, None, calls[1])
    look = partial(svg2.measure_recall, q, keys, *selection, scale, RECALL_ROWS, 1, 0)
    print(f"{shape.name} (1, {heads}, {tokens}, {dim}), {clusters[0]} / {clusters[1]} clusters")
    result: dict[str, object] = {"shape": shape.name, "size": shape.size, "clusters": clusters}
    of_the_layer = ("cluster_tokens_", cluster), ("select_blocks", select), ("block_sparse_attention", attend)
    for op, call in (*of_the_layer, ("block_masses", estimate), ("measure_recall", look)):
        launches = count_launches(call)
        host, gpu = host_ms(call, repeats), device_median_ms(call, repeats)
        result[op] = {"launches": launches, "host_ms": host, "device_ms": gpu}
        print(f"  {op:<24} {launches:3d} launches, host {host:6.3f} ms, GPU {gpu:7.3f} ms", flush=True)
    return result


def count_launches(call: Callable[[], object]) -> int:
    """Return how many kernels a call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


if __name__ == "__main__":
    sys.exit(main())
