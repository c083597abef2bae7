"""``svg2::measure_recall``: the share of the softmax that the kept keys hold, on some rows, exactly."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recall_cases import plain_case, recall_cases, tolerance

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels import measure_recall as recall_module
from svg2_compile.kernels.sort_labels import sort_labels_reference

PROPERTY = settings(max_examples=60, deadline=None)


@PROPERTY
@given(recall_cases())
def test_recall_of_every_row_is_that_of_the_dense_matrix(case):
    calls, recall = case.measure()
    assert (calls == 1).all()
    torch.testing.assert_close(recall.double(), case.exact().mean(-1), rtol=0, atol=tolerance(case))


@PROPERTY
@given(recall_cases(), st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**31 - 1))
def test_recall_of_some_rows_is_the_mean_of_theirs(case, rows, calls, seed):
    _, recall = case.measure(rows=rows, calls=calls, seed=seed)
    q_order = sort_labels_reference(case.q_labels, case.keep.shape[2])[0].long()
    tokens = case.q.shape[2]
    positions = recall_module.sampled_positions(tokens, min(rows, tokens), torch.tensor([calls]), seed)
    assert positions.unique().numel() == min(rows, tokens) and positions.min() >= 0 and positions.max() < tokens
    expected = case.exact().gather(2, q_order[..., positions]).mean(-1)
    torch.testing.assert_close(recall.double(), expected, rtol=0, atol=tolerance(case))


@PROPERTY
@given(recall_cases())
def test_recall_is_one_where_everything_is_kept(case):
    _, recall = dataclasses.replace(case, keep=torch.ones_like(case.keep)).measure()
    assert (recall == 1).all()


@PROPERTY
@given(recall_cases())
def test_hidden_keys_cannot_influence_it(case):
    is_hidden = (case.k_labels == case.keep.shape[3]).unsqueeze(-1)
    context_k = case.context_k
    if case.context_mask is not None:
        context_k = context_k.masked_fill(~case.context_mask.mT, math.nan)
    poisoned = dataclasses.replace(case, k=case.k.masked_fill(is_hidden, math.nan), context_k=context_k)
    assert all(map(torch.equal, case.measure(), poisoned.measure()))


@PROPERTY
@given(recall_cases())
def test_the_chunks_of_heads_make_no_difference(case):
    whole = case.measure()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall_module, "CHUNK_BYTES", 1)
        for one, other in zip(whole, case.measure()):
            torch.testing.assert_close(one, other, rtol=0, atol=2 * tolerance(case))


def test_different_calls_look_at_different_rows_and_together_at_all():
    seen = [recall_module.sampled_positions(1000, 10, torch.tensor([call], dtype=torch.int32), 3) for call in range(60)]
    assert all(((each[1:] - each[:-1] - 100).abs() <= 1).all() for each in seen)
    gaps = torch.cat(seen).unique().diff()
    assert gaps.max() <= 4  # 60 calls of 10 rows over 1000 leave 1.7 between; a golden section at most a few times that


def test_positions_of_the_longest_sequence_do_not_overflow():
    positions = recall_module.sampled_positions(2**31 - 1, 64, torch.tensor([2**31 - 1], dtype=torch.int32), 2**31 - 1)
    assert positions.min() >= 0 and positions.max() < 2**31 - 1 and (positions.diff() > 0).all()


def test_only_every_interval_th_call_of_a_generation_is_measured():
    case = plain_case()
    measured = [bool(case.measure(calls=call, interval=3)[0].all()) for call in range(1, 8)]
    assert measured == [True, False, False, True, False, False, True]


def test_a_row_that_sees_no_key_has_lost_nothing():
    case = dataclasses.replace(plain_case(), keep=torch.zeros(2, 4, 3, 6).bool())
    blind = dataclasses.replace(
        case, k_labels=torch.full_like(case.k_labels, 6), context_mask=torch.zeros_like(case.context_mask)
    )
    assert (blind.measure()[1] == 1).all()


def test_autocast_does_not_round_the_scores():
    case = plain_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = case.measure()
    assert all(map(torch.equal, rounded, case.measure()))


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(2, 4, 40, 8).int(), TypeError, "q must be .* got torch.int32"),
        (1, torch.zeros(2, 3, 50, 8), ValueError, "multiple of the key/value heads, got 4 and 3"),
        (2, torch.zeros(2, 4, 41).int(), ValueError, r"q_order must have shape \(2, 4, 40\), got \(2, 4, 41\)"),
        (7, None, ValueError, "context_mask must come with context_k"),
        (9, torch.zeros(2).int(), ValueError, r"k_calls must have shape \(1,\), got \(2,\)"),
        (11, 0, ValueError, "rows must be at least 1, got 0"),
        (12, 0, ValueError, "interval must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(position, value, error, message):
    arguments = list(plain_case().arguments())
    arguments[position] = value
    with pytest.raises(error, match=message):
        torch.ops.svg2.measure_recall(*arguments)


@pytest.mark.parametrize("context", [0, 5])
def test_opcheck(context):
    torch.library.opcheck(torch.ops.svg2.measure_recall.default, plain_case(context=context).arguments(rows=7))
