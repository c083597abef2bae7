"""Time block-sparse attention against dense attention on the CPU, over the density.

Run from anywhere: ``python -P benchmarks/kernels/bench_cpu_attention.py``. Cluster sizes are uneven, as
k-means makes them. The density printed is the one reached: kept query-key pairs over all pairs.
"""

import argparse
import platform
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from plan_costs import selected_pairs
from random_blocks import random_blocks
from timing import medians_in_turns_ms

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.work_list import kept_runs_reference


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--q-clusters", type=int, default=16)
    parser.add_argument("--k-clusters", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    shape = (1, args.heads, args.tokens, args.dim)
    q, k, v = (torch.randn(shape, generator=generator).to(getattr(torch, args.dtype)) for _ in range(3))
    q_sizes = uneven_sizes(args.heads, args.tokens, args.q_clusters, generator)
    k_sizes = uneven_sizes(args.heads, args.tokens, args.k_clusters, generator)
    scale = args.dim**-0.5

    print(
        f"torch {torch.__version__}, {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"{platform.machine()}; B=1 H={args.heads} N={args.tokens} D={args.dim} {args.dtype}, "
        f"C_q={args.q_clusters} C_k={args.k_clusters}; medians of {args.repeats}"
    )
    print(f"{'density':>8} {'sparse_ms':>10} {'dense_ms':>9} {'speedup':>8} {'share_of_ideal':>15}")
    for target in args.densities:
        keep = random_blocks(generator, target, k_sizes, args.q_clusters)
        density = selected_pairs(q_sizes, k_sizes, keep) / (args.heads * args.tokens**2)
        kept = kept_runs_reference(keep, k_sizes)
        sparse_ms, dense_ms = medians_in_turns_ms(
            lambda kept=kept: torch.ops.svg2.block_sparse_attention(
                q, k, v, q_sizes, kept.runs, kept.counts, None, None, None, None, scale
            ),
            lambda: F.scaled_dot_product_attention(q, k, v, scale=scale),
            repeats=args.repeats,
        )
        speedup = dense_ms / sparse_ms
        print(f"{density:8.3f} {sparse_ms:10.1f} {dense_ms:9.1f} {speedup:8.2f} {speedup * density:15.2f}")


def uneven_sizes(heads: int, tokens: int, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Return int32 [1, H, C] cluster sizes between about half and one and a half times the mean."""
    edges = torch.rand((heads, clusters), generator=generator).add(0.5).cumsum(-1)
    edges = (edges / edges[:, -1:] * tokens).round().int()
    return torch.diff(edges, prepend=torch.zeros_like(edges[:, :1])).unsqueeze(0)


if __name__ == "__main__":
    main()
