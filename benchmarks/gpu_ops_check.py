"""The Triton ops against their references, on the GPU: run before any timing is believed.

python -P benchmarks/gpu_ops_check.py
"""

from __future__ import annotations

import itertools

import torch

from svg2_compile.kernels import ops  # noqa: F401
from svg2_compile.kernels.kmeans import kmeans_reference
from svg2_compile.kernels.permute import permute_tokens_reference, unpermute_tokens_reference
from svg2_compile.kernels.select_blocks import select_blocks_reference
from svg2_compile.kernels.sort_labels import sort_labels_reference

svg2 = torch.ops.svg2


def token_major(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Return clustered tokens stored as (batch, tokens, heads, dim)."""
    centres = torch.randn(20, dim, device="cuda")
    which = torch.randint(20, (batch, tokens, heads), device="cuda")
    return (2 * centres[which] + torch.randn(batch, tokens, heads, dim, device="cuda")).to(dtype).transpose(1, 2)


def inertia(x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> float:
    chosen = centroids.gather(2, labels.long()[..., None].expand(*labels.shape, x.shape[-1]))
    return float((x.float() - chosen).square().sum(-1).mean())


def check(batch: int, heads: int, tokens: int, dim: int, clusters: int, dtype: torch.dtype) -> str:
    x = token_major(batch, heads, tokens, dim, dtype)
    state = [
        (torch.zeros(batch, heads, clusters, dim, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda"))
        for _ in range(3)
    ]
    for _ in range(2):
        labels = svg2.kmeans_(x, *state[0], 5, 2, 0)
        again = svg2.kmeans_(x, *state[1], 5, 2, 0)
        expected = kmeans_reference(x, *state[2], 5, 2, 0)
    assert torch.equal(labels, again) and torch.equal(state[0][0], state[1][0]), "k-means differs between runs"
    ours, theirs = inertia(x, state[0][0], labels), inertia(x, state[2][0], expected)
    assert abs(ours - theirs) <= 0.02 * theirs, f"inertia {ours} against {theirs}"
    order, sizes = svg2.sort_labels(labels, clusters)
    for got, want in zip((order, sizes), sort_labels_reference(labels, clusters)):
        assert torch.equal(got, want), "sort_labels"
    assert torch.equal(svg2.permute_tokens(x, order), permute_tokens_reference(x, order)), "permute"
    permuted = svg2.permute_tokens(x, order)
    assert torch.equal(svg2.unpermute_tokens(permuted, order), unpermute_tokens_reference(permuted, order)), "unpermute"
    assert torch.equal(svg2.unpermute_tokens(permuted, order), x), "round trip"
    statistics = [torch.zeros(batch, heads, 4, device="cuda") for _ in range(2)]
    centroids = state[0][0]
    keep = svg2.select_blocks(centroids, centroids, sizes, sizes, dim**-0.5, 0.9, 0.1, statistics[0])
    want = select_blocks_reference(centroids, centroids, sizes, sizes, dim**-0.5, 0.9, 0.1, statistics[1])
    differing = float((keep != want).float().mean())
    assert differing <= 1e-3, f"select_blocks differs in {differing:.4f} of the blocks"
    assert torch.allclose(*statistics, rtol=1e-3, atol=1e-3), "statistics"
    same = float((labels == expected).float().mean())
    return f"labels equal {100 * same:.2f} %, inertia ratio {ours / theirs:.5f}, blocks differing {differing:.1e}"


def main() -> None:
    torch.manual_seed(0)
    shapes = [
        (1, 3, 1000, 64, 16),
        (2, 2, 4097, 128, 100),
        (1, 4, 8192, 64, 256),
        (1, 2, 32760, 128, 1000),
        (1, 2, 63, 80, 5),
    ]
    for shape, dtype in itertools.product(shapes, (torch.float32, torch.bfloat16, torch.float16)):
        try:
            print(shape, str(dtype).removeprefix("torch."), check(*shape, dtype), flush=True)
        except AssertionError as error:
            print(shape, dtype, "WRONG:", error, flush=True)


if __name__ == "__main__":
    main()
