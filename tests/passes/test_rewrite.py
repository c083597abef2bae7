"""The rewritten graph means what the given one means, and says truthfully what it computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rewritten_graphs import (
    BATCH,
    CASES,
    CHANNELS,
    DENSE,
    HEADS,
    SPARSE,
    TEXT,
    VIDEO,
    WIDTH,
    Joint,
    SparseBackend,
    assert_equal_within_rounding,
    attend,
    every_case,
    hunyuan_video,
    joint_inputs,
    key_mask,
    ops,
    run,
    trace,
    traced,
    wan,
    zeros,
)
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from svg2_compile.kernels.tiles import AttentionTiles
from svg2_compile.passes import sparsify as sparsify_module
from svg2_compile.passes.clone import clone
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.dump import dump_graph
from svg2_compile.passes.errors import InternalError, UnsupportedError
from svg2_compile.passes.kernel_config import TILES, KernelConfig
from svg2_compile.passes.nodes import is_sdpa, target_name, tensor_of
from svg2_compile.passes.records import size_hint
from svg2_compile.passes.sparsify import PASSES, sparsify
from svg2_compile.passes.stages import attend as attend_module
from svg2_compile.passes.verify import Q_ORDER, snapshot, verify

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These tensors are too small to share; waking a second thread for each op costs more than the op."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@every_case
def test_keeping_everything_equals_the_dense_graph(name):
    gm, inputs, expected = traced(name)
    plan = sparsify(gm, DENSE)
    assert len(plan.sites) == CASES[name].sites
    assert_equal_within_rounding(run(plan, inputs), expected, len(plan.sites))


@every_case
def test_a_second_call_starts_from_the_centroids_of_the_first_and_is_still_dense(name):
    gm, inputs, expected = traced(name)
    plan = sparsify(gm, DENSE)
    state = zeros(plan)
    run(plan, inputs, state)
    assert_equal_within_rounding(run(plan, inputs, state), expected, len(plan.sites))
    counters = [tensor for tensor, spec in zip(state, plan.state_specs) if spec.name.endswith("calls")]
    assert len(counters) == 2 * len(plan.sites) and all(counter.item() == 2 for counter in counters)


@every_case
def test_keeping_less_changes_the_output_and_the_statistics_say_so(name):
    gm, inputs, expected = traced(name)
    plan = sparsify(gm, SPARSE)
    state = zeros(plan)
    output = run(plan, inputs, state)
    assert output.isfinite().all() and not torch.equal(output, expected)
    statistics = [tensor for tensor, spec in zip(state, plan.state_specs) if spec.name == "statistics"]
    assert len(statistics) == len(plan.sites)
    for each in statistics:
        assert (each[..., 0] == 1).all() and (each[..., 1] > 0).all() and each[..., 1].mean() < 1


@every_case
def test_every_site_becomes_the_same_nodes(name):
    gm, _, _ = traced(name)
    before, case = ops(gm), CASES[name]
    plan = sparsify(gm, SPARSE)
    after = ops(plan.gm)
    per_site = {
        "cluster_tokens_": int(not case.hides),
        "kmeans_": 2 * case.hides,
        "sort_labels": 2 * case.hides,
        "permute_tokens": 2 * case.hides,
        "masked_fill": int(case.hides),
        "select_blocks": 1,
        "block_sparse_attention": 1,
        "unpermute_tokens": 0,
        "context_attention": case.context,
    }
    assert {op: after[op] - before[op] for op in per_site} == {op: case.sites * count for op, count in per_site.items()}
    assert before["scaled_dot_product_attention"] - after["scaled_dot_product_attention"] == case.sites


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.hides])
def test_queries_and_keys_go_in_their_own_order(name):
    gm, _, _ = traced(name)
    plan = sparsify(gm, SPARSE)

    for node in plan.gm.graph.nodes:
        if target_name(node) == "block_sparse_attention":
            q, k, v, q_sizes, runs, counts = node.args[:6]
            clustering, selection = k.args[0], runs.args[0]
            assert target_name(clustering) == "cluster_tokens_"
            assert clustering.args[0] is q
            results = [node.args[Q_ORDER], q_sizes, selection.args[3], k, v]
            assert [each.args for each in results] == [(clustering, index) for index in range(5)]
            assert (runs.args[1], counts.args) == (0, (selection, 1))
            assert selection.args[2] is q_sizes


@pytest.mark.parametrize(
    ("kernel_config", "arguments"),
    [
        (None, ()),
        (KernelConfig(), ()),
        (KernelConfig(attention="pointer"), ("pointer",)),
        (KernelConfig(autotune=True), ("auto", None, True)),
        (KernelConfig("descriptor", 32, 64, 4, 5), ("descriptor", [32, 64, 4, 5])),
        (KernelConfig(attention="gluon", autotune=True), ("gluon", None, True)),
    ],
    ids=str,
)
def test_the_attention_is_told_of_kernels_only_what_is_not_the_default(kernel_config, arguments):
    gm, inputs, expected = traced("text first")
    plan = sparsify(gm, DENSE, kernel_config)
    schema = torch.ops.svg2.block_sparse_attention.default._schema
    first = [argument.name for argument in schema.arguments].index("scale") + 1
    pseudo = ["pseudo_k", "pseudo_v", "pseudo_bias"]
    assert [argument.name for argument in schema.arguments[first:]] == ["implementation", "tiles", "autotune", *pseudo]
    attentions = [node for node in plan.gm.graph.nodes if target_name(node) == "block_sparse_attention"]
    assert [node.args[first:] for node in attentions] == [arguments] * len(plan.sites)
    assert_equal_within_rounding(run(plan, inputs, zeros(plan)), expected, len(plan.sites))


@pytest.mark.parametrize("name", TILES)
def test_tiles_that_are_left_out_are_the_tuned_ones_of_the_site(name, monkeypatch):
    gm, _, _ = traced("text first")
    asked = []

    def tuned(*question: Any) -> AttentionTiles:
        asked.append(question)
        return AttentionTiles(block_m=64, block_n=32, piece=16, num_warps=4, num_stages=2)

    monkeypatch.setattr(attend_module, "attention_tiles", tuned)
    monkeypatch.setattr(attend_module, "capability_of", lambda device: 90)
    given = {name: 8 if name.startswith("num") else 128}
    plan = sparsify(gm, SPARSE, KernelConfig(attention="descriptor", **given))
    expected = {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2} | given
    attentions = [node for node in plan.gm.graph.nodes if target_name(node) == "block_sparse_attention"]
    assert [list(node.args[-1]) for node in attentions] == [list(expected.values())] * 2
    # heads of 8 are padded to 16
    assert asked == [(90, 16, torch.float32, "descriptor")] * 2


@every_case
def test_state_inputs_come_last_and_in_the_order_of_their_specs(name):
    gm, _, _ = traced(name)
    plan = sparsify(gm, SPARSE)
    given = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    placeholders = [node for node in plan.gm.graph.nodes if node.op == "placeholder"]
    assert [node.name for node in placeholders[: len(given)]] == given
    added = placeholders[len(given) :]
    assert [node.name for node in added] == [f"svg2_{spec.site}_{spec.name}" for spec in plan.state_specs]
    values = [tensor_of(node) for node in added]
    assert [(tuple(value.shape), value.dtype) for value in values] == [(s.shape, s.dtype) for s in plan.state_specs]
    assert all(node.meta["tensor_dict"] == {"_dynamo_static_input_type": "unguarded"} for node in added)


class Recorder(Interpreter):
    """Notes nodes whose real value is not what their metadata says; of ``given`` nodes the layout may differ."""

    def __init__(self, gm: GraphModule, given: set[str]) -> None:
        super().__init__(gm)
        self.given = given
        self.wrong: list[str] = []
        self.new = 0

    def run_node(self, node: Node) -> Any:
        value = super().run_node(node)
        claimed = tensor_of(node)
        if isinstance(value, Tensor) and claimed is not None:
            is_new = node.name not in self.given
            self.new += is_new
            real, claim = [(x.shape, x.dtype, x.device, is_new and x.stride()) for x in (value, claimed)]
            if real != claim:
                self.wrong.append(f"{node.format_node()}: {real}, not {claim}")
        return value


@every_case
def test_metadata_of_new_nodes_is_what_running_them_gives(name):
    gm, inputs, _ = traced(name)
    plan = sparsify(gm, SPARSE)
    recorder = Recorder(plan.gm, {node.name for node in gm.graph.nodes})
    with torch.no_grad():
        recorder.run(*inputs, *zeros(plan))
    assert recorder.wrong == []
    assert recorder.new > 8 * len(plan.sites)


@every_case
def test_new_nodes_carry_the_provenance_of_the_attention_they_replace(name):
    gm, _, _ = traced(name)
    stacks = [node.meta.get("nn_module_stack") for node in gm.graph.nodes if is_sdpa(node)]
    plan = sparsify(gm, SPARSE)
    replaced = [node for node in plan.gm.graph.nodes if target_name(node) == "block_sparse_attention"]
    assert [node.meta.get("nn_module_stack") for node in replaced] == [stacks[site.index] for site in plan.sites]
    assert all("stack_trace" in node.meta for node in replaced)


@every_case
def test_the_given_graph_is_untouched_and_twice_gives_the_same(name):
    gm, inputs, expected = traced(name)
    before = gm.print_readable(print_output=False)
    metas = [dict(node.meta) for node in gm.graph.nodes]
    first, second = sparsify(gm, SPARSE), sparsify(gm, SPARSE)
    assert gm.print_readable(print_output=False) == before
    assert all(dict(node.meta) == meta for node, meta in zip(gm.graph.nodes, metas))
    assert first.gm.code == second.gm.code and first.decisions == second.decisions
    with torch.no_grad():
        assert torch.equal(gm(*inputs)[0], expected)


@every_case
def test_sparsifying_what_is_sparse_adds_nothing(name):
    gm, _, _ = traced(name)
    plan = sparsify(gm, SPARSE)
    again = sparsify(plan.gm, SPARSE)
    assert again.sites == () and again.gm.code == plan.gm.code
    assert all(rejection.by_design for rejection in again.rejections)


def test_the_head_groups_of_a_grouped_attention_are_kept():
    gm, _, _ = traced("grouped heads")
    assert [(site.q_heads, site.k_heads) for site in sparsify(gm, SPARSE).sites] == [(HEADS, 1)] * 2


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", ["masked text first", "masked text last", "one mask for the batch"])
def test_hidden_text_cannot_influence_the_video(name, config):
    gm, inputs, _ = traced(name)
    plan = sparsify(gm, config)
    mask = next(each for each in inputs if isinstance(each, Tensor) and each.dtype is torch.bool)
    position = next(i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.shape == (BATCH, TEXT, WIDTH))
    is_first = CASES[name].build()[0].order == "text first"
    text_mask = mask[:, 0, 0, :TEXT] if is_first else mask[:, 0, 0, -TEXT:]
    video = slice(TEXT, None) if is_first else slice(0, VIDEO)
    noisy = list(inputs)
    noisy[position] = torch.where(text_mask[..., None], inputs[position], 1e3 * torch.randn(BATCH, TEXT, WIDTH))
    assert not torch.equal(noisy[position], inputs[position])
    assert torch.equal(run(plan, noisy)[:, video], run(plan, inputs)[:, video])


def test_hidden_text_cannot_influence_hunyuan_video():
    gm, inputs, _ = traced("HunyuanVideo")
    plan = sparsify(gm, SPARSE)
    position = next(i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.shape == (BATCH, TEXT, 16))
    noisy = list(inputs)
    noisy[position] = inputs[position].clone()
    noisy[position][0, 6:], noisy[position][1, 8:] = 3, 5
    assert_equal_within_rounding(run(plan, noisy), run(plan, inputs), len(plan.sites))


EVERY_VIDEO_KEY_OF_ONE = slice(TEXT, None)


@pytest.mark.parametrize("hidden", [slice(4, 12), slice(20, 25), EVERY_VIDEO_KEY_OF_ONE], ids=str)
@pytest.mark.parametrize("order", ["text first", "video asks"])
@pytest.mark.parametrize("key_heads", [HEADS, 1])
def test_video_keys_that_a_mask_hides_beside_context_mean_what_they_mean_densely(hidden, order, key_heads):
    text, video = joint_inputs()
    inputs = {"text": text, "video": video, "mask": key_mask(hidden)}
    gm, args, expected = trace(Joint(order=order, key_heads=key_heads).eval(), inputs)
    plan = sparsify(gm, DENSE)
    assert [len(site.segments) for site in plan.sites] == [2, 2]
    assert_equal_within_rounding(run(plan, args), expected, len(plan.sites))


def test_hidden_video_values_beside_context_cannot_influence_a_sparse_output():
    """All keys alike: every cluster mixes hidden and visible ones, and only the values tell them apart."""

    class Attend(nn.Module):
        def forward(self, q, text_k, video_k, text_v, video_v, m):
            return attend(q, torch.cat((text_k, video_k), 2), torch.cat((text_v, video_v), 2), attn_mask=m)

    mask = key_mask(slice(TEXT - 2, TEXT + 30), batch=1)
    values = torch.where(mask.transpose(2, 3), 1.0, float("nan")).expand(-1, -1, -1, CHANNELS)
    q = torch.randn(1, 1, TEXT + VIDEO, CHANNELS)
    keys = torch.ones(1, 1, TEXT, CHANNELS), torch.ones(1, 1, VIDEO, CHANNELS)
    given = dict(
        zip(("q", "text_k", "video_k", "text_v", "video_v", "m"), (q, *keys, *values.split([TEXT, VIDEO], 2), mask))
    )
    gm, inputs, _ = trace(Attend(), given)
    plan = sparsify(gm, SPARSE)
    assert len(plan.sites[0].segments) == 2
    video = run(plan, inputs)[:, :, TEXT:]
    assert_equal_within_rounding(video, torch.ones_like(video), 1)


def masked_video(hidden: slice, batch: int = BATCH, key_heads: int = HEADS) -> tuple[GraphModule, list[Any], Tensor]:
    """Trace a model whose one mask hides rows of a sequence that has no context."""
    text, video = joint_inputs()
    inputs = {"text": text, "video": video, "mask": key_mask(hidden, VIDEO, batch)}
    return trace(Joint(order="video only", key_heads=key_heads, layers=1).eval(), inputs)


@pytest.mark.parametrize("key_heads", [HEADS, 1])
@pytest.mark.parametrize("batch", [BATCH, 1])
@pytest.mark.parametrize("hidden", [slice(0, 0), slice(20, 31), slice(-9, None)])
def test_a_mask_without_context_rows_means_what_it_means_densely(hidden, batch, key_heads):
    gm, inputs, expected = masked_video(hidden, batch, key_heads)
    assert_equal_within_rounding(run(sparsify(gm, DENSE), inputs), expected, 1)


def test_hidden_rows_cannot_be_attended_to_whatever_cluster_they_are_in():
    """All keys alike: every cluster mixes hidden and visible ones, and only the values tell them apart."""
    keys = torch.ones(1, 1, VIDEO, CHANNELS)
    mask = key_mask(slice(10, 30), VIDEO, 1)
    values = torch.where(mask.transpose(2, 3), 1.0, 1e6).expand(-1, -1, -1, CHANNELS)

    class Attend(nn.Module):
        def forward(self, q, k, v, m):
            return attend(q, k, v, attn_mask=m)

    q = torch.randn(1, 1, VIDEO, CHANNELS)
    gm, inputs, _ = trace(Attend(), {"q": q, "k": keys, "v": values, "m": mask})
    plan = sparsify(gm, SPARSE)
    assert len(plan.sites) == 1
    assert_equal_within_rounding(run(plan, inputs), torch.ones_like(q), 1)


def test_a_mask_of_ones_beside_context_rows_costs_nothing():
    class Ones(nn.Module):
        def forward(self, text, video):
            x = torch.cat((text, video), 1).unflatten(2, (HEADS, CHANNELS)).transpose(1, 2)
            return attend(x, x, x, attn_mask=torch.ones(BATCH, 1, 1, TEXT + VIDEO, dtype=torch.bool))

    text, video = joint_inputs()
    gm, inputs, expected = trace(Ones(), {"text": text, "video": video})
    plan = sparsify(gm, DENSE)
    assert not plan.sites[0].has_mask
    (attention,) = plan.gm.graph.find_nodes(op="call_function", target=torch.ops.svg2.block_sparse_attention.default)
    (of_context,) = plan.gm.graph.find_nodes(op="call_function", target=torch.ops.svg2.context_attention.default)
    names = [argument.name for argument in torch.ops.svg2.block_sparse_attention.default._schema.arguments]
    assert attention.args[names.index("context_mask")] is None and of_context.args[3] is None
    assert_equal_within_rounding(run(plan, inputs), expected, 1)


def test_options_reach_the_ops():
    gm, _, _ = traced("own scale")
    config = SparseConfig(
        top_p=0.7, min_keep_ratio=0.3, kmeans_iters_init=4, kmeans_iters_step=3, seed=11, min_tokens=40
    )
    site = (plan := sparsify(gm, config)).sites[0]
    nodes = {target_name(node): node for node in plan.gm.graph.nodes}
    assert nodes["cluster_tokens_"].args[7:] == (4, 3, 11)
    assert nodes["select_blocks"].args[4:7] == (0.9, 0.7, 0.3)
    assert nodes["block_sparse_attention"].args[-1] == nodes["context_attention"].args[-1] == site.scale == 0.9
    assert (site.q_clusters, site.k_clusters) == config.clusters_for(VIDEO)


def with_dynamic_lengths(*tensors: Tensor) -> tuple[Tensor, ...]:
    for each in tensors:
        torch._dynamo.mark_dynamic(each, each.dim() - 1 if each.dtype is torch.bool else 1)
    return tensors


@pytest.mark.parametrize(
    "name", ["text first", "video first", "both ends", "video only", "video asks", "grouped heads", "masked"]
)
def test_one_graph_serves_every_length(name):
    options = {"masked": {}, "grouped heads": {"key_heads": 1}}.get(name, {"order": name})
    model = Joint(**options).eval()
    backend = SparseBackend(DENSE)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for text, video in ((9, 55), (13, 91), (4, 71)):
            inputs = joint_inputs(text, video)
            if name == "masked":
                inputs = (*inputs, key_mask(slice(2, 4), text + video))
            expected = model(*inputs)
            assert_equal_within_rounding(compiled(*with_dynamic_lengths(*inputs)), expected, 2)
    (plan,) = backend.plans
    # what was decided by the lengths is guarded, and fixes none of them
    guards = [str(guard) for guard in backend.guards]
    assert any(">= 40" in each for each in guards)
    assert not [each for each in guards if "Eq(" in each or "==" in each]
    assert [not isinstance(site.tokens, int) for site in plan.sites] == [True, True]
    assert [size_hint(site.tokens) for site in plan.sites] == [55, 55]


def test_an_attention_whose_output_joins_a_later_sequence_serves_every_length():
    def function(text: Tensor, video: Tensor) -> Tensor:
        text, video = (x.unflatten(2, (HEADS, CHANNELS)).transpose(1, 2) for x in (text, video))
        out = attend(video, video, video)
        joined = torch.cat((text, out), dim=2)
        return attend(joined, joined, joined)

    backend = SparseBackend(DENSE)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    with torch.no_grad():
        for text, video in ((9, 55), (13, 91)):
            inputs = joint_inputs(text, video)
            expected = function(*inputs)
            assert_equal_within_rounding(compiled(*with_dynamic_lengths(*inputs)), expected, 2)
    assert [len(plan.sites) for plan in backend.plans] == [2]


@pytest.mark.parametrize(
    ("build", "resize"),
    [(wan, {"hidden_states": (BATCH, 4, 5, 10, 14)}), (hunyuan_video, {"hidden_states": (BATCH, 4, 5, 5, 7)})],
    ids=["Wan", "HunyuanVideo"],
)
def test_a_dynamic_model_is_traced_once_for_two_lengths(build, resize):
    model, inputs = build()
    model.eval()
    backend = SparseBackend(DENSE)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for each in (inputs, inputs | {name: torch.randn(shape) for name, shape in resize.items()}):
            expected = model(**each, return_dict=False)[0]
            assert_equal_within_rounding(compiled(**each, return_dict=False)[0], expected, 2)
    assert [len(plan.sites) for plan in backend.plans] == [2]


def test_an_inductor_compiled_sparse_graph_equals_the_dense_one():
    gm, inputs, expected = traced("masked text first")
    plan = sparsify(gm, DENSE)
    with torch.no_grad():
        output = torch.compile(plan.gm, backend="inductor")(*inputs, *zeros(plan))[0]
    assert_equal_within_rounding(output, expected, len(plan.sites))


class Nested(nn.Module):
    """A model with keyword and nested inputs and a dictionary as output."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = Joint()

    def forward(self, streams: dict[str, Tensor], *, gain: Tensor) -> dict[str, Tensor]:
        out = self.joint(streams["text"], streams["video"]) * gain
        return {"text": out[:, :TEXT], "video": out[:, TEXT:]}


def exported() -> tuple[nn.Module, GraphModule, dict[str, Tensor], Tensor]:
    text, video = joint_inputs()
    model, streams, gain = Nested().eval(), {"text": text, "video": video}, torch.tensor(0.5)
    with torch.no_grad():
        return model, torch.export.export(model, (streams,), {"gain": gain}).module(), streams, gain


def test_an_exported_model_keeps_its_state_in_buffers():
    model, gm, streams, gain = exported()
    with torch.no_grad():
        plan = sparsify(gm, DENSE, state="buffers")
        expected = model(streams, gain=gain)
        buffers = dict(plan.gm.named_buffers())
        assert {f"svg2_{spec.site}_{spec.name}" for spec in plan.state_specs} <= set(buffers)
        assert all(type(buffer) is Tensor and not buffer.any() for name, buffer in buffers.items() if "svg2" in name)
        seen = []
        for scale in (1.0, 2.0, 3.0):
            scaled = {name: scale * x for name, x in streams.items()}
            output = plan.gm(scaled, gain=gain)
            assert set(output) == {"text", "video"}
            reference = model(scaled, gain=gain)
            assert_equal_within_rounding(output["video"], reference["video"], 2)
            assert_equal_within_rounding(output["text"], reference["text"], 2)
            seen.append(buffers["svg2_0_q_centroids"].clone())
        assert buffers["svg2_1_k_calls"].item() == 3
        assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
        assert torch.equal(gm(streams, gain=gain)["video"], expected["video"])
    assert not any("svg2" in name for name, _ in gm.named_buffers())


def test_an_exported_model_with_state_inputs_takes_and_gives_flat_tensors():
    model, gm, streams, gain = exported()
    with torch.no_grad():
        plan = sparsify(gm, DENSE)
        _, video = plan.gm(streams["text"], streams["video"], gain, *zeros(plan))
        assert_equal_within_rounding(video, model(streams, gain=gain)["video"], 2)


def test_a_sparse_exported_model_can_be_exported_again_with_its_state():
    _, gm, streams, gain = exported()
    with torch.no_grad():
        plan = sparsify(gm, DENSE, state="buffers")
        again = torch.export.export(plan.gm, (streams,), {"gain": gain})
        module = again.module()
        assert_equal_within_rounding(module(streams, gain=gain)["video"], plan.gm(streams, gain=gain)["video"], 2)
        calls = dict(module.named_buffers())["svg2_1_k_calls"]
        before = calls.item()
        module(streams, gain=gain)
        assert calls.item() == before + 1


def test_a_graph_with_nothing_to_rewrite_is_a_plain_copy():
    gm, inputs, expected = traced("text first")
    plan = sparsify(gm)
    assert plan.sites == () and plan.state_specs == ()
    assert [rejection.reason for rejection in plan.rejections] == ["short: 64 tokens"] * 2
    assert plan.gm.code == gm.code and plan.gm is not gm
    assert torch.equal(run(plan, inputs), expected)
    assert list(plan.timings_ms) == [each.name for each in PASSES if not each.needs_sites]


def test_every_pass_is_timed_in_order():
    plan = sparsify(traced("text first")[0], SPARSE)
    assert list(plan.timings_ms) == [each.name for each in PASSES]
    assert all(milliseconds >= 0 for milliseconds in plan.timings_ms.values())


class Causal(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return attend(self.blocks[0](x), x, x, **self.options)


def masked_graph(**options: Any) -> GraphModule:
    x = torch.randn(BATCH, HEADS, VIDEO, CHANNELS)
    return trace(Causal(**options), {"x": x})[0]


def test_an_unsupported_attention_is_an_error_on_request_naming_path_reason_and_advice():
    gm = masked_graph(dropout_p=0.1)
    assert len(sparsify(gm, SPARSE).rejections) == 1
    config = SparseConfig(min_tokens=40, on_unsupported="error")
    with pytest.raises(UnsupportedError) as refusal:
        sparsify(gm, config)
    (rejection,) = sparsify(gm, SPARSE).rejections
    assert str(refusal.value) == (
        f"{rejection.path} stays dense: attention dropout is active; call model.eval(), "
        'or set on_unsupported="dense" to accept that'
    )


@pytest.mark.parametrize("options", [{"is_causal": True}, {}], ids=["causal", "short"])
def test_an_attention_that_is_dense_by_design_is_no_error(options):
    config = SparseConfig(min_tokens=40 if options else 4096, on_unsupported="error")
    plan = sparsify(masked_graph(**options), config)
    assert [rejection.by_design for rejection in plan.rejections] == [True]


def test_graphs_are_written_with_numbers_where_asked(tmp_path, monkeypatch):
    gm, _, _ = traced("text first")
    assert dump_graph(gm, "unasked") is None
    monkeypatch.setenv("SVG2_DEBUG_DIR", str(tmp_path / "new"))
    sparsify(gm, SPARSE)
    written = sorted((tmp_path / "new").iterdir())
    names = "before", "inline_subgraphs", "canonicalize", "fold_axes", "attach_state", "rewrite"
    assert all(re.fullmatch(rf"\d{{4}}_{name}\.py", path.name) for name, path in zip(names, written, strict=True))
    before, after = written[0], written[-1]
    assert "scaled_dot_product_attention" in before.read_text(encoding="utf-8")
    assert "torch.ops.svg2.block_sparse_attention" in after.read_text(encoding="utf-8")
    path = dump_graph(gm, "again")
    assert path is not None and path.name > after.name


def test_a_copy_shares_parameters_and_nothing_else():
    gm, inputs, expected = traced("Wan")
    gm.meta["ours"] = "kept"
    copied = clone(gm)
    assert copied.code == gm.code and copied.meta is gm.meta
    assert not {id(node) for node in gm.graph.nodes} & {id(node) for node in copied.graph.nodes}
    for old, new in zip(gm.graph.nodes, copied.graph.nodes):
        assert old.op == "output" or (old.meta == new.meta and old.meta is not new.meta)
        assert getattr(old, "_dynamo_source", None) is getattr(new, "_dynamo_source", None)
    assert copied._param_name_to_source is gm._param_name_to_source
    next(node for node in copied.graph.nodes if is_sdpa(node)).meta["mark"] = True
    assert not any("mark" in node.meta for node in gm.graph.nodes)
    assert torch.equal(copied(*inputs)[0], expected)


def drop_the_inverse_permutation(gm: GraphModule) -> None:
    node = find(gm, "block_sparse_attention")
    node.update_arg(Q_ORDER, None)


def forget_a_rewrite(gm: GraphModule) -> None:
    node = find(gm, "block_sparse_attention")
    with gm.graph.inserting_before(node):
        attention = gm.graph.call_function(attend, node.args[:3])
    attention.meta = dict(node.meta)


def drop_a_sparse_attention(gm: GraphModule) -> None:
    (result,) = find(gm, "block_sparse_attention").users
    result.replace_all_uses_with(find(gm, "cluster_tokens_").args[0])
    gm.graph.eliminate_dead_code()


def change_the_dtype_of_the_output(gm: GraphModule) -> None:
    result = find_output(gm)
    with gm.graph.inserting_after(result):
        cast = gm.graph.call_method("to", (result, torch.float16))
    cast.meta["example_value"] = result.meta["example_value"].to(torch.float16)
    result.replace_all_uses_with(cast, delete_user_cb=lambda user: user.op == "output")


def change_the_shape_of_the_output(gm: GraphModule) -> None:
    result = find_output(gm)
    with gm.graph.inserting_after(result):
        cut = gm.graph.call_method("narrow", (result, 0, 0, 1))
    cut.meta["example_value"] = result.meta["example_value"][:1]
    result.replace_all_uses_with(cut, delete_user_cb=lambda user: user.op == "output")


def add_an_output(gm: GraphModule) -> None:
    output = next(node for node in gm.graph.nodes if node.op == "output")
    output.args = ((*output.args[0], find(gm, "block_sparse_attention").args[1]),)


def share(argument: int, op: str) -> Callable[[GraphModule], None]:
    def plant(gm: GraphModule) -> None:
        first, *_, last = [node for node in gm.graph.nodes if target_name(node) == op]
        last.args = (*last.args[:argument], first.args[argument], *last.args[argument + 1 :])

    return plant


def find(gm: GraphModule, name: str) -> Node:
    return next(node for node in gm.graph.nodes if target_name(node) == name)


def find_output(gm: GraphModule) -> Node:
    return next(node for node in gm.graph.nodes if node.op == "output").all_input_nodes[0]


PLANTED: dict[str, tuple[Callable[[GraphModule], None], str]] = {
    "inverse permutation dropped": (drop_the_inverse_permutation, r"2 sparse attentions entered, 1 inverse"),
    "attention left": (forget_a_rewrite, r"2 sites accepted, 1 attentions gone"),
    "attention lost": (drop_a_sparse_attention, r"2 attentions gone, 1 sparse attentions entered"),
    "output dtype": (change_the_dtype_of_the_output, r"output 0 was torch.float32 .* and is now torch.float16"),
    "output shape": (change_the_shape_of_the_output, r"output 0 was .*\(2, 64, 16\).* and is now .*\(1, 64, 16\)"),
    "another output": (add_an_output, r"1 outputs became 2"),
    "centroids shared": (share(3, "cluster_tokens_"), r"svg2_0_q_centroids is updated by 2"),
    "calls shared": (share(5, "cluster_tokens_"), r"svg2_0_q_calls is updated by 2"),
    "statistics shared": (share(7, "select_blocks"), r"svg2_0_statistics is updated by 2"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug):
    plant, message = PLANTED[bug]
    gm, _, _ = traced("text first")
    before, plan = snapshot(gm), sparsify(gm, SPARSE)
    verify(plan.gm, before, plan.sites)
    plant(plan.gm)
    with pytest.raises(InternalError, match=f"^verify: .*{message}"):
        verify(plan.gm, before, plan.sites)


def test_a_bug_of_ours_leaves_the_graph_it_failed_on(tmp_path, monkeypatch):
    def broken(gm: GraphModule, *_: Any) -> None:
        drop_the_inverse_permutation(gm)
        verify(gm, *_)

    monkeypatch.setenv("SVG2_DEBUG_DIR", str(tmp_path))
    monkeypatch.setattr(sparsify_module, "verify", broken)
    with pytest.raises(InternalError):
        sparsify(traced("text first")[0], SPARSE)
    assert [path.name[5:] for path in sorted(tmp_path.iterdir())] == [
        "before.py",
        "inline_subgraphs.py",
        "canonicalize.py",
        "fold_axes.py",
        "attach_state.py",
        "rewrite.py",
        "failed_verify.py",
    ]
