"""The recall that the graph measures is that of its own attention, in every form, and measuring changes nothing."""

import dataclasses

import pytest
import torch
from rewritten_graphs import CASES, DENSE, HEADS, SPARSE, SparseBackend, ops, run, traced, wan, zeros
from torch.fx import Interpreter

import svg2_compile
from svg2_compile.passes.nodes import is_sdpa, sdpa_arguments, target_name
from svg2_compile.passes.sparsify import sparsify

pytestmark = pytest.mark.usefixtures("no_grad_and_a_fresh_start")

EVERY_ROW = 10**6
MEASURED = dataclasses.replace(SPARSE, recall_rows=EVERY_ROW)
every_case = pytest.mark.parametrize("name", CASES)


class Values(Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, gm):
        super().__init__(gm)
        self.seen = {}

    def run_node(self, node):
        self.seen[node] = super().run_node(node)
        return self.seen[node]

    def of(self, x):
        return self.seen[x] if isinstance(x, torch.fx.Node) else x


def dense_log_sum_exp(gm, inputs, site):
    """Return the log-sum-exp [B, H, N] in fp64 of the video rows of one attention of a graph that is not rewritten."""
    values = Values(gm)
    values.run(*inputs)
    attention = sdpa_arguments([node for node in gm.graph.nodes if is_sdpa(node)][site.index])
    q, k, mask = (values.of(each) for each in (attention.query, attention.key, attention.attn_mask))
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * site.scale
    dense = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).logsumexp(-1)
    if not site.has_context_queries:
        return dense
    rows = dense.split([segment.length for segment in site.segments], -1)
    return rows[[segment.is_video for segment in site.segments].index(True)]


def sparse_log_sum_exp(plan, inputs, state):
    """Return the log-sum-exp [B, H, N] of the first sparse attention."""
    values = Values(plan.gm)
    values.run(*inputs, *state)
    return next(each[1].double() for node, each in values.seen.items() if target_name(node) == "block_sparse_attention")


def recalls(plan, state):
    return [tensor[..., 1] / tensor[..., 0] for tensor, spec in zip(state, plan.state_specs) if spec.name == "recall"]


@every_case
def test_recall_is_the_mass_of_the_sparse_attention_over_that_of_the_dense_one(name):
    gm, inputs, _ = traced(name)
    plan = sparsify(gm, MEASURED)
    state = zeros(plan)
    sparse, dense = sparse_log_sum_exp(plan, inputs, state), dense_log_sum_exp(gm, inputs, plan.sites[0])
    expected = (sparse - dense).exp().mean(-1)
    assert expected.max() < 1
    # the log-sum-exps are fp32: a step of a mass of at most 1 for each of about a hundred keys, and for the scores
    torch.testing.assert_close(recalls(plan, state)[0].double(), expected, rtol=0, atol=2e-5)


@every_case
def test_recall_is_one_at_every_site_where_everything_is_kept(name):
    gm, inputs, _ = traced(name)
    plan = sparsify(gm, dataclasses.replace(DENSE, recall_rows=5))
    state = zeros(plan)
    run(plan, inputs, state)
    assert [bool((each == 1).all()) for each in recalls(plan, state)] == [True] * len(plan.sites)


@every_case
def test_measuring_adds_one_op_a_site_and_changes_no_bit(name):
    gm, inputs, _ = traced(name)
    plain, measured = sparsify(gm, SPARSE), sparsify(gm, dataclasses.replace(SPARSE, recall_rows=4))
    assert ops(measured.gm) - ops(plain.gm) == {
        "measure_recall": len(plain.sites),
        "add_": len(plain.sites),
    }
    assert torch.equal(run(measured, inputs), run(plain, inputs))


def test_only_the_calls_of_the_interval_are_measured():
    gm, inputs, _ = traced("text first")
    plan = sparsify(gm, dataclasses.replace(SPARSE, recall_rows=4, recall_interval=2))
    state = zeros(plan)
    for _ in range(5):
        run(plan, inputs, state)
    calls = [tensor[..., 0] for tensor, spec in zip(state, plan.state_specs) if spec.name == "recall"]
    assert len(calls) == 2 and all((each == 3).all() for each in calls)


def test_one_dynamic_graph_measures_every_length():
    model, inputs = wan()
    backend = SparseBackend(MEASURED)
    compiled = torch.compile(model.eval(), backend=backend, fullgraph=True, dynamic=True)
    for frames in (3, 5):
        assert compiled(**inputs | {"hidden_states": torch.randn(2, 4, frames, 10, 14)})[0].isfinite().all()
    assert len(backend.plans) == 1 and not isinstance(backend.plans[0].sites[0].tokens, int)


def test_the_report_tells_the_recall_of_a_model_compiled_by_inductor():
    """The same graph run node by node is the yardstick; the tests above judge that one."""
    model, inputs = wan()
    options = {"top_p": 0.3, "min_keep_ratio": 0.0, "min_tokens": 40, "dense_layers": 0, "dense_steps": 1}
    options |= {"recall_rows": EVERY_ROW, "q_clusters": 3, "k_clusters": 5}
    reports = []
    for lowering in ("inductor", "eager"):
        torch._dynamo.reset()
        svg2_compile.reset()
        compiled = torch.compile(model.eval(), backend="svg2", options=options | {"lowering": lowering}, fullgraph=True)
        for timestep in (900, 800, 700):
            compiled(**inputs | {"timestep": torch.tensor([timestep, timestep])})
        reports.append(svg2_compile.report(compiled))
    fast, slow = reports
    assert len(fast.sparse_sites) == 2 and [site.sparse_calls for site in fast.sparse_sites] == [2, 2]
    for one, other in zip(fast.sparse_sites, slow.sparse_sites):
        assert len(one.recall_per_head) == HEADS
        assert one.recall_per_head == pytest.approx(other.recall_per_head, abs=1e-4)
        assert one.recall == pytest.approx(sum(one.recall_per_head) / HEADS)
        assert 0.2 < one.recall < 0.999
    assert fast.recall == fast.to_dict()["recall"] == pytest.approx(slow.recall, abs=1e-4)
    assert f"recall {100 * fast.recall:.1f}%" in str(fast)


def test_a_report_without_measuring_has_no_recall():
    model, inputs = wan()
    options = {"min_tokens": 40, "dense_layers": 0, "dense_steps": 0, "lowering": "eager"}
    compiled = torch.compile(model.eval(), backend="svg2", options=options)
    compiled(**inputs)
    report = svg2_compile.report(compiled)
    assert report.density is not None and report.recall is None
    assert all(site.recall is None and site.recall_per_head == () for site in report.sites)
