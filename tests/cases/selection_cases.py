"""Arguments of ``svg2::select_blocks`` at random, and what the paper says of their probabilities."""

import dataclasses

import torch
from hypothesis import strategies as st
from sizes_of_clusters import random_sizes

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.select_blocks import block_logits, kept_clusters
from svg2_compile.kernels.selection_statistics import STATISTICS


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of the op, less the statistics."""

    q_centroids: torch.Tensor
    k_centroids: torch.Tensor
    q_sizes: torch.Tensor
    k_sizes: torch.Tensor
    scale: float = 0.125
    top_p: float = 0.9
    min_keep_ratio: float = 0.0

    def arguments(self):
        statistics = torch.zeros(*self.q_sizes.shape, len(STATISTICS))
        return (*(getattr(self, f.name) for f in dataclasses.fields(self)), statistics)

    def select(self, **changes):
        """Return the runs and the counts."""
        return torch.ops.svg2.select_blocks(*dataclasses.replace(self, **changes).arguments())

    def keep(self, **changes):
        """Return which key clusters are kept, empty ones included, which the runs cannot tell."""
        case = dataclasses.replace(self, **changes)
        assert (case.q_centroids.dtype, case.k_centroids.dtype) == (torch.float32, torch.float32)
        logits = block_logits(case.q_centroids, case.k_centroids, case.k_sizes, case.scale)
        keep, _ = kept_clusters(logits, case.top_p, case.min_keep_ratio)
        return keep

    def statistics(self):
        arguments = self.arguments()
        torch.ops.svg2.select_blocks(*arguments)
        return arguments[-1]

    def for_every_query_head(self, k):
        return k.repeat_interleave(self.q_sizes.shape[1] // k.shape[1], dim=1)

    def tolerance(self):
        """Return what fp32 may err by in a mass: a step per summed cluster, and a step of either score of a ratio."""
        largest = self.q_centroids.norm(dim=-1).max() * self.k_centroids.norm(dim=-1).max() * self.scale
        return torch.finfo(torch.float32).eps * (self.k_sizes.shape[-1] + 2 * float(largest))

    def probability(self):
        """Return P of section 1.3 in fp64."""
        k_sizes = self.for_every_query_head(self.k_sizes).double().unsqueeze(2)
        scores = self.q_centroids.double() @ self.for_every_query_head(self.k_centroids).double().mT * self.scale
        return (scores + k_sizes.log()).softmax(-1)


@st.composite
def selection_cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, groups, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    q_clusters, k_clusters = draw(st.sampled_from([1, 3, 16])), draw(st.sampled_from([1, 2, 15, 65]))
    dim = draw(st.sampled_from([4, 64]))
    kinds = st.sampled_from(["uneven", "half empty", "giant"])
    sharpness = draw(st.sampled_from([0.0, 1.0, 8.0, 60.0]))
    return Case(
        q_centroids=sharpness * torch.randn(batch, groups * repeats, q_clusters, dim, generator=generator),
        k_centroids=torch.randn(batch, groups, k_clusters, dim, generator=generator),
        q_sizes=random_sizes(generator, batch, groups * repeats, q_clusters, 100, draw(kinds)),
        k_sizes=random_sizes(generator, batch, groups, k_clusters, 100, draw(kinds)),
        top_p=draw(st.sampled_from([0.01, 0.5, 0.9, 0.999])),
        min_keep_ratio=draw(st.sampled_from([0.0, 0.1, 0.5])),
    )
