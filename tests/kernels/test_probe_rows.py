"""``svg2::probe_rows``: rows that are computed densely, whatever is kept, and the recall that is measured on them."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recall_cases import SCALE, plain_case, recall_cases, tolerance

from svg2_compile.kernels.card import MAX_PROBES
from svg2_compile.kernels.measure_recall import sampled_positions

svg2 = torch.ops.svg2
PROPERTY = settings(max_examples=60, deadline=None)


def values_of(case, seed=1):
    """Return values of the keys, in token order, and of the context."""
    generator = torch.Generator().manual_seed(seed)
    context = case.context_k
    return [
        None if like is None else torch.randn(like.shape, generator=generator).to(case.q.dtype)
        for like in (case.k, context)
    ]


def arguments_of(case, values, calls=1, rows=MAX_PROBES, interval=1, seed=0):
    v, context_v = values
    counter = torch.tensor([calls], dtype=torch.int32)
    tokens = (case.q, case.in_cluster_order(case.k), case.in_cluster_order(v))
    context = (case.context_k, context_v, case.context_mask)
    return (*tokens, *case.selection(), *context, counter, SCALE, rows, interval, seed)


def probe(case, values, **numbers):
    return svg2.probe_rows(*arguments_of(case, values, **numbers))


def dense(case, values):
    """Return dense attention in fp64 [B, H, N, D]."""
    everything = torch.cat([each.double() for each in values if each is not None], 2)
    return case.weights()[0] @ everything.repeat_interleave(case.q.shape[1] // case.k.shape[1], 1)


@PROPERTY
@given(recall_cases(), st.integers(1, MAX_PROBES), st.integers(1, 7), st.integers(0, 2**31 - 1))
def test_the_rows_are_those_of_dense_attention(case, rows, calls, seed):
    values = values_of(case)
    places, exact, _ = probe(case, values, rows=rows, calls=calls, seed=seed)
    count = min(rows, case.q.shape[2])
    assert places.dtype == torch.int32 and places.shape == (*case.q.shape[:2], count)
    assert exact.dtype == torch.float32
    assert all(each.unique().numel() == count for each in places.flatten(0, 1))
    expected = dense(case, values).gather(2, places.long().unsqueeze(-1).expand(exact.shape))
    largest = max(float(each.float().abs().max()) for each in values if each is not None and each.numel())
    torch.testing.assert_close(exact.double(), expected, rtol=0, atol=2 * tolerance(case) * largest)


@PROPERTY
@given(recall_cases(), st.integers(1, 20), st.integers(1, 7), st.integers(1, 3), st.integers(0, 2**31 - 1))
def test_the_recall_is_that_of_the_op_that_only_measures(case, rows, calls, interval, seed):
    numbers = {"rows": rows, "calls": calls, "interval": interval, "seed": seed}
    _, _, recall = probe(case, values_of(case), **numbers)
    torch.testing.assert_close(recall, torch.stack(case.measure(**numbers), -1), rtol=0, atol=2 * tolerance(case))


@PROPERTY
@given(recall_cases(), st.integers(1, 7))
def test_what_is_kept_does_not_influence_the_rows(case, calls):
    values = values_of(case)
    other = dataclasses.replace(case, keep=~case.keep)
    assert all(map(torch.equal, probe(case, values, calls=calls)[:2], probe(other, values, calls=calls)[:2]))


@PROPERTY
@given(recall_cases())
def test_hidden_keys_and_values_cannot_influence_it(case):
    v, context_v = values_of(case)
    is_hidden = (case.k_labels == case.keep.shape[3]).unsqueeze(-1)
    context_k, poisoned_v = case.context_k, context_v
    if case.context_mask is not None:
        context_k, poisoned_v = (x.masked_fill(~case.context_mask.mT, math.nan) for x in (context_k, context_v))
    poisoned = dataclasses.replace(case, k=case.k.masked_fill(is_hidden, math.nan), context_k=context_k)
    found = probe(poisoned, (v.masked_fill(is_hidden, math.nan), poisoned_v))
    assert all(map(torch.equal, probe(case, (v, context_v)), found))


def test_the_rows_are_those_that_recall_looks_at():
    case = plain_case()
    places, _, _ = probe(case, values_of(case), rows=7, calls=3, seed=5)
    positions = sampled_positions(case.q.shape[2], 7, torch.tensor([3]), 5)
    assert torch.equal(places, case.selection()[0][:, :, positions])


def test_an_interval_of_0_measures_never_and_changes_no_row():
    case = plain_case()
    values = values_of(case)
    places, exact, recall = probe(case, values, interval=0)
    assert recall.shape == (2, 4, 2) and not recall.any()
    assert all(map(torch.equal, probe(case, values)[:2], (places, exact)))


def test_a_row_that_sees_no_key_is_0():
    case = plain_case()
    blind = dataclasses.replace(
        case, k_labels=torch.full_like(case.k_labels, 6), context_mask=torch.zeros_like(case.context_mask)
    )
    _, exact, recall = probe(blind, values_of(case))
    assert not exact.any() and (recall == 1).all()


def test_fp64_is_computed_in_fp64():
    case = plain_case()
    case = dataclasses.replace(case, q=case.q.double(), k=case.k.double(), context_k=case.context_k.double())
    values = values_of(case)
    places, exact, _ = probe(case, values)
    expected = dense(case, values).gather(2, places.long().unsqueeze(-1).expand(exact.shape))
    torch.testing.assert_close(exact, expected, rtol=1e-12, atol=1e-13)


def test_autocast_does_not_round():
    case = plain_case()
    values = values_of(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = probe(case, values)
    assert all(map(torch.equal, rounded, probe(case, values)))


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(2, 4, 40, 8).int(), TypeError, "q must be .* got torch.int32"),
        (2, torch.zeros(2, 2, 49, 8), ValueError, r"v must have shape \(2, 2, 50, 8\), got \(2, 2, 49, 8\)"),
        (2, torch.zeros(2, 2, 50, 8).half(), TypeError, "v must be torch.float32, got torch.float16"),
        (9, None, ValueError, "context_k and context_v must come together, got one alone"),
        (9, torch.zeros(2, 2, 4, 8), ValueError, r"context_v must have shape \(2, 2, 5, 8\)"),
        (13, 0, ValueError, r"rows must be in \[1, 64\], got 0"),
        (13, MAX_PROBES + 1, ValueError, r"rows must be in \[1, 64\], got 65"),
        (14, -1, ValueError, "interval must be at least 0, got -1"),
    ],
)
def test_bad_input_is_named(position, value, error, message):
    case = plain_case()
    arguments = list(arguments_of(case, values_of(case)))
    arguments[position] = value
    with pytest.raises(error, match=message):
        svg2.probe_rows(*arguments)


@pytest.mark.parametrize("context", [0, 5])
def test_opcheck(context):
    case = plain_case(context=context)
    torch.library.opcheck(svg2.probe_rows.default, arguments_of(case, values_of(case), rows=7))
