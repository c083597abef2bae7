"""``svg2::block_masses_by_keys``: the softmaxes of mean queries over all keys, summed cluster by cluster."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from masses_by_keys_cases import cases, random_case
from masses_cases import random_case as random_case_by_queries

from svg2_compile.kernels import block_masses_by_keys
from svg2_compile.kernels.select_blocks import block_logits

svg2 = torch.ops.svg2
PROPERTY = settings(max_examples=60, deadline=None)


@PROPERTY
@given(cases())
def test_a_mass_is_the_sum_of_its_keys_probabilities(case):
    torch.testing.assert_close(case.masses().double(), case.exact(), rtol=0, atol=case.tolerance())


@PROPERTY
@given(cases())
def test_masses_are_shares_and_empty_clusters_have_none(case):
    masses = case.masses()
    assert masses.dtype == torch.float32 and masses.is_contiguous()
    torch.testing.assert_close(masses.sum(-1), torch.ones(masses.shape[:3]), rtol=0, atol=case.tolerance())
    empty = (case.k_sizes == 0).repeat_interleave(masses.shape[1] // case.k_sizes.shape[1], 1).unsqueeze(2)
    assert (masses.masked_fill(~empty, 0) == 0).all()


@PROPERTY
@given(cases())
def test_hidden_keys_cannot_influence_the_masses(case):
    assert torch.equal(case.with_hidden(math.nan).masses(), case.masses())


@PROPERTY
@given(cases())
def test_with_one_query_a_cluster_the_masses_are_those_of_the_attention(case):
    """The values are which cluster a key is of, so the results of attention are the masses."""
    case = dataclasses.replace(case, k=case.k.float())
    repeats = case.q_centroids.shape[1] // case.k.shape[1]
    ends = case.k_sizes.cumsum(-1).unsqueeze(2)
    place = torch.arange(case.k.shape[2]).view(1, 1, -1, 1)
    values = ((place < ends) & (place >= ends - case.k_sizes.unsqueeze(2))).float()  # [B, G, N_k, C_k]
    visible = (place < ends[..., -1:]).mT
    keys, values, visible = (each.repeat_interleave(repeats, 1) for each in (case.k, values, visible))
    expected = torch.nn.functional.scaled_dot_product_attention(
        case.q_centroids, keys, values, attn_mask=visible, scale=case.scale
    )
    torch.testing.assert_close(case.masses(), expected, rtol=0, atol=case.tolerance())


def test_clusters_of_equal_keys_have_the_masses_of_their_centroids():
    case = random_case()
    centroids = case.k[:, :, :7]
    keys = torch.stack(
        [
            torch.stack([means.repeat_interleave(sizes, 0) for means, sizes in zip(*of_element)])
            for of_element in zip(centroids, case.k_sizes)
        ]
    )
    of_centroids = block_logits(case.q_centroids, centroids, case.k_sizes, case.scale).softmax(-1)
    torch.testing.assert_close(case.masses(k=keys), of_centroids)


def test_with_clusters_of_one_token_both_estimates_are_the_same():
    ones = torch.ones(2, 4, 9).int()
    case = dataclasses.replace(random_case_by_queries(tokens=9, clusters=(9, 9)), q_sizes=ones, k_sizes=ones[:, :2])
    means = svg2.permute_tokens(case.q, case.q_order)
    by_keys = svg2.block_masses_by_keys(means, case.k_centroids, case.k_sizes, case.scale)
    torch.testing.assert_close(by_keys, case.masses())


def test_keys_that_lie_elsewhere_than_their_mean_are_counted():
    # Two keys, their mean is 0 and says nothing; each of the first two of three queries looks at one of them.
    case = random_case(batch=1, groups=1, repeats=1, tokens=3, dim=2)
    case = dataclasses.replace(
        case,
        q_centroids=torch.tensor([[9.0, 0.0], [-9.0, 0.0], [0.0, 9.0]]).view(1, 1, 3, 2),
        k=torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).view(1, 1, 3, 2),
        k_sizes=torch.tensor([[[2, 1]]], dtype=torch.int32),
        scale=1.0,
    )
    assert case.masses()[..., 0].flatten().tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-3)


@pytest.mark.parametrize("columns", [1, 64, 699])
def test_keys_in_parts_have_the_same_masses_and_take_no_more_than_was_said(monkeypatch, columns):
    case = random_case(tokens=700, hidden=65)
    whole, largest = case.masses(), []
    exp = torch.Tensor.exp
    monkeypatch.setattr(torch.Tensor, "exp", lambda x: largest.append(x.numel()) or exp(x))
    monkeypatch.setattr(block_masses_by_keys, "MAX_SCORES", columns * (5 + 7))
    parts = block_masses_by_keys.block_masses_by_keys_reference(*case.arguments())
    torch.testing.assert_close(parts, whole, rtol=0, atol=case.tolerance())
    assert max(largest) == columns * 5


def test_centroids_are_rounded_as_the_keys_are():
    case = random_case(dtype=torch.bfloat16)
    assert torch.equal(case.masses(q_centroids=case.q_centroids.bfloat16().float()), case.masses())


def test_fp64_judges():
    case = random_case()
    masses = case.masses(q_centroids=case.q_centroids.double(), k=case.k.double())
    assert masses.dtype == torch.float64
    torch.testing.assert_close(masses, case.exact(), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q_centroids": torch.zeros(2, 4, 5)}, ValueError, r"q_centroids must have 4 axes, got shape \(2, 4, 5\)"),
        ({"q_centroids": torch.zeros(2, 4, 5, 8).half()}, TypeError, "q_centroids must be torch.float32, got torch.fl"),
        ({"q_centroids": torch.zeros(2, 3, 5, 8)}, ValueError, "multiple of the key/value heads, got 3 and 2"),
        ({"q_centroids": torch.zeros(2, 4, 0, 8)}, ValueError, "at least 1 cluster on either side, got 0 and 7"),
        ({"k": torch.zeros(2, 2, 63, 9)}, ValueError, r"k must have shape \(2, 2, 63, 8\), got \(2, 2, 63, 9\)"),
        ({"k": torch.zeros(2, 2, 63, 8).int()}, TypeError, "k must be .* got torch.int32"),
        ({"k_sizes": torch.zeros(2, 2, 7)}, TypeError, "k_sizes must be torch.int32, got torch.float32"),
        ({"k_sizes": torch.zeros(1, 2, 7).int()}, ValueError, r"k_sizes must have shape \(2, 2, 7\), got \(1, 2, 7\)"),
        ({"k_sizes": torch.zeros(2, 2).int()}, ValueError, r"k_sizes must have 3 axes, got shape \(2, 2\)"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        random_case().masses(**changes)


def test_opcheck():
    torch.library.opcheck(svg2.block_masses_by_keys.default, random_case(hidden=5).arguments())


def test_compiled_it_is_the_same():
    case = random_case(hidden=5)
    compiled = torch.compile(lambda *args: svg2.block_masses_by_keys(*args), fullgraph=True)
    assert torch.equal(compiled(*case.arguments()), case.masses())
