"""``svg2::key_mask`` and ``svg2::redo_densely_``: what a mask does is read, and is done densely where it is more."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels import redo_densely as module

PROPERTY = settings(max_examples=100, deadline=None)
BATCH, HEADS, TOKENS = 2, 3, 7
key_mask = torch.ops.svg2.key_mask
HIDDEN = (-math.inf, torch.finfo(torch.float32).min, -1e38, -1e9, -65504.0, -1e4)


@st.composite
def key_masks(draw):
    """Return which keys are seen, [B or 1, 1, 1, N_k]; at least one of each batch element."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    seen = torch.rand(draw(st.sampled_from((1, BATCH))), 1, 1, TOKENS, generator=generator) < 0.6
    seen[..., draw(st.integers(0, TOKENS - 1))] = True
    return seen


@st.composite
def spellings(draw):
    """Return a mask that only hides keys, and which it shows."""
    seen = draw(key_masks())
    rows = draw(st.sampled_from((1, TOKENS, 5)))
    mask = seen.expand(-1, draw(st.sampled_from((1, HEADS))), rows, -1).clone()
    if rows == TOKENS and draw(st.booleans()):
        mask &= seen.transpose(2, 3)  # padding queries see nothing
    if draw(st.booleans()):
        dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
        value = draw(st.sampled_from(HIDDEN))
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(
            ~mask, max(value, torch.finfo(dtype).min) if math.isfinite(value) else value
        )
    return mask, seen


@PROPERTY
@given(spellings())
def test_a_mask_that_only_hides_keys_is_told_whatever_its_spelling(case):
    mask, seen = case
    keys, is_key_mask = key_mask(mask)
    assert torch.equal(keys, seen) and bool(is_key_mask)
    assert is_key_mask.device.type == "cpu"


@PROPERTY
@given(spellings(), st.data())
def test_a_mask_with_one_other_element_is_no_key_mask(case, data):
    """Boolean: a key is hidden from one query that sees others; added: one key is weighed."""
    mask, seen = case
    places = (mask == 0).nonzero() if mask.dtype is not torch.bool else mask.nonzero()
    place = tuple(places[data.draw(st.integers(0, len(places) - 1))].tolist())
    if mask.dtype is torch.bool:
        mask = mask.expand(-1, -1, 5 if mask.shape[2] == 1 else -1, -1).clone()
        if seen[min(place[0], len(seen) - 1)].sum() == 1:
            return  # the row sees nothing now: it may be padding
        mask[place] = False
    else:
        mask[place] = data.draw(st.sampled_from((0.5, -3.0, -100.0, math.nan, math.inf)))
    keys, is_key_mask = key_mask(mask)
    assert not bool(is_key_mask) and keys.all()


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None],
        torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(torch.ones(TOKENS, TOKENS).triu(1) > 0, -math.inf),
        torch.randn(1, HEADS, TOKENS, TOKENS),
        torch.full((BATCH, 1, 1, TOKENS), -1e4),
        torch.arange(TOKENS) >= torch.tensor([[[[0]], [[3]]]]),
        (torch.arange(TOKENS) != 2)[None, None, :, None].expand(1, 1, TOKENS, TOKENS),
    ],
    ids=[
        "causal",
        "causal to be added",
        "bias",
        "added, hides all",
        "other heads see other keys",
        "a query sees nothing",
    ],
)
def test_masks_of_queries_and_biases_are_told(mask):
    assert not bool(key_mask(mask)[1])


def case_of_redoing(is_key_mask):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, heads, TOKENS, 4, generator=generator) for heads in (4, 2, 2))
    bias = torch.randn(1, 1, TOKENS, TOKENS, generator=generator)
    out = torch.full((BATCH, TOKENS, 4, 4), 5.0).transpose(1, 2)
    return out, torch.zeros(1, dtype=torch.int32), torch.tensor(is_key_mask), q, k, v, bias, 0.4


@pytest.mark.parametrize("is_key_mask", [True, False])
def test_the_output_is_dense_attention_unless_it_is_a_key_mask(is_key_mask, caplog):
    module._warn.cache_clear()
    out, calls, flag, q, k, v, bias, scale = case_of_redoing(is_key_mask)
    for _ in range(2):
        torch.ops.svg2.redo_densely_(out, calls, flag, q, k, v, bias, scale, False)
    wanted = scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=True)
    torch.testing.assert_close(out, torch.full_like(out, 5.0) if is_key_mask else wanted)
    assert calls.item() == (0 if is_key_mask else 2)
    told = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert len(told) == (0 if is_key_mask else 1)
    assert all("attn_mask 1×1×7×7 does more than to hide keys" in each for each in told)


def test_a_mask_that_does_more_is_refused_on_request():
    with pytest.raises(ValueError, match=r"attn_mask 1×1×7×7 does more .* give a boolean key mask"):
        torch.ops.svg2.redo_densely_(*case_of_redoing(False), True)
    torch.ops.svg2.redo_densely_(*case_of_redoing(True), True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 7),), ValueError, "mask must have 4 axes"),
        ((torch.zeros(1, 1, 1, 7, dtype=torch.int64),), TypeError, "mask must be torch.bool or"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        key_mask(*arguments)


def test_an_output_of_another_shape_is_refused():
    out, *rest = case_of_redoing(False)
    with pytest.raises(ValueError, match="out must have shape"):
        torch.ops.svg2.redo_densely_(out[:, :3], *rest, False)


@pytest.mark.parametrize("mask", [torch.ones(2, 1, 1, 7) > 0, torch.zeros(1, 3, 7, 7)], ids=["bool", "added"])
def test_the_ops_keep_their_contract(mask):
    torch.library.opcheck(torch.ops.svg2.key_mask.default, (mask,))
    torch.library.opcheck(torch.ops.svg2.redo_densely_.default, (*case_of_redoing(False), False))


def test_both_work_inside_a_compiled_function():
    def function(out, calls, q, k, v, bias):
        _, flag = key_mask(bias)
        torch.ops.svg2.redo_densely_(out, calls, flag, q, k, v, bias, 0.4, False)
        return out + 1

    arguments = case_of_redoing(False)
    out, calls, _, q, k, v, bias, scale = arguments
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(out.clone(), calls, q, k, v, bias)
    wanted = scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=True)
    torch.testing.assert_close(got, wanted + 1)
    assert calls.item() == 1
