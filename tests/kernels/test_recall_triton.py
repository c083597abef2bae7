"""The scores of ``svg2::measure_recall`` in Triton: the reference's masses, and nothing between two looks."""

import math

import pytest
import torch
from triton_interpreter import (
    DEVICE,
    INTERPRETED,
    assert_passes_under_the_interpreter,
    runs_kernels,
    starts_the_interpreter,
)

from svg2_compile.kernels.measure_recall import key_masses_reference, measure_with
from svg2_compile.kernels.sort_labels import sort_labels_reference
from svg2_compile.kernels.work_list import kept_runs_reference

SCALE = 0.3
# The interpreter has no bf16 products.
DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16, torch.float32]
# An fp32 sum of 4,096 terms in another order, and exponentials by another routine.
ROUNDING = 4096 * torch.finfo(torch.float32).eps


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


def selection(batch=2, heads=4, groups=2, tokens=150, keys=333, dim=24, dtype=torch.float16, hidden=0, layout="plain"):
    """Return the first arguments of the op: tokens, a random selection of 7 clusters for each of 5, no context."""
    generator = torch.Generator().manual_seed(keys)
    q, k = (
        torch.randn(batch, each, count, dim, generator=generator).to(dtype)
        for each, count in ((heads, tokens), (groups, keys))
    )
    if layout == "transposed rows":
        k = k.mT.contiguous().mT
    labels = [
        torch.randint(clusters, (batch, each, count), generator=generator, dtype=torch.int32)
        for each, count, clusters in ((heads, tokens, 5), (groups, keys, 7))
    ]
    (q_order, q_sizes), (_, k_sizes) = (sort_labels_reference(each, c) for each, c in zip(labels, (5, 7)))
    k_sizes[..., -1] -= hidden
    keep = torch.rand(batch, heads, 5, 7, generator=generator) < 0.4
    kept = kept_runs_reference(keep, k_sizes)
    return [each.to(DEVICE) for each in (q, k, q_order, q_sizes, k_sizes, kept.runs, kept.counts)]


def measure(key_masses, arguments, rows=19, calls=1, interval=1, context=(None, None)):
    """Return the recall [B, H, 2] that the op finds."""
    counter = torch.tensor([calls], dtype=torch.int32, device=DEVICE)
    return measure_with(key_masses, *arguments, *context, counter, SCALE, rows, interval, 0)


CASES = [
    {},
    {"groups": 4, "dim": 64},
    {"dtype": torch.float32, "dim": 80, "layout": "transposed rows"},
    {"hidden": 11},
    {"batch": 1, "heads": 2, "groups": 1, "keys": 4096 + 77, "dim": 16},
    {"batch": 1, "heads": 1, "groups": 1, "tokens": 1, "keys": 1, "dim": 128},
    {"dim": 256, "keys": 129},
]


@runs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_recall_is_the_references(case, dtype):
    from svg2_compile.kernels.measure_recall_triton import key_masses_triton

    arguments = selection(**{"dtype": dtype} | case)
    exact = [each.double() if each.is_floating_point() else each for each in arguments]
    got, wanted = measure(key_masses_triton, arguments), measure(key_masses_reference, exact)
    assert 0 < wanted[..., 1].max() <= 1
    assert (got - wanted).abs().max() <= ROUNDING


@runs_kernels
@pytest.mark.parametrize("rows", [1, 16, 65, 150])
def test_any_number_of_rows(rows):
    from svg2_compile.kernels.measure_recall_triton import key_masses_triton

    arguments = selection(batch=1, heads=2, groups=1, keys=200)
    got, wanted = measure(key_masses_triton, arguments, rows), measure(key_masses_reference, arguments, rows)
    assert (got - wanted).abs().max() <= ROUNDING


@runs_kernels
def test_context_keys_count_as_kept():
    from svg2_compile.kernels.measure_recall_triton import key_masses_triton

    arguments = selection()
    context_k = torch.randn(2, 2, 9, 24, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    context = (context_k, (torch.arange(9) % 3 > 0).view(1, 1, 1, -1).to(DEVICE))
    got, wanted = (measure(each, arguments, context=context) for each in (key_masses_triton, key_masses_reference))
    assert (got - wanted).abs().max() <= ROUNDING
    assert (got[..., 1] > measure(key_masses_triton, arguments)[..., 1]).all()


@runs_kernels
def test_hidden_keys_do_not_influence_it():
    from svg2_compile.kernels.measure_recall_triton import key_masses_triton

    arguments = selection(hidden=11)
    before = measure(key_masses_triton, arguments)
    visible = arguments[4].sum(-1)
    for batch in range(2):
        for group in range(2):
            arguments[1][batch, group, visible[batch, group] :] = math.nan
    assert torch.equal(measure(key_masses_triton, arguments), before)


@runs_kernels
def test_between_two_looks_nothing_is_added():
    from svg2_compile.kernels.measure_recall_triton import key_masses_triton

    arguments = selection()
    assert measure(key_masses_triton, arguments, calls=4, interval=3)[..., 0].eq(1).all()
    arguments[1].fill_(math.nan)
    for calls in (2, 3):
        assert measure(key_masses_triton, arguments, calls=calls, interval=3).eq(0).all()


@runs_kernels
@pytest.mark.parametrize(("calls", "works"), [(1, True), (2, False), (3, False), (4, True)])
def test_between_two_looks_the_kernel_does_nothing(calls, works, monkeypatch):
    from svg2_compile.kernels.measure_recall_triton import LOG2_E, key_masses_triton

    monkeypatch.setattr(torch, "empty", lambda *arguments, **options: torch.zeros(*arguments, **options) + 4)
    _, k, _, _, k_sizes, runs, counts = selection(heads=2, groups=2)
    q = torch.ones(4, 5, 24, dtype=k.dtype, device=DEVICE)
    counter = torch.tensor([calls], dtype=torch.int32, device=DEVICE)
    visible = k_sizes.flatten(0, 1).sum(-1, dtype=torch.int32)
    total, _ = key_masses_triton(q, k, visible, runs.flatten(0, 1), counts.flatten(0, 1), SCALE, counter, 3)
    untouched = torch.full_like(total, (4 + 2) / LOG2_E)  # what was there: a maximum of 4, a sum of 4
    assert torch.isclose(total, untouched).all() != works
