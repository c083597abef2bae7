"""``svg2::block_masses``: the mean of queries' softmaxes over the key centroids, cluster by cluster."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels import block_masses
from svg2_compile.kernels.select_blocks import block_logits
from svg2_compile.kernels.sort_labels import sort_labels_reference

PROPERTY = settings(max_examples=60, deadline=None)


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


@PROPERTY
@given(cases())
def test_a_mass_is_the_mean_of_its_queries_softmaxes(case):
    torch.testing.assert_close(case.masses().double(), case.exact(), rtol=0, atol=case.tolerance())


@PROPERTY
@given(cases())
def test_masses_are_shares_and_empty_clusters_have_none(case):
    masses = case.masses()
    assert masses.dtype == torch.float32 and masses.is_contiguous()
    torch.testing.assert_close(masses.sum(-1), torch.ones(masses.shape[:3]), rtol=0, atol=case.tolerance())
    empty = (case.k_sizes == 0).repeat_interleave(case.q.shape[1] // case.k_sizes.shape[1], 1).unsqueeze(2)
    assert (masses.masked_fill(~empty, 0) == 0).all()


@PROPERTY
@given(cases())
def test_what_lies_in_an_empty_cluster_does_not_matter(case):
    poisoned = case.k_centroids.masked_fill((case.k_sizes == 0).unsqueeze(-1), math.nan)
    assert torch.equal(case.masses(k_centroids=poisoned), case.masses())


def test_clusters_of_one_query_have_the_masses_of_their_centroids():
    tokens = torch.arange(9, dtype=torch.int32).expand(2, 4, -1)
    case = dataclasses.replace(random_case(tokens=9), q_order=tokens.flip(-1), q_sizes=torch.ones(2, 4, 9).int())
    of_centroids = block_logits(case.q.flip(2), case.k_centroids, case.k_sizes, case.scale).softmax(-1)
    torch.testing.assert_close(case.masses(), of_centroids)


def test_queries_that_look_elsewhere_than_their_mean_are_counted():
    # Two queries, their mean is 0 and says nothing; each of them looks at one of the first two of three clusters.
    q = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).view(1, 1, 2, 2)
    k = torch.tensor([[9.0, 0.0], [-9.0, 0.0], [0.0, 9.0]]).view(1, 1, 3, 2)
    sizes = torch.tensor([[[2]]], dtype=torch.int32), torch.ones(1, 1, 3, dtype=torch.int32)
    case = Case(q, torch.tensor([[[0, 1]]], dtype=torch.int32), k, *sizes, scale=1.0)
    assert case.masses().flatten().tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-3)


def one_of_many(which, queries=300):
    """Return a case in which query ``which`` of one cluster wants a key cluster that no other query wants."""
    q = torch.zeros(1, 1, queries, 2)
    q[..., 0] = 1.0
    q[:, :, which] = torch.tensor([0.0, 1.0])
    order = torch.arange(queries, dtype=torch.int32).flip(0).view(1, 1, -1)
    k = torch.tensor([[20.0, 0.0], [0.0, 20.0]]).view(1, 1, 2, 2)
    sizes = torch.tensor([[[queries]]], dtype=torch.int32), torch.tensor([[[3, 5]]], dtype=torch.int32)
    return Case(q, order, k, *sizes, scale=1.0)


@pytest.mark.parametrize("which", [0, 1, 127, 128, 150, 298, 299])
def test_a_key_cluster_that_one_query_in_300_wants_has_its_mass(which):
    assert one_of_many(which).masses().flatten().tolist() == pytest.approx([299 / 300, 1 / 300], rel=1e-4)


class Softmaxes(TorchDispatchMode):
    """Remembers the elements of the largest one."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._softmax.default:
            self.largest = max(self.largest, args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 64, 699])
def test_queries_in_parts_have_the_same_masses_and_take_no_more_than_was_said(monkeypatch, rows):
    case = random_case(tokens=700)
    whole = case.masses()
    monkeypatch.setattr(block_masses, "MAX_SCORES", rows * (5 + 7))
    with Softmaxes() as softmaxes:
        parts = block_masses.block_masses_reference(*case.arguments())
    torch.testing.assert_close(parts, whole, rtol=0, atol=case.tolerance())
    assert softmaxes.largest == rows * 7


def test_fp64_judges():
    case = random_case()
    masses = case.masses(q=case.q.double(), k_centroids=case.k_centroids.double())
    assert masses.dtype == torch.float64
    torch.testing.assert_close(masses, case.exact(), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 4, 63)}, ValueError, r"q must have 4 axes, got shape \(2, 4, 63\)"),
        ({"q": torch.zeros(2, 4, 63, 8).int()}, TypeError, "q must be .* got torch.int32"),
        ({"q_order": torch.zeros(2, 4, 62).int()}, ValueError, r"q_order must have shape \(2, 4, 63\)"),
        ({"k_centroids": torch.zeros(2, 3, 7, 8)}, ValueError, "multiple of the key/value heads, got 4 and 3"),
        ({"k_centroids": torch.zeros(2, 2, 7, 8).half()}, TypeError, "k_centroids must be torch.float32, got torch.fl"),
        ({"q_sizes": torch.zeros(2, 4, 5)}, TypeError, "q_sizes must be torch.int32, got torch.float32"),
        ({"q_sizes": torch.zeros(2, 3, 5).int()}, ValueError, r"q_sizes must have shape \(2, 4, 5\), got \(2, 3, 5\)"),
        ({"q_sizes": torch.zeros(2, 4, 0).int()}, ValueError, "at least 1 cluster on either side, got 0 and 7"),
        ({"k_sizes": torch.zeros(2, 2, 6).int()}, ValueError, r"k_sizes must have shape \(2, 2, 7\), got \(2, 2, 6\)"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        random_case().masses(**changes)


def test_opcheck():
    torch.library.opcheck(torch.ops.svg2.block_masses.default, random_case().arguments())
