"""Block-sparse attention in Gluon: on a Hopper GPU, as exact as the reference."""

import math

import attention_cases
import pytest
import torch

from svg2_compile.kernels.why_not import GLUON_DIMS, GLUON_DTYPES, why_not_gluon
from svg2_compile.kernels.work_list import kept_runs_reference

REASON = why_not_gluon(torch.device("cuda"), torch.bfloat16, dim=128, rows=1) if torch.cuda.is_available() else "no GPU"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"not run by Gluon: {REASON}")]


def attend(case):
    from svg2_compile.kernels.block_sparse_attention_gluon import block_sparse_attention_gluon

    values = (x.cuda() if isinstance(x, torch.Tensor) else x for x in case.arguments())
    return tuple(x.cpu() for x in block_sparse_attention_gluon(*values))


def assert_kernel_is_accurate(case):
    attention_cases.assert_as_accurate(attend(case), case.low_precision(), case.exact(), case.largest_score())


@pytest.fixture(params=GLUON_DIMS)
def random_case(request):
    """Make cases of one head dimension: each has a kernel of its own, with other tiles."""
    defaults = {"batch": 1, "groups": 1, "repeats": 2, "q_clusters": 3, "context": 0, "dtype": torch.bfloat16}
    return lambda **changes: attention_cases.random_case(**(defaults | {"dim": request.param} | changes))


@pytest.mark.parametrize("dtype", GLUON_DTYPES)
@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 127, 128, 129, 191, 192, 193])
def test_any_number_of_tokens(random_case, tokens, dtype):
    assert_kernel_is_accurate(random_case(tokens=tokens, k_tokens=tokens, dtype=dtype))


@pytest.mark.parametrize("dtype", GLUON_DTYPES)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.1])
def test_thousands_of_tokens_in_any_layout_and_order(random_case, density, shuffled, strided, dtype):
    sizes = {"tokens": 1000, "k_tokens": 2000, "q_clusters": 7, "k_clusters": 61, "context": 300}
    assert_kernel_is_accurate(random_case(**sizes, density=density, strided=strided, shuffled=shuffled, dtype=dtype))


@pytest.mark.parametrize("q_kind", ["half empty", "giant", "singletons"])
@pytest.mark.parametrize("k_kind", ["half empty", "giant", "singletons"])
def test_clusters_of_any_size(random_case, q_kind, k_kind):
    assert_kernel_is_accurate(random_case(q_kind=q_kind, k_kind=k_kind, k_clusters=33, tokens=200, k_tokens=200))


@pytest.mark.parametrize("context_mask", [False, True])
@pytest.mark.parametrize("context", [1, 15, 128, 129])
@pytest.mark.parametrize("density", [0.0, 0.5])
def test_context_keys_are_attended_to_where_the_mask_admits(random_case, context, context_mask, density):
    assert_kernel_is_accurate(random_case(batch=2, context=context, context_mask=context_mask, density=density))


@pytest.mark.parametrize(("batch", "groups", "repeats"), [(1, 1, 1), (2, 1, 3), (2, 3, 1), (2, 2, 2)])
def test_any_batch_and_queries_sharing_key_heads(random_case, batch, groups, repeats):
    assert_kernel_is_accurate(random_case(batch=batch, groups=groups, repeats=repeats, context=15, shuffled=True))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_any_scale(random_case, scale):
    assert_kernel_is_accurate(random_case(context=15).replace(scale=scale))


def test_a_row_that_attends_to_nothing_is_zero_with_lse_minus_infinity(random_case):
    out, lse = attend(random_case(density=-1.0))
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def with_key_sizes(case, sizes):
    return case.replace(k_sizes=torch.tensor(sizes).int().expand(*case.k_sizes.shape[:2], -1).contiguous())


# Of the seven clusters the odd ones are kept: no run merges.
@pytest.mark.parametrize(
    "sizes",
    [
        [5, 1, 5, 15, 5, 7, 5],  # no full piece
        [5, 16, 5, 32, 5, 128, 5],  # no tail
        [5, 17, 5, 31, 5, 129, 5],
        [5, 1, 5, 160, 5, 16, 5],  # classes out of order
        [0, 112, 1, 0, 0, 9, 6],  # a tile with one slot left for two tails
        [1000, 640, 1000, 1, 1000, 15, 1000],
    ],
)
@pytest.mark.parametrize("context", [0, 15])
def test_runs_of_any_length(random_case, context, sizes):
    case = with_key_sizes(random_case(k_tokens=sum(sizes), context=context), sizes)
    case.keep[:] = torch.arange(7) % 2 == 1
    assert_kernel_is_accurate(case)


def test_hundreds_of_runs_shorter_than_a_piece(random_case):
    case = random_case(k_tokens=1023, k_clusters=1023, k_kind="singletons")
    case.keep[:] = torch.arange(1023) % 2 == 1
    assert_kernel_is_accurate(case)


@pytest.mark.parametrize("sizes", [[9] * 7, [16] * 7, [150] * 7, [1, 300, 2, 16, 3, 15, 4]])
@pytest.mark.parametrize("kept_clusters", [[0], [6], [1, 3, 5], [0, 2, 4, 6]])
def test_dropped_keys_cannot_influence_the_output_even_as_nan(random_case, kept_clusters, sizes):
    case = with_key_sizes(random_case(k_tokens=sum(sizes), batch=2, groups=2), sizes)
    case.keep[:] = torch.isin(torch.arange(7), torch.tensor(kept_clusters))
    unseen = ~case.keep[0, 0, 0].repeat_interleave(torch.tensor(sizes))[:, None]
    poisoned = case.replace(k=case.k.masked_fill(unseen, math.nan), v=case.v.masked_fill(unseen, math.nan))
    for got, expected in zip(attend(poisoned), attend(case), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("context", [1, 128, 300])
@pytest.mark.parametrize("density", [0.0, 0.5])
def test_masked_context_keys_cannot_influence_the_output_even_as_nan(random_case, density, context):
    case = random_case(batch=2, context=context, density=density)
    unseen = ~case.context_mask.mT
    changes = {name: getattr(case, name).masked_fill(unseen, math.nan) for name in ("context_k", "context_v")}
    for got, expected in zip(attend(case.replace(**changes)), attend(case), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("density", [0.0, 0.5])
def test_the_context_of_another_head_cannot_influence_the_output_even_as_nan(random_case, density):
    case = random_case(groups=2, context=15, context_mask=False, density=density)
    changes = {name: getattr(case, name).clone() for name in ("context_k", "context_v")}
    for x in changes.values():
        x[:, 1] = math.nan
    got, expected = attend(case.replace(**changes)), attend(case)
    heads = slice(case.q.shape[1] // 2)
    assert torch.equal(got[0][:, heads], expected[0][:, heads])
    assert torch.equal(got[1][:, heads], expected[1][:, heads])


def test_runs_past_their_number_may_hold_anything(random_case):
    case = random_case(density=0.4)
    kept = kept_runs_reference(case.keep, case.k_sizes)
    unused = torch.arange(kept.runs.shape[3]) >= kept.counts[..., :1]
    poisoned = case.replace(runs=kept.runs.masked_fill(unused.unsqueeze(-1), 2**31 - 1), counts=kept.counts)
    for got, expected in zip(attend(poisoned), attend(case), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shuffled", [False, True])
def test_what_is_found_in_memory_makes_no_difference(random_case, monkeypatch, shuffled):
    case = random_case(density=0.5, q_kind="half empty", shuffled=shuffled)
    expected = attend(case)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # it was not a number before
    for got, wanted in zip(attend(case), expected, strict=True):
        assert torch.equal(got, wanted)


def test_same_input_gives_the_same_bits(random_case):
    case = random_case(tokens=1000, k_tokens=2000, k_clusters=61, context=15)
    first = attend(case)
    for _ in range(5):
        assert all(torch.equal(got, expected) for got, expected in zip(attend(case), first, strict=True))


def test_the_op_takes_it(random_case):
    case = random_case(tokens=300, k_tokens=300, shuffled=True)
    values = tuple(x.cuda() if isinstance(x, torch.Tensor) else x for x in case.arguments())
    got = torch.ops.svg2.block_sparse_attention(*values)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(got, attend(case), strict=True))
