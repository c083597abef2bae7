"""``svg2::log_dropped_weights``: what the keys of a dropped cluster weigh for a mean query, beside their mean."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from weights_cases import cases, random_case

from svg2_compile.kernels import log_dropped_weights
from svg2_compile.kernels.cluster_means import cluster_means_reference

svg2 = torch.ops.svg2
PROPERTY = settings(max_examples=40, deadline=None)


@PROPERTY
@given(cases())
def test_a_weight_is_that_of_all_keys_of_the_cluster(case):
    weights = case.weights()
    assert weights.dtype == torch.float32 and weights.is_contiguous()
    case.assert_right(weights)


@PROPERTY
@given(cases())
def test_it_is_the_number_of_keys_or_more(case):
    double = {each: getattr(case, each).double() for each in ("log_sizes", "q_centroids", "k")}
    means = cluster_means_reference(double["k"], case.k_sizes)
    weights = case.with_hidden(0.0).weights(**double, k_means=means)
    repeats = case.q_centroids.shape[1] // case.k_sizes.shape[1]
    least = case.k_sizes.repeat_interleave(repeats, 1).unsqueeze(2).double().log()
    assert ((weights >= least - 1e-9) | (weights == -math.inf)).all()


@PROPERTY
@given(cases())
def test_hidden_keys_cannot_influence_the_weights(case):
    assert torch.equal(case.with_hidden(math.nan).weights(), case.weights())


def test_by_hand():
    """Two keys at 0 and 2, their mean at 1, and a query at 1: ln(1 + e^2) - 1."""
    k, q, log_sizes = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 1)
    k[..., 1, 0], q[..., 0] = 2.0, 1.0
    sizes = torch.tensor([[[2]]], dtype=torch.int32)
    got = svg2.log_dropped_weights(log_sizes, q, k, cluster_means_reference(k, sizes), sizes, 1.0)
    assert got.item() == pytest.approx(math.log(1 + math.exp(2)) - 1, rel=1e-6)


def test_equal_keys_weigh_their_number():
    case = random_case(batch=1, clusters=(5, 7), kept=0.0)
    k = case.k[:, :, :1].expand_as(case.k).contiguous()
    got = case.weights(k=k, k_means=cluster_means_reference(k, case.k_sizes))
    wanted = case.k_sizes.repeat_interleave(2, 1).unsqueeze(2).float().log().expand_as(got)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 64, 699])
def test_keys_in_parts_have_the_same_weights(monkeypatch, columns):
    case = random_case(tokens=700, hidden=65)
    whole = case.weights()
    monkeypatch.setattr(log_dropped_weights, "MAX_SCORES", columns * (5 + 7))
    parts = log_dropped_weights.log_dropped_weights_reference(*case.arguments())
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_centroids_are_rounded_as_the_keys_are():
    case = random_case(dtype=torch.bfloat16)
    assert torch.equal(case.weights(q_centroids=case.q_centroids.bfloat16().float()), case.weights())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q_centroids": torch.zeros(2, 4, 5)}, ValueError, r"q_centroids must have 4 axes, got shape \(2, 4, 5\)"),
        ({"q_centroids": torch.zeros(2, 4, 5, 8).half()}, TypeError, "q_centroids must be torch.float32, got torch.fl"),
        ({"q_centroids": torch.zeros(2, 3, 5, 8)}, ValueError, "multiple of the key/value heads, got 3 and 2"),
        ({"k": torch.zeros(2, 2, 63, 9)}, ValueError, r"k must have shape \(2, 2, 63, 8\), got \(2, 2, 63, 9\)"),
        ({"k_means": torch.zeros(2, 2, 6, 8)}, ValueError, r"k_means must have shape \(2, 2, 7, 8\)"),
        ({"k_means": torch.zeros(2, 2, 7, 8).half()}, TypeError, "k_means must be torch.float32, got torch.float16"),
        ({"k_sizes": torch.zeros(2, 2, 7)}, TypeError, "k_sizes must be torch.int32, got torch.float32"),
        ({"log_sizes": torch.zeros(2, 4, 5, 6)}, ValueError, r"log_sizes must have shape \(2, 4, 5, 7\)"),
        (
            {"log_sizes": torch.zeros(2, 4, 5, 7).half()},
            TypeError,
            "log_sizes must be torch.float32, got torch.float16",
        ),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        random_case().weights(**changes)


def test_opcheck():
    torch.library.opcheck(svg2.log_dropped_weights.default, random_case(hidden=5).arguments())


def test_compiled_it_is_the_same():
    case = random_case(hidden=5)
    compiled = torch.compile(lambda *args: svg2.log_dropped_weights(*args), fullgraph=True)
    assert torch.equal(compiled(*case.arguments()), case.weights())
    assert dataclasses.replace(case).weights().isfinite().any()
