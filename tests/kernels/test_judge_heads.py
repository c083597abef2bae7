"""``svg2::judge_heads_``: a head that kept too little is dense from then on, and counts as whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.judge_heads import DENSE_HEADS

PROPERTY = settings(max_examples=60, deadline=None)


def counter(calls):
    return torch.tensor([calls], dtype=torch.int32)


@st.composite
def recalls(draw):
    """Return the recall of some heads, as a call that measures finds it."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    recall = torch.rand(shape, generator=generator)
    return torch.stack((torch.ones(shape), recall), -1)


@PROPERTY
@given(recalls(), recalls(), st.sampled_from([0.2, 0.5, 0.9]), st.integers(1, 9))
def test_heads_below_the_least_recall_become_dense_once_and_count_as_whole(found, later, min_recall, calls):
    _, recall = found.unbind(-1)
    dense_heads = torch.zeros_like(found)
    is_dense = recall < min_recall
    judged = torch.ops.svg2.judge_heads_(found, counter(calls), dense_heads, min_recall)
    assert torch.equal(judged, torch.stack((torch.ones_like(recall), recall.masked_fill(is_dense, 1.0)), -1))
    assert torch.equal(dense_heads, torch.stack((calls * is_dense.float(), recall * is_dense), -1))
    if later.shape != found.shape:
        later = found
    first = dense_heads.clone()
    judged = torch.ops.svg2.judge_heads_(later, counter(calls + 1), dense_heads, min_recall)
    assert torch.equal(dense_heads[is_dense], first[is_dense])
    assert (judged[..., 1][is_dense] == 1).all()


def test_a_call_that_is_not_measured_makes_no_head_dense_and_counts_for_nothing():
    dense_heads = torch.zeros(2, 4, len(DENSE_HEADS))
    dense_heads[0, 1] = torch.tensor([3.0, 0.1])
    first = dense_heads.clone()
    judged = torch.ops.svg2.judge_heads_(torch.zeros(2, 4, 2), counter(5), dense_heads, 0.5)
    assert torch.equal(dense_heads, first) and (judged == 0).all()


def test_a_recall_of_exactly_the_least_stays_sparse():
    dense_heads, found = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0.5]]])
    assert torch.equal(torch.ops.svg2.judge_heads_(found, counter(1), dense_heads, 0.5), found)
    assert (dense_heads == 0).all()


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(2, 4, 3), ValueError, r"found must have shape \(2, 4, 2\), got \(2, 4, 3\)"),
        (0, torch.zeros(2, 4, 2).half(), TypeError, "found must be torch.float32 or torch.float64, got torch.float16"),
        (1, torch.zeros(1), TypeError, "k_calls must be torch.int32, got torch.float32"),
        (2, torch.zeros(2, 4, 1), ValueError, r"dense_heads must have shape \(2, 4, 2\), got \(2, 4, 1\)"),
        (2, torch.zeros(2, 4, 2).double(), TypeError, "dense_heads must be torch.float32, got torch.float64"),
    ],
)
def test_bad_input_is_named(position, value, error, message):
    arguments = [torch.zeros(2, 4, 2), counter(1), torch.zeros(2, 4, 2), 0.5]
    arguments[position] = value
    with pytest.raises(error, match=message):
        torch.ops.svg2.judge_heads_(*arguments)


def test_opcheck():
    arguments = (torch.rand(2, 4, 2).ceil(), counter(1), torch.zeros(2, 4, 2), 0.5)
    torch.library.opcheck(torch.ops.svg2.judge_heads_.default, arguments)
