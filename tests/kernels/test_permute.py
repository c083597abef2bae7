"""``svg2::permute_tokens`` and ``svg2::unpermute_tokens``: bitwise copies in another order, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)

PROPERTY = settings(max_examples=40, deadline=None)
OPS = (torch.ops.svg2.permute_tokens, torch.ops.svg2.unpermute_tokens)


def random_order(batch, heads, tokens, generator=None):
    return torch.rand(batch, heads, tokens, generator=generator).argsort(-1).int()


@st.composite
def permute_cases(draw):
    """Tokens [B, H, N, D], contiguous or seen through a transpose, and an order for them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    tokens, dim = draw(st.sampled_from([1, 15, 63, 64, 65, 1000])), draw(st.sampled_from([1, 24, 64]))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    if draw(st.booleans()):
        x = torch.randn(batch, tokens, heads, dim, generator=generator).transpose(1, 2)
    else:
        x = torch.randn(batch, heads, tokens, dim, generator=generator)
    return x.to(dtype), random_order(batch, heads, tokens, generator)


@PROPERTY
@given(permute_cases())
def test_row_i_is_token_order_i(case):
    x, order = case
    y = torch.ops.svg2.permute_tokens(x, order)
    assert y.is_contiguous()
    for b, h in ((b, h) for b in range(x.shape[0]) for h in range(x.shape[1])):
        assert torch.equal(y[b, h], x[b, h][order[b, h].long()])


@PROPERTY
@given(permute_cases())
def test_unpermute_undoes_permute_and_stores_tokens_first(case):
    x, order = case
    y = torch.ops.svg2.unpermute_tokens(torch.ops.svg2.permute_tokens(x, order), order)
    assert torch.equal(y, x)
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("op", OPS)
def test_bad_input_is_named(op):
    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"order must have shape \(1, 2, 5\), got \(1, 2, 4\)"):
        op(x, torch.zeros(1, 2, 4, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"order must be torch\.int32, got torch\.int64"):
        op(x, torch.zeros(1, 2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="x must have 4 axes"):
        op(x[0], torch.zeros(2, 5, dtype=torch.int32))


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    torch.library.opcheck(op.default, (torch.randn(2, 65, 3, 8).transpose(1, 2), random_order(2, 3, 65)))


@pytest.mark.parametrize("op", OPS)
def test_compiled_equals_eager(op):
    x, order = torch.randn(2, 65, 3, 8).transpose(1, 2), random_order(2, 3, 65)
    got, expected = torch.compile(lambda x, order: op(x, order), fullgraph=True)(x, order), op(x, order)
    assert torch.equal(got, expected)
    assert got.stride() == expected.stride()
