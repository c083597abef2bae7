"""Time the measurement of recall beside the sparse attention that it judges, on a GPU or the CPU.

Run from anywhere: ``python -P benchmarks/kernels/recall_cost.py``. Tokens are random around some centres; the ops
themselves cluster and select them, at their defaults, and the density printed is the one that comes out.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from shapes import WAN_1_3B_480P
from timing import cpu_ms, device_ms, medians_in_turns_ms

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.environment import describe_environment
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.passes.config import SparseConfig

svg2 = torch.ops.svg2


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=WAN_1_3B_480P.heads)
    parser.add_argument("--tokens", type=int, default=WAN_1_3B_480P.tokens)
    parser.add_argument("--dim", type=int, default=WAN_1_3B_480P.dim)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = SparseConfig()
    clusters = config.clusters_for(args.tokens)
    generator = torch.Generator().manual_seed(0)
    shape = (1, args.heads, args.tokens, args.dim)
    centres = 2 * torch.randn(1, args.heads, 100, args.dim, generator=generator)
    which = torch.randint(100, (2, 1, args.heads, args.tokens, 1), generator=generator)
    q, k = (
        (centres.gather(2, each.expand(shape)) + torch.randn(shape, generator=generator))
        .to(getattr(torch, args.dtype))
        .to(device)
        for each in which
    )
    state = [torch.zeros(1, args.heads, count, args.dim, device=device) for count in clusters]
    state += [torch.zeros(1, dtype=torch.int32, device=device) for _ in clusters]
    scale, iterations = args.dim**-0.5, (config.kmeans_iters_init, config.kmeans_iters_step, config.seed)
    q_order, q_sizes, k_sizes, keys, values = svg2.cluster_tokens_(q, k, k, *state, *iterations)
    statistics_of_call = torch.zeros(1, args.heads, clusters[0], len(STATISTICS), device=device)
    runs, counts = svg2.select_blocks(
        *state[:2], q_sizes, k_sizes, scale, config.top_p, config.min_keep_ratio, statistics_of_call
    )
    selection = (q_order, q_sizes, k_sizes, runs, counts, None, None, state[3])
    attention_ms, *recall_ms = medians_in_turns_ms(
        lambda: svg2.block_sparse_attention(q, keys, values, q_sizes, runs, counts, None, None, None, q_order, scale),
        *(lambda rows=rows: svg2.measure_recall(q, keys, *selection, scale, rows, 1, 0) for rows in args.rows),
        repeats=args.repeats,
        time_ms=device_ms if torch.cuda.is_available() else cpu_ms,
    )
    density = float(statistics_of_call[..., 1].sum() / args.heads)
    print(", ".join(f"{name} {value}" for name, value in describe_environment().items()))
    print(
        f"B=1 H={args.heads} N={args.tokens} D={args.dim} {args.dtype}, C_q={clusters[0]} C_k={clusters[1]}, "
        f"density {density:.3f}; medians of {args.repeats}"
    )
    print("| | ms | of the sparse attention |\n| --- | --- | --- |")
    print(f"| sparse attention | {attention_ms:.2f} | |")
    for rows, each in zip(args.rows, recall_ms, strict=True):
        print(f"| recall on {rows} rows | {each:.2f} | {100 * each / attention_ms:.1f} % |")


if __name__ == "__main__":
    main()
