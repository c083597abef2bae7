"""A graph is cut into dense segments, in program order, and computes what it did."""

import operator

import pytest
import torch
from segments import MODELS, cut
from torch.fx.experimental.proxy_tensor import make_fx

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.passes.freeze_weights import freeze_weights
from svg2_compile.passes.nodes import tensor_of
from svg2_compile.passes.split_segments import split_segments, why_kept

aten = torch.ops.aten
WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


def attend(x):
    x = x.reshape(1, 4, 2, 4).transpose(1, 2)
    out = torch.ops.svg2.dense_attention(x, x, x, None, 0.0, False, None, False)
    return out.transpose(1, 2).reshape(4, 8)


def block(x, weight):
    x = x + attend((x @ weight.t()).sigmoid())
    return x + (x @ weight.t()).relu()


def traced(function, *inputs, weights=(), **options):
    """Return the ATen graph of ``function``, the inputs at the places ``weights`` made constants."""
    gm = make_fx(function, **options)(*inputs)
    return freeze_weights(gm, {place: inputs[place] for place in weights})


def parts(split):
    """Return the nodes of the parent graph as text: segments, kept ops, reshapes between them."""
    nodes = [node for node in split.gm.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    return [str(node.target) for node in nodes if node.target is not operator.getitem]


def assert_same_bits(split, whole, *inputs):
    for got, wanted in zip(split.gm(*inputs), whole(*inputs), strict=True):
        assert torch.equal(got, wanted)


def test_segments_lie_between_kept_ops_and_reshapes_outside():
    whole = traced(lambda x, w: (block(x, w),), torch.randn(4, 8), WEIGHT, weights=[1])
    split = split_segments(whole)
    reshape, transpose = "aten.reshape.default", "aten.transpose.int"
    assert parts(split) == [
        "segment_0", reshape, transpose, "svg2.dense_attention.default", transpose, reshape, "segment_1",
    ]  # fmt: skip
    assert [segment.ops for segment in split.segments] == [
        ("aten.t.default", "aten.mm.default", "aten.sigmoid.default"),
        ("aten.add.Tensor", "aten.t.default", "aten.mm.default", "aten.relu.default", "aten.add.Tensor"),
    ]
    assert [(kept.op, kept.why) for kept in split.kept] == [("svg2.dense_attention.default", "attention")]
    assert_same_bits(split, whole, torch.randn(4, 8))


def test_a_weight_goes_into_every_segment_that_uses_it():
    whole = traced(lambda x, w: (block(x, w),), torch.randn(4, 8), WEIGHT, weights=[1])
    split = split_segments(whole)
    assert [segment.weights for segment in split.segments] == [("weight_1",), ("weight_1",)]
    assert not split.gm.graph.find_nodes(op="get_attr")
    for segment in split.segments:
        held = split.gm.get_submodule(segment.name).weight_1
        assert held.data_ptr() == WEIGHT.data_ptr()


def test_what_several_segments_make_of_weights_alone_is_made_once_before_them():
    def scaled(x, w):
        table, own = w.exp() + 1, w.sin()
        return (attend((x * table[:4]).relu()) * table[:4] * own[4:],)

    whole = traced(scaled, torch.randn(4, 8), WEIGHT, weights=[1])
    split = split_segments(whole)
    first, second = split.segments
    assert parts(split)[:3] == ["aten.exp.default", "aten.add.Tensor", "segment_0"]
    assert (len(first.inputs), len(first.outputs), first.weights) == (2, 1, ())
    assert second.ops[0] == "aten.sin.default" and second.weights == ("weight_1",)
    assert_same_bits(split, whole, torch.randn(4, 8))


def test_a_segment_returns_what_is_read_outside_and_nothing_else():
    whole = traced(lambda x, w: (block(x, w), x), torch.randn(4, 8), WEIGHT, weights=[1])
    (first, second) = split_segments(whole).segments
    assert (len(first.inputs), len(first.outputs)) == (1, 1)
    # the attention's result and the residual
    assert (len(second.inputs), len(second.outputs)) == (2, 1)


def test_a_split_whose_parts_are_all_read_outside_stays_outside():
    def packed(x, w):
        q, k, v = (each.reshape(1, 4, 2, 4).transpose(1, 2) for each in (x @ w).repeat(1, 3).split(8, -1))
        return (torch.ops.svg2.dense_attention(q, k, v, None, 0.0, False, None, False),)

    whole = traced(packed, torch.randn(4, 8), WEIGHT, weights=[1])
    split = split_segments(whole)
    assert parts(split)[:2] == ["segment_0", "aten.split.Tensor"]
    assert len(split.segments[0].outputs) == 1
    assert_same_bits(split, whole, torch.randn(4, 8))


def test_a_split_with_a_part_read_inside_stays_inside():
    def gated(x, w):
        first, gate = (x @ w).split(4, -1)
        q = (first * 2).reshape(1, 1, 4, 4)
        return (torch.ops.svg2.dense_attention(q, q, q, None, 0.0, False, None, False) * gate,)

    whole = traced(gated, torch.randn(4, 8), WEIGHT, weights=[1])
    split = split_segments(whole)
    (segment,) = [each for each in split.segments if "aten.split.Tensor" in each.ops]
    (output,) = split.gm.get_submodule(segment.name).graph.find_nodes(op="output")
    assert len(output.args[0]) == 2 and all(tensor_of(each) is not None for each in output.args[0])
    assert_same_bits(split, whole, torch.randn(4, 8))


def test_state_is_updated_in_place_between_the_segments():
    def counting(x, calls, w):
        calls.add_(1)
        return (block(x, w) * calls,)

    whole = traced(counting, torch.randn(4, 8), torch.zeros(1), WEIGHT, weights=[2])
    split = split_segments(whole)
    assert ("aten.add_.Tensor", "has an effect") in [(kept.op, kept.why) for kept in split.kept]
    x, calls = torch.randn(4, 8), torch.zeros(1)
    first, second = split.gm(x, calls)[0], split.gm(x, calls)[0]
    assert calls.item() == 2 and not torch.equal(first, second)


def test_an_attention_in_any_form_stays_outside():
    def forms(q):
        scale = {"scale": 0.5}
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, **scale)[0]
        own = torch.ops.svg2.dense_attention(q, q, q, None, 0.0, False, 0.5, False)
        return (flash.relu().exp(), own.relu().exp())

    split = split_segments(traced(forms, torch.randn(1, 2, 4, 8)))
    assert [kept.why for kept in split.kept] == ["attention", "attention"]
    for segment in split.segments:
        assert set(segment.ops) == {"aten.relu.default", "aten.exp.default"}


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: (x + torch.rand_like(x),), "draws random numbers"),
        (lambda x: ((x > 0).nonzero().sum(),), "its size depends on data"),
        (lambda x: (torch.ops.svg2.sort_labels((x > 0).int()[None], 2)[0] + 1,), "sparse attention"),
    ],
    ids=["random", "nonzero", "svg2"],
)
def test_what_no_engine_may_do_is_kept_with_its_reason(function, why):
    options = {"tracing_mode": "symbolic"} if "size" in why else {}
    split = split_segments(traced(function, torch.randn(4, 8), **options))
    assert {kept.why for kept in split.kept} == {why, "alone between kept ops"}


def test_sizes_and_numbers_are_the_hosts():
    def scaled(x, rows, w):
        y = (x @ w)[:rows].relu()
        return (y.reshape(-1, 2, 4).sum(0) + y.shape[0],)

    x = torch.randn(6, 8)
    whole = make_fx(scaled, tracing_mode="symbolic")(x, 4, WEIGHT)
    split = split_segments(whole)
    for segment in split.segments:
        module = split.gm.get_submodule(segment.name)
        computed = [node for node in module.graph.nodes if node.op == "call_function"]
        assert all(tensor_of(node) is not None for node in computed)
    assert_same_bits(split, whole, x, 4, WEIGHT)
    other = torch.randn(10, 8)
    assert_same_bits(split, whole, other, 6, WEIGHT)


def test_bool_and_integer_tensors_pass_through_segments():
    def masked(x, mask, index):
        y = torch.where(mask, x.relu(), x)
        return (attend(y)[index] + 1, mask.logical_not())

    x, mask, index = torch.randn(4, 8), torch.rand(4, 8) < 0.5, torch.tensor([3, 1])
    whole = traced(masked, x, mask, index)
    assert_same_bits(split_segments(whole), whole, x, mask, index)


def test_segments_may_return_any_strides():
    """An engine's outputs are contiguous, whatever the graph was traced with."""

    def transposed(x, w):
        y = (x.transpose(1, 2) + 1).relu()  # element by element: keeps the strides of the view
        out = torch.ops.svg2.dense_attention(y, y, y, None, 0.0, False, None, False)
        return ((y.transpose(1, 2).reshape(2, 6, 8) @ w).relu() + out.transpose(1, 2).reshape(2, 6, 8),)

    x = torch.randn(2, 6, 2, 4)
    whole = traced(transposed, x, WEIGHT, weights=[1])
    split = split_segments(whole)
    (wanted,) = whole(x)
    for segment in split.segments:
        module = split.gm.get_submodule(segment.name)
        delattr(split.gm, segment.name)
        run = lambda *inputs, module=module: tuple(each.contiguous() for each in module(*inputs))  # noqa: E731
        setattr(split.gm, segment.name, run)
    assert len(split.segments) == 2 and torch.equal(split.gm(x)[0], wanted)


def test_a_graph_without_attention_is_one_segment():
    split = split_segments(traced(lambda x: (x.relu() + 1,), torch.randn(4)))
    assert parts(split) == ["segment_0"] and split.kept == ()


def test_the_given_graph_is_not_changed():
    whole = traced(lambda x, w: (block(x, w),), torch.randn(4, 8), WEIGHT, weights=[1])
    before = str(whole.graph)
    split_segments(whole)
    assert str(whole.graph) == before


ATTENTION = ["dense_attention"]
SPARSE = ["cluster_tokens_", "select_blocks", "block_sparse_attention"]
WITH_TEXT = [*SPARSE, "slice", "context_attention"]
PLANS = {
    ("WanTransformer3DModel", "dense"): ([101, 29, 90, 29, 38], 4 * ATTENTION),
    ("WanTransformer3DModel", "sparse"): ([101, 29, 90, 29, 38], 2 * (SPARSE + ATTENTION)),
    ("HunyuanVideoTransformer3DModel", "dense"): ([98, 156, 131, 31], 3 * ATTENTION),
    ("HunyuanVideoTransformer3DModel", "sparse"): ([98, 168, 147, 35], ATTENTION + 2 * WITH_TEXT),
    ("CogVideoXTransformer3DModel", "dense"): ([76, 99, 72], 2 * ATTENTION),
    ("CogVideoXTransformer3DModel", "sparse"): ([84, 112, 77], 2 * WITH_TEXT),
}
"""Ops of each segment, and what is kept between them."""


@pytest.fixture(scope="module", params=MODELS)
def cuts(request):
    return request.param, cut(request.param)


def test_a_model_gives_the_bits_of_its_uncut_graph(cuts):
    _, both = cuts
    assert [each.graph for each in both] == ["dense", "sparse"]
    for each in both:
        state, own = ([arg.clone() for arg in each.args] for _ in range(2))
        with torch.no_grad():
            for got, wanted in zip(each.split.gm(*own), each.whole(*state), strict=True):
                assert torch.equal(got, wanted)
        assert all(map(torch.equal, own, state))
        assert any(not torch.equal(a, b) for a, b in zip(own, each.args)) == (each.graph == "sparse")


def test_no_kept_op_is_inside_a_segment_of_a_model(cuts):
    _, both = cuts
    for each in both:
        for module in each.modules.values():
            assert not [node for node in module.graph.nodes if node.op == "call_function" and why_kept(node)]


def test_the_weights_of_a_model_are_inside_its_segments(cuts):
    """What stays outside are the tables of rotations of Wan, which all its layers share."""
    name, both = cuts
    for each in both:
        outside = [getattr(each.split.gm, node.target) for node in each.split.gm.graph.find_nodes(op="get_attr")]
        tables = 2 if name.startswith("Wan") else 0
        assert len(outside) == tables and all(each.shape == (32, 12) for each in outside)
        held = {name for segment in each.split.segments for name in segment.weights}
        assert len(held) + tables == len(each.whole.graph.find_nodes(op="get_attr"))


def test_the_plan_of_a_model_is_this(cuts):
    name, both = cuts
    for each in both:
        sizes, kept = PLANS[name, each.graph]
        assert [len(segment.ops) for segment in each.split.segments] == sizes
        assert [op.op.split(".")[1] for op in each.split.kept] == kept
