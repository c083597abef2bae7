"""Arguments of ``svg2::block_masses``, at random or as told, and the masses they have in fp64."""

import dataclasses
import math

import torch
from hypothesis import strategies as st

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.sort_labels import sort_labels_reference


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of the op."""

    q: torch.Tensor
    q_order: torch.Tensor
    k_centroids: torch.Tensor
    q_sizes: torch.Tensor
    k_sizes: torch.Tensor
    scale: float = 0.3

    def arguments(self):
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    def masses(self, **changes):
        return torch.ops.svg2.block_masses(*dataclasses.replace(self, **changes).arguments())

    def exact(self):
        """Return the masses in fp64, query by query."""
        repeats = self.q.shape[1] // self.k_sizes.shape[1]
        means = self.k_centroids.to(self.q.dtype).double().repeat_interleave(repeats, 1)
        sizes = self.k_sizes.double().repeat_interleave(repeats, 1).unsqueeze(2)
        scores = (self.q.double() @ means.mT * self.scale).masked_fill(sizes == 0, -math.inf)
        weights = sizes * (scores - scores.amax(-1, keepdim=True)).exp()
        probability = weights / weights.sum(-1, keepdim=True)
        masses = (sizes / sizes.sum(-1, keepdim=True)).expand(*self.q_sizes.shape, -1).clone()
        for b, h, i in torch.cartesian_prod(*map(torch.arange, self.q_sizes.shape)).tolist():
            start, size = int(self.q_sizes[b, h, :i].sum()), int(self.q_sizes[b, h, i])
            if size:
                rows = [probability[b, h, int(t)] for t in self.q_order[b, h, start : start + size]]
                masses[b, h, i] = torch.stack(rows).mean(0)
        return masses

    def tolerance(self):
        """Return what may be off: a few steps of either score of a ratio, and one for each term of a sum."""
        largest = self.q.float().norm(dim=-1).max() * self.k_centroids.norm(dim=-1).max() * self.scale
        terms = self.k_sizes.shape[2] + self.q.shape[2]
        return torch.finfo(torch.float32).eps * (terms + 4 * float(largest))


def random_case(
    seed=0,
    batch=2,
    groups=2,
    repeats=2,
    tokens=63,
    dim=8,
    clusters=(5, 7),
    dtype=torch.float32,
    sharpness=1.0,
    used=1.0,
):
    """Return one whose ``used`` first share of the clusters have tokens."""
    generator = torch.Generator().manual_seed(seed)
    heads = groups * repeats
    labels = [
        torch.randint(max(1, int(used * count)), (batch, each, tokens), generator=generator, dtype=torch.int32)
        for each, count in zip((heads, groups), clusters)
    ]
    (q_order, q_sizes), (_, k_sizes) = (sort_labels_reference(each, count) for each, count in zip(labels, clusters))
    return Case(
        q=(sharpness * torch.randn(batch, heads, tokens, dim, generator=generator)).to(dtype),
        q_order=q_order,
        k_centroids=torch.randn(batch, groups, clusters[1], dim, generator=generator),
        q_sizes=q_sizes,
        k_sizes=k_sizes,
    )


@st.composite
def cases(draw):
    return random_case(
        seed=draw(st.integers(0, 2**31)),
        batch=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 2)),
        repeats=draw(st.integers(1, 2)),
        tokens=draw(st.sampled_from([1, 2, 65, 200, 700])),
        dim=draw(st.sampled_from([4, 64])),
        clusters=(draw(st.sampled_from([1, 3, 16])), draw(st.sampled_from([1, 2, 15, 65]))),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        sharpness=draw(st.sampled_from([0.0, 1.0, 8.0, 60.0])),
        used=draw(st.sampled_from([0.5, 1.0])),
    )


def one_of_many(which, queries=300):
    """Return a case in which query ``which`` of one cluster wants a key cluster that no other query wants."""
    q = torch.zeros(1, 1, queries, 2)
    q[..., 0] = 1.0
    q[:, :, which] = torch.tensor([0.0, 1.0])
    order = torch.arange(queries, dtype=torch.int32).flip(0).view(1, 1, -1)
    k = torch.tensor([[20.0, 0.0], [0.0, 20.0]]).view(1, 1, 2, 2)
    sizes = torch.tensor([[[queries]]], dtype=torch.int32), torch.tensor([[[3, 5]]], dtype=torch.int32)
    return Case(q, order, k, *sizes, scale=1.0)
