"""Dense attention becomes one opaque op, with the same arguments."""

import pytest
import torch
from torch.fx import symbolic_trace
from torch.nn.functional import scaled_dot_product_attention

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.passes.hold_attention import hold_attention
from svg2_compile.passes.nodes import is_sdpa

X = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.7


def graph_of(function, *inputs):
    gm = symbolic_trace(function)
    values = torch.fx.Interpreter(gm)
    values.run(*inputs)
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs):
        node.meta["example_value"] = value
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta["example_value"] = node.target(
                *torch.fx.node.map_arg(node.args, lambda each: each.meta["example_value"]),
                **torch.fx.node.map_arg(node.kwargs, lambda each: each.meta["example_value"]),
            )
    return gm


@pytest.mark.parametrize(
    "function",
    [
        lambda q, mask: scaled_dot_product_attention(q, q, q),
        lambda q, mask: scaled_dot_product_attention(q, q, value=q, attn_mask=mask, scale=0.3),
        lambda q, mask: scaled_dot_product_attention(q, q, q, None, 0.0, True),
    ],
    ids=["plain", "masked", "causal"],
)
def test_the_held_attention_gives_the_same_bits(function):
    gm = graph_of(function, X, MASK)
    assert hold_attention(gm) == 1
    assert not [node for node in gm.graph.nodes if is_sdpa(node)]
    assert torch.equal(gm(X, MASK), function(X, MASK))
    (held,) = gm.graph.find_nodes(op="call_function", target=torch.ops.svg2.dense_attention.default)
    assert held.meta["example_value"].shape == X.shape


def test_twice_is_once_and_another_op_is_left_alone():
    gm = graph_of(lambda q, mask: torch.matmul(scaled_dot_product_attention(q, q, q), q.mT), X, MASK)
    assert hold_attention(gm) == 1
    before = str(gm.graph)
    assert hold_attention(gm) == 0
    assert str(gm.graph) == before and "matmul" in before
