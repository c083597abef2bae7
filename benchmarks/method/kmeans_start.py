"""Where should the first clustering start? Inertia of three starts on queries and keys of the trained tiny Wan.

    python -P benchmarks/method/kmeans_start.py

Prints, for each start and number of Lloyd iterations, the inertia over that of k-means++ with the same iterations: the
mean over layers, heads, queries and keys; queries have 64 clusters, keys 256; tokens of the second of two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from svg2_compile import tiny_wan
from svg2_compile.environment import describe_environment
from svg2_compile.kernels import kmeans
from svg2_compile.video.measure import Video

ITERATIONS = (2, 5, 10, 50)
CLUSTERS = {"queries": 64, "keys": 256}


class Capture(TorchFunctionMode):
    """Keeps queries and keys of every self-attention of the given length, of the last forward."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.calls: list[dict[str, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(zip(("query", "key"), args)) | (kwargs or {})
        if func is F.scaled_dot_product_attention and given["query"].shape[2] == given["key"].shape[2] == self.tokens:
            self.calls.append({"queries": given["query"][0].contiguous(), "keys": given["key"][0].contiguous()})
        return func(*args, **(kwargs or {}))


def stratified(tokens: Tensor, clusters: int, head: int, seed: int) -> Tensor:
    return tokens[kmeans.initial_tokens(head + 1, len(tokens), clusters, seed, tokens.device)[head]]


def uniform(tokens: Tensor, clusters: int, head: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + head)
    return tokens[torch.randint(len(tokens), (clusters,), generator=generator)]


def plus_plus(tokens: Tensor, clusters: int, head: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + head)
    chosen = [int(torch.randint(len(tokens), (1,), generator=generator))]
    nearest = (tokens - tokens[chosen[0]]).square().sum(-1)
    for _ in range(clusters - 1):
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
        nearest = torch.minimum(nearest, (tokens - tokens[chosen[-1]]).square().sum(-1))
    return tokens[chosen]


STARTS = {"k-means++": plus_plus, "stratified": stratified, "uniform": uniform}


def inertias(tokens: Tensor, centroids: Tensor) -> list[float]:
    """Return the mean squared distance to the nearest centroid after each of ``ITERATIONS``."""
    labels, found = torch.empty(len(tokens), dtype=torch.int32), []
    for iteration in range(1, max(ITERATIONS) + 1):
        centroids = kmeans._lloyd_iteration_cpu(tokens, centroids, labels)
        if iteration in ITERATIONS:
            found.append(float((tokens - centroids[labels.long()]).square().sum(-1).mean()))
    return found


def main() -> None:
    video = Video(steps=2)
    pipeline = tiny_wan.load_pipeline()
    capture = Capture(video.tokens)
    with capture:
        tiny_wan.generate(
            pipeline,
            video.prompt,
            frames=video.frames,
            height=video.height,
            width=video.width,
            steps=2,
            guidance_scale=1.0,
        )
    layers = capture.calls[len(capture.calls) // 2 :]
    totals: dict[str, list[Tensor]] = {name: [] for name in STARTS}
    for layer in layers:
        for side, clusters in CLUSTERS.items():
            for head, tokens in enumerate(layer[side]):
                results = {
                    name: torch.tensor(inertias(tokens, start(tokens, clusters, head, 0)))
                    for name, start in STARTS.items()
                }
                for name, result in results.items():
                    totals[name].append(result / results["k-means++"])
    environment = describe_environment()
    print(f"{video.tokens} tokens, {len(layers)} layers; {environment['device']}, torch {environment['torch']}")
    print("| start |", " | ".join(f"{each} iterations" for each in ITERATIONS), "| worst head, 10 iterations |")
    print("|", " --- |" * (len(ITERATIONS) + 2))
    for name, ratios in totals.items():
        stacked = torch.stack(ratios)
        means = " | ".join(f"{each:.3f}" for each in stacked.mean(0).tolist())
        print(f"| {name} | {means} | {stacked[:, ITERATIONS.index(10)].max():.3f} |")


if __name__ == "__main__":
    main()
