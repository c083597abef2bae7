"""What a sparse attention costs the host, beside what it costs the GPU: the host decides in small models.

    python -P benchmarks/kernels/host_time.py --out host_time.json

Times, for every op of a sparse attention, how long the host takes to launch its kernels, and how long they take on the
GPU once launched. Where the host takes longer, the GPU waits for it, unless CUDA graphs replay the launches. Tokens are
normal, bf16; clustering starts from centroids. Times are medians. Without a GPU it says so and stops.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from svg2_compile.environment import describe_environment
from svg2_compile.kernels import ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.known_state import known_as_clustered
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.passes.config import SparseConfig

# name, heads, tokens, head dimension, (query clusters, key clusters)
SHAPES = (
    ("tiny Wan, 64 frames", 4, 32_768, 64, (128, 512)),
    ("Wan 1.3B 480p", 12, 32_760, 128, (55, 218)),
    ("Wan 14B 720p", 40, 75_600, 128, (100, 500)),
)
RECALL_ROWS = 32
SLEEP_CYCLES = 40_000_000  # some 20 ms in which the host gets ahead
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
    rows = [measure(*shape, args.repeats) for shape in SHAPES]
    record = {"environment": describe_environment(), "date": time.strftime("%Y-%m-%d"), "shapes": rows}
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"on {record['environment']}, {record['date']}")
    return 0


def measure(
    name: str, heads: int, tokens: int, dim: int, clusters: tuple[int, int], repeats: int, device: str = "cuda"
) -> dict[str, object]:
    """Time the ops of one attention and print what came out."""
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
    print(f"{name} (1, {heads}, {tokens}, {dim}), {clusters[0]} / {clusters[1]} clusters")
    result: dict[str, object] = {"shape": name, "size": [1, heads, tokens, dim], "clusters": clusters}
    of_the_layer = ("cluster_tokens_", cluster), ("select_blocks", select), ("block_sparse_attention", attend)
    for op, call in (*of_the_layer, ("block_masses", estimate), ("measure_recall", look)):
        launches = count_launches(call)
        host, gpu = host_ms(call, repeats), device_median_ms(call, repeats)
        result[op] = {"launches": launches, "host_ms": host, "device_ms": gpu}
        print(f"  {op:<24} {launches:3d} launches, host {host:6.3f} ms, GPU {gpu:7.3f} ms", flush=True)
    return result


def host_ms(call: Callable[[], object], repeats: int) -> float:
    """Return the median time the host takes to launch a call on an idle GPU."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    torch.cuda.synchronize()
    return statistics.median(times)


def device_median_ms(call: Callable[[], object], rounds: int) -> float:
    """Return the median time on the GPU alone, which in a model has other work while the host launches this."""
    call()
    return statistics.median(device_ms(call) for _ in range(rounds))


def device_ms(call: Callable[[], object]) -> float:
    """Return the time of one call on the GPU, launched while the GPU was busy, as it is behind a large attention."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def count_launches(call: Callable[[], object]) -> int:
    """Return how many kernels a call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


if __name__ == "__main__":
    sys.exit(main())
