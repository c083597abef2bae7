"""``svg2::block_errors``: how wrong the mean of a key cluster would be in its place."""

import dataclasses
import math

import pytest
import torch
from errors_cases import cases, random_case
from hypothesis import given, settings

from svg2_compile.kernels import block_errors
from svg2_compile.kernels.cluster_means import cluster_means_reference

svg2 = torch.ops.svg2
PROPERTY = settings(max_examples=40, deadline=None)


@PROPERTY
@given(cases())
def test_an_error_is_that_of_the_mean_in_the_place_of_its_keys(case):
    errors = case.errors()
    assert errors.dtype == torch.float32 and errors.is_contiguous()
    case.assert_right(errors)


@PROPERTY
@given(cases())
def test_hidden_keys_and_values_cannot_influence_the_errors(case):
    assert torch.equal(case.with_hidden(math.nan).errors(), case.errors())


def test_the_error_of_equal_keys_with_equal_values_is_rounding_and_that_of_others_is_not():
    case = random_case(batch=1, clusters=(5, 7))
    ends = case.k_sizes.cumsum(-1)
    cluster = torch.searchsorted(ends, torch.arange(case.k.shape[2]).expand(1, 2, -1).contiguous().int(), right=True)
    first = (ends - case.k_sizes).long().gather(2, cluster).unsqueeze(-1)
    k, v = (x.gather(2, first.expand(x.shape)) for x in (case.k, case.v))
    means = {f"{name}_means": cluster_means_reference(x, case.k_sizes) for name, x in (("k", k), ("v", v))}
    alike = case.errors(k=k, v=v, **means)
    assert (alike < case.errors() - math.log(1e4)).all()


def test_by_hand():
    """Two keys at 0 and 2 with values 1 and 3, their mean at 1 with 2, and a query at 1."""
    k, v, q = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 1, 4)
    k[..., 1, 0], v[..., 0, 0], v[..., 1, 0], q[..., 0] = 2.0, 1.0, 3.0, 1.0
    sizes = torch.tensor([[[2]]], dtype=torch.int32)
    means = [cluster_means_reference(x, sizes) for x in (k, v)]
    wanted = (1 - 2 * math.e) ** 2 + (3 * math.exp(2) - 2 * math.e) ** 2
    assert svg2.block_errors(q, k, v, *means, sizes, 1.0).item() == pytest.approx(math.log(wanted), rel=1e-5)


@pytest.mark.parametrize("columns", [1, 64, 699])
def test_keys_in_parts_have_the_same_errors(monkeypatch, columns):
    case = random_case(tokens=700, hidden=65)
    whole = case.errors()
    monkeypatch.setattr(block_errors, "MAX_SCORES", columns * (5 + 7))
    torch.testing.assert_close(block_errors.block_errors_reference(*case.arguments()), whole, rtol=1e-4, atol=1e-4)


def test_centroids_are_rounded_as_the_keys_are():
    case = random_case(dtype=torch.bfloat16)
    assert torch.equal(case.errors(q_centroids=case.q_centroids.bfloat16().float()), case.errors())


def test_fp64_judges():
    case = random_case()
    doubles = {each: getattr(case, each).double() for each in ("q_centroids", "k", "v", "k_means", "v_means")}
    errors = case.errors(**doubles)
    assert errors.dtype == torch.float64
    torch.testing.assert_close(errors.float(), case.errors(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q_centroids": torch.zeros(2, 4, 5)}, ValueError, r"q_centroids must have 4 axes, got shape \(2, 4, 5\)"),
        ({"q_centroids": torch.zeros(2, 4, 5, 8).half()}, TypeError, "q_centroids must be torch.float32, got torch.fl"),
        ({"q_centroids": torch.zeros(2, 3, 5, 8)}, ValueError, "multiple of the key/value heads, got 3 and 2"),
        ({"q_centroids": torch.zeros(2, 4, 0, 8)}, ValueError, "at least 1 cluster on either side, got 0 and 7"),
        ({"k": torch.zeros(2, 2, 63, 9)}, ValueError, r"k must have shape \(2, 2, 63, 8\), got \(2, 2, 63, 9\)"),
        ({"v": torch.zeros(2, 2, 62, 8)}, ValueError, r"v must have shape \(2, 2, 63, 8\), got \(2, 2, 62, 8\)"),
        ({"v": torch.zeros(2, 2, 63, 8).half()}, TypeError, "v must be torch.float32, got torch.float16"),
        ({"k_means": torch.zeros(2, 2, 6, 8)}, ValueError, r"k_means must have shape \(2, 2, 7, 8\)"),
        ({"v_means": torch.zeros(2, 1, 7, 8)}, ValueError, r"v_means must have shape \(2, 2, 7, 8\)"),
        ({"k_sizes": torch.zeros(2, 2, 7)}, TypeError, "k_sizes must be torch.int32, got torch.float32"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        random_case().errors(**changes)


def test_opcheck():
    torch.library.opcheck(svg2.block_errors.default, random_case(hidden=5).arguments())


def test_compiled_it_is_the_same():
    case = random_case(hidden=5)
    compiled = torch.compile(lambda *args: svg2.block_errors(*args), fullgraph=True)
    assert torch.equal(compiled(*case.arguments()), case.errors())
    assert dataclasses.replace(case).errors().isfinite().any()
