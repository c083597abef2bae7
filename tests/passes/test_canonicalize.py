"""Hand-written softmax attention becomes SDPA, and nothing else does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

from svg2_compile.passes.canonicalize import CanonicalizeResult, canonicalize
from svg2_compile.passes.nodes import is_sdpa, sdpa_arguments, target_name, tensor_of

Attention = Callable[..., Tensor]
Spelling = tuple[Attention, Callable[[torch.dtype], tuple[Tensor, ...]]]
BATCH, HEADS, QUERIES, KEYS, CHANNELS = 2, 3, 7, 5, 8
SCALE = CHANNELS**-0.5


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def randn(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64).to(dtype)


def heads_first(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(randn(BATCH, HEADS, n, CHANNELS, dtype=dtype) for n in (QUERIES, KEYS, KEYS))


def tokens_first(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).contiguous() for x in heads_first(dtype))


def flat_heads(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.flatten(0, 1) for x in heads_first(dtype))


def no_heads(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x[0] for x in flat_heads(dtype))


def five_axes(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.unsqueeze(1).expand(-1, 2, -1, -1, -1).contiguous() for x in heads_first(dtype))


def with_bias(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (*heads_first(dtype), randn(HEADS, QUERIES, KEYS, dtype=dtype))


def with_key_mask(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (*heads_first(dtype), torch.arange(KEYS).repeat(BATCH, 1, 1, 1) >= KEYS - 2)


def with_flat_bias(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (*flat_heads(dtype), randn(BATCH * HEADS, QUERIES, KEYS, dtype=dtype))


def channels_first(dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, k, v = flat_heads(dtype)
    return q, k.mT.contiguous(), v.mT.contiguous()


def spelling(
    function: Attention, inputs: Callable[[torch.dtype], tuple[Tensor, ...]] = heads_first, name: str = ""
) -> object:
    return pytest.param(function, inputs, id=name or function.__name__)


def operators(q, k, v):
    return ((q @ k.transpose(-1, -2)) * SCALE).softmax(dim=-1) @ v


def matmul_div_sqrt(q, k, v):
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1])
    return torch.matmul(F.softmax(scores, dim=-1), v)


def dim_counted_from_the_front(q, k, v):
    return torch.softmax(q @ k.mT, 3) @ v


def query_scaled(q, k, v):
    return torch.softmax((SCALE * q) @ k.permute(0, 1, 3, 2), -1) @ v


def key_scaled_then_transposed(q, k, v):
    return torch.softmax(q @ (k / 2.0).mT, -1) @ v


def key_transposed_then_scaled(q, k, v):
    return torch.softmax(q @ (k.mT * SCALE), -1) @ v


def both_sides_scaled(q, k, v):
    factor = q.shape[-1] ** -0.25
    return torch.softmax((q * factor) @ (k * factor).transpose(-2, -1), -1) @ v


def scaled_in_place(q, k, v):
    scores = q @ k.mT
    scores *= 2
    scores /= 7
    scores.mul_(0.5)
    return scores.softmax(-1) @ v


def query_scaled_in_place(q, k, v):
    q = q + 0
    q *= SCALE
    return (q @ k.mT).softmax(-1) @ v


def scaled_by_a_constant_tensor(q, k, v):
    return torch.softmax(q @ k.mT / torch.tensor(3.0), -1) @ v


def shifted_by_a_number(q, k, v):
    return torch.softmax(q @ k.mT * SCALE - 1.5, -1) @ v


def fp32_softmax(q, k, v):
    return F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def casts_around(q, k, v):
    return F.softmax((q @ k.mT * SCALE).float(), dim=-1).type_as(v) @ v


def upcast_operands(q, k, v):
    scores = q.float() @ k.float().mT
    return (scores * SCALE).softmax(-1).to(v.dtype) @ v


def upcast_everything(q, k, v):
    return ((q.float() @ k.float().mT * SCALE).softmax(-1) @ v.float()).to(v.dtype)


class SoftmaxModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(0.3)

    def forward(self, q, k, v):
        return self.dropout(self.softmax(q @ k.mT * SCALE)) @ v


def dropout_of_zero(q, k, v):
    return F.dropout(torch.softmax(q @ k.mT, -1), p=0.0, training=True) @ v


def einsum_heads_first(q, k, v):
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def einsum_tokens_first(q, k, v):
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q * SCALE, k), dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def einsum_odd_letters(q, k, v):
    weights = torch.softmax(torch.einsum("xiyz, xjyz -> xijy", q, k), dim=2)
    return torch.einsum("xijy,xjyz->xyiz", weights, v)


def einsum_ellipsis(q, k, v):
    return torch.einsum("...ij,...jc->...ic", torch.einsum("...ic,...jc->...ij", q, k).softmax(-1), v)


def einsum_keys_first(q, k, v):
    return torch.einsum("bhqk,bhkd->bqhd", torch.einsum("bhkd,bhqd->bhqk", k, q).softmax(-1), v)


def bmm(q, k, v):
    return torch.bmm(torch.bmm(q * SCALE, k.transpose(1, 2)).softmax(-1), v)


def bmm_then_view(q, k, v):
    out = torch.bmm(torch.bmm(q * SCALE, k.transpose(1, 2)).softmax(-1), v)
    return out.view(BATCH, HEADS, out.shape[1], out.shape[2]) + 1


def baddbmm_empty(q, k, v):
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(dim=-1), v)


def baddbmm_bias(q, k, v, bias):
    return torch.bmm(torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=SCALE).softmax(-1), v)


def without_heads(q, k, v):
    return torch.softmax(q @ k.t() * SCALE, -1) @ v


def values_on_the_left(q, k, v):
    weights = torch.bmm(q, k).mul(SCALE).softmax(2).permute(0, 2, 1)
    return torch.bmm(v, weights)


def added_bias(q, k, v, bias):
    return ((q @ k.mT) * SCALE + bias).softmax(-1) @ v


def bias_first_and_weighted(q, k, v, bias):
    return torch.softmax((bias + q @ k.mT) * SCALE, -1) @ v


def subtracted_bias(q, k, v, bias):
    return torch.softmax(q @ k.mT - bias, -1) @ v


def added_alpha(q, k, v, bias):
    return torch.softmax(torch.add(q @ k.mT, bias, alpha=2), -1) @ v


def bias_in_place(q, k, v, bias):
    scores = q @ k.mT
    scores += bias
    scores.add_(bias)
    return scores.softmax(-1) @ v


def einsum_scores_transposed_bias(q, k, v, bias):
    weights = torch.softmax(torch.einsum("bhqd,bhkd->hqkb", q, k) + bias.unsqueeze(-1), dim=2)
    return torch.einsum("hqkb,bhkd->bhqd", weights, v)


def masked_fill(q, k, v, hidden):
    return (q @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def masked_fill_in_place(q, k, v, hidden):
    scores = q @ k.mT
    scores.masked_fill_(hidden, -torch.inf)
    return scores.softmax(-1) @ v


def masked_fill_lowest(q, k, v, hidden):
    scores = q @ k.mT * SCALE
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1) @ v


def where_keep(q, k, v, hidden):
    return torch.where(~hidden, q @ k.mT, float("-inf")).softmax(-1) @ v


def where_drop_tensor(q, k, v, hidden):
    scores = q @ k.mT
    return torch.where(hidden, torch.full_like(scores, float("-inf")), scores).softmax(-1) @ v


def causal_and_padding(q, k, v, hidden):
    scores = q @ k.mT
    causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    scores = scores.masked_fill(~causal, float("-inf"))
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


def bias_and_padding(q, k, v, hidden):
    bias = torch.linspace(-1, 1, k.shape[-2], dtype=q.dtype)
    return (q @ k.mT + bias).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def one_key_head(q, k, v):
    return torch.softmax(q @ k[:, :1].mT, -1) @ v[:, :1]


def attention_of_attention(q, k, v):
    inner = torch.softmax(k @ k.mT, -1) @ v
    return torch.softmax(q @ k.mT, -1) @ inner


# What casts down to fp32 cannot judge in fp64.
JUDGES = dict.fromkeys((fp32_softmax, casts_around, upcast_operands, upcast_everything), operators)

ONE = [
    spelling(operators),
    spelling(operators, flat_heads, "operators_3d"),
    spelling(operators, five_axes, "operators_5d"),
    spelling(matmul_div_sqrt),
    spelling(dim_counted_from_the_front),
    spelling(query_scaled),
    spelling(key_scaled_then_transposed),
    spelling(key_transposed_then_scaled),
    spelling(both_sides_scaled),
    spelling(scaled_in_place),
    spelling(query_scaled_in_place),
    spelling(scaled_by_a_constant_tensor),
    spelling(shifted_by_a_number),
    spelling(fp32_softmax),
    spelling(casts_around),
    spelling(upcast_operands),
    spelling(upcast_everything),
    spelling(SoftmaxModule().eval(), name="softmax_module_and_eval_dropout"),
    spelling(dropout_of_zero),
    spelling(einsum_heads_first),
    spelling(einsum_tokens_first, tokens_first),
    spelling(einsum_odd_letters, tokens_first),
    spelling(einsum_ellipsis),
    spelling(einsum_keys_first),
    spelling(bmm, flat_heads),
    spelling(bmm_then_view, flat_heads),
    spelling(baddbmm_empty, flat_heads),
    spelling(baddbmm_bias, with_flat_bias),
    spelling(without_heads, no_heads),
    spelling(values_on_the_left, channels_first),
    spelling(added_bias, with_bias),
    spelling(bias_first_and_weighted, with_bias),
    spelling(subtracted_bias, with_bias),
    spelling(added_alpha, with_bias),
    spelling(bias_in_place, with_bias),
    spelling(einsum_scores_transposed_bias, with_bias),
    spelling(masked_fill, with_key_mask),
    spelling(masked_fill_in_place, with_key_mask),
    spelling(masked_fill_lowest, with_key_mask),
    spelling(where_keep, with_key_mask),
    spelling(where_drop_tensor, with_key_mask),
    spelling(causal_and_padding, with_key_mask),
    spelling(bias_and_padding, with_key_mask),
]


def capture(
    function: Attention, inputs: tuple[Tensor, ...], dynamic: bool = False
) -> tuple[GraphModule, list[object], Tensor]:
    """Return Dynamo's one graph of ``function``, the inputs of that graph, and what it returns after the pass."""
    graphs: list[tuple[GraphModule, list[object]]] = []

    def backend(gm: GraphModule, _: list[Tensor]) -> Callable[..., object]:
        def run(*args: object) -> object:
            graphs.append((gm, [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]))
            return gm(*args)

        return run

    with torch.no_grad():
        output = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    assert len(graphs) == 1
    return *graphs[0], output


def sdpa_nodes(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if is_sdpa(node)]


def error(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact).abs().max().item()


def run(gm: GraphModule, inputs: list[object]) -> Tensor:
    with torch.no_grad():
        return gm(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))[0]


def assert_values_are_true(gm: GraphModule, inputs: list[object]) -> None:
    sizes: dict[str, int] = {}

    class Checker(Interpreter):
        def run_node(self, node: Node) -> object:
            result = super().run_node(node)
            value = tensor_of(node)
            if node.op == "placeholder" and isinstance(result, int):
                sizes[str(node.meta["example_value"])] = result
            if isinstance(result, Tensor):
                assert value is not None, node
                shape = tuple(int(eval(str(size), {}, dict(sizes))) for size in value.shape)
                assert (shape, value.dtype) == (tuple(result.shape), result.dtype), node
            return result

    with torch.no_grad():
        Checker(gm).run(*inputs)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("function", "make"), ONE)
def test_each_spelling_becomes_one_sdpa_node_with_the_same_output(function, make, dynamic):
    inputs = make(torch.float32)
    gm, graph_inputs, eager = capture(function, inputs, dynamic)
    guards = len(shape_env_guards(gm))

    result = canonicalize(gm)

    assert (len(result.rewritten), result.declined) == (1, ())
    assert [node.name for node in sdpa_nodes(gm)] == list(result.rewritten)
    assert not any(target_name(node) == "softmax" for node in gm.graph.nodes)
    assert len(shape_env_guards(gm)) == guards
    exact = JUDGES.get(function, function)(*(x.double() if x.is_floating_point() else x for x in make_again(make)))
    ours = run(gm, graph_inputs)
    assert (ours.dtype, ours.shape) == (eager.dtype, eager.shape)
    assert error(ours, exact) <= 2 * error(eager, exact) + rounding_step(exact, torch.float32)
    assert_values_are_true(gm, graph_inputs)


def make_again(make: Callable[[torch.dtype], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return make(torch.float32)


def rounding_step(exact: Tensor, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps * exact.abs().max().item()


def shape_env_guards(gm: GraphModule) -> list[object]:
    for node in gm.graph.nodes:
        mode = getattr(tensor_of(node), "fake_mode", None)
        if mode is not None and isinstance(mode.shape_env, ShapeEnv):
            return list(mode.shape_env.guards)
    return []


@pytest.mark.parametrize("function", [operators, fp32_softmax, casts_around, upcast_operands, upcast_everything])
def test_half_precision_is_as_exact_as_it_was(function):
    inputs = heads_first(torch.bfloat16)
    exact = operators(*(x.double() for x in inputs))
    gm, graph_inputs, eager = capture(function, inputs)

    canonicalize(gm)

    ours = run(gm, graph_inputs)
    assert ours.dtype is eager.dtype
    reference = max(error(eager, exact), rounding_step(exact, torch.bfloat16) / 2)
    assert error(ours, exact) <= 2 * reference + rounding_step(exact, torch.bfloat16)


@pytest.mark.parametrize("function", [fp32_softmax, casts_around, upcast_operands])
def test_exact_casts_of_operands_are_looked_through(function):
    gm, _, _ = capture(function, heads_first(torch.bfloat16))

    canonicalize(gm)

    (node,) = sdpa_nodes(gm)
    assert tensor_of(node).dtype is torch.bfloat16
    assert all(tensor_of(each).dtype is torch.bfloat16 for each in node.all_input_nodes)


def test_operands_that_are_wider_than_the_output_stay_wide():
    def attend(q, k, v):
        return (q.float().exp() @ k.float().exp().mT).softmax(-1).to(v.dtype) @ v

    gm, _, eager = capture(attend, heads_first(torch.bfloat16))

    canonicalize(gm)

    (node,) = sdpa_nodes(gm)
    assert tensor_of(node).dtype is torch.float32
    assert eager.dtype is torch.bfloat16


def test_scales_of_query_key_and_scores_are_one_number():
    def attend(q, k, v):
        return ((q * 0.5) @ (k / 4).mT * 3).softmax(-1) @ v

    gm, _, _ = capture(attend, heads_first(torch.float32))

    canonicalize(gm)

    (node,) = sdpa_nodes(gm)
    call = sdpa_arguments(node)
    assert call.scale == 0.5 / 4 * 3
    assert (call.query.op, call.key.op, call.value.op) == ("placeholder",) * 3
    assert target_name(node.next) == "contiguous"


@pytest.mark.parametrize("function", [masked_fill, where_keep, causal_and_padding])
def test_fills_with_minus_infinity_become_a_boolean_mask(function):
    gm, _, _ = capture(function, with_key_mask(torch.float32))

    canonicalize(gm)

    (node,) = sdpa_nodes(gm)
    assert tensor_of(sdpa_arguments(node).attn_mask).dtype is torch.bool


@pytest.mark.parametrize(("function", "make"), ONE[:6])
def test_twice_is_once(function, make):
    gm, _, _ = capture(function, make(torch.float32))
    canonicalize(gm)
    once = gm.code

    result = canonicalize(gm)

    assert result == CanonicalizeResult((), ())
    assert gm.code == once


def test_provenance_is_copied_to_every_new_node():
    class Block(nn.Module):
        def forward(self, q, k, v):
            return operators(q, k, v)

    gm, _, _ = capture(nn.Sequential(Block())[0], heads_first(torch.float32))
    old = next(node for node in gm.graph.nodes if target_name(node) == "softmax")
    meta = {key: old.meta[key] for key in ("nn_module_stack",) if key in old.meta}
    known = set(gm.graph.nodes)

    canonicalize(gm)

    for node in gm.graph.nodes:
        if node not in known:
            assert "stack_trace" in node.meta
            assert {key: node.meta[key] for key in meta} == meta


def test_every_attention_of_a_graph_is_rewritten():
    gm, graph_inputs, eager = capture(attention_of_attention, heads_first(torch.float32))

    result = canonicalize(gm)

    assert list(result.rewritten) == [node.name for node in sdpa_nodes(gm)]
    assert len(result.rewritten) == 2
    torch.testing.assert_close(run(gm, graph_inputs), eager)


def test_a_single_key_head_is_expanded_to_the_query_heads():
    gm, graph_inputs, eager = capture(one_key_head, heads_first(torch.float32))

    canonicalize(gm)

    (node,) = sdpa_nodes(gm)
    assert tensor_of(sdpa_arguments(node).key).shape[1] == HEADS
    torch.testing.assert_close(run(gm, graph_inputs), eager)


def test_a_layout_that_nobody_sees_costs_no_copy():
    def attend(q, k, v):
        return operators(q, k, v).transpose(1, 2).reshape(BATCH, QUERIES, -1)

    gm, _, _ = capture(attend, heads_first(torch.float32))

    canonicalize(gm)

    assert not any(target_name(node) == "contiguous" for node in gm.graph.nodes)


def test_the_rewritten_graph_compiles_with_gradients():
    inputs = tuple(x.requires_grad_() for x in flat_heads(torch.float32))

    def backend(gm: GraphModule, example: list[Tensor]) -> Callable[..., object]:
        assert canonicalize(gm).rewritten
        return torch._dynamo.lookup_backend("aot_eager")(gm, example)

    expected = torch.autograd.grad(bmm_then_view(*inputs).sum(), inputs)
    actual = torch.autograd.grad(torch.compile(bmm_then_view, backend=backend)(*inputs).sum(), inputs)

    torch.testing.assert_close(actual, expected)


def softmax_over_heads(q, k, v):
    return (q @ k.mT).softmax(1) @ v


def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def linear_attention(q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def routing(q, k, v):
    weights, experts = (q @ k.mT).softmax(-1).topk(2)
    return weights.sum() + experts.sum() + v.sum()


def gate(q, k, v):
    return (q @ k.mT).softmax(-1).sum(-1, keepdim=True) + v.mean()


def attention_pooling(q, k, v):
    return q.sum(-1).softmax(-1).unsqueeze(-2) @ q + k.mean() + v.mean()


def plain_products(q, k, v):
    return q @ k.mT @ v


@pytest.mark.parametrize(
    "function",
    [
        softmax_over_heads,
        softmax_over_queries,
        linear_attention,
        routing,
        gate,
        attention_pooling,
        plain_products,
        F.scaled_dot_product_attention,
    ],
)
def test_a_look_alike_is_left_alone(function):
    gm, _, _ = capture(lambda q, k, v: function(q, k, v), heads_first(torch.float32))
    before = str(gm.graph)

    assert canonicalize(gm) == CanonicalizeResult((), ())
    assert str(gm.graph) == before


def weights_returned(q, k, v, x):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def scores_used_elsewhere(q, k, v, x):
    scores = q @ k.mT
    return scores.softmax(-1) @ v + scores.mean()


def scaled_key_by_key(q, k, v, x):
    return (q @ k.mT * k[..., 0].unsqueeze(-2)).softmax(-1) @ v


def soft_cap(q, k, v, x):
    return torch.tanh(q @ k.mT).softmax(-1) @ v


def weights_reweighted(q, k, v, x):
    return ((q @ k.mT).softmax(-1) * x) @ v


def active_dropout(q, k, v, x):
    return F.dropout((q @ k.mT).softmax(-1), 0.1, training=True) @ v


def filled_with_a_moderate_number(q, k, v, x):
    return (q @ k.mT).masked_fill(x > 0, -10000.0).softmax(-1) @ v


def scaled_after_masking(q, k, v, x):
    return (q @ k.mT).masked_fill(x > 0, float("-inf")).mul(-1).softmax(-1) @ v


def shared_key_head(q, k, v, x):
    weights = torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]).softmax(-1)
    return torch.einsum("bhqk,bkd->bhqd", weights, v[:, 0])


def scores_broadcast_by_the_mask(q, k, v, x):
    return (q[:1] @ k[:1].mT + x.expand(BATCH, 1, 1, 1)).softmax(-1) @ v


def value_overwritten(q, k, v, x):
    values = v + 1
    key = values.mT
    scores = q @ key
    values.mul_(2)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (weights_returned, "are returned"),
        (scores_used_elsewhere, "also used by"),
        (scaled_key_by_key, "scaled by a tensor"),
        (soft_cap, "tanh between"),
        (weights_reweighted, "mul between"),
        (active_dropout, "dropout is active"),
        (filled_with_a_moderate_number, "filled with -10000"),
        (scaled_after_masking, "scaled after masking"),
        (shared_key_head, "do not share their batch axes"),
        (scores_broadcast_by_the_mask, "batch sizes"),
        (value_overwritten, "overwritten"),
    ],
)
def test_attention_that_sdpa_cannot_express_is_declined_with_its_reason(function, reason):
    inputs = heads_first(torch.float32)
    gm, _, _ = capture(function, (*inputs, torch.ones(1, 1, 1, 1)))
    before = str(gm.graph)

    result = canonicalize(gm)

    assert str(gm.graph) == before
    (rejection,) = result.declined
    assert reason in rejection.reason
    (softmax,) = (node for node in gm.graph.nodes if target_name(node) == "softmax")
    assert rejection.node == softmax.name


def test_an_operand_overwritten_after_the_attention_or_before_it_does_not_matter():
    def attend(q, k, v):
        q, v = q + 0, v + 0
        q.mul_(3)
        v.mul_(3)
        out = (q @ k.mT).softmax(-1) @ v
        q.zero_()
        v.zero_()
        return out + q + v.mean()

    gm, graph_inputs, eager = capture(attend, heads_first(torch.float32))

    assert canonicalize(gm).rewritten
    torch.testing.assert_close(run(gm, graph_inputs), eager)


def test_a_copy_is_not_looked_through_when_its_source_is_overwritten():
    def attend(q, k, v):
        source = q + 0
        query = source * 3
        source.zero_()
        return (query @ k.mT).softmax(-1) @ v + source

    gm, graph_inputs, eager = capture(attend, heads_first(torch.float32))

    assert canonicalize(gm).rewritten
    torch.testing.assert_close(run(gm, graph_inputs), eager)


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_old_attention_processor_of_diffusers_is_rewritten(upcast, masked):
    from diffusers.models.attention_processor import Attention as DiffusersAttention
    from diffusers.models.attention_processor import AttnProcessor

    module = DiffusersAttention(24, heads=3, dim_head=8, processor=AttnProcessor()).eval()
    module.upcast_attention = module.upcast_softmax = upcast
    x = torch.randn(BATCH, QUERIES, 24)
    mask = torch.zeros(BATCH, 1, QUERIES).masked_fill(torch.arange(QUERIES) > 4, -10000.0) if masked else None
    gm, graph_inputs, eager = capture(lambda x, mask: module(x, attention_mask=mask), (x, mask))

    result = canonicalize(gm)

    assert (len(result.rewritten), result.declined) == (1, ())
    torch.testing.assert_close(run(gm, graph_inputs), eager)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_pixart_with_the_old_processor_equals_eager(dynamic):
    from diffusers import PixArtTransformer2DModel
    from diffusers.models.attention_processor import AttnProcessor

    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=8,
        patch_size=2,
        caption_channels=16,
        norm_num_groups=1,
        use_additional_conditions=False,
    ).eval()
    model.set_attn_processor(AttnProcessor())
    latents, text, timestep = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.tensor([3, 3])
    text_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    results: list[CanonicalizeResult] = []

    def backend(gm: GraphModule, _: list[Tensor]) -> Callable[..., object]:
        results.append(canonicalize(gm))
        return gm.forward

    def forward(module: Callable[..., tuple[Tensor]]) -> Tensor:
        return module(
            latents,
            encoder_hidden_states=text,
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=text_mask,
            return_dict=False,
        )[0]

    with torch.no_grad():
        eager = forward(model)
        ours = forward(torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True))

    (result,) = results
    assert (len(result.rewritten), result.declined) == (4, ())
    torch.testing.assert_close(ours, eager)
