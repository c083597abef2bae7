"""What the work lists of block-sparse attention cost: padding, balance and memory, computed on the CPU.

Run from anywhere: ``python -P benchmarks/planning_simulator.py``. Cluster sizes are lognormal with a standard deviation
of 0.8 of the mean; every query cluster keeps random key clusters up to the density, which is the worst case: real
neighbours are kept together and make longer runs. Processors take the next tile of queries when they are free, in
the order in which the kernel is launched, and a tile takes as long as it has tiles of keys. Heads are sampled for the
padding; for the balance the sampled heads repeat until there are as many as in the model.
"""

import argparse
import heapq
import math

import torch
from torch import Tensor

from svg2_compile.kernels.work_list import max_pieces, max_tiles, work_list_reference

# name, heads, tokens
MODELS = (("Wan 14B 720p", 40, 75_600), ("HunyuanVideo 720p", 24, 118_800))
CLUSTERS = ((100, 500), (300, 1000))


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.15, 0.25, 0.4])
    parser.add_argument("--block-m", type=int, default=128)
    parser.add_argument("--block-n", type=int, default=64)
    parser.add_argument("--piece", type=int, default=16)
    parser.add_argument("--processors", type=int, default=132)
    parser.add_argument("--sampled-heads", type=int, default=1)
    args = parser.parse_args()
    print(
        f"Tiles {args.block_m} x {args.block_n}, pieces of {args.piece} keys, {args.processors} processors, "
        f"{args.sampled_heads} heads sampled, torch {torch.__version__}.\n"
    )
    print("| model | clusters | density | K padding | whole tiles | Q padding | runs | imbalance | lists, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, heads, tokens in MODELS:
        for q_clusters, k_clusters in CLUSTERS:
            for density in args.densities:
                cells = row(args, heads, tokens, q_clusters, k_clusters, density)
                print(f"| {name} | {q_clusters} / {k_clusters} | {cells} |", flush=True)


def row(args: argparse.Namespace, heads: int, tokens: int, q_clusters: int, k_clusters: int, density: float) -> str:
    """Return the cells of one line."""
    generator = torch.Generator().manual_seed(0)
    q_sizes, k_sizes = (
        lognormal_sizes(generator, args.sampled_heads, clusters, tokens) for clusters in (q_clusters, k_clusters)
    )
    keep = random_blocks(generator, density, k_sizes, q_clusters)
    work = work_list_reference(q_sizes, k_sizes, keep, tokens, tokens, args.block_m, args.piece)
    kept = (keep * k_sizes.unsqueeze(2)).sum(-1)  # [1, H, C_q]
    full, total = work.counts.unbind(-1)
    per_tile = args.block_n // args.piece
    # Full tiles, then tiles of what is left over.
    key_tiles = full // per_tile + (total - full // per_tile * per_tile + per_tile - 1) // per_tile
    q_tiles = (q_sizes + args.block_m - 1) // args.block_m
    issued = (q_tiles * key_tiles).sum() * args.block_n
    k_padding = issued / (q_tiles * kept).sum()
    run_starts = keep & ~torch.nn.functional.pad(keep, (1, 0))[..., :-1]
    # The plain way, for comparison: every run is cut into tiles of its own.
    run_of_cluster = run_starts.cumsum(-1) * keep
    run_lengths = torch.zeros((*keep.shape[:3], k_clusters + 1), dtype=torch.int64)
    run_lengths.scatter_add_(-1, run_of_cluster, (keep * k_sizes.unsqueeze(2)).long())
    whole_tiles = ((run_lengths[..., 1:] + args.block_n - 1) // args.block_n).sum(-1)
    plain_padding = (q_tiles * whole_tiles).sum() * args.block_n / (q_tiles * kept).sum()
    q_padding = q_tiles.sum() * args.block_m / q_sizes.sum()
    jobs = [
        cost
        for h in range(heads)
        for count, cost in zip(q_tiles[0, h % len(q_tiles[0])].tolist(), key_tiles[0, h % len(q_tiles[0])].tolist())
        for cost in [cost] * count
    ]
    lists = heads * (
        max_tiles(tokens, q_clusters, args.block_m) * 12
        + q_clusters * (max_pieces(tokens, k_clusters, args.piece) * 4 + 8)
    )
    reached = (q_sizes.double() * kept).sum() / (args.sampled_heads * tokens**2)
    return (
        f"{reached:.3f} | {k_padding:.3f} | {plain_padding:.3f} | {q_padding:.3f} | "
        f"{run_starts.sum(-1).double().mean():.0f} | {imbalance(jobs, args.processors):.3f} | {lists / 2**20:.0f}"
    )


def imbalance(jobs: list[int], processors: int) -> float:
    """Return the time of the busiest processor over the mean, when each takes the next job as soon as it is free."""
    busy_until = [0] * processors
    for cost in jobs:
        heapq.heapreplace(busy_until, busy_until[0] + cost)
    return max(busy_until) / (sum(jobs) / processors)


def lognormal_sizes(generator: torch.Generator, heads: int, clusters: int, tokens: int) -> Tensor:
    """Return int32 [1, H, C] sizes that sum to ``tokens``, lognormal with a standard deviation of 0.8 of the mean."""
    sigma = math.sqrt(math.log(1 + 0.8**2))
    edges = (torch.randn((1, heads, clusters), generator=generator) * sigma).exp().double().cumsum(-1)
    edges = (edges / edges[..., -1:] * tokens).round().int()
    return torch.diff(edges, prepend=torch.zeros_like(edges[..., :1]))


def random_blocks(generator: torch.Generator, density: float, k_sizes: Tensor, q_clusters: int) -> Tensor:
    """Return bool [1, H, C_q, C_k]: per query cluster, random key clusters of about that share of the keys."""
    shape = (1, k_sizes.shape[1], q_clusters, k_sizes.shape[2])
    order = torch.rand(shape, generator=generator).argsort(-1)
    sizes = k_sizes.unsqueeze(2).expand(shape).gather(-1, order)
    kept = sizes.cumsum(-1) - sizes / 2 < density * sizes.sum(-1, keepdim=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, kept)


if __name__ == "__main__":
    main()
