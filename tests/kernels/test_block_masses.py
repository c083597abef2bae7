"""``svg2::block_masses``: the mean of queries' softmaxes over the key centroids, cluster by cluster."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from masses_cases import Case, cases, one_of_many, random_case
from torch.utils._python_dispatch import TorchDispatchMode

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels import block_masses
from svg2_compile.kernels.select_blocks import block_logits

PROPERTY = settings(max_examples=60, deadline=None)


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
