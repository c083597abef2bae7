"""Does ordering the clusters make long runs of kept key clusters? On queries and keys of the trained tiny Wan.

    python -P benchmarks/method/cluster_order.py

One generation; the clustering starts at the third of six denoising steps and goes on, warm, to the last. Prints, for
both steps and four orders of the clusters, the mean run of kept key clusters and what it costs: *K padding* is keys
multiplied over keys kept, with pieces of 16 keys packed into tiles of 64; *whole tiles* is the same if every run were
cut into tiles of 64 of its own. Means over layers and heads.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from capture import AttentionCapture, queries_and_keys
from plan_costs import key_tiles, query_tiles

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile import tiny_wan
from svg2_compile.environment import describe_environment
from svg2_compile.kernels.kmeans import initial_tokens, nearest_neighbour_chain
from svg2_compile.kernels.select_blocks import block_logits, kept_clusters
from svg2_compile.kernels.work_list import kept_runs_reference
from svg2_compile.video.measure import Video

STEPS, FIRST_STEP = 6, 2
ITERS_INIT, ITERS_STEP = 10, 2
BLOCK_M, BLOCK_N, PIECE = 128, 64, 16
ORDERS = ("chain", "chain from the largest norm", "stretches of the sequence", "random")


@dataclass(slots=True)
class Side:
    """Queries or keys of one layer: their clusters now."""

    centroids: Tensor
    sizes: Tensor

    @classmethod
    def first(cls, x: Tensor, clusters: int, order: str) -> Side:
        """Cluster as the first call does; with an order other than the chain, as a later call does from its start."""
        starts = initial_tokens(x.shape[1], x.shape[2], clusters, 0, x.device)
        if order == "random":
            generator = torch.Generator().manual_seed(0)
            starts = starts[:, torch.randperm(clusters, generator=generator)]
        centroids = x.gather(2, starts[None, :, :, None].expand(-1, -1, -1, x.shape[3])).float()
        side = cls(centroids, centroids.new_empty(0))
        side.cluster(x, calls=0 if order == "chain" else 1, iterations=ITERS_INIT)
        if order == "chain from the largest norm":
            side.chain_from_the_largest_norm()
        return side

    def chain_from_the_largest_norm(self) -> None:
        """Put the clusters of every head into the order of a chain with another start."""
        for centroids, sizes in zip(self.centroids.flatten(0, 1), self.sizes.flatten(0, 1)):
            order = centroids.norm(dim=-1).argsort(descending=True)
            order = order[nearest_neighbour_chain(centroids[order])]
            centroids[:], sizes[:] = centroids[order], sizes[order]

    def cluster(self, x: Tensor, calls: int, iterations: int) -> None:
        """Move the clusters to the tokens ``x``."""
        state = torch.tensor([calls], dtype=torch.int32)
        labels = torch.ops.svg2.kmeans_(x, self.centroids, state, iterations, iterations, 0)
        self.sizes = F.one_hot(labels.long(), self.centroids.shape[2]).sum(2).int()


def costs(query: Side, key: Side, tokens: int, scale: float, top_p: float) -> Tensor:
    """Return (density, run, K padding, whole tiles) per head, fp64 [H, 4]."""
    keep, _ = kept_clusters(block_logits(query.centroids, key.centroids, key.sizes, scale), top_p, 0.1)
    keep = keep & (key.sizes.unsqueeze(2) > 0)
    kept_runs = kept_runs_reference(keep, key.sizes)
    tiles_of_keys = key_tiles(kept_runs.counts, BLOCK_N, PIECE)
    q_tiles = query_tiles(query.sizes, BLOCK_M)
    kept = (keep * key.sizes.unsqueeze(2)).sum(-1)  # [1, H, C_q]
    lengths = torch.diff(kept_runs.runs, dim=-1)
    whole = ((lengths + BLOCK_N - 1) // BLOCK_N).sum((-1, -2))
    kept_by_tiles = (q_tiles * kept).sum(-1).double()
    columns = (
        (query.sizes * kept).sum(-1).double() / tokens**2,
        keep.sum((-1, -2)).double() / kept_runs.counts[..., 0].sum(-1),
        (q_tiles * tiles_of_keys).sum(-1) * BLOCK_N / kept_by_tiles,
        (q_tiles * whole).sum(-1) * BLOCK_N / kept_by_tiles,
    )
    return torch.stack(columns, -1)[0]


def captured_layers() -> tuple[int, list[list[tuple[Tensor, Tensor]]]]:
    """Return the length of the sequence, and the queries and keys of every layer of every clustered step."""
    video = Video(steps=STEPS)
    with AttentionCapture(video.tokens, queries_and_keys) as capture:
        tiny_wan.generate(
            tiny_wan.load_pipeline(),
            video.prompt,
            frames=video.frames,
            height=video.height,
            width=video.width,
            steps=STEPS,
            guidance_scale=1.0,
        )
    layers = len(capture.measured) // STEPS
    steps = [capture.measured[step * layers : (step + 1) * layers] for step in range(FIRST_STEP, STEPS)]
    return video.tokens, steps


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--q-clusters", type=int, default=64)
    parser.add_argument("--k-clusters", type=int, default=256)
    parser.add_argument("--top-p", type=float, default=0.9)
    options = parser.parse_args()
    tokens, steps = captured_layers()
    scale = steps[0][0][0].shape[-1] ** -0.5
    environment = describe_environment()
    print(
        f"{tokens} tokens, {len(steps[0])} layers, {options.q_clusters} / {options.k_clusters} clusters, "
        f"top_p {options.top_p}; {environment['device']}, torch {environment['torch']}\n"
    )
    print("| step | order | density | mean run | K padding | whole tiles |")
    print("| --- | --- | --- | --- | --- | --- |")
    for order in ORDERS:
        results: dict[int, list[Tensor]] = {FIRST_STEP: [], STEPS - 1: []}
        for layer in range(len(steps[0])):
            query, key = steps[0][layer]
            sides = Side.first(query, options.q_clusters, order), Side.first(key, options.k_clusters, order)
            for step in range(FIRST_STEP, STEPS):
                if step > FIRST_STEP:
                    for side, x in zip(sides, steps[step - FIRST_STEP][layer]):
                        side.cluster(x, calls=1, iterations=ITERS_STEP)
                if step in results:
                    results[step].append(costs(*sides, tokens, scale, options.top_p))
        for step, found in results.items():
            density, run, padding, whole = torch.cat(found).mean(0).tolist()
            print(f"| {step + 1} | {order} | {density:.3f} | {run:.2f} | {padding:.3f} | {whole:.3f} |", flush=True)


if __name__ == "__main__":
    main()
