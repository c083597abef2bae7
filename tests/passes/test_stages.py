"""Stages: the fused ops equal their parts, and a stage of one's own fits in."""

from dataclasses import dataclass, replace

import pytest
import torch
from rewritten_graphs import CASES, SPARSE, every_case, ops, run, traced, zeros

from svg2_compile.passes.attach_state import attach_inputs
from svg2_compile.passes.classify import classify
from svg2_compile.passes.clone import clone
from svg2_compile.passes.errors import InternalError
from svg2_compile.passes.kernel_config import KernelConfig
from svg2_compile.passes.match import match
from svg2_compile.passes.plan import plan_site, stages_of
from svg2_compile.passes.records import StateSpec
from svg2_compile.passes.rewrite import rewrite
from svg2_compile.passes.sparsify import fake_mode_of, sparsify
from svg2_compile.passes.stages.attend import Attend
from svg2_compile.passes.stages.cluster import Cluster
from svg2_compile.passes.stages.stage import Stage

aten, svg2 = torch.ops.aten, torch.ops.svg2


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def instead(config, site, *stages):
    """Return the usual stages with others in the place of their base class."""
    others = {type(stage).__bases__[0]: stage for stage in stages}
    return tuple(others.get(type(stage), stage) for stage in stages_of(config, site))


@dataclass(frozen=True, slots=True)
class ClusterInParts(Cluster):
    """Clusters, sorts and permutes in ops of their own, whether a mask hides keys or not."""

    def emit(self, writer, flow):
        if flow.key_mask is not None:
            return Cluster.emit(self, writer, flow)
        site, sides = writer.site, []
        for side, x, clusters in (("q", flow.q, site.q_clusters), ("k", flow.k, site.k_clusters)):
            state = writer.state[f"{side}_centroids"], writer.state[f"{side}_calls"]
            numbers = site.kmeans_iters_init, site.kmeans_iters_step, site.seed
            labels = writer.emit(svg2.kmeans_.default, x, *state, *numbers)
            sides.append(writer.parts(svg2.sort_labels.default, labels, clusters, count=2))
        (q_order, q_sizes), (k_order, k_sizes) = sides
        k, v = (writer.emit(svg2.permute_tokens.default, x, k_order) for x in (flow.k, flow.v))
        return replace(flow, q_order=q_order, q_sizes=q_sizes, k_sizes=k_sizes, k_clustered=k, v_clustered=v)


@dataclass(frozen=True, slots=True)
class AttendInParts(Attend):
    """Permutes queries and results in ops of their own."""

    def emit(self, writer, flow):
        q = writer.emit(svg2.permute_tokens.default, flow.q, flow.q_order)
        done = Attend.emit(self, writer, replace(flow, q=q, q_order=None))
        return replace(flow, out=writer.emit(svg2.unpermute_tokens.default, done.out, flow.q_order))


@every_case
def test_the_fused_ops_equal_their_parts(name):
    gm, inputs, _ = traced(name)
    fused = sparsify(gm, SPARSE)
    parts = sparsify(gm, SPARSE, stages=lambda *asked: instead(*asked, ClusterInParts(), AttendInParts()))
    count = len(fused.sites)
    assert ops(fused.gm)["permute_tokens"] == 2 * count * CASES[name].hides and not ops(fused.gm)["unpermute_tokens"]
    assert ops(parts.gm)["cluster_tokens_"] == 0 and ops(parts.gm)["kmeans_"] == 2 * count
    assert ops(parts.gm)["permute_tokens"] == 3 * count and ops(parts.gm)["unpermute_tokens"] == count
    states = zeros(fused), zeros(parts)
    for _ in range(2):  # from tokens, then from centroids
        assert torch.equal(run(fused, inputs, states[0]), run(parts, inputs, states[1]))
        for one, other in zip(*states, strict=True):
            assert torch.equal(one, other)


@dataclass(frozen=True, slots=True)
class AddLogSumExp(Stage):
    """Adds the log-sum-exp to every channel."""

    def emit(self, writer, flow):
        column = writer.emit(aten.unsqueeze.default, flow.lse, 3)
        return replace(flow, out=writer.emit(aten.add.Tensor, flow.out, column))


@every_case
def test_reading_the_log_sum_exp_keeps_the_gather_fused(name):
    gm, inputs, _ = traced(name)
    plain = sparsify(gm, SPARSE)
    reading = sparsify(gm, SPARSE, stages=lambda *asked: (*stages_of(*asked), AddLogSumExp()))
    added = ops(reading.gm) - ops(plain.gm)
    assert set(added) == {"getitem", "unsqueeze", "add"} and not ops(plain.gm) - ops(reading.gm)
    assert all(count == len(plain.sites) for count in added.values())
    assert run(reading, inputs).isfinite().all() and not torch.equal(run(reading, inputs), run(plain, inputs))


def test_results_that_no_stage_reads_leave_the_graph():
    gm, _, _ = traced("text first")
    attentions = sparsify(gm, SPARSE).gm.graph.find_nodes(
        op="call_function", target=svg2.block_sparse_attention.default
    )
    assert [[user.args[1] for user in node.users] for node in attentions] == [[0], [0]]


@dataclass(frozen=True, slots=True)
class Rehearse(Stage):
    """Scales the output by a state that starts as something else than zeros and is counted up."""

    start: float

    def state(self, site):
        shape = (site.head_dim,)
        return (StateSpec(site.index, "factors", shape, torch.float32, "generation", (self.start,) * site.head_dim),)

    def emit(self, writer, flow):
        factors = writer.state["factors"]
        out = writer.emit(aten.mul.Tensor, flow.out, factors)
        writer.emit(aten.add_.Scalar, factors, 1.0)
        return replace(flow, out=out)


def test_two_sites_of_a_graph_may_differ():
    gm, inputs, _ = traced("text first")

    def stages(config, site):
        return (*stages_of(config, site), *([Rehearse(2.0)] if site.index == 1 else []))

    plan = sparsify(gm, SPARSE, stages=stages)
    assert ["factors" in [spec.name for spec in site.state_specs] for site in plan.sites] == [False, True]
    state = [spec.create("cpu") for spec in plan.state_specs]
    run(plan, inputs, state)
    (factors,) = (tensor for tensor, spec in zip(state, plan.state_specs) if spec.name == "factors")
    assert (factors == 3).all()


def test_budgets_are_the_sites_own():
    gm = clone(traced("text first")[0])
    budgets = [(0.3, 0.0), (0.5, 0.25)]
    sites = [
        plan_site(site, replace(SPARSE, top_p=top_p, min_keep_ratio=floor), KernelConfig())
        for site, (top_p, floor) in zip(classify(match(gm, SPARSE), SPARSE), budgets, strict=True)
    ]
    fake_mode = fake_mode_of(gm)
    nodes = attach_inputs(gm, sites, fake_mode)
    with fake_mode:
        rewrite(gm, sites, nodes)
    selections = gm.graph.find_nodes(op="call_function", target=svg2.select_blocks.default)
    place = [argument.name for argument in svg2.select_blocks.default._schema.arguments].index("top_p")
    assert [node.args[place : place + 2] for node in selections] == budgets


def test_stages_without_an_attention_are_an_error_of_ours():
    gm, _, _ = traced("text first")
    with pytest.raises(InternalError, match=r"^rewrite: the stages of .* \(Cluster\) give no output; end with Attend"):
        sparsify(gm, SPARSE, stages=lambda *_: (Cluster(),))
