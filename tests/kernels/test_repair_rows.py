"""``svg2::repair_rows_``: an error that the results tell is taken off, one that they do not tell is left alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repair_cases import judged, other_rows, random_case

from svg2_compile.kernels.card import MAX_PROBES
from svg2_compile.kernels.repair_rows import RANK, RIDGE, fit_of, inverse_of, largest_directions, orthonormal, start_of

svg2 = torch.ops.svg2
PROPERTY = settings(max_examples=30, deadline=None)


def fit_case(seed=0, rows=40, dim=24, rank=RANK):
    """Return sparse and exact rows in fp64, of which the residuals have ``rank`` directions beside their mean."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sparse = random(2, rows, dim) * (1 + torch.arange(dim)) + random(1, 1, dim)
    return sparse, sparse + random(2, rows, rank) @ random(2, rank, dim) + random(2, 1, dim)


@PROPERTY
@given(st.integers(0, 2**31), st.integers(2, MAX_PROBES), st.sampled_from([3, 24, 70]))
def test_the_map_is_a_ridge_regression_where_residuals_have_few_directions(seed, rows, dim):
    sparse, exact = fit_case(seed, rows, dim, rank=2)
    fit = fit_of(sparse, exact)
    x = (sparse - sparse.mean(1, keepdim=True)) / sparse.std(1, keepdim=True, correction=0)
    residual = exact - sparse
    y = residual - residual.mean(1, keepdim=True)
    wanted = torch.linalg.solve(x.mT @ x + RIDGE * torch.eye(dim), x.mT @ y)
    torch.testing.assert_close(fit.features @ fit.directions, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
    torch.testing.assert_close(
        fit.correction(sparse), x @ wanted + residual.mean(1, keepdim=True), rtol=1e-6, atol=1e-6
    )
    assert fit.features.shape == (2, dim, RANK) and fit.directions.shape == (2, RANK, dim)


@PROPERTY
@given(st.integers(0, 2**31), st.integers(3, 40), st.sampled_from([3, 24, 70]))
def test_what_is_left_is_what_fits_without_a_row_get_wrong_there(seed, rows, dim):
    sparse, exact = fit_case(seed, rows, dim, rank=2)
    fit = fit_of(sparse, exact)
    wanted = torch.zeros(2, dtype=torch.float64)
    for row in range(rows):
        others = [each for each in range(rows) if each != row]
        x, y = sparse / fit.spread, exact - sparse
        x_mean, y_mean = x[:, others].mean(1, keepdim=True), y[:, others].mean(1, keepdim=True)
        x_others, y_others = x[:, others] - x_mean, y[:, others] - y_mean
        weights = torch.linalg.solve(x_others.mT @ x_others + RIDGE * torch.eye(dim), x_others.mT @ y_others)
        foretold = (x[:, row : row + 1] - x_mean) @ weights + y_mean
        wanted += (y[:, row : row + 1] - foretold).square().sum((1, 2))
    torch.testing.assert_close(fit.error_left, wanted, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(fit.error, (exact - sparse).square().sum((1, 2)))


@PROPERTY
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 16, 17, 64]), st.floats(0.5, 1.0))
def test_the_directions_are_orthonormal_and_nearly_the_largest(seed, rows, decay):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(3, rows, rows, generator=generator, dtype=torch.float64))[0]
    values = decay ** torch.arange(rows, dtype=torch.float64)
    gram = vectors * values @ vectors.mT
    basis = largest_directions(gram)
    assert basis.shape == (3, rows, RANK)
    is_there = basis.square().sum(1) > 0.5
    torch.testing.assert_close(basis.mT @ basis, is_there.double().diag_embed(), rtol=0, atol=1e-7)
    held, most = (basis.mT @ gram @ basis).diagonal(dim1=1, dim2=2).sum(-1), values[:RANK].sum()
    assert (held >= 0.9 * most).all() and (held <= 1.0001 * most).all()


def test_directions_that_nothing_has_are_0():
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(1, 40, 3, generator=generator)
    basis = largest_directions(few @ few.mT)
    torch.testing.assert_close(
        basis.mT @ basis, (torch.arange(RANK) < 3).float().diag().unsqueeze(0), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(basis @ basis.mT @ few, few, rtol=0, atol=1e-4)
    assert not largest_directions(torch.zeros(1, 40, 40)).any()
    assert not orthonormal(torch.zeros(1, 5, RANK)).any()


@PROPERTY
@given(st.integers(0, 2**31), st.integers(1, MAX_PROBES))
def test_the_inverse_is_the_inverse(seed, rows):
    factor = torch.randn(2, rows, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = factor @ factor.mT + 0.1 * torch.eye(rows)
    torch.testing.assert_close(inverse_of(matrix), torch.linalg.inv(matrix), rtol=1e-8, atol=1e-8)


def test_the_signs_of_the_start_look_random():
    signs = start_of(MAX_PROBES, torch.zeros(()))
    assert torch.equal(signs[:5], start_of(5, torch.zeros(())))
    assert signs.abs().eq(1).all() and signs.mean().abs() < 0.1
    # of independent columns of 64, three standard deviations are 24
    products = (signs.T @ signs).fill_diagonal_(0)
    assert products.abs().max() <= 32


@PROPERTY
@given(
    st.integers(0, 2**31),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([17, 40, 64]),
    st.sampled_from([16, 80]),
)
def test_an_error_that_results_tell_is_taken_off_and_no_other(seed, dtype, rows, dim):
    out, places, exact = random_case(seed, dtype, rows=rows, dim=dim)
    result = out.clone()
    found = svg2.repair_rows_(result, places, exact)
    assert (found[..., 0] == 1).all() and (found[:, :-1, 1] == 1).all()
    assert (found[:, :-1, 3] < 0.5 * found[:, :-1, 2]).all()
    index = places.long().unsqueeze(-1).expand(exact.shape)
    assert torch.equal(result.gather(2, index), exact.to(dtype))
    is_other, is_left = other_rows(out, places), found[..., 1] == 0
    assert torch.equal(found[..., 3][is_left], found[..., 2][is_left])
    untouched = is_other & is_left.unsqueeze(-1)
    assert torch.equal(result[untouched], out[untouched])
    assert not torch.equal(result[:, 0], out[:, 0])


def test_an_error_that_only_noise_makes_is_left_alone():
    left = 0
    for seed in range(10):
        out, places, exact = random_case(seed)
        left += int((svg2.repair_rows_(out, places, exact)[:, -1, 1] == 0).sum())
    assert left >= 18  # of 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounding_is_that_of_fp32_and_of_the_result(dtype):
    out, places, exact = random_case(dtype=dtype, rows=64, dim=80)
    wanted, wanted_found = judged(out, places, exact)
    found = svg2.repair_rows_(out, places, exact)
    # The regression's matrix has a condition of at most (rows * dim + ridge) / ridge; errors of fp32 grow by that.
    condition = 64 * 80 / RIDGE * torch.finfo(torch.float32).eps
    correction = 0.5 * float(wanted.abs().max())
    step = torch.finfo(dtype).eps * float(wanted.abs().max())
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=step + condition * correction)
    torch.testing.assert_close(found.double(), wanted_found, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_heads_do_not_influence_each_other_and_one_that_is_not_finite_keeps_its_bits(poison):
    out, places, exact = random_case()
    clean = out.clone()
    svg2.repair_rows_(clean, places, exact)
    poisoned = out.clone()
    poisoned[1, 0, int(places[1, 0, 3]), 5] = poison
    result = poisoned.clone()
    found = svg2.repair_rows_(result, places, exact)
    assert found[1, 0, 1] == 0 and (found[..., 1].flatten()[:3] == 1).sum() >= 2
    is_other = other_rows(out, places)[1, 0]
    assert torch.equal(result[1, 0][is_other], out[1, 0][is_other])
    result[1, 0], clean[1, 0] = 0, 0
    assert torch.equal(result, clean)


def test_what_lacks_nothing_stays():
    out, places, exact = random_case()
    index = places.long().unsqueeze(-1).expand(exact.shape)
    result = out.clone()
    found = svg2.repair_rows_(result, places, out.gather(2, index))
    assert torch.equal(result, out) and not found[..., 1:].any()


def test_rows_of_one_channel_value_and_a_single_row_are_only_replaced():
    out, places, exact = random_case(rows=1)
    result = out.clone()
    found = svg2.repair_rows_(result, places, exact)
    assert not found[..., 1].any()
    is_other = other_rows(out, places)
    assert torch.equal(result[is_other], out[is_other])
    constant = torch.ones_like(out)
    found = svg2.repair_rows_(constant, places, torch.full_like(exact, 1.5))
    assert constant.isfinite().all() and found.isfinite().all()


def test_a_constant_error_is_taken_off_results_that_do_not_vary():
    out, places = torch.ones(1, 2, 60, 8), torch.arange(20).int().expand(1, 2, -1).contiguous()
    found = svg2.repair_rows_(out, places, torch.full((1, 2, 20, 8), 1.5))
    torch.testing.assert_close(out, torch.full_like(out, 1.5))
    assert (found[..., 1] == 1).all()


def test_autocast_does_not_round():
    case = random_case()
    plain, rounded = case[0].clone(), case[0].clone()
    svg2.repair_rows_(plain, *case[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        svg2.repair_rows_(rounded, *case[1:])
    assert torch.equal(plain, rounded)


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(2, 3, 150), ValueError, "out must have 4 axes"),
        (0, torch.zeros(2, 3, 150, 24).int(), TypeError, "out must be .* got torch.int32"),
        (1, torch.zeros(2, 3, 40), TypeError, "places must be torch.int32, got torch.float32"),
        (1, torch.zeros(2, 2, 40).int(), ValueError, r"places must have shape \(2, 3, 40\), got \(2, 2, 40\)"),
        (2, torch.zeros(2, 3, 40, 23), ValueError, r"exact must have shape \(2, 3, 40, 24\)"),
        (2, torch.zeros(2, 3, 40, 24).half(), TypeError, "exact must be torch.float32, got torch.float16"),
    ],
)
def test_bad_input_is_named(position, value, error, message):
    arguments = list(random_case())
    arguments[position] = value
    with pytest.raises(error, match=message):
        svg2.repair_rows_(*arguments)


def test_more_rows_than_a_program_can_hold_are_refused():
    out, places, exact = random_case(rows=MAX_PROBES + 1)
    with pytest.raises(ValueError, match="there must be at most 64 rows, got 65"):
        svg2.repair_rows_(out, places, exact)


def test_opcheck():
    torch.library.opcheck(svg2.repair_rows_.default, random_case())
