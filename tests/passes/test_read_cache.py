"""A cache that is written in place: its rows are told from the new ones, or the reason says that they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.records import AttentionSite, Rejection, size_hint
from svg2_compile.passes.sparsify import Sparsified, sparsify

HEADS, DIM, ROWS, NEW, OLD = 2, 8, 120, 45, 30
WIDTH = HEADS * DIM
CONFIG = SparseConfig(min_tokens=40, dense_layers=0, top_p=1.0)
attend = F.scaled_dot_product_attention
Cache = Tensor


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def decide(function: Callable[..., Tensor], *args: Any, config: SparseConfig = CONFIG) -> tuple[Any, Tensor, Tensor]:
    """Return what becomes of the attention, the output of the sparse graph, and what the function gives."""
    found: list[Sparsified] = []

    def backend(gm: GraphModule, _: list[Any]) -> Callable[..., Any]:
        plan = sparsify(gm, config)
        found.append(plan)
        state = [spec.create("cpu") for spec in plan.state_specs]
        return lambda *inputs: plan.gm(*inputs, *state)

    with torch.no_grad():
        expected = function(*(each.clone() if isinstance(each, Tensor) else each for each in args))
        output = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args)
    (decision,) = found[0].decisions
    return decision, output, expected


def by_setitem(cache: Cache, new: Tensor, at: int) -> Tensor:
    cache[:, :, at : at + NEW] = new
    return cache[:, :, : at + NEW]


def by_copy(cache: Cache, new: Tensor, at: int) -> Tensor:
    cache[:, :, at : at + NEW].copy_(new)
    return cache[:, :, : at + NEW]


def by_narrow(cache: Cache, new: Tensor, at: int) -> Tensor:
    cache.narrow(2, at, NEW).copy_(new)
    return cache.narrow(2, 0, at + NEW)


def read_before(cache: Cache, new: Tensor, at: int) -> Tensor:
    read = cache[:, :, : at + NEW]
    cache[:, :, at : at + NEW] = new
    return read


def copied_after(cache: Cache, new: Tensor, at: int) -> Tensor:
    cache[:, :, at : at + NEW] = new
    return cache[:, :, : at + NEW].contiguous().to(new.dtype)


def tokens_first(cache: Cache, new: Tensor, at: int) -> Tensor:
    rows = cache.transpose(1, 2)
    rows[:, at : at + NEW] = new.transpose(1, 2)
    return rows[:, : at + NEW].transpose(1, 2)


def written_twice(cache: Cache, new: Tensor, at: int) -> Tensor:
    cache[:, :, at : at + NEW] = 2 * new
    cache[:, :, at : at + NEW] = new
    return cache[:, :, : at + NEW]


def beyond_what_is_read(cache: Cache, new: Tensor, at: int) -> Tensor:
    cache[:, :, at + NEW :] = 0.0
    return by_setitem(cache, new, at)


SPELLINGS = [
    by_setitem,
    by_copy,
    by_narrow,
    read_before,
    copied_after,
    tokens_first,
    written_twice,
    beyond_what_is_read,
]


def attention_over(write: Callable[..., Tensor], at: int) -> Callable[..., Tensor]:
    def attention(x: Tensor, keys: Cache, values: Cache) -> Tensor:
        q, k, v = heads(x * 2), heads(x * 3), heads(x * 4)
        return attend(q, write(keys, k, at), write(values, v, at))

    return attention


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, NEW, WIDTH), torch.randn(1, HEADS, ROWS, DIM), torch.randn(1, HEADS, ROWS, DIM)


@pytest.mark.parametrize("at", [0, OLD])
@pytest.mark.parametrize("write", SPELLINGS, ids=lambda write: write.__name__)
def test_cached_rows_are_context_and_the_new_ones_ask(write, at):
    found, output, expected = decide(attention_over(write, at), *inputs())
    assert isinstance(found, AttentionSite), found
    rows = [(size_hint(each.length), each.is_video) for each in found.segments]
    assert rows == ([(OLD, False), (NEW, True)] if at else [(NEW, True)])
    assert found.has_context_queries == (at == 0)
    torch.testing.assert_close(output, expected)


def test_rows_of_both_sides_of_the_new_ones_are_context():
    def attention(x: Tensor, keys: Cache, values: Cache) -> Tensor:
        q, k, v = heads(x * 2), heads(x * 3), heads(x * 4)
        keys[:, :, 20 : 20 + NEW], values[:, :, 20 : 20 + NEW] = k, v
        return attend(q, keys[:, :, :80], values[:, :, :80])

    found, output, expected = decide(attention, *inputs())
    assert [(each.length, each.is_video) for each in found.segments] == [(20, False), (NEW, True), (15, False)]
    torch.testing.assert_close(output, expected)


def test_a_cache_of_all_layers_and_both_operands_is_told_apart():
    def attention(x: Tensor, cache: Tensor) -> Tensor:
        q, k, v = heads(x * 2), heads(x * 3), heads(x * 4)
        layer = cache[1]
        layer[0, :, :, OLD : OLD + NEW], layer[1, :, :, OLD : OLD + NEW] = k, v
        keys, values = (each[:, :, : OLD + NEW] for each in layer)
        return attend(q, keys, values)

    found, output, expected = decide(attention, inputs()[0], torch.randn(2, 2, 1, HEADS, ROWS, DIM))
    assert [(each.length, each.is_video) for each in found.segments] == [(OLD, False), (NEW, True)]
    torch.testing.assert_close(output, expected)


def test_a_cache_that_is_mostly_context_says_so():
    config = SparseConfig(min_tokens=40, dense_layers=0, max_context_ratio=0.1)
    found, _, _ = decide(attention_over(by_setitem, OLD), *inputs(), config=config)
    assert isinstance(found, Rejection) and not found.by_design
    assert found.reason.startswith("more context than max_context_ratio=0.1")


def by_index_copy(cache: Cache, new: Tensor, at: int) -> Tensor:
    cache.index_copy_(2, torch.arange(at, at + NEW), new)
    return cache[:, :, : at + NEW]


def by_positions(cache: Cache, new: Tensor, at: int) -> Tensor:
    cache[:, :, torch.arange(at, at + NEW)] = new
    return cache[:, :, : at + NEW]


def partly_overwritten(cache: Cache, new: Tensor, at: int) -> Tensor:
    cache[:, :, at : at + NEW] = new
    cache[:, :, at + 5 : at + 9] = 0 * new[:, :, :4]
    return cache[:, :, : at + NEW]


def partly_read(cache: Cache, new: Tensor, at: int) -> Tensor:
    cache[:, :, at : at + NEW] = new
    return cache[:, :, 10 : at + NEW - 1]


@pytest.mark.parametrize("at", [0, OLD])
@pytest.mark.parametrize("write", [by_index_copy, by_positions, partly_overwritten, partly_read])
def test_a_cache_whose_rows_are_not_told_is_never_called_cross_attention(write, at):
    if write is partly_read and at == 0:
        pytest.skip("fewer keys than queries")
    found, output, expected = decide(attention_over(write, at), *inputs())
    assert isinstance(found, Rejection) and not found.by_design
    assert found.reason == "its keys are a cache written in place, and the graph does not tell which rows were written"
    assert "concatenate" in found.hint
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("write", [by_setitem, by_index_copy])
def test_a_short_chunk_over_a_long_cache_is_short(write):
    config = SparseConfig(min_tokens=60)
    found, _, _ = decide(attention_over(write, OLD), *inputs(), config=config)
    assert isinstance(found, Rejection)
    assert (found.reason, found.by_design) == (f"short: {NEW} queries among {NEW + OLD} keys", True)


def test_rows_of_another_stream_in_a_cache_are_cross_attention():
    def attention(x: Tensor, other: Tensor, keys: Cache, values: Cache) -> Tensor:
        return attend(heads(x), by_setitem(keys, heads(other), OLD), by_setitem(values, heads(other), OLD))

    found, _, _ = decide(attention, inputs()[0], *inputs())
    assert isinstance(found, Rejection)
    assert (found.reason, found.by_design) == (f"cross-attention: {NEW} queries, {OLD + NEW} keys", True)


def test_what_is_written_after_the_attention_is_not_among_its_keys():
    def attention(x: Tensor, keys: Cache, values: Cache) -> Tensor:
        out = attend(heads(x * 2), keys[:, :, : OLD + NEW], values[:, :, : OLD + NEW])
        by_setitem(keys, heads(x * 3), OLD)
        by_setitem(values, heads(x * 4), OLD)
        return out

    found, output, expected = decide(attention, *inputs())
    assert isinstance(found, Rejection)
    torch.testing.assert_close(output, expected)


def test_a_rotation_in_place_is_no_cache():
    def attention(x: Tensor) -> Tensor:
        q = heads(x)
        out = torch.empty_like(q)
        out[..., ::2], out[..., 1::2] = q[..., 1::2], q[..., ::2]
        return attend(out, out, out)

    found, output, expected = decide(attention, inputs()[0])
    assert isinstance(found, AttentionSite) and len(found.segments) == 1
    torch.testing.assert_close(output, expected)
