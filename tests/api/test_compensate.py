"""``compensate``: means stand in for what is dropped, in every form of attention, and nothing else changes."""

import dataclasses

import pytest
import torch
from rewritten_graphs import (
    CASES,
    SPARSE,
    assert_equal_within_rounding,
    ops,
    run,
    trace,
    traced,
    zeros,
)
from triton_interpreter import DEVICE

import svg2_compile
from svg2_compile import denoise_step
from svg2_compile.passes.sparsify import sparsify

pytestmark = pytest.mark.usefixtures("no_grad_and_a_fresh_start")

svg2 = torch.ops.svg2
every_case = pytest.mark.parametrize("name", CASES)
COMPENSATED = dataclasses.replace(SPARSE, compensate="centroids")
ROUTED = dataclasses.replace(COMPENSATED, route="error")
BY_KEYS = dataclasses.replace(COMPENSATED, compensate="keys")
every_config = pytest.mark.parametrize(
    "config", [COMPENSATED, ROUTED, BY_KEYS], ids=["compensated", "routed", "weighed by keys"]
)


@every_case
def test_it_adds_three_calls_a_site_and_everything_stays_fused(name):
    gm, _, _ = traced(name)
    plain, compensated = sparsify(gm, SPARSE), sparsify(gm, COMPENSATED)
    sites = len(plain.sites)
    assert ops(compensated.gm) - ops(plain.gm) == {"cluster_means": 2 * sites, "log_dropped_sizes": sites}
    assert not ops(plain.gm) - ops(compensated.gm)
    assert [spec.name for spec in plain.state_specs] == [spec.name for spec in compensated.state_specs]


@every_case
def test_asking_the_keys_adds_one_more_op_a_site(name):
    gm, _, _ = traced(name)
    compensated, by_keys = sparsify(gm, COMPENSATED), sparsify(gm, BY_KEYS)
    assert ops(by_keys.gm) - ops(compensated.gm) == {"log_dropped_weights": len(by_keys.sites)}
    assert not ops(compensated.gm) - ops(by_keys.gm)


@every_case
def test_routing_adds_one_more_op_a_site(name):
    gm, _, _ = traced(name)
    compensated, routed = sparsify(gm, COMPENSATED), sparsify(gm, ROUTED)
    assert ops(routed.gm) - ops(compensated.gm) == {"block_errors": len(routed.sites)}
    assert not ops(compensated.gm) - ops(routed.gm)
    by_queries = sparsify(gm, dataclasses.replace(ROUTED, estimate_by="queries"))
    assert ops(by_queries.gm) - ops(routed.gm) == {"block_masses": len(routed.sites)}


@every_config
@every_case
def test_keeping_everything_gives_the_same_bits(name, config):
    gm, inputs, _ = traced(name)
    plain, compensated = (sparsify(gm, dataclasses.replace(each, top_p=1)) for each in (SPARSE, config))
    assert torch.equal(run(plain, inputs), run(compensated, inputs))


@pytest.mark.parametrize("config", [COMPENSATED, BY_KEYS], ids=["centroids", "keys"])
@every_case
def test_it_is_nearer_to_dense_attention_and_keeps_no_more(name, config):
    gm, inputs, expected = traced(name)
    plans = [sparsify(gm, each) for each in (SPARSE, config)]
    states = [zeros(plan) for plan in plans]
    errors = [(run(plan, inputs, state) - expected).norm() for plan, state in zip(plans, states)]
    assert errors[1] < errors[0]
    # of the first attention; what it gives changes those after it
    place = [spec.name for spec in plans[0].state_specs].index("statistics")
    assert torch.equal(states[0][place], states[1][place])


@every_config
@every_case
def test_a_head_that_the_guard_makes_dense_is_dense(name, config):
    gm, inputs, expected = traced(name)
    plan = sparsify(gm, dataclasses.replace(config, min_recall=1.0))
    assert_equal_within_rounding(run(plan, inputs), expected, len(plan.sites))


class Model(torch.nn.Module):
    def forward(self, q, k, v, mask=None):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


TOKENS, DIM = 96, 16
OPTIONS = {"top_p": 0.5, "min_keep_ratio": 0.0, "min_tokens": 64, "dense_layers": 0, "dense_steps": 0}
OPTIONS |= {"q_clusters": 4, "k_clusters": 8, "compensate": "centroids"}


def tokens(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return [2 * torch.randn(1, 2, TOKENS, DIM, generator=generator).to(DEVICE, dtype) for _ in "qkv"]


def test_a_hidden_value_is_in_no_mean():
    q, k, v = (each.cpu() for each in tokens(0))
    q /= 8  # of a smooth softmax means are nearly the truth
    mask = torch.ones(1, 1, 1, TOKENS, dtype=torch.bool)
    mask[..., 20:31] = False
    gm, inputs, dense = trace(Model(), {"q": q, "k": k, "v": v, "mask": mask})
    plan = sparsify(gm, dataclasses.replace(COMPENSATED, q_clusters=2, k_clusters=4))
    assert len(plan.sites) == 1
    out = run(plan, inputs)
    other = v.clone()
    other[:, :, 20:31] = 1e4
    assert torch.equal(run(plan, [other if each.equal(v) else each for each in inputs]), out)
    assert (out - dense).norm() < 0.5 * dense.norm()


def by_hand(q, k, v, state, route, compensate):
    """Return the attention that the ops make of it, one by one."""
    means, counters, statistics = state
    scale = DIM**-0.5
    q_order, q_sizes, k_sizes, keys, values = svg2.cluster_tokens_(q, k, v, *means, *counters, 10, 2, 0)
    pseudo = [svg2.cluster_means(each, k_sizes) for each in (keys, values)]
    errors = svg2.block_errors(means[0], keys, values, *pseudo, k_sizes, scale) if route == "error" else None
    runs, counts = svg2.select_blocks(*means, q_sizes, k_sizes, scale, 0.5, 0.0, statistics, None, errors)
    pseudo.append(svg2.log_dropped_sizes(runs, counts, k_sizes))
    if compensate == "keys":
        pseudo[-1] = svg2.log_dropped_weights(pseudo[-1], means[0], keys, pseudo[0], k_sizes, scale)
    arguments = (q, keys, values, q_sizes, runs, counts, None, None, None, q_order, scale)
    return svg2.block_sparse_attention(*arguments, "auto", None, False, *pseudo)[0]


@pytest.mark.parametrize(
    ("route", "compensate"), [("mass", "centroids"), ("error", "centroids"), ("mass", "keys"), ("error", "keys")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_compiled_model_does_it_step_by_step(lowering, dtype, route, compensate):
    options = OPTIONS | {"lowering": lowering, "route": route, "compensate": compensate}
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
        assert torch.equal(got, by_hand(q, k, v, state, route, compensate))
    (site,) = svg2_compile.report(model).sites
    share = state[2][..., 1].sum(-1) / 3
    assert site.density_per_head == pytest.approx(share.flatten().tolist(), rel=1e-5)


def test_recall_stays_the_share_that_is_attended_to_exactly():
    recalls = []
    for compensate in ("none", "centroids"):
        torch._dynamo.reset()
        options = OPTIONS | {"compensate": compensate, "recall_rows": 8, "lowering": "eager"}
        model = torch.compile(Model(), backend="svg2", options=options, fullgraph=True)
        with denoise_step(0, 3):
            model(*tokens(0))
        recalls.append(svg2_compile.report(model).sites[0].recall)
    assert recalls[0] == recalls[1] and 0 < recalls[0] < 1


def test_what_is_kept_is_where_means_are_most_wrong():
    """Two clusters have most mass and equal keys, whose means are exact; in the third, keys lie apart."""
    q = torch.zeros(1, 1, TOKENS, DIM)
    q[..., 0] = 4.0
    k, v = torch.zeros(1, 1, TOKENS, DIM), torch.zeros(1, 1, TOKENS, DIM)
    k[..., :32, 0], k[..., :32, 1], v[..., :32, 0] = 4.0, 40.0, 1.0
    k[..., 32:64, 0], k[..., 32:64, 2], v[..., 32:64, 1] = 3.0, 40.0, 2.0
    k[..., 64::2, 0], k[..., 65::2, 0], k[..., 64:, 3], v[..., 64::2, 2] = 5.0, -5.0, 40.0, 5.0
    dense = Model()(q, k, v)
    errors = {}
    for route in ("mass", "error"):
        torch._dynamo.reset()
        options = OPTIONS | {"q_clusters": 1, "k_clusters": 3, "top_p": 0.8, "route": route, "lowering": "eager"}
        model = torch.compile(Model(), backend="svg2", options=options, fullgraph=True)
        with denoise_step(0, 3):
            errors[route] = float((model(q, k, v) - dense).norm() / dense.norm())
        assert svg2_compile.report(model).density == pytest.approx(2 / 3)
    assert errors["error"] < 1e-5 < errors["mass"]


def test_an_exported_graph_keeps_it():
    q, k, v = (each.cpu() for each in tokens(0))
    exported = torch.export.export(Model(), (q, k, v))
    config = dataclasses.replace(ROUTED, q_clusters=4, k_clusters=8, top_p=0.5)
    plan = sparsify(exported.module(), config, state="buffers")
    again = torch.export.export(plan.gm, (q, k, v))
    counted = ops(again.graph_module)
    assert counted["cluster_means"] == 2 and counted["log_dropped_sizes"] == counted["block_errors"] == 1
