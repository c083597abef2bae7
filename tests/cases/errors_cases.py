"""Arguments of ``svg2::block_errors``, at random or as told, and the errors they have in fp64."""

import dataclasses
import math

import torch
from hypothesis import strategies as st
from masses_by_keys_cases import Case as Masses
from masses_by_keys_cases import cases as masses_cases
from masses_by_keys_cases import random_case as random_masses

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.block_errors import LEAST_ERROR
from svg2_compile.kernels.cluster_means import cluster_means_reference


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of the op."""

    q_centroids: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_means: torch.Tensor
    v_means: torch.Tensor
    k_sizes: torch.Tensor
    scale: float = 0.3

    def arguments(self):
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    def errors(self, **changes):
        return torch.ops.svg2.block_errors(*dataclasses.replace(self, **changes).arguments())

    def assert_right(self, got, steps=1):
        """Assert that errors are exact but for rounding, block by block in fp64; hidden keys are not looked at."""
        repeats = self.q_centroids.shape[1] // self.k_sizes.shape[1]
        assert torch.equal(
            got == -math.inf, (self.k_sizes == 0).repeat_interleave(repeats, 1)[:, :, None].expand_as(got)
        )
        norms = (x.float().norm(dim=-1).nan_to_num(0).max() for x in (self.q_centroids, self.k))
        # a few steps of either score, which the weights double, and one for each term of a sum
        eps = torch.finfo(torch.float32).eps * (self.k.shape[2] + 8 + 12 * self.scale * float(math.prod(norms)))
        for b, h in torch.cartesian_prod(*map(torch.arange, got.shape[:2])).tolist():
            g, first = h // repeats, 0
            means = self.q_centroids[b, h].to(self.k.dtype).double()
            for j, size in enumerate(self.k_sizes[b, g].tolist()):
                keys, values = (x[b, g, first : first + size].double() for x in (self.k, self.v))
                first += size
                if size == 0:
                    continue
                scores, of_mean = means @ keys.T * self.scale, means @ self.k_means[b, g, j].double() * self.scale
                highest = torch.maximum(scores.amax(-1), of_mean)
                weights, mean_weight = (scores - highest[:, None]).exp(), (of_mean - highest).exp()
                value = self.v_means[b, g, j].double()
                parts = weights[..., None] * values, mean_weight[:, None, None] * value
                error = (parts[0] - parts[1]).square().sum((1, 2))
                sums = parts[0].square().sum((1, 2)) + size * parts[1].square().sum((1, 2))
                found = (got[b, h, :, j].double() - 2 * highest).exp()
                # the logarithm itself is rounded
                logs = torch.finfo(torch.float32).eps * (1 + got[b, h, :, j].double().abs())
                allowed = steps * (2 * eps * sums + logs * (error + sums * eps)) + 2 * LEAST_ERROR
                assert ((found - error).abs() <= allowed).all(), (b, h, j, found, error, allowed)

    def with_hidden(self, value):
        """Return the case with other hidden keys and values."""
        is_hidden = torch.arange(self.k.shape[2]).unsqueeze(-1) >= self.k_sizes.sum(-1, keepdim=True).unsqueeze(-1)
        return dataclasses.replace(self, **{name: getattr(self, name).masked_fill(is_hidden, value) for name in "kv"})


def with_values(masses: Masses, seed=1, alike=0.0):
    """Return a case whose values are ``alike`` beside their noise."""
    v = torch.randn(masses.k.shape, generator=torch.Generator().manual_seed(seed)) + alike
    v = v.to(masses.k.dtype)
    means = (cluster_means_reference(x, masses.k_sizes) for x in (masses.k, v))
    return Case(masses.q_centroids, masses.k, v, *means, masses.k_sizes, masses.scale)


def random_case(alike=0.0, **shape):
    return with_values(random_masses(**shape), alike=alike)


@st.composite
def cases(draw):
    return with_values(draw(masses_cases()), draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, 30.0])))
