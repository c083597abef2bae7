"""``estimate_by``: masses of every query, or of every key, choose the blocks, in every form of attention."""

import dataclasses

import pytest
import torch
from rewritten_graphs import CASES, SPARSE, assert_equal_within_rounding, ops, run, traced
from triton_interpreter import DEVICE

import svg2_compile
from svg2_compile import denoise_step
from svg2_compile.passes.sparsify import sparsify

pytestmark = pytest.mark.usefixtures("no_grad_and_a_fresh_start")

svg2 = torch.ops.svg2
OP_OF = {"queries": "block_masses", "keys": "block_masses_by_keys"}
every_case = pytest.mark.parametrize("name", CASES)
every_estimate = pytest.mark.parametrize("asked", OP_OF)


@every_estimate
@every_case
def test_it_adds_one_op_a_site_and_everything_stays_fused(name, asked):
    gm, _, _ = traced(name)
    by_centroids, by_all = sparsify(gm, SPARSE), sparsify(gm, dataclasses.replace(SPARSE, estimate_by=asked))
    assert ops(by_all.gm) - ops(by_centroids.gm) == {OP_OF[asked]: len(by_all.sites)}
    assert not ops(by_centroids.gm) - ops(by_all.gm)


@every_estimate
@every_case
def test_keeping_everything_is_dense_attention(name, asked):
    gm, inputs, expected = traced(name)
    plan = sparsify(gm, dataclasses.replace(SPARSE, estimate_by=asked, top_p=1))
    assert_equal_within_rounding(run(plan, inputs), expected, len(plan.sites))


@every_estimate
@every_case
def test_with_the_guard_and_recall_it_is_measured_like_any_other(name, asked):
    gm, inputs, expected = traced(name)
    plan = sparsify(gm, dataclasses.replace(SPARSE, estimate_by=asked, min_recall=1.0))
    assert_equal_within_rounding(run(plan, inputs), expected, len(plan.sites))


class Model(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


TOKENS, DIM = 96, 16
OPTIONS = {"top_p": 0.5, "min_keep_ratio": 0.0, "min_tokens": 64, "dense_layers": 0, "dense_steps": 0}
OPTIONS |= {"q_clusters": 4, "k_clusters": 8}


def tokens(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return [2 * torch.randn(1, 2, TOKENS, DIM, generator=generator).to(DEVICE, dtype) for _ in "qkv"]


def by_hand(q, k, v, state, asked):
    """Return the attention that the ops make of it, one by one."""
    means, counters, statistics = state
    scale = DIM**-0.5
    q_order, q_sizes, k_sizes, keys, values = svg2.cluster_tokens_(q, k, v, *means, *counters, 10, 2, 0)
    if asked == "queries":
        masses = svg2.block_masses(q, q_order, means[1], q_sizes, k_sizes, scale)
    else:
        masses = svg2.block_masses_by_keys(means[0], keys, k_sizes, scale)
    runs, counts = svg2.select_blocks(*means, q_sizes, k_sizes, scale, 0.5, 0.0, statistics, masses)
    return svg2.block_sparse_attention(q, keys, values, q_sizes, runs, counts, None, None, None, q_order, scale)[0]


@every_estimate
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_compiled_model_does_it_step_by_step(lowering, dtype, asked):
    options = OPTIONS | {"estimate_by": asked, "lowering": lowering}
    model = torch.compile(Model(), backend="svg2", options=options, fullgraph=True)
    state = (
        [torch.zeros(1, 2, count, DIM, device=DEVICE) for count in (4, 8)],
        [torch.zeros(1, dtype=torch.int32, device=DEVICE) for _ in "qk"],
        torch.zeros(1, 2, 4, 5, device=DEVICE),
    )
    for step in range(3):
        q, k, v = tokens(step, dtype)
        with denoise_step(step, 3):
            got = model(q, k, v)
        assert torch.equal(got, by_hand(q, k, v, state, asked))
    (site,) = svg2_compile.report(model).sites
    share = state[2][..., 1].sum(-1) / 3
    assert site.density_per_head == pytest.approx(share.flatten().tolist(), rel=1e-5)
    other = torch.compile(Model(), backend="svg2", options=OPTIONS | {"lowering": "eager"}, fullgraph=True)
    with denoise_step(0, 3):
        assert not torch.equal(other(*tokens(0, dtype)), model(*tokens(0, dtype)))


def errors_of(q, k, **options):
    """Return how far the results are from dense ones, by what the estimate is made from."""
    v = torch.randn(1, 1, TOKENS, DIM, generator=torch.Generator().manual_seed(0))
    dense = Model()(q, k, v)
    errors = {}
    for estimate_by in ("centroids", *OP_OF):
        torch._dynamo.reset()
        asked = OPTIONS | {"q_clusters": 1, "top_p": 0.9, "estimate_by": estimate_by} | options
        model = torch.compile(Model(), backend="svg2", options=asked, fullgraph=True)
        with denoise_step(0, 3):
            errors[estimate_by] = float((model(q, k, v) - dense).norm() / dense.norm())
    return errors


def test_queries_that_look_apart_keep_what_their_mean_would_drop():
    """Two groups of queries in one cluster look at one group of keys each; their mean looks at a third."""
    q = torch.zeros(1, 1, TOKENS, DIM)
    q[..., ::2, 0], q[..., 1::2, 0], q[..., 2] = 4.0, -4.0, 1.0
    k = torch.zeros(1, 1, TOKENS, DIM)
    k[..., 0::3, 0], k[..., 1::3, 0], k[..., 2::3, 2] = 9.0, -9.0, 9.0
    errors = errors_of(q, k, k_clusters=3)
    assert errors["queries"] < 0.1 < errors["centroids"]


def test_keys_that_lie_apart_are_kept_where_their_mean_would_be_dropped():
    """Half of the keys of a cluster are what all queries look for, the other half the opposite; the rest is near."""
    q = torch.zeros(1, 1, TOKENS, DIM)
    q[..., 0] = 4.0
    k = torch.zeros(1, 1, TOKENS, DIM)
    k[..., 0:48:2, 0], k[..., 1:48:2, 0], k[..., :48, 1] = 10.0, -10.0, 40.0
    k[..., 48:, 0], k[..., 48:, 2] = 5.0, 40.0
    errors = errors_of(q, k, k_clusters=2)
    assert errors["keys"] < 0.1 < min(errors["centroids"], errors["queries"])
