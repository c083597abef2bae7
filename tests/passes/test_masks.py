"""Masks in every spelling: those that only hide keys are made sparse under, and none is replaced by another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewritten_graphs import (
    BATCH,
    CHANNELS,
    DENSE,
    HEADS,
    TEXT,
    VIDEO,
    Joint,
    SparseBackend,
    assert_equal_within_rounding,
    attend,
    joint_inputs,
    key_mask,
    ops,
    run,
    trace,
    zeros,
)
from torch import Tensor, nn
from torch.fx import GraphModule

from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.nodes import is_sdpa, sdpa_arguments
from svg2_compile.passes.read_mask import has_no_effect, value_everywhere
from svg2_compile.passes.sparsify import Sparsified, sparsify

KEYS = TEXT + VIDEO
LOWEST = torch.finfo(torch.float32).min


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def added(mask: Tensor, value: float = -math.inf) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, value)


ALL, SOME = torch.ones(BATCH, 1, 1, KEYS, dtype=torch.bool), key_mask(slice(TEXT - 4, TEXT + 3))
HIDES_KEYS: dict[str, Tensor] = {
    "0 and -inf": added(SOME),
    "0 and the lowest number": added(SOME, LOWEST),
    "0 and -10000": added(SOME, -1e4),
    "0 and -1e38": added(SOME, -1e38),
    "of one batch element": added(SOME[1:]),
    "expanded": SOME.expand(-1, 1, KEYS, -1).contiguous(),
    "expanded over heads": SOME.expand(-1, HEADS, KEYS, -1).contiguous(),
    "for each head": SOME.expand(-1, HEADS, 1, -1).contiguous(),
    "added, expanded": added(SOME, -1e9).expand(-1, 1, KEYS, -1).contiguous(),
    "outer product": SOME & SOME.transpose(2, 3),
    "of two axes": SOME[1, 0].clone(),
    "of two axes, square": SOME[1, 0].expand(KEYS, -1).contiguous(),
    "of three axes": added(SOME[1], LOWEST),
    "all true, square": torch.ones(1, 1, KEYS, KEYS, dtype=torch.bool),
    "zeros, square": torch.zeros(1, 1, KEYS, KEYS),
    "zeros of two axes": torch.zeros(KEYS, KEYS),
}
DOES_MORE: dict[str, Tensor] = {
    "a bias of keys": torch.randn(BATCH, 1, 1, KEYS),
    "mild hiding": added(SOME, -5.0),
    "a bias of pairs": torch.randn(KEYS, KEYS),
    "a bias of heads": torch.randn(1, HEADS, KEYS, KEYS),
    "causal": torch.ones(KEYS, KEYS, dtype=torch.bool).tril(),
    "two blocks": (torch.arange(KEYS)[:, None] < 30) == (torch.arange(KEYS) < 30),
    "other keys for each head": torch.stack([SOME[1], SOME[1].roll(5, -1)], 1),
}


def checked(
    order: str, mask: Tensor, config: SparseConfig = DENSE, **options: Any
) -> tuple[Sparsified, list[Any], Tensor]:
    text, video = joint_inputs()
    gm, inputs, expected = trace(Joint(order=order, **options), {"text": text, "video": video, "mask": mask})
    return sparsify(gm, config), inputs, expected


def state_named(plan: Sparsified, state: list[Tensor], name: str) -> list[int]:
    return [int(tensor.sum()) for spec, tensor in zip(plan.state_specs, state) if spec.name == name]


@pytest.mark.parametrize("order", ["text first", "video first", "video asks"])
@pytest.mark.parametrize("name", [*HIDES_KEYS, *DOES_MORE])
def test_whatever_the_mask_does_full_selection_equals_dense_attention(name, order):
    mask = (HIDES_KEYS | DOES_MORE)[name]
    if order == "video asks" and KEYS in mask.shape[-2:-1]:
        mask = mask[..., TEXT:, :].contiguous()
    plan, inputs, expected = checked(order, mask, key_heads=1 if name == "a bias of keys" else HEADS)
    assert len(plan.sites) == 2 and plan.rejections == ()
    state = zeros(plan)
    with torch.no_grad():
        output = plan.gm(*inputs, *state)[0]
    is_outer_without_its_rows = name == "outer product" and order == "video asks"
    if name == "outer product" and not is_outer_without_its_rows:
        # nobody reads what padding attends to
        output, expected = (each * SOME[:, 0, 0, :, None] for each in (output, expected))
    assert_equal_within_rounding(output, expected, sites=2)
    assert all(tensor.isfinite().all() for tensor in state)
    redone = state_named(plan, state, "redone_calls")
    if name == "of two axes":
        assert redone == [] and ops(plan.gm)["key_mask"] == 0
    else:
        assert redone == ([1, 1] if name in DOES_MORE or is_outer_without_its_rows else [0, 0])
        assert ops(plan.gm)["key_mask"] == 1


def test_a_mask_that_hides_keys_leaves_the_selection_sparse():
    sparse = SparseConfig(top_p=0.3, min_keep_ratio=0, min_tokens=40, dense_layers=0, q_clusters=3, k_clusters=5)
    boolean, inputs, dense = checked("text first", SOME, sparse)
    plan, added_inputs, _ = checked("text first", added(SOME, -1e4), sparse)
    assert [site.is_mask_checked for site in (*boolean.sites, *plan.sites)] == [False, False, True, True]
    inputs = [SOME if tensor.shape == SOME.shape else tensor for tensor in added_inputs]
    first, second = run(boolean, inputs), run(plan, added_inputs)
    torch.testing.assert_close(first, second)
    assert (first - dense).abs().max() > 1e-3


def test_a_mask_that_does_more_is_refused_at_run_time_where_that_was_asked_for():
    config = SparseConfig(top_p=1, min_tokens=40, dense_layers=0, on_unsupported="error")
    plan, inputs, _ = checked("text first", DOES_MORE["causal"], config)
    with pytest.raises(ValueError, match="does more than to hide keys"):
        run(plan, inputs)


def test_a_mask_that_is_overwritten_between_two_attentions_is_read_twice():
    class Overwritten(Joint):
        def forward(self, text: Tensor, video: Tensor, mask: Tensor) -> Tensor:
            x = torch.cat((text, video), dim=1)
            mask = mask * 1
            for place, block in enumerate(self.blocks):
                q, k, v = map(self.heads, block(x).chunk(3, dim=-1))
                x = x + attend(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2, 3)
                mask[..., place : place + 30] = -1e9
            return x

    text, video = joint_inputs()
    gm, inputs, expected = trace(Overwritten(), {"text": text, "video": video, "mask": added(SOME)})
    plan = sparsify(gm, DENSE)
    assert ops(plan.gm)["key_mask"] == 2
    assert_equal_within_rounding(run(plan, inputs), expected, sites=2)


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_compiled_graph_reads_the_mask_of_each_call(top_p):
    """No recompilation: that it only hid keys when it was compiled makes no later mask another one."""
    config = SparseConfig(top_p=top_p, min_tokens=40, dense_layers=0)
    backend, model = SparseBackend(config), Joint()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    text, video = joint_inputs()
    bias = torch.randn(BATCH, 1, 1, KEYS)
    with torch.no_grad():
        for mask in (added(SOME), bias, bias * 2, added(SOME)):
            output = compiled(text, video, mask)
            if top_p == 1 or mask.isfinite().all():
                torch.testing.assert_close(output, model(text, video, mask))
    (plan,) = backend.plans
    assert len(plan.sites) == 2


@pytest.mark.parametrize("name", DOES_MORE)
def test_a_mask_that_does_more_when_it_is_compiled_stays_dense_with_advice(name):
    backend, model = SparseBackend(DENSE), Joint()
    text, video = joint_inputs()
    with torch.no_grad():
        output = torch.compile(model, backend=backend, fullgraph=True)(text, video, DOES_MORE[name])
        torch.testing.assert_close(output, model(text, video, DOES_MORE[name]))
    (plan,) = backend.plans
    assert plan.sites == () and len(plan.rejections) == 2
    assert all("not a key mask" in each.reason and each.hint and not each.by_design for each in plan.rejections)


class Masked(nn.Module):
    """An attention under a mask that is made in the graph."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return attend(x, x, x, attn_mask=self.make(x))


def made(make: Callable[[Tensor], Tensor]) -> tuple[GraphModule, list[Any], Tensor]:
    return trace(Masked(make), {"x": torch.randn(BATCH, HEADS, VIDEO, CHANNELS)})


SQUARE = (1, 1, VIDEO, VIDEO)
NO_EFFECT: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: torch.zeros(SQUARE),
    "zeros of two axes": lambda x: torch.zeros(VIDEO, VIDEO, dtype=x.dtype),
    "new zeros": lambda x: x.new_zeros(VIDEO, VIDEO)[None, None],
    "zeros like": lambda x: torch.zeros_like(x[:, :1, :, :1].expand(-1, -1, -1, VIDEO)),
    "full of zeros": lambda x: torch.full((VIDEO, VIDEO), 0.0),
    "the same number": lambda x: torch.full(SQUARE, 3.0),
    "true": lambda x: torch.ones(SQUARE, dtype=torch.bool),
    "full of true": lambda x: torch.full(SQUARE, True),
    "ones that became true": lambda x: torch.ones(VIDEO, VIDEO).bool()[None, None],
    "not false": lambda x: ~torch.zeros(SQUARE, dtype=torch.bool),
    "logical not": lambda x: torch.logical_not(torch.zeros(SQUARE, dtype=torch.bool)),
    "compared": lambda x: torch.ones(VIDEO, VIDEO) > 0.5,
    "ones times ones": lambda x: (torch.ones(1, 1, VIDEO, 1) * torch.ones(1, 1, 1, VIDEO)).bool(),
    "inverted ones times a number": lambda x: (1.0 - torch.ones(1, 1, 1, VIDEO)) * -1e4,
    "where": lambda x: torch.where(torch.ones(SQUARE, dtype=torch.bool), 0.0, -math.inf),
    "nothing filled": lambda x: torch.zeros(SQUARE).masked_fill(~torch.ones(SQUARE, dtype=torch.bool), -math.inf),
    "expanded": lambda x: torch.zeros(1, 1, 1, VIDEO).expand(BATCH, HEADS, VIDEO, -1).to(x.dtype),
}
HAS_EFFECT: dict[str, Callable[[Tensor], Tensor]] = {
    "causal": lambda x: torch.ones(SQUARE, dtype=torch.bool).tril(),
    "causal to be added": lambda x: torch.full((VIDEO, VIDEO), -math.inf).triu(1),
    "a band": lambda x: (torch.arange(VIDEO)[:, None] - torch.arange(VIDEO)).abs() < 9,
    "overwritten": lambda x: overwritten(torch.zeros(SQUARE), -math.inf),
    "overwritten before it is cast": lambda x: overwritten(torch.ones(SQUARE), 0.0).bool(),
    "overwritten through a view": lambda x: through_a_view(torch.zeros(SQUARE)),
    "of the inputs": lambda x: x[..., :1] @ x[..., :1].transpose(2, 3),
    "filled in place": lambda x: torch.full(SQUARE, LOWEST).masked_fill_(band(), 0.0),
    "filled in place, and read": lambda x: filled(torch.full(SQUARE, LOWEST), band()),
    "infinite": lambda x: torch.full(SQUARE, math.inf),
}


def band() -> Tensor:
    return torch.ones(SQUARE, dtype=torch.bool) & ((torch.arange(VIDEO)[:, None] - torch.arange(VIDEO)).abs() < 9)


def filled(mask: Tensor, where: Tensor) -> Tensor:
    mask.masked_fill_(where, 0.0)
    return mask


def overwritten(mask: Tensor, value: float) -> Tensor:
    mask[..., :3] = value
    return mask


def through_a_view(mask: Tensor) -> Tensor:
    mask.view(-1)[5:9].fill_(-2.0)
    return mask


@pytest.mark.parametrize("name", NO_EFFECT)
def test_a_mask_made_in_the_graph_that_has_no_effect_is_none(name):
    gm, inputs, expected = made(NO_EFFECT[name])
    plan = sparsify(gm, DENSE)
    (site,) = plan.sites
    assert not site.has_mask and not ops(plan.gm)["key_mask"]
    assert_equal_within_rounding(run(plan, inputs), expected, sites=1)


@pytest.mark.parametrize("name", HAS_EFFECT)
def test_a_mask_made_in_the_graph_that_has_an_effect_is_none_of_those(name):
    gm, inputs, expected = made(HAS_EFFECT[name])
    (attention,) = [node for node in gm.graph.nodes if is_sdpa(node)]
    assert not has_no_effect(sdpa_arguments(attention).attn_mask, attention)
    plan = sparsify(gm, DENSE)
    torch.testing.assert_close(run(plan, inputs), expected, equal_nan=True)
    assert [each.reason.startswith("attn_mask is") and bool(each.hint) for each in plan.rejections] == [True]


MADE_OF_A_KEY_MASK: dict[str, Callable[[Tensor], Tensor]] = {
    "as ComfyUI": lambda m: (m.to(torch.float32) - 1.0).reshape(BATCH, 1, 1, -1) * torch.finfo(torch.float32).max,
    "as transformers": lambda m: (1.0 - m[:, None, None, :].float()) * -10000.0,
    "where": lambda m: torch.where(m.bool(), 0.0, -math.inf)[:, None, None],
    "filled": lambda m: torch.zeros(m.shape).masked_fill(m == 0, -math.inf)[:, None, None],
    "expanded": lambda m: ((1.0 - m[:, None, None, :].float()) * -1e9).expand(-1, 1, VIDEO, -1),
    "repeated": lambda m: m[:, None, None].bool().repeat(1, 1, VIDEO, 1),
    "zeros, filled in place": lambda m: filled_in_place(m),
}


def filled_in_place(mask: Tensor) -> Tensor:
    bias = torch.zeros(BATCH, 1, 1, VIDEO)
    bias[..., -12:] = (mask[:, None, None, -12:].float() - 1.0) * 1e9
    return bias


@pytest.mark.parametrize("name", MADE_OF_A_KEY_MASK)
def test_a_key_mask_made_in_the_graph_of_what_a_tokenizer_gives_is_sparse_under(name):
    class Model(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return attend(x, x, x, attn_mask=MADE_OF_A_KEY_MASK[name](mask))

    mask = (torch.arange(VIDEO) < torch.tensor([[VIDEO], [VIDEO - 7]])).long()
    gm, inputs, expected = trace(Model(), {"x": torch.randn(BATCH, HEADS, VIDEO, CHANNELS), "mask": mask})
    plan = sparsify(gm, DENSE)
    assert len(plan.sites) == 1
    state = zeros(plan)
    with torch.no_grad():
        output = plan.gm(*inputs, *state)[0]
    assert_equal_within_rounding(output, expected, sites=1)
    assert sum(state_named(plan, state, "redone_calls")) == 0


def test_an_unknown_value_is_none():
    gm, *_ = made(lambda x: x[..., :1] @ x[..., :1].transpose(2, 3))
    assert [value_everywhere(node, node) for node in gm.graph.nodes] == [None] * len(gm.graph.nodes)
