"""Arguments of ``svg2::block_masses_by_keys``, at random or as told, and the masses they have in fp64."""

import dataclasses
import math

import torch
from hypothesis import strategies as st

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.sort_labels import sort_labels_reference


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of the op."""

    q_centroids: torch.Tensor
    k: torch.Tensor
    k_sizes: torch.Tensor
    scale: float = 0.3

    def arguments(self):
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    def masses(self, **changes):
        return torch.ops.svg2.block_masses_by_keys(*dataclasses.replace(self, **changes).arguments())

    def exact(self):
        """Return the masses in fp64, cluster by cluster; hidden keys are not even looked at."""
        masses = torch.zeros(*self.q_centroids.shape[:3], self.k_sizes.shape[2], dtype=torch.float64)
        repeats = self.q_centroids.shape[1] // self.k_sizes.shape[1]
        for b, h in torch.cartesian_prod(*map(torch.arange, masses.shape[:2])).tolist():
            sizes = self.k_sizes[b, h // repeats].tolist()
            means, keys = (x.to(self.k.dtype).double() for x in (self.q_centroids[b, h], self.k[b, h // repeats]))
            probability = (means @ keys[: sum(sizes)].T * self.scale).softmax(-1)
            masses[b, h] = torch.stack([part.sum(-1) for part in probability.split(sizes, -1)], -1)
        return masses

    def tolerance(self):
        """Return what may be off: a few steps of either score of a ratio, and one for each term of a sum."""
        norms = (x.float().norm(dim=-1).nan_to_num(0).max() for x in (self.q_centroids, self.k))
        return torch.finfo(torch.float32).eps * (self.k.shape[2] + 4 * self.scale * float(math.prod(norms)))

    def with_hidden(self, value):
        """Return the case with other hidden keys."""
        visible = self.k_sizes.sum(-1, keepdim=True).unsqueeze(-1)
        is_hidden = torch.arange(self.k.shape[2]).unsqueeze(-1) >= visible
        return dataclasses.replace(self, k=self.k.masked_fill(is_hidden, value))


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
    hidden=0,
):
    """Return one whose ``used`` first share of the key clusters have tokens, with hidden keys behind the last one."""
    generator = torch.Generator().manual_seed(seed)
    q_clusters, k_clusters = clusters
    labels = torch.randint(
        max(1, int(used * k_clusters)), (batch, groups, tokens), generator=generator, dtype=torch.int32
    )
    return Case(
        q_centroids=sharpness * torch.randn(batch, groups * repeats, q_clusters, dim, generator=generator),
        k=torch.randn(batch, groups, tokens + hidden, dim, generator=generator).to(dtype),
        k_sizes=sort_labels_reference(labels, k_clusters)[1],
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
        hidden=draw(st.sampled_from([0, 1, 70])),
    )
