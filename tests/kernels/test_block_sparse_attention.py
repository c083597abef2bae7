"""``svg2::block_sparse_attention``: exact on what is kept, blind to what is not."""

import math

import pytest
import torch
from attention_cases import DTYPES, assert_as_accurate, block_cases, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.block_sparse_attention import block_sparse_attention_reference
from svg2_compile.kernels.work_list import kept_runs_reference

PROPERTY = settings(max_examples=50, deadline=None)


@PROPERTY
@given(block_cases())
def test_output_is_as_accurate_as_plain_attention(case):
    out, lse = case.attend()
    assert out.dtype == case.q.dtype
    assert lse.dtype == torch.float32
    assert (out if case.q_order is None else out.transpose(1, 2)).is_contiguous()
    assert lse.is_contiguous()
    assert_as_accurate((out, lse), case.low_precision(), case.exact(), case.largest_score())


@PROPERTY
@given(block_cases())
def test_reference_is_as_accurate_as_plain_attention(case):
    reference = block_sparse_attention_reference(*case.arguments())
    assert_as_accurate(reference, case.low_precision(), case.exact(), case.largest_score())


@PROPERTY
@given(block_cases())
def test_reference_in_fp64_is_plain_attention_in_fp64(case):
    """A wrong reference would judge itself right and, as the yardstick above, widen every tolerance."""
    case = case.to(torch.float64)
    eps, keys, dim = torch.finfo(torch.float64).eps, case.mask().shape[-1], case.q.shape[-1]
    # Two orders of summation differ by at most a step of the sum of magnitudes per term: dim of them in a score, which
    # moves the lse by as much and every weight of the output by twice as much relative to itself, then all the keys.
    context_k = None if case.context_k is None else case.context_k.abs()
    magnitudes = case.replace(q=case.q.abs(), k=case.k.abs(), context_k=context_k).largest_score()
    scores = (dim + 1) * eps * magnitudes
    value = max(v.abs().max().item() for v in (case.v, case.context_v) if v is not None)
    for got, wanted, moved in zip(case.exact(), case.low_precision(), (2 * scores * value, scores), strict=True):
        largest = max(1.0, value, *wanted[wanted.isfinite()].abs().flatten().tolist())
        torch.testing.assert_close(got, wanted, rtol=0, atol=keys * eps * largest + moved)


@PROPERTY
@given(block_cases(density=1.0, context=0))
def test_keeping_everything_is_dense_attention(case):
    dense = torch.nn.functional.scaled_dot_product_attention(
        case.q.double(), case.k.double(), case.v.double(), scale=case.scale, enable_gqa=True
    )
    assert_as_accurate(case.attend()[:1], case.low_precision()[:1], [dense], case.largest_score())


@PROPERTY
@given(block_cases(density=0.2))
def test_dropped_keys_cannot_influence_the_output(case):
    # Keys no query attends to become NaN: the result must keep its bits.
    repeats = case.q.shape[1] // case.k.shape[1]
    seen = case.mask().any(2).unflatten(1, (-1, repeats)).any(2).unsqueeze(-1)  # [B, G, N_k + M, 1]
    split = [case.k.shape[2], seen.shape[2] - case.k.shape[2]]
    seen_tokens, seen_context = seen.split(split, dim=2)
    poisoned = {name: getattr(case, name).masked_fill(~seen_tokens, math.nan) for name in ("k", "v")}
    if case.context_k is not None:
        for name in ("context_k", "context_v"):
            poisoned[name] = getattr(case, name).masked_fill(~seen_context, math.nan)
    for got, expected in zip(case.replace(**poisoned).attend(), case.attend(), strict=True):
        assert torch.equal(got, expected)


@PROPERTY
@given(block_cases(dtypes=[torch.float32], batch=1, groups=1, repeats=1, k_kind="uneven", density=0.5, shuffled=False))
def test_a_dropped_cluster_is_invisible_to_its_row_even_if_others_see_it(case):
    out, _ = case.attend()
    row_of_token = torch.arange(case.q_sizes.shape[-1]).repeat_interleave(case.q_sizes[0, 0].long())
    cluster_of_key = torch.arange(case.k_sizes.shape[-1]).repeat_interleave(case.k_sizes[0, 0].long())
    poison = (cluster_of_key == 0)[:, None]
    poisoned = case.replace(k=case.k.masked_fill(poison, math.nan), v=case.v.masked_fill(poison, math.nan))
    blind = ~case.keep[0, 0, row_of_token, 0]
    assert torch.equal(poisoned.attend()[0][0, 0, blind], out[0, 0, blind])


@PROPERTY
@given(block_cases(), st.randoms(use_true_random=False))
def test_relabelling_key_clusters_changes_nothing(case, random):
    clusters = list(range(case.k_sizes.shape[-1]))
    random.shuffle(clusters)
    starts = case.k_sizes.cumsum(-1) - case.k_sizes
    token_order = torch.stack(
        [
            torch.cat([torch.arange(starts[b, g, c], starts[b, g, c] + case.k_sizes[b, g, c]) for c in clusters])
            for b in range(case.k.shape[0])
            for g in range(case.k.shape[1])
        ]
    ).view(case.k.shape[:3])
    index = token_order.unsqueeze(-1).expand(case.k.shape)
    relabelled = case.replace(
        k=case.k.gather(2, index),
        v=case.v.gather(2, index),
        k_sizes=case.k_sizes[..., clusters],
        keep=case.keep[..., clusters],
    )
    assert_as_accurate(relabelled.attend(), case.low_precision(), case.exact(), case.largest_score())


@PROPERTY
@given(block_cases(q_kind="giant", shuffled=False))
def test_permuting_queries_within_a_cluster_permutes_the_output(case):
    order = torch.randperm(case.q.shape[2], generator=torch.Generator().manual_seed(0))
    permuted = case.replace(q=case.q[:, :, order]).attend()
    low_precision, exact = ([x[:, :, order] for x in pair] for pair in (case.low_precision(), case.exact()))
    assert_as_accurate(permuted, low_precision, exact, case.largest_score())


@PROPERTY
@given(block_cases(shuffled=True))
def test_queries_in_their_own_order_are_the_permuted_attention_put_back(case):
    permuted = case.replace(q=torch.ops.svg2.permute_tokens(case.q, case.q_order), q_order=None)
    out, lse = permuted.attend()
    got_out, got_lse = case.attend()
    assert torch.equal(got_out, torch.ops.svg2.unpermute_tokens(out, case.q_order))
    assert torch.equal(got_lse.gather(2, case.q_order.long()), lse)


@PROPERTY
@given(block_cases())
def test_same_input_gives_the_same_bits(case):
    for first, second in zip(case.attend(), case.attend(), strict=True):
        assert torch.equal(first, second)


def test_two_halves_merge_by_their_log_sum_exp():
    case = random_case(context=0)
    (out_a, lse_a), (out_b, lse_b) = case.attend(), case.replace(keep=~case.keep).attend()
    lse = torch.logaddexp(lse_a, lse_b)
    merged = out_a * (lse_a - lse).exp().unsqueeze(-1) + out_b * (lse_b - lse).exp().unsqueeze(-1)
    everything = case.replace(keep=torch.ones_like(case.keep))
    torch.testing.assert_close(merged, everything.attend()[0], rtol=1e-5, atol=1e-6)


def test_a_row_that_attends_to_nothing_is_zero_with_lse_minus_infinity():
    case = random_case(context=0)
    out, lse = case.replace(keep=torch.zeros_like(case.keep)).attend()
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_a_thousand_tokens():
    case = random_case(tokens=1000, k_tokens=1000, dim=64, q_clusters=7, k_clusters=31, density=0.3)
    assert_as_accurate(case.attend(), case.low_precision(), case.exact(), case.largest_score())


def test_rows_of_any_stride():
    case = random_case()
    awkward = {name: getattr(case, name).mT.contiguous().mT for name in ("q", "k", "v", "context_k", "context_v")}
    for got, expected in zip(case.replace(**awkward).attend(), case.attend(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 4, 65, 24).int()}, TypeError, "q must be .* got torch.int32"),
        ({"k": torch.zeros(2, 2, 63, 24).half()}, TypeError, "k must be torch.float32, got torch.float16"),
        ({"v": torch.zeros(2, 2, 62, 24)}, ValueError, r"v must have shape \(2, 2, 63, 24\), got \(2, 2, 62, 24\)"),
        ({"k": torch.zeros(2, 3, 63, 24)}, ValueError, "multiple of the key/value heads, got 4 and 3"),
        ({"runs": torch.ones(2, 4, 5, 4, 2)}, TypeError, "runs must be torch.int32, got torch.float32"),
        ({"runs": torch.ones(2, 4, 6, 4, 2).int()}, ValueError, r"counts must have shape \(2, 4, 6, 4\)"),
        ({"counts": torch.ones(2, 4, 5, 3).int()}, ValueError, r"counts must have shape \(2, 4, 5, 4\)"),
        ({"q_sizes": torch.ones(2, 4, 5).int()}, ValueError, "q_sizes must be non-negative and sum to 65"),
        ({"q_order": torch.zeros(2, 4, 64).int()}, ValueError, r"q_order must have shape \(2, 4, 65\)"),
        ({"q_order": torch.zeros(2, 4, 65)}, TypeError, "q_order must be torch.int32, got torch.float32"),
        ({"context_v": None}, ValueError, "context_k and context_v must be given together"),
        ({"context_k": None, "context_v": None}, ValueError, "context_mask only with them"),
        ({"context_mask": torch.ones(2, 1, 1, 14).bool()}, ValueError, r"context_mask must have shape \(2, 1, 1, 15\)"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        case = random_case()
        kept = kept_runs_reference(case.keep, case.k_sizes)
        case.replace(**({"runs": kept.runs, "counts": kept.counts} | changes)).attend()


@pytest.mark.parametrize("anything", [(0, 5), (2**31 - 1, 2**31 - 1), (-7, 3)])
def test_runs_past_their_number_may_hold_anything(anything):
    case = random_case(density=0.4)
    kept = kept_runs_reference(case.keep, case.k_sizes)
    unused = torch.arange(kept.runs.shape[3]) >= kept.counts[..., :1]
    assert unused.any()
    runs = torch.where(unused.unsqueeze(-1), torch.tensor(anything, dtype=torch.int32), kept.runs)
    poisoned = case.replace(runs=runs, counts=kept.counts)
    for implementation in (torch.ops.svg2.block_sparse_attention, block_sparse_attention_reference):
        for got, expected in zip(implementation(*poisoned.arguments()), implementation(*case.arguments()), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [0, 15])
@pytest.mark.parametrize("shuffled", [False, True])
def test_opcheck(dtype, context, shuffled):
    case = random_case(dtype=dtype, context=context, shuffled=shuffled)
    torch.library.opcheck(torch.ops.svg2.block_sparse_attention.default, case.arguments())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_compiled_equals_eager(dynamic, shuffled):
    case = random_case(shuffled=shuffled)
    compiled = torch.compile(
        lambda *args: torch.ops.svg2.block_sparse_attention(*args), fullgraph=True, dynamic=dynamic
    )
    for got, expected in zip(compiled(*case.arguments()), case.attend(), strict=True):
        assert torch.equal(got, expected)
