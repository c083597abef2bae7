"""Tokens around a few centres, k-means of them in Triton, and what nearest labels and mean centroids are."""

import torch
from triton_interpreter import DEVICE

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)


def random_tokens(tokens, dim, dtype, batch=1, heads=1):
    """Return tokens [B, H, N, D] around a few centres, stored as (B, N, H, D)."""
    generator = torch.Generator().manual_seed(tokens)
    centres = torch.randn(5, dim, generator=generator)
    nearby = torch.randint(0, 5, (batch, tokens, heads), generator=generator)
    x = centres[nearby] + 0.3 * torch.randn(batch, tokens, heads, dim, generator=generator)
    return x.transpose(1, 2).to(device=DEVICE, dtype=dtype)


def fresh_state(x, clusters):
    centroids = torch.full((*x.shape[:2], clusters, x.shape[3]), float("nan"), device=x.device)
    return centroids, torch.zeros(1, dtype=torch.int32, device=x.device)


def run(x, clusters, iterations, seed=0):
    """Return labels and centroids of a first call."""
    from svg2_compile.kernels.kmeans_triton import kmeans_triton

    centroids, calls = fresh_state(x, clusters)
    return kmeans_triton(x, centroids, calls, iterations, 1, seed), centroids


def continued(x, centroids, iterations):
    """Return labels and centroids of a later call, which starts from ``centroids`` and orders nothing."""
    from svg2_compile.kernels.kmeans_triton import kmeans_triton

    centroids, calls = centroids.clone(), torch.ones(1, dtype=torch.int32, device=x.device)
    return kmeans_triton(x, centroids, calls, 1, iterations, 0), centroids


def assert_labels_are_nearest(x, labels, centroids):
    """Assert that labels are nearest centroids, but for ties within rounding of the centroids and the products."""
    x, rounded, exact = x.double(), centroids.to(x.dtype).double(), centroids.double()
    scores = x @ rounded.mT - rounded.square().sum(-1).unsqueeze(-2) / 2
    lost = scores.amax(-1) - scores.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    # As in the reference's test: fp32 rounds each of the D products and sums of a score.
    size = x.norm(dim=-1) * exact.norm(dim=-1).amax(-1, keepdim=True)
    size = size + exact.square().sum(-1).amax(-1, keepdim=True)
    assert (lost <= 2 * x.shape[-1] * torch.finfo(torch.float32).eps * size).all()


def assert_centroids_are_means(x, labels, centroids):
    members = torch.nn.functional.one_hot(labels.long(), centroids.shape[2]).double()  # [B, H, N, C]
    sizes = members.sum(-2).unsqueeze(-1)
    means = members.mT @ x.double() / sizes.clamp(min=1)
    error = (centroids.double() - means).abs().masked_fill(sizes == 0, 0)
    assert (error <= x.shape[2] * torch.finfo(torch.float32).eps * x.double().abs().max()).all()


def check_labels_and_means(x, clusters):
    _, before = run(x, clusters, 1)
    for labels, centroids in (run(x, clusters, 2), continued(x, before, 1)):
        assert labels.min() >= 0
        assert labels.max() < clusters
        assert_centroids_are_means(x, labels, centroids)
    # A later call does not reorder the centroids that its labels are judged against.
    assert_labels_are_nearest(x, labels, before)
