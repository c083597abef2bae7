"""Arguments of ``svg2::log_dropped_weights``, at random or as told, and the weights that they have in fp64."""

import dataclasses
import math

import torch
from hypothesis import strategies as st
from masses_by_keys_cases import Case as Masses
from masses_by_keys_cases import cases as masses_cases
from masses_by_keys_cases import random_case as random_masses

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.cluster_means import cluster_means_reference


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of the op."""

    log_sizes: torch.Tensor
    q_centroids: torch.Tensor
    k: torch.Tensor
    k_means: torch.Tensor
    k_sizes: torch.Tensor
    scale: float = 0.3

    def arguments(self):
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    def weights(self, **changes):
        return torch.ops.svg2.log_dropped_weights(*dataclasses.replace(self, **changes).arguments())

    def exact(self):
        """Return the weights in fp64, block by block; hidden keys are not even looked at."""
        weights = torch.full(self.log_sizes.shape, -math.inf, dtype=torch.float64)
        repeats = self.q_centroids.shape[1] // self.k_sizes.shape[1]
        for b, h in torch.cartesian_prod(*map(torch.arange, weights.shape[:2])).tolist():
            g, first = h // repeats, 0
            means = self.q_centroids[b, h].to(self.k.dtype).double()
            for j, size in enumerate(self.k_sizes[b, g].tolist()):
                scores = means @ self.k[b, g, first : first + size].double().T * self.scale
                of_mean = means @ self.k_means[b, g, j].double() * self.scale
                weights[b, h, :, j] = scores.logsumexp(-1) - of_mean
                first += size
        return weights.masked_fill(self.log_sizes == -math.inf, -math.inf)

    def assert_right(self, got):
        """Assert that weights are exact but for rounding: a few steps of the scores, and one for each term of a sum."""
        exact = self.exact()
        assert torch.equal(got.isinf(), exact.isinf()) and not got.isnan().any()
        norms = (x.float().norm(dim=-1).nan_to_num(0).max() for x in (self.q_centroids, self.k))
        eps = torch.finfo(torch.float32).eps
        allowed = eps * (self.k.shape[2] + 8 + (8 + self.k.shape[3] ** 0.5) * self.scale * float(math.prod(norms)))
        assert ((got.double() - exact).nan_to_num(0).abs() <= allowed).all()

    def with_hidden(self, value):
        """Return the case with other hidden keys."""
        is_hidden = torch.arange(self.k.shape[2]).unsqueeze(-1) >= self.k_sizes.sum(-1, keepdim=True).unsqueeze(-1)
        return dataclasses.replace(self, k=self.k.masked_fill(is_hidden, value))


def with_weights(masses: Masses, seed=1, kept=0.4):
    """Return a case that keeps a share of the blocks."""
    shape = (*masses.q_centroids.shape[:3], masses.k_sizes.shape[2])
    is_kept = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < kept
    log_sizes = torch.zeros(shape).masked_fill_(is_kept, -math.inf)
    means = cluster_means_reference(masses.k, masses.k_sizes)
    return Case(log_sizes, masses.q_centroids, masses.k, means, masses.k_sizes, masses.scale)


def random_case(kept=0.4, **shape):
    return with_weights(random_masses(**shape), kept=kept)


@st.composite
def cases(draw):
    return with_weights(draw(masses_cases()), draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, 0.4, 1.0])))
