"""What the work lists of block-sparse attention cost: padding, balance, bytes and memory, computed on the CPU.

    python -P benchmarks/kernels/planning_simulator.py --write docs/kernels.md

For the large models, cluster sizes are lognormal with a standard deviation of 0.8 of the mean; every query cluster
keeps random key clusters up to the density: neighbours that are kept together would make longer runs.
Heads are sampled; for the balance the sampled heads repeat until there are as many as in the model. For the trained
tiny Wan, queries and keys of all layers and heads are taken from the middle of denoising a real clip, clustered and
selected as the ops do; its rows are one layer's launch in size, all layers in the means, the worst layer in the
balance. Once more, all its layers and heads are the heads of one layer of the first large model, every cluster as much
larger as the sequence is longer: real proportions and real neighbours, at a real size. ``--skip-trained`` leaves them
out; ``--frames-file`` is that of ``benchmarks/method/learned_attention.py``.

Processors take the next tile of queries when they are free, in the order in which the kernel is launched, and a tile
takes as long as it has tiles of keys. L2: K and V of the kept keys, once a tile of queries. HBM: K and V of the keys
that any of a wave of tiles of a head keeps, once a wave; queries and results once; nothing is reused between waves.
"""

import argparse
import heapq
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from marked_table import write_between
from plan_costs import key_tiles, query_tiles
from random_blocks import lognormal_sizes, random_blocks
from shapes import HUNYUAN_720P, WAN_14B_720P, Shape

from svg2_compile.kernels.work_list import COUNTS, kept_runs_reference, max_runs, max_tiles

MODELS = (WAN_14B_720P, HUNYUAN_720P)
CLUSTERS = ((100, 500), (300, 1000))
ELEMENT_BYTES = 2
MAX_K_PADDING, MAX_IMBALANCE = 1.10, 1.05
COLUMNS = ("model", "clusters", "density", f"K padding, at most {MAX_K_PADDING:.2f}", "whole tiles", "Q padding")
COLUMNS += ("runs", f"imbalance, at most {MAX_IMBALANCE:.2f}", "L2, GB", "HBM, GB", "lists, MiB", "list use", "fullest")


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plan is for."""

    block_m: int
    block_n: int
    piece: int
    processors: int


@dataclass(frozen=True, slots=True)
class Selection:
    """The selections of some heads of a model; each launch has ``heads`` of them."""

    name: str
    heads: int
    dim: int
    q_sizes: Tensor
    """[L, H, C_q], layers as batch."""
    k_sizes: Tensor
    """[L, H, C_k]."""
    keep: Tensor
    """[L, H, C_q, C_k]."""


def main() -> None:
    """Print one table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.15, 0.25, 0.4])
    parser.add_argument("--block-m", type=int, default=128)
    parser.add_argument("--block-n", type=int, default=128)
    parser.add_argument("--piece", type=int, default=16)
    parser.add_argument("--processors", type=int, default=132)
    parser.add_argument("--sampled-heads", type=int, default=1)
    parser.add_argument("--skip-trained", action="store_true")
    parser.add_argument("--frames-file", type=Path)
    parser.add_argument("--write", type=Path, help="a Markdown file with the markers of the table")
    args = parser.parse_args()
    machine = Machine(args.block_m, args.block_n, args.piece, args.processors)
    lines = [
        f"Tiles {args.block_m} x {args.block_n}, pieces of {args.piece} keys, {args.processors} processors, "
        f"{args.sampled_heads} heads sampled of the large models, torch {torch.__version__}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + " --- |" * len(COLUMNS),
    ]
    print("\n".join(lines))
    selections = lognormal_selections(args.densities, args.sampled_heads)
    if not args.skip_trained:
        from tiny_wan_selections import captured_layers, select

        layers = captured_layers(args.frames_file)
        selections += [
            Selection(f"tiny Wan, trained{how}", layers.heads, layers.dim, *select(layers, clusters))
            for how, clusters in (("", (64, 256)), (", auto", "auto"))
        ]
        selections.append(as_long_as(MODELS[0], selections[-2]))
    for selection in selections:
        lines.append(row(machine, selection))
        print(lines[-1], flush=True)
    if args.write:
        write_between(args.write, "simulator", "\n".join(lines))


def lognormal_selections(densities: list[float], sampled_heads: int) -> list[Selection]:
    """Return random selections for the large models."""
    selections = []
    for model in MODELS:
        for q_clusters, k_clusters in CLUSTERS:
            for density in densities:
                generator = torch.Generator().manual_seed(0)
                q_sizes, k_sizes = (
                    lognormal_sizes(generator, 1, sampled_heads, clusters, model.tokens)
                    for clusters in (q_clusters, k_clusters)
                )
                keep = random_blocks(generator, density, k_sizes, q_clusters)
                selections.append(Selection(model.name, model.heads, model.dim, q_sizes, k_sizes, keep))
    return selections


def as_long_as(model: Shape, real: Selection) -> Selection:
    """Return the clusters and selections of all layers and heads as heads of one layer of a large model."""
    sizes = []
    for small in (real.q_sizes, real.k_sizes):
        edges = small.double().cumsum(-1)
        edges = (edges / edges[..., -1:] * model.tokens).round().int()
        sizes.append(torch.diff(edges, prepend=torch.zeros_like(edges[..., :1])).flatten(0, 1).unsqueeze(0))
    keep = real.keep.flatten(0, 1).unsqueeze(0)
    return Selection(f"{real.name}, stretched to {model.name}", model.heads, model.dim, *sizes, keep)


def row(machine: Machine, selection: Selection) -> str:
    """Return one line of the table."""
    q_sizes, k_sizes, keep = selection.q_sizes, selection.k_sizes, selection.keep
    layers, sampled, q_clusters, k_clusters = keep.shape
    tokens = int(q_sizes[0, 0].sum())
    kept_runs = kept_runs_reference(keep, k_sizes)
    kept = (keep * k_sizes.unsqueeze(2)).sum(-1)  # [L, H, C_q]
    k_tiles = key_tiles(kept_runs.counts, machine.block_n, machine.piece)
    q_tiles = query_tiles(q_sizes, machine.block_m)
    k_padding = float((q_tiles * k_tiles).sum() * machine.block_n / (q_tiles * kept).sum())
    whole_tiles = key_tiles_run_by_run(kept_runs.runs, machine.block_n)
    plain_padding = float((q_tiles * whole_tiles).sum() * machine.block_n / (q_tiles * kept).sum())
    q_padding = q_tiles.sum() * machine.block_m / q_sizes.sum()
    balance = max(layer_imbalance(machine, selection.heads, q_tiles[i], k_tiles[i]) for i in range(layers))
    scale = selection.heads / (layers * sampled)  # to one layer of the model
    l2 = float((q_tiles * kept).sum()) * 2 * selection.dim * ELEMENT_BYTES * scale
    waves = [
        wave_keys(machine, q_tiles[i, h], k_sizes[i, h], keep[i, h]) for i in range(layers) for h in range(sampled)
    ]
    hbm = (sum(waves) + layers * sampled * tokens) * 2 * selection.dim * ELEMENT_BYTES * scale
    slots = max_runs(k_clusters)
    tiles_bytes, row_bytes = max_tiles(tokens, q_clusters, machine.block_m) * 12, slots * 8 + len(COUNTS) * 4
    lists = selection.heads * (tiles_bytes + q_clusters * row_bytes)
    runs = kept_runs.counts[..., 0].double()
    density = (q_sizes.double() * kept).sum() / (layers * sampled * tokens**2)
    cells = (
        selection.name,
        f"{q_clusters} / {k_clusters}",
        f"{density:.3f}",
        judged(k_padding, MAX_K_PADDING),
        f"{plain_padding:.3f}",
        f"{q_padding:.3f}",
        f"{runs.mean():.0f}",
        judged(balance, MAX_IMBALANCE),
        f"{l2 / 1e9:.3g}",
        f"{hbm / 1e9:.3g}",
        f"{lists / 2**20:.0f}",
        f"{100 * runs.mean() / slots:.0f} %",
        f"{100 * runs.max() / slots:.0f} %",
    )
    return f"| {' | '.join(cells)} |"


def key_tiles_run_by_run(runs: Tensor, block_n: int) -> Tensor:
    """Return the tiles of keys, [L, H, C_q], if every run were cut into its own."""
    return ((torch.diff(runs, dim=-1).squeeze(-1) + block_n - 1) // block_n).sum(-1)


def wave_keys(machine: Machine, q_tiles: Tensor, k_sizes: Tensor, keep: Tensor) -> int:
    """Return the keys of one head that come from outside the cache: once for every wave of tiles that wants them."""
    cluster_of_tile = torch.arange(len(q_tiles)).repeat_interleave(q_tiles)
    return sum(int(k_sizes[keep[wave].any(0)].sum()) for wave in cluster_of_tile.split(machine.processors))


def layer_imbalance(machine: Machine, heads: int, q_tiles: Tensor, k_tiles: Tensor) -> float:
    """Return the imbalance of one launch, [H, C_q] of the sampled heads each."""
    jobs = [
        cost
        for h in range(heads)
        for count, cost in zip(q_tiles[h % len(q_tiles)].tolist(), k_tiles[h % len(q_tiles)].tolist())
        for cost in [cost] * count
    ]
    return imbalance(jobs, machine.processors)


def imbalance(jobs: list[int], processors: int) -> float:
    """Return the time of the busiest processor over the mean, when each takes the next job as soon as it is free."""
    busy_until = [0] * processors
    for cost in jobs:
        heapq.heapreplace(busy_until, busy_until[0] + cost)
    return max(busy_until) / (sum(jobs) / processors)


def judged(value: float, limit: float) -> str:
    """Return the figure and whether it keeps to its limit."""
    return f"{value:.3f} {'pass' if value <= limit else 'miss'}"


if __name__ == "__main__":
    main()
