"""``head_floor="online"``: no query cluster keeps less than its head does on average, in every form of attention."""

import dataclasses

import pytest
import torch
from rewritten_graphs import CASES, SPARSE, assert_equal_within_rounding, ops, run, traced, zeros
from triton_interpreter import DEVICE

import svg2_compile
from svg2_compile import denoise_step
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.passes.sparsify import sparsify

pytestmark = pytest.mark.usefixtures("no_grad_and_a_fresh_start")

svg2 = torch.ops.svg2
every_case = pytest.mark.parametrize("name", CASES)
FLOORED = dataclasses.replace(SPARSE, head_floor="online")


@every_case
def test_it_adds_a_selection_and_a_floor_a_site(name):
    gm, _, _ = traced(name)
    plain, floored = sparsify(gm, SPARSE), sparsify(gm, FLOORED)
    sites = len(plain.sites)
    assert ops(floored.gm) - ops(plain.gm) == {"zeros_like": sites, "select_blocks": sites, "least_keys_": sites}
    assert not ops(plain.gm) - ops(floored.gm)


@every_case
def test_the_floor_is_the_density_without_it_and_nobody_is_below(name):
    gm, inputs, _ = traced(name)
    states = []
    for config in (SPARSE, FLOORED):
        plan = sparsify(gm, config)
        states.append(dict(zip([(spec.site, spec.name) for spec in plan.state_specs], zeros(plan))))
        run(plan, inputs, list(states[-1].values()))
    # of the first attention; what it gives changes those after it
    first = next(iter(states[0]))[0]
    plain, raised = (each[first, "statistics"][..., STATISTICS.index("density_sum")].sum(-1) for each in states)
    floors = states[1][first, "floors"]
    torch.testing.assert_close(floors[..., 1], plain, rtol=1e-5, atol=1e-6)
    assert (floors[..., 0] == 1).all() and (raised >= plain - 1e-6).all() and (raised > plain).any()


@every_case
def test_keeping_everything_gives_the_same_bits(name):
    gm, inputs, _ = traced(name)
    plain, floored = (sparsify(gm, dataclasses.replace(each, top_p=1)) for each in (SPARSE, FLOORED))
    assert torch.equal(run(plain, inputs), run(floored, inputs))


@pytest.mark.parametrize(
    "options", [{"estimate_by": "queries"}, {"compensate": "centroids", "route": "error"}, {"repair_rows": 16}], ids=str
)
@every_case
def test_it_goes_with_other_ways_and_a_guard_that_makes_all_dense(name, options):
    gm, inputs, expected = traced(name)
    config = dataclasses.replace(FLOORED, **options)
    assert run(sparsify(gm, config), inputs).isfinite().all()
    guarded = sparsify(gm, dataclasses.replace(config, min_recall=1.0))
    assert_equal_within_rounding(run(guarded, inputs), expected, len(guarded.sites))


class Model(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


TOKENS, DIM = 96, 16
OPTIONS = {"top_p": 0.5, "min_keep_ratio": 0.0, "min_tokens": 64, "dense_layers": 0, "dense_steps": 0}
OPTIONS |= {"q_clusters": 4, "k_clusters": 8, "head_floor": "online"}


def tokens(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return [2 * torch.randn(1, 2, TOKENS, DIM, generator=generator).to(DEVICE, dtype) for _ in "qkv"]


def by_hand(q, k, v, state, errors):
    """Return the attention that the ops make of it, one by one."""
    means, counters, statistics, floors = state
    scale = DIM**-0.5
    q_order, q_sizes, k_sizes, keys, values = svg2.cluster_tokens_(q, k, v, *means, *counters, 10, 2, 0)
    of_call = torch.zeros_like(statistics)
    svg2.select_blocks(*means, q_sizes, k_sizes, scale, 0.5, 0.0, of_call)
    least = svg2.least_keys_(of_call, k_sizes, floors)
    pseudo = [None] * 3
    block_errors = None
    if errors:
        pseudo = [svg2.cluster_means(each, k_sizes) for each in (keys, values)]
        block_errors = svg2.block_errors(means[0], keys, values, *pseudo, k_sizes, scale)
    runs, counts = svg2.select_blocks(*means, q_sizes, k_sizes, scale, 0.5, 0.0, statistics, None, block_errors, least)
    if errors:
        pseudo.append(svg2.log_dropped_sizes(runs, counts, k_sizes))
    arguments = (q, keys, values, q_sizes, runs, counts, None, None, None, q_order, scale)
    return svg2.block_sparse_attention(*arguments, "auto", None, False, *pseudo)[0]


@pytest.mark.parametrize("errors", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_compiled_model_does_it_step_by_step(lowering, dtype, errors):
    options = OPTIONS | {"lowering": lowering}
    if errors:
        options |= {"compensate": "centroids", "route": "error"}
    model = torch.compile(Model(), backend="svg2", options=options, fullgraph=True)
    state = (
        [torch.zeros(1, 2, count, DIM, device=DEVICE) for count in (4, 8)],
        [torch.zeros(1, dtype=torch.int32, device=DEVICE) for _ in "qk"],
        torch.zeros(1, 2, 4, len(STATISTICS), device=DEVICE),
        torch.zeros(1, 2, 2, device=DEVICE),
    )
    for step in range(3):
        q, k, v = tokens(step, dtype)
        with denoise_step(step, 3):
            got = model(q, k, v)
        assert torch.equal(got, by_hand(q, k, v, state, errors))
    (site,) = svg2_compile.report(model).sites
    assert site.density_per_head == pytest.approx((state[2][..., 1].sum(-1) / 3).flatten().tolist(), rel=1e-5)
    assert site.more == pytest.approx({"head_floor": float(state[3][..., 1].sum()) / 6}, rel=1e-5)
    assert site.more["head_floor"] <= site.density
    assert "head floor" in str(svg2_compile.report(model))


def test_an_exported_graph_keeps_it():
    q, k, v = (each.cpu() for each in tokens(0))
    exported = torch.export.export(Model(), (q, k, v))
    config = dataclasses.replace(FLOORED, q_clusters=4, k_clusters=8, top_p=0.5)
    plan = sparsify(exported.module(), config, state="buffers")
    again = torch.export.export(plan.gm, (q, k, v))
    counted = ops(again.graph_module)
    assert counted["select_blocks"] == 2 and counted["least_keys_"] == 1
