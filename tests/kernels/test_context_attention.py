"""``svg2::context_attention``: dense attention of a few rows, of any number including none."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.context_attention import context_attention_reference

PROPERTY = settings(max_examples=50, deadline=None)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SCALE = 0.2


def random_case(seed=0, dtype=torch.float32, batch=2, groups=2, repeats=2, rows=15, tokens=65, dim=24, masked=True):
    """Return q [B, H, M, D] and k, v [B, G, N, D], seen through a transpose, and a key mask."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, n, heads, dim, generator=generator).to(dtype).transpose(1, 2)
        for n, heads in ((rows, groups * repeats), (tokens, groups), (tokens, groups))
    )
    key_mask = torch.rand(batch, 1, 1, tokens, generator=generator) < 0.5
    return q, k, v, key_mask if masked else None


@st.composite
def context_cases(draw):
    return random_case(
        seed=draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from(DTYPES)),
        batch=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 2)),
        repeats=draw(st.integers(1, 2)),
        rows=draw(st.sampled_from([0, 1, 15, 63])),
        tokens=draw(st.sampled_from([1, 15, 63, 64, 65, 1000])),
        dim=draw(st.sampled_from([8, 24, 64])),
        masked=draw(st.booleans()),
    )


def low_precision(q, k, v, key_mask):
    """Return the same attention in three plain operations that each round to the dtype of q."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * SCALE
    scores = scores if key_mask is None else scores.masked_fill(~key_mask, -math.inf)
    return scores.softmax(-1).nan_to_num(0) @ v


@PROPERTY
@given(context_cases())
@pytest.mark.parametrize("attend", [torch.ops.svg2.context_attention, context_attention_reference])
def test_output_is_as_accurate_as_plain_attention(attend, case):
    q, k, v, key_mask = case
    out = attend(q, k, v, key_mask, SCALE)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous()
    if q.numel() == 0:
        return
    # At most twice the error of low-precision arithmetic, plus one step of the result, and one of the largest score,
    # which moves every weight by as much relative to itself: the result by that times the mean magnitude of the values.
    exact, magnitude = (
        context_attention_reference(q.double(), k.double(), values.double(), key_mask, SCALE) for values in (v, v.abs())
    )
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * SCALE
    step = torch.finfo(q.dtype).eps * (exact.abs().max() + scores.abs().max() * magnitude.max())
    allowed = 2 * (low_precision(q, k, v, key_mask).double() - exact).abs().max() + step
    assert (out.double() - exact).abs().max() <= allowed


@PROPERTY
@given(context_cases())
def test_reference_in_fp64_is_plain_attention_in_fp64(case):
    """A wrong reference would judge itself right and, as the yardstick above, widen every tolerance."""
    q, k, v, key_mask = case
    q, k, v = q.double(), k.double(), v.double()
    # a step of the largest value per summed key, which is where the orders of summation differ
    step = torch.finfo(torch.float64).eps * max(1.0, v.abs().max().item())
    reference, plain = context_attention_reference(q, k, v, key_mask, SCALE), low_precision(q, k, v, key_mask)
    torch.testing.assert_close(reference, plain, rtol=0, atol=k.shape[2] * step)


@PROPERTY
@given(context_cases())
def test_same_input_gives_the_same_bits(case):
    first, second = (torch.ops.svg2.context_attention(*case, SCALE) for _ in range(2))
    assert torch.equal(first, second)


def test_a_row_that_attends_to_nothing_is_zero():
    q, k, v, key_mask = random_case()
    assert (torch.ops.svg2.context_attention(q, k, v, torch.zeros_like(key_mask), SCALE) == 0).all()


def test_rows_of_any_stride():
    q, k, v, key_mask = random_case()
    awkward = (x.mT.contiguous().mT for x in (q, k, v))
    expected = torch.ops.svg2.context_attention(q, k, v, key_mask, SCALE)
    torch.testing.assert_close(torch.ops.svg2.context_attention(*awkward, key_mask, SCALE), expected)


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(2, 4, 15, 24).int(), TypeError, "q must be .* got torch.int32"),
        (1, torch.zeros(2, 3, 65, 24), ValueError, "multiple of the key/value heads, got 4 and 3"),
        (2, torch.zeros(2, 2, 64, 24), ValueError, r"v must have shape \(2, 2, 65, 24\), got \(2, 2, 64, 24\)"),
        (3, torch.zeros(2, 1, 1, 65), TypeError, "key_mask must be torch.bool, got torch.float32"),
        (3, torch.zeros(2, 1, 15, 65).bool(), ValueError, r"key_mask must have shape \(2, 1, 1, 65\)"),
    ],
)
def test_bad_input_is_named(position, value, error, message):
    arguments = [*random_case(), SCALE]
    arguments[position] = value
    with pytest.raises(error, match=message):
        torch.ops.svg2.context_attention(*arguments)


@pytest.mark.parametrize("rows", [0, 15])
def test_opcheck(rows):
    torch.library.opcheck(torch.ops.svg2.context_attention.default, (*random_case(rows=rows), SCALE))


def test_compiled_equals_eager():
    case = random_case()
    compiled = torch.compile(lambda *args: torch.ops.svg2.context_attention(*args, SCALE), fullgraph=True)
    assert torch.equal(compiled(*case), torch.ops.svg2.context_attention(*case, SCALE))


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_row_count_unknown_at_compile_time_needs_no_guard():
    q, k, v, key_mask = random_case(batch=1)

    def attend(visible):
        rows = q.index_select(2, visible.nonzero().squeeze(1))
        return torch.ops.svg2.context_attention(rows, k, v, key_mask, SCALE)

    compiled = torch.compile(attend, fullgraph=True)
    for count in (3, 0, 15):
        visible = torch.arange(15) < count
        assert torch.equal(compiled(visible), attend(visible))
