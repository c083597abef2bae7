"""Attentions of any number of axes become attentions of four, and mean the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.fold_axes import fold_axes
from svg2_compile.passes.nodes import is_sdpa, sdpa_arguments, shape_of
from svg2_compile.passes.sparsify import Sparsified, sparsify

TOKENS, DIM = 45, 8
attend = F.scaled_dot_product_attention


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def folded(function: Callable[..., Tensor], *args: Tensor) -> tuple[Tensor, list[GraphModule]]:
    """Return what the folded graph computes, and the graph."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, _: list[Any]) -> Callable[..., Any]:
        fold_axes(gm)
        gm.graph.lint()
        assert fold_axes(gm) == 0
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args), graphs


def ranks(gm: GraphModule) -> list[int]:
    return [len(shape_of(sdpa_arguments(node).query) or ()) for node in gm.graph.nodes if is_sdpa(node)]


@st.composite
def operands_and_masks(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...] | None, bool]:
    """Leading axes of the operands, shape of a mask, and whether that is boolean."""
    leading = tuple(draw(st.lists(st.integers(1, 3), max_size=4)))
    rank = draw(st.integers(-1, len(leading)))
    if rank < 0:
        return leading, None, False
    own = tuple(draw(st.sampled_from((1, size))) for size in leading[len(leading) - rank :])
    return leading, (*own, draw(st.sampled_from((1, 7))), 7), draw(st.booleans())


@settings(deadline=None, max_examples=50)
@given(operands_and_masks())
def test_a_folded_attention_is_the_attention(case):
    leading, mask_shape, is_boolean = case
    q, k, v = (torch.randn(*leading, 7, 4) for _ in range(3))
    mask = None
    if mask_shape is not None:
        mask = torch.rand(mask_shape) < 0.8 if is_boolean else torch.randn(mask_shape)
        if is_boolean:
            mask[..., :1] = True

    def function(q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
        return attend(q, k, v, *masks, scale=0.3)

    got, (gm,) = folded(function, q, k, v, *([] if mask is None else [mask]))
    assert ranks(gm) == [4]
    torch.testing.assert_close(got, attend(q, k, v, mask, scale=0.3))


def test_an_attention_of_four_axes_is_left_alone():
    q = torch.randn(2, 3, 7, 4)
    calls: list[int] = []

    def backend(gm: GraphModule, _: list[Any]) -> Callable[..., Any]:
        before = gm.print_readable(print_output=False)
        calls.append(fold_axes(gm))
        assert gm.print_readable(print_output=False) == before
        return gm.forward

    torch.compile(lambda x: attend(x, x, x), backend=backend)(q)
    assert calls == [0]


def unlike_ranks(q: Tensor) -> Tensor:
    return attend(q[0], q[0], q)


def unlike_leading_axes(q: Tensor) -> Tensor:
    return attend(q[:, None].expand(-1, 3, -1, -1, -1), q[:, None], q[:, None])


@pytest.mark.parametrize("function", [unlike_ranks, unlike_leading_axes])
def test_what_cannot_be_folded_stays_as_it_is_and_is_declined_with_advice(function):
    q = torch.randn(2, 2, TOKENS, DIM)
    found: list[Sparsified] = []

    def backend(gm: GraphModule, _: list[Any]) -> Callable[..., Any]:
        before = gm.print_readable(print_output=False)
        assert fold_axes(gm) == 0 and gm.print_readable(print_output=False) == before
        found.append(sparsify(gm, SparseConfig(min_tokens=40, dense_layers=0)))
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(q)
    (rejection,) = found[0].rejections
    assert rejection.reason.startswith("expected 4-D") and rejection.hint and not rejection.by_design


def packed(x: Tensor) -> Tensor:
    q = x[0].unflatten(-1, (-1, DIM)).transpose(0, 1)
    return attend(q, q * 2, q)


def heads_in_the_batch(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (-1, DIM)).transpose(1, 2).flatten(0, 1)
    return attend(q, q * 2, q)


def one_head(x: Tensor) -> Tensor:
    return attend(x, x * 2, x)


def one_head_of_one_sample(x: Tensor) -> Tensor:
    return attend(x[0], x[0] * 2, x[0])


def with_an_axis_between(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (-1, DIM)).transpose(1, 2)[:, None]
    return attend(q, q * 2, q)


def windows(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (-1, DIM)).unflatten(1, (2, -1)).transpose(2, 3)
    return attend(q, q * 2, q)


def packed_joined(x: Tensor) -> Tensor:
    return packed(torch.cat((x[:, :5] * 3, x[:, 5:] * 2), 1))


SPARSE = {
    packed: ((2,), 2 * TOKENS),
    heads_in_the_batch: ((4,), 2 * TOKENS),
    one_head: ((2,), 2 * TOKENS),
    one_head_of_one_sample: ((1,), 2 * TOKENS),
    with_an_axis_between: ((2, 2), 2 * TOKENS),
    windows: ((4, 2), TOKENS),
    packed_joined: ((2,), 2 * TOKENS - 5),
}


@pytest.mark.parametrize("function", SPARSE, ids=lambda function: function.__name__)
def test_long_self_attention_of_any_rank_is_sparse_and_full_selection_is_dense(function):
    found: list[Sparsified] = []

    def backend(gm: GraphModule, _: list[Any]) -> Callable[..., Any]:
        found.append(sparsify(gm, SparseConfig(min_tokens=40, dense_layers=0, top_p=1.0)))
        state = [spec.create("cpu") for spec in found[0].state_specs]
        return lambda *args: found[0].gm(*args, *state)

    x = torch.randn(2, 2 * TOKENS, 2 * DIM)
    with torch.no_grad():
        got = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(x)
        torch.testing.assert_close(got, function(x), rtol=1e-4, atol=1e-5)
    (site,) = found[0].sites
    leading, tokens = SPARSE[function]
    assert site.batch * site.q_heads == torch.Size(leading).numel() and site.token_hint == tokens
