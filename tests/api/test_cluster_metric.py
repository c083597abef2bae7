"""``cluster_metric="queries"``: keys that the queries cannot tell apart form clusters, in every form of attention."""

import dataclasses

import pytest
import torch
from rewritten_graphs import CASES, SPARSE, assert_equal_within_rounding, ops, run, traced
from triton_interpreter import DEVICE

from svg2_compile import denoise_step
from svg2_compile.passes.sparsify import sparsify

pytestmark = pytest.mark.usefixtures("no_grad_and_a_fresh_start")

svg2 = torch.ops.svg2
every_case = pytest.mark.parametrize("name", CASES)
BY_QUERIES = dataclasses.replace(SPARSE, cluster_metric="queries")


@every_case
def test_each_side_is_clustered_by_itself_and_keys_in_the_metric(name):
    gm, _, _ = traced(name)
    plan = sparsify(gm, BY_QUERIES)
    found, count = ops(plan.gm), len(plan.sites)
    assert not found["cluster_tokens_"]
    assert {op: found[op] for op in ("kmeans_", "sort_labels", "permute_tokens", "gram")} == {
        "kmeans_": 2 * count,
        "sort_labels": 2 * count,
        "permute_tokens": 2 * count,
        "gram": count,
    }


@every_case
def test_keeping_everything_is_dense_attention(name):
    gm, inputs, expected = traced(name)
    plan = sparsify(gm, dataclasses.replace(BY_QUERIES, top_p=1))
    assert_equal_within_rounding(run(plan, inputs), expected, len(plan.sites))


@every_case
def test_with_the_guard_and_recall_it_is_measured_like_any_other(name):
    gm, inputs, expected = traced(name)
    plan = sparsify(gm, dataclasses.replace(BY_QUERIES, min_recall=1.0))
    assert_equal_within_rounding(run(plan, inputs), expected, len(plan.sites))


class Model(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


TOKENS, DIM = 96, 16
OPTIONS = {"top_p": 0.5, "min_keep_ratio": 0.0, "min_tokens": 64, "dense_layers": 0, "dense_steps": 0}
OPTIONS |= {"q_clusters": 4, "k_clusters": 8}


def by_hand(q, k, v, means, counters, statistics):
    """Return the attention that the ops make of it, one by one."""
    scale = DIM**-0.5
    q_order, q_sizes = svg2.sort_labels(svg2.kmeans_(q, means[0], counters[0], 10, 2, 0), 4)
    metric = svg2.gram(means[0], k.shape[1])
    k_order, k_sizes = svg2.sort_labels(svg2.kmeans_(k, means[1], counters[1], 10, 2, 0, metric), 8)
    keys, values = (svg2.permute_tokens(each, k_order) for each in (k, v))
    runs, counts = svg2.select_blocks(*means, q_sizes, k_sizes, scale, 0.5, 0.0, statistics)
    return svg2.block_sparse_attention(q, keys, values, q_sizes, runs, counts, None, None, None, q_order, scale)[0]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_compiled_model_does_it_step_by_step(lowering, groups):
    options = OPTIONS | {"cluster_metric": "queries", "lowering": lowering}
    model = torch.compile(Model(), backend="svg2", options=options, fullgraph=True)
    means = [torch.zeros(1, 2, 4, DIM, device=DEVICE), torch.zeros(1, groups, 8, DIM, device=DEVICE)]
    counters = [torch.zeros(1, dtype=torch.int32, device=DEVICE) for _ in "qk"]
    statistics = torch.zeros(1, 2, 4, 5, device=DEVICE)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        q, k, v = (
            2 * torch.randn(1, heads, TOKENS, DIM, generator=generator).to(DEVICE) for heads in (2, groups, groups)
        )
        with denoise_step(step, 3):
            got = model(q, k, v)
        assert torch.equal(got, by_hand(q, k, v, means, counters, statistics))


def test_keys_that_differ_only_where_no_query_looks_are_taken_together():
    """The queries see one channel; in another, which they do not see, the keys are far from each other."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.zeros(1, 1, TOKENS, DIM), torch.zeros(1, 1, TOKENS, DIM)
    q[..., ::2, 0], q[..., 1::2, 0] = 8.0, -8.0
    k[..., 0] = torch.where(torch.rand(TOKENS, generator=generator) < 0.5, 3.0, -3.0)
    k[..., 1] = 50 * torch.randn(TOKENS, generator=generator)
    v = torch.randn(1, 1, TOKENS, DIM, generator=generator)
    dense = Model()(q, k, v)
    errors = {}
    for metric in ("tokens", "queries"):
        torch._dynamo.reset()
        options = OPTIONS | {"q_clusters": 2, "k_clusters": 2, "cluster_metric": metric}
        model = torch.compile(Model(), backend="svg2", options=options, fullgraph=True)
        with denoise_step(0, 3):
            errors[metric] = float((model(q, k, v) - dense).norm() / dense.norm())
    assert errors["queries"] < 0.01 < 0.1 < errors["tokens"]
