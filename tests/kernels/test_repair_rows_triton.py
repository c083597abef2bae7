"""``svg2::probe_rows`` and ``svg2::repair_rows_`` in Triton: what the references say, up to rounding."""

import math

import pytest
import torch
from pairs import every_two
from repair_cases import judged, other_rows, random_case
from triton_interpreter import (
    DEVICE,
    INTERPRETED,
    assert_passes_under_the_interpreter,
    runs_kernels,
    starts_the_interpreter,
)

from svg2_compile.kernels.probe_rows import key_results_reference, probe_with
from svg2_compile.kernels.repair_rows import fit_of, repair_rows_reference
from svg2_compile.kernels.sort_labels import sort_labels_reference
from svg2_compile.kernels.work_list import kept_runs_reference

SCALE = 0.3
# The interpreter has no bf16 products.
DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16, torch.float32]
FP32 = torch.finfo(torch.float32).eps
# What a product of tensor cores keeps of fp32 factors.
TF32 = 2.0**-10


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


def probe_arguments(batch=2, heads=4, groups=2, tokens=150, keys=333, dim=24, dtype=torch.float16, hidden=0, odd=False):
    """Return tokens, a random selection of 7 clusters for each of 5, and no context."""
    generator = torch.Generator().manual_seed(keys)
    q, k, v = (
        torch.randn(batch, each, count, dim, generator=generator).to(dtype)
        for each, count in ((heads, tokens), (groups, keys), (groups, keys))
    )
    if odd:
        k, v = k.mT.contiguous().mT, torch.cat((v, v), -1)[..., :dim]
    labels = [
        torch.randint(clusters, (batch, each, count), generator=generator, dtype=torch.int32)
        for each, count, clusters in ((heads, tokens, 5), (groups, keys, 7))
    ]
    (q_order, q_sizes), (_, k_sizes) = (sort_labels_reference(each, c) for each, c in zip(labels, (5, 7)))
    k_sizes[..., -1] -= hidden
    keep = torch.rand(batch, heads, 5, 7, generator=generator) < 0.4
    kept = kept_runs_reference(keep, k_sizes)
    return [each.to(DEVICE) for each in (q, k, v, q_order, q_sizes, k_sizes, kept.runs, kept.counts)]


def probe(key_results, arguments, rows=19, calls=1, interval=1, context=(None, None, None)):
    counter = torch.tensor([calls], dtype=torch.int32, device=DEVICE)
    return [each.cpu() for each in probe_with(key_results, *arguments, *context, counter, SCALE, rows, interval, 0)]


def probe_in_triton(arguments, **numbers):
    from svg2_compile.kernels.probe_rows_triton import key_results_triton

    return probe(key_results_triton, arguments, **numbers)


def assert_rows_are_right(arguments, **numbers):
    """Compare with the reference in fp64: weights are rounded to the dtype of the values, sums are in fp32."""
    exact = [each.double() if each.is_floating_point() else each for each in arguments]
    context = numbers.pop("context", (None, None, None))
    in_fp64 = tuple(each.double() if each is not None and each.is_floating_point() else each for each in context)
    places, rows, recall = probe_in_triton(arguments, context=context, **numbers)
    wanted = probe(key_results_reference, exact, context=in_fp64, **numbers)
    assert torch.equal(places, wanted[0])
    keys = arguments[1].shape[2]
    step = torch.finfo(arguments[2].dtype).eps + keys * FP32
    torch.testing.assert_close(rows.double(), wanted[1], rtol=0, atol=step * float(arguments[2].abs().max()))
    torch.testing.assert_close(recall.double(), wanted[2], rtol=0, atol=4096 * FP32)


CASES = [
    {},
    {"groups": 4, "dim": 64},
    {"dtype": torch.float32, "dim": 80, "odd": True},
    {"hidden": 11, "odd": True},
    {"batch": 1, "heads": 2, "groups": 1, "keys": 4096 + 77, "dim": 16},
    {"batch": 1, "heads": 1, "groups": 1, "tokens": 1, "keys": 1, "dim": 128},
    {"batch": 1, "dim": 256, "keys": 129},
]


@runs_kernels
@every_two(case=CASES, dtype=DTYPES, interval=[0, 1])
def test_dense_rows_and_their_recall_are_the_references(case, dtype, interval):
    assert_rows_are_right(probe_arguments(**{"dtype": dtype} | case), interval=interval)


@runs_kernels
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_any_number_of_dense_rows(rows):
    assert_rows_are_right(probe_arguments(batch=1, heads=2, groups=1, keys=200), rows=rows)


@runs_kernels
def test_dense_rows_see_the_context():
    generator = torch.Generator().manual_seed(0)
    context = [torch.randn(2, 2, 9, 24, generator=generator).half().to(DEVICE) for _ in "kv"]
    mask = (torch.arange(9) % 3 > 0).view(1, 1, 1, -1).to(DEVICE)
    assert_rows_are_right(probe_arguments(), context=(*context, mask))


@runs_kernels
def test_hidden_keys_do_not_influence_dense_rows():
    arguments = probe_arguments(hidden=11)
    before = probe_in_triton(arguments)
    visible = arguments[5].sum(-1)
    for x in arguments[1:3]:
        for batch in range(2):
            for group in range(2):
                x[batch, group, visible[batch, group] :] = math.nan
    assert all(map(torch.equal, probe_in_triton(arguments), before))


@runs_kernels
def test_dense_rows_are_the_same_whether_recall_is_measured_or_not():
    arguments = probe_arguments()
    first = probe_in_triton(arguments, interval=3, calls=4)
    between = probe_in_triton(arguments, interval=3, calls=5)
    assert first[2][..., 0].eq(1).all() and not between[2].any()
    arguments[6].fill_(2**31 - 1)
    again = probe_in_triton(arguments, interval=3, calls=5)
    assert all(map(torch.equal, between, again))


def repair_in_triton(out, places, exact):
    from svg2_compile.kernels.repair_rows_triton import repair_rows_triton

    result = out.to(DEVICE, copy=True)
    found = repair_rows_triton(result, places.to(DEVICE), exact.to(DEVICE))
    return result.cpu(), found.cpu()


def assert_repair_is_right(out, places, exact):
    """Compare with fp64: twice the error of the reference in the same dtype, a step, and what products keep."""
    wanted, wanted_found = judged(out, places, exact)
    result, found = repair_in_triton(out, places, exact)
    assert torch.equal(found[..., :2].double(), wanted_found[..., :2])
    reference = out.clone()
    repair_rows_reference(reference, places, exact)
    allowed = 2 * (reference.double() - wanted).abs().max() + torch.finfo(out.dtype).eps * wanted.abs().max()
    if out.dtype == torch.float32:
        allowed += FP32 * wanted.abs().max()
    else:
        index = places.long().unsqueeze(-1).expand(exact.shape)
        fit = fit_of(out.gather(2, index).double().flatten(0, 1), exact.double().flatten(0, 1))
        x = ((out.double().flatten(0, 1) - fit.mean) / fit.spread).abs()
        allowed += 2 * TF32 * (x @ fit.features.abs() @ fit.directions.abs()).max()
    assert float((result.double() - wanted).abs().max()) <= float(allowed)
    # a sum of squares of what the inverse left
    torch.testing.assert_close(found.double(), wanted_found, rtol=1e-2, atol=1e-4)


@runs_kernels
@every_two(dim=[4, 80, 256], rows=[2, 40], dtype=DTYPES)
def test_repairs_of_any_rows(dtype, dim, rows):
    # so much noise that no direction is so small that rounding decides whether it counts
    assert_repair_is_right(*random_case(dtype=dtype, dim=dim, rows=rows, tokens=70, noise=0.1, batch=1, heads=2))


@runs_kernels
def test_many_tokens_and_as_many_rows_as_may_be():
    assert_repair_is_right(*random_case(dtype=torch.float16, dim=16, tokens=2100, rows=64, batch=1, heads=2))


@runs_kernels
def test_repairs_work_on_any_strides():
    out, places, exact = random_case(dim=16)
    wanted, _ = repair_in_triton(out, places, exact)
    for other in (out.contiguous(), out.mT.contiguous().mT):
        result = other.to(DEVICE, copy=True)
        assert result.stride() == other.stride()
        found = repair_in_triton(result, torch.stack((places, places), -1)[..., 0], exact)[0]
        assert torch.equal(found, wanted)


@runs_kernels
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_head_that_is_not_finite_keeps_its_bits(poison):
    out, places, exact = random_case(dim=16)
    out[1, 0, int(places[1, 0, 3]), 5] = poison
    result, found = repair_in_triton(out, places, exact)
    assert found[1, 0, 1] == 0 and (found[..., 1] == 1).any()
    is_other = other_rows(out, places)[1, 0]
    assert torch.equal(result[1, 0][is_other], out[1, 0][is_other])
    assert result[0].isfinite().all()


@runs_kernels
def test_a_head_that_noise_spoils_keeps_its_bits():
    out, places, exact = random_case(dim=16)
    _, found = judged(out, places, exact)
    result, _ = repair_in_triton(out, places, exact)
    untouched = other_rows(out, places) & (found[..., 1:2] == 0)
    assert untouched.any() and torch.equal(result[untouched], out[untouched])
