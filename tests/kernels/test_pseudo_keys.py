"""Pseudo-keys of ``svg2::block_sparse_attention``: means of what is dropped, in the same softmax."""

import math

import pytest
import torch
from attention_cases import assert_as_accurate, block_cases, random_case
from hypothesis import given, settings
from pseudo_cases import compensated, some_bias, with_any_bias

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.block_sparse_attention import block_sparse_attention_reference

PROPERTY = settings(max_examples=30, deadline=None)


@PROPERTY
@given(some_bias(block_cases()))
def test_output_is_as_accurate_as_plain_attention_with_more_keys(case):
    case.assert_right()


@PROPERTY
@given(some_bias(block_cases()))
def test_reference_is_as_accurate_as_plain_attention_with_more_keys(case):
    case.assert_right(block_sparse_attention_reference(*case.arguments()))


@PROPERTY
@given(some_bias(block_cases()))
def test_reference_in_fp64_is_plain_attention_in_fp64(case):
    """A wrong reference would judge itself right and, as the yardstick above, widen every tolerance."""
    case = case.to(torch.float64)
    values = max(v.abs().max().item() for v in (case.case.v, case.v))
    for got, wanted in zip(case.exact(), case.low_precision(), strict=True):
        size = 1 + values * (1 + case.largest_score())
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13 * size)


@PROPERTY
@given(block_cases(density=1.0))
def test_where_everything_is_kept_the_bits_are_those_without_means(case):
    for got, wanted in zip(compensated(case).attend(), case.attend(), strict=True):
        assert torch.equal(got, wanted)


@PROPERTY
@given(block_cases(context=0))
def test_clusters_of_equal_keys_and_values_give_dense_attention_whatever_is_kept(case):
    same = []
    for x in (case.k, case.v):
        ends = case.k_sizes.cumsum(-1)
        token = torch.arange(x.shape[2]).expand(*ends.shape[:2], -1).contiguous()
        cluster = torch.searchsorted(ends, token.int(), right=True)
        first = (ends - case.k_sizes).long().gather(2, cluster).unsqueeze(-1)
        same.append(x.gather(2, first.expand(x.shape)))
    case = case.replace(k=same[0], v=same[1])
    dense = case.replace(keep=torch.ones_like(case.keep))
    exact, largest = dense.exact(), compensated(case).largest_score()
    assert_as_accurate(compensated(case).attend(), dense.low_precision(), exact, largest)


def test_what_a_dropped_cluster_gives_is_one_key_with_the_weight_of_all():
    """By hand: one query, two keys at 1 and 3 in a dropped cluster, one at 0 that is kept."""
    case = random_case(batch=1, groups=1, repeats=1, tokens=1, k_tokens=3, dim=8, q_clusters=1, k_clusters=2, context=0)
    k = torch.zeros(1, 1, 3, 8)
    k[..., 0] = torch.tensor([0.0, 1.0, 3.0])
    v = torch.zeros(1, 1, 3, 8)
    v[..., 0] = torch.tensor([5.0, 7.0, 11.0])
    sizes = torch.tensor([[[1, 2]]], dtype=torch.int32)
    keep = torch.tensor([True, False]).view(1, 1, 1, 2)
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 1.0
    out, lse = compensated(case.replace(q=q, k=k, v=v, k_sizes=sizes, keep=keep, scale=1.0)).attend()
    heavy = 2 * math.exp(2)
    assert lse.item() == pytest.approx(math.log(1 + heavy))
    assert out[0, 0, 0, 0].item() == pytest.approx((5 + heavy * 9) / (1 + heavy))


@PROPERTY
@given(some_bias(block_cases(density=0.5)))
def test_what_is_left_out_for_everybody_is_not_even_read(case):
    repeats = case.case.q.shape[1] // case.k.shape[1]
    unseen = ~(case.bias > -math.inf).any(2).unflatten(1, (-1, repeats)).any(2).unsqueeze(-1)
    poisoned = case.replace(k=case.k.masked_fill(unseen, math.nan), v=case.v.masked_fill(unseen, math.nan))
    for got, expected in zip(poisoned.attend(), case.attend(), strict=True):
        assert torch.equal(got, expected)


def test_a_query_cluster_that_leaves_a_mean_out_is_blind_to_it_even_if_others_see_it():
    case = with_any_bias(random_case(batch=1, groups=1, repeats=1, q_kind="uneven"), 5, seed=0, admitted=1.0)
    bias = case.bias.clone()
    bias[:, :, 0, 2] = -math.inf
    case = case.replace(bias=bias)
    v = case.v.clone()
    v[:, :, 2] = math.nan
    rows = int(case.case.q_sizes[0, 0, 0])
    assert rows > 0
    got, wanted = case.replace(v=v).attend()[0], case.attend()[0]
    assert torch.equal(got[0, 0, :rows], wanted[0, 0, :rows])
    assert got[0, 0, rows:].isnan().all()


def test_means_alone_are_attended_to_where_nothing_is_kept():
    case = random_case(context=0, density=0.0)
    out, lse = compensated(case).attend()
    assert lse.isfinite().all() and out.isfinite().all()
    assert (case.attend()[1] == -math.inf).all()


def test_none_of_none_is_the_attention_without():
    case = random_case()
    for got, wanted in zip(with_any_bias(case, 0, seed=0).attend(), case.attend(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": None}, ValueError, "pseudo_k, pseudo_v and pseudo_bias must be given together"),
        ({"bias": None}, ValueError, "pseudo_k, pseudo_v and pseudo_bias must be given together"),
        ({"k": torch.zeros(2, 2, 3)}, ValueError, "pseudo_k must have 4 axes"),
        ({"k": torch.zeros(2, 2, 3, 23)}, ValueError, r"pseudo_k must have shape \(2, 2, 3, 24\)"),
        ({"v": torch.zeros(2, 2, 4, 24)}, ValueError, r"pseudo_v must have shape \(2, 2, 3, 24\)"),
        ({"bias": torch.zeros(2, 4, 5, 4)}, ValueError, r"pseudo_bias must have shape \(2, 4, 5, 3\)"),
        ({"bias": torch.zeros(2, 4, 5, 3).double()}, TypeError, "pseudo_bias must be torch.float32"),
        ({"v": torch.zeros(2, 2, 3, 24).half()}, TypeError, "pseudo_v must be torch.float32"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    case = with_any_bias(random_case(), 3, seed=0)
    with pytest.raises(error, match=message):
        case.replace(**changes).attend()


def test_opcheck():
    case = compensated(random_case(shuffled=True))
    torch.library.opcheck(torch.ops.svg2.block_sparse_attention.default, case.arguments())


def test_compiled_it_is_the_same():
    case = compensated(random_case(shuffled=True))
    compiled = torch.compile(lambda *arguments: torch.ops.svg2.block_sparse_attention(*arguments), fullgraph=True)
    for got, wanted in zip(compiled(*case.arguments()), case.attend(), strict=True):
        assert torch.equal(got, wanted)
