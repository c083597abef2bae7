"""Attention in subgraphs is seen: inlined where that changes nothing, and reported where it stays out of reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.errors import UnsupportedError
from svg2_compile.passes.inline_subgraphs import inline_subgraphs, subgraphs_left
from svg2_compile.passes.nodes import target_name
from svg2_compile.passes.sparsify import Sparsified, sparsify

TOKENS, HEADS, WIDTH = 45, 2, 16
FULL = SparseConfig(min_tokens=40, dense_layers=0, top_p=1.0)
attend = F.scaled_dot_product_attention


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    def __init__(self, run: Callable[..., Tensor] = attend) -> None:
        super().__init__()
        self.qkv, self.run = nn.Linear(WIDTH, 3 * WIDTH), run
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return x + self.run(q, k, v).transpose(1, 2).flatten(2) * torch.tensor([0.5])


class Model(nn.Module):
    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor], run: Callable[..., Tensor] = attend) -> None:
        super().__init__()
        self.how, self.blocks = how, nn.ModuleList(Block(run) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.how(block, x)
        return x


@torch.compiler.nested_compile_region
def region(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


@torch.compiler.nested_compile_region
def region_of_two(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return block(x), x * 2


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


def in_a_context(context: Callable[[], Any]) -> Callable[[nn.Module, Tensor], Tensor]:
    def how(block: nn.Module, x: Tensor) -> Tensor:
        with context():
            return block(x)

    return how


def sparsified(model: nn.Module, x: Tensor, config: SparseConfig = FULL) -> tuple[Sparsified, Tensor]:
    """Return what became of the graph, and what it computes."""
    found: list[Sparsified] = []

    def backend(gm: GraphModule, _: list[Any]) -> Callable[..., Any]:
        before = gm.print_readable(print_output=False)
        plan = sparsify(gm, config)
        assert gm.print_readable(print_output=False) == before
        assert inline_subgraphs(plan.gm) == 0
        found.append(plan)
        state = [spec.create("cpu") for spec in plan.state_specs]
        return lambda *args: plan.gm(*args, *state)

    output = torch.compile(model, backend=backend, fullgraph=True)(x)
    return found[0], output


SEEN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "checkpoint": checkpointed,
    "checkpoint in a checkpoint": lambda block, x: checkpoint(lambda y: checkpointed(block, y), x, use_reentrant=False),
    "region": region,
    "region with two results": lambda block, x: sum(region_of_two(block, x)),
    "region in a checkpoint": lambda block, x: checkpoint(lambda y: region(block, y), x, use_reentrant=False),
    "checkpoint in a region": lambda block, x: region(lambda y: checkpointed(block, y), x),
    "a kernel asked for": in_a_context(lambda: sdpa_kernel(SDPBackend.MATH)),
    "kernels asked for": in_a_context(lambda: sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])),
    "autocast": in_a_context(lambda: torch.autocast("cpu", torch.bfloat16, enabled=False)),
    "no gradients": in_a_context(torch.no_grad),
}


@pytest.mark.parametrize("name", SEEN)
def test_attention_inside_is_sparse_and_full_selection_is_dense(name):
    model, x = Model(SEEN[name]).eval(), torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        plan, output = sparsified(model, x)
        torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-4)
    assert len(plan.sites) == 3 and plan.rejections == ()
    assert list(subgraphs_left(plan.gm)) == []


@pytest.mark.parametrize("name", [each for each in SEEN if each != "checkpoint in a region"])
def test_each_call_of_a_region_is_a_layer_of_its_own(name):
    model, x = Model(SEEN[name]).eval(), torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        plan, _ = sparsified(model, x, SparseConfig(min_tokens=40, dense_layers=1))
    assert [each.path for each in plan.decisions] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [each.path for each in plan.sites] == ["blocks.1", "blocks.2"]


def test_a_region_that_writes_writes_once_a_call_and_in_order():
    class Writes(Block):
        def forward(self, x: Tensor) -> Tensor:
            self.calls.mul_(2).add_(1)
            return super().forward(x) + self.calls

    model, x = Model(checkpointed).eval(), torch.randn(1, TOKENS, WIDTH)
    shared = Writes()
    model.blocks = nn.ModuleList([shared, shared])
    with torch.no_grad():
        expected = model(x)
        shared.calls.zero_()
        plan, output = sparsified(model, x)
    assert len(plan.sites) == 2 and shared.calls == 3
    torch.testing.assert_close(output, expected)


def branches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cond(q.sum() > 0, lambda q, k, v: attend(q, k, v), lambda q, k, v: attend(q, k, 2 * v), (q, k, v))


def one_branch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cond(q.sum() > 0, lambda q, k, v: attend(q, k, v), lambda q, k, v: v.clone(), (q, k, v))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v

    return torch.cond(q.sum() > 0, written, lambda q, k, v: (v * 1).contiguous(), (q, k, v))


@pytest.mark.parametrize("how", [lambda block, x: block(x), checkpointed], ids=["alone", "in a checkpoint"])
@pytest.mark.parametrize(("run", "each"), [(branches, 2), (one_branch, 1), (by_hand, 1)])
def test_attention_in_a_branch_is_reported_with_advice_and_can_be_refused(run, each, how):
    model, x = Model(how, run).eval(), torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        plan, output = sparsified(model, x)
        torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-4)
        assert plan.sites == () and len(plan.rejections) == 3 * each
        for rejection in plan.rejections:
            assert rejection.reason == "it is inside cond, a graph of its own"
            assert "decide in Python" in rejection.hint and not rejection.by_design
        torch._dynamo.reset()
        with pytest.raises(Exception, match="inside cond") as refusal:
            sparsified(model, x, SparseConfig(min_tokens=40, on_unsupported="error"))
    assert isinstance(refusal.value, UnsupportedError) or "UnsupportedError" in repr(refusal.value)


def test_short_attention_in_a_branch_is_no_complaint():
    model, x = Model(lambda block, x: block(x), one_branch).eval(), torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        plan, _ = sparsified(model, x, SparseConfig(on_unsupported="error"))
    assert [(each.reason, each.by_design) for each in plan.rejections] == [(f"short: {TOKENS} tokens", True)] * 3


def test_a_checkpoint_stays_where_gradients_are_computed_and_its_attention_is_declined():
    model, x = Model(checkpointed), torch.randn(2, TOKENS, WIDTH)
    plan, output = sparsified(model, x)
    torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-4)
    assert [target_name(node) for node, _ in subgraphs_left(plan.gm)] == ["tag_activation_checkpoint"] * 3
    assert [each.reason for each in plan.rejections] == ["gradients are required"] * 3
    assert all("no_grad" in each.hint for each in plan.rejections)


def test_a_graph_without_subgraphs_is_left_alone():
    model, x = Model(lambda block, x: block(x)).eval(), torch.randn(2, TOKENS, WIDTH)

    def backend(gm: GraphModule, _: list[Any]) -> Callable[..., Any]:
        before = gm.print_readable(print_output=False)
        assert inline_subgraphs(gm) == 0 and gm.print_readable(print_output=False) == before
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(x)
