"""``repair_rows``: some rows are dense, others lose the error that these tell, in every form of attention."""

import dataclasses

import pytest
import torch
from rewritten_graphs import (
    CASES,
    SPARSE,
    SparseBackend,
    assert_equal_within_rounding,
    ops,
    run,
    trace,
    traced,
    wan,
    zeros,
)
from triton_interpreter import DEVICE

import svg2_compile
from svg2_compile import denoise_step
from svg2_compile.kernels.repair_rows import REPAIRS
from svg2_compile.passes.sparsify import sparsify

pytestmark = pytest.mark.usefixtures("no_grad_and_a_fresh_start")

svg2 = torch.ops.svg2
every_case = pytest.mark.parametrize("name", CASES)
REPAIRED = dataclasses.replace(SPARSE, repair_rows=24)
MEASURED = dataclasses.replace(REPAIRED, recall_rows=5)


@every_case
def test_it_adds_three_calls_a_site_and_its_rows_serve_recall(name):
    gm, _, _ = traced(name)
    plain, repaired, measured = (sparsify(gm, each) for each in (SPARSE, REPAIRED, MEASURED))
    sites = len(plain.sites)
    added = {"probe_rows": sites, "repair_rows_": sites, "add_": sites, "getitem": 2 * sites}
    assert ops(repaired.gm) - ops(plain.gm) == added
    assert not ops(plain.gm) - ops(repaired.gm)
    assert ops(measured.gm) - ops(repaired.gm) == {"add_": sites, "getitem": sites}
    assert not ops(repaired.gm) - ops(measured.gm)


@every_case
def test_measuring_recall_changes_no_bit(name):
    gm, inputs, _ = traced(name)
    assert torch.equal(run(sparsify(gm, MEASURED), inputs), run(sparsify(gm, REPAIRED), inputs))


@pytest.mark.parametrize(
    "options", [{}, {"compensate": "centroids"}, {"estimate_by": "queries"}, {"min_recall": 0.5}], ids=str
)
@every_case
def test_rows_that_are_all_dense_make_every_form_of_attention_dense(name, options, monkeypatch):
    monkeypatch.setattr("svg2_compile.kernels.probe_rows.MAX_PROBES", 10**6)
    monkeypatch.setattr("svg2_compile.kernels.repair_rows.MAX_PROBES", 10**6)
    gm, inputs, expected = traced(name)
    every_row = dataclasses.replace(SPARSE, **options)
    object.__setattr__(every_row, "repair_rows", 10**6)
    plan = sparsify(gm, every_row)
    assert_equal_within_rounding(run(plan, inputs), expected, len(plan.sites))


@every_case
def test_keeping_everything_stays_dense(name):
    gm, inputs, expected = traced(name)
    plan = sparsify(gm, dataclasses.replace(REPAIRED, top_p=1))
    assert_equal_within_rounding(run(plan, inputs), expected, len(plan.sites))


@every_case
def test_the_selection_of_the_first_attention_stays(name):
    gm, inputs, _ = traced(name)
    states = []
    for config in (SPARSE, REPAIRED):
        plan = sparsify(gm, config)
        states.append(dict(zip([(spec.site, spec.name) for spec in plan.state_specs], zeros(plan))))
        run(plan, inputs, list(states[-1].values()))
    first = next(iter(states[0]))[0]
    assert torch.equal(*(each[first, "statistics"] for each in states))
    repairs = states[1][first, "repairs"]
    assert (repairs[..., 0] == 1).all() and (repairs[..., 3] <= repairs[..., 2]).all() and (repairs[..., 2] > 0).all()


def test_one_dynamic_graph_repairs_every_length():
    model, inputs = wan()
    backend = SparseBackend(MEASURED)
    compiled = torch.compile(model.eval(), backend=backend, fullgraph=True, dynamic=True)
    for frames in (3, 5):
        assert compiled(**inputs | {"hidden_states": torch.randn(2, 4, frames, 10, 14)})[0].isfinite().all()
    assert len(backend.plans) == 1 and not isinstance(backend.plans[0].sites[0].tokens, int)


class Model(torch.nn.Module):
    def forward(self, q, k, v, mask=None):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


TOKENS, DIM, ROWS = 128, 16, 32
OPTIONS = {"top_p": 0.5, "min_keep_ratio": 0.0, "min_tokens": 64, "dense_layers": 0, "dense_steps": 0}
OPTIONS |= {"q_clusters": 4, "k_clusters": 8, "repair_rows": ROWS}


def tokens(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return [2 * torch.randn(1, 2, TOKENS, DIM, generator=generator).to(DEVICE, dtype) for _ in "qkv"]


def alike(step, dtype=torch.float32):
    """Return tokens of which dense results are all nearly the mean of all values: sparse ones lack the rest of it."""
    q, k, v = tokens(step)
    return [each.to(dtype) for each in (q / 8, k, v)]


def test_a_hidden_key_and_value_do_not_influence_it():
    q, k, v = (each.cpu() for each in tokens(0))
    mask = torch.ones(1, 1, 1, TOKENS, dtype=torch.bool)
    mask[..., 20:31] = False
    gm, inputs, _ = trace(Model(), {"q": q, "k": k, "v": v, "mask": mask})
    plan = sparsify(gm, dataclasses.replace(REPAIRED, q_clusters=2, k_clusters=4))
    assert len(plan.sites) == 1
    other = v.clone()
    other[:, :, 20:31] = 1e4
    assert torch.equal(run(plan, [other if each.equal(v) else each for each in inputs]), run(plan, inputs))


def by_hand(q, k, v, state, step):
    """Return the attention that the ops make of it, one by one, and what the last one found."""
    means, counters, statistics = state
    scale = DIM**-0.5
    q_order, q_sizes, k_sizes, keys, values = svg2.cluster_tokens_(q, k, v, *means, *counters, 10, 2, 0)
    runs, counts = svg2.select_blocks(*means, q_sizes, k_sizes, scale, 0.5, 0.0, statistics)
    selection = (q_order, q_sizes, k_sizes, runs, counts)
    places, exact, _ = svg2.probe_rows(q, keys, values, *selection, None, None, None, counters[1], scale, ROWS, 0, 0)
    arguments = (q, keys, values, q_sizes, runs, counts, None, None, None, q_order, scale)
    out = svg2.block_sparse_attention(*arguments)[0]
    return out, svg2.repair_rows_(out, places, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_compiled_model_does_it_step_by_step(lowering, dtype):
    model = torch.compile(Model(), backend="svg2", options=OPTIONS | {"lowering": lowering}, fullgraph=True)
    state = (
        [torch.zeros(1, 2, count, DIM, device=DEVICE) for count in (4, 8)],
        [torch.zeros(1, dtype=torch.int32, device=DEVICE) for _ in "qk"],
        torch.zeros(1, 2, 4, 5, device=DEVICE),
    )
    found = torch.zeros(1, 2, len(REPAIRS), device=DEVICE)
    for step in range(3):
        q, k, v = alike(step, dtype)
        with denoise_step(step, 3):
            got = model(q, k, v)
        wanted, of_call = by_hand(q, k, v, state, step)
        assert torch.equal(got, wanted)
        found += of_call
    (site,) = svg2_compile.report(model).sites
    calls, repaired, error, left = found.sum((0, 1)).tolist()
    assert calls == 6 and 0 < repaired <= 6 and left < error
    expected = {"repaired_heads": repaired / 6, "sparse_error": error / 6, "error_left": left / 6}
    assert site.more == pytest.approx(expected)
    assert "sparse error" in str(svg2_compile.report(model))


def test_it_is_nearer_to_dense_attention_where_results_tell_what_they_lack():
    q, k, v = alike(0)
    dense = Model()(q, k, v)
    errors = []
    for rows in (0, ROWS):
        torch._dynamo.reset()
        options = OPTIONS | {"repair_rows": rows, "lowering": "eager"}
        model = torch.compile(Model(), backend="svg2", options=options, fullgraph=True)
        with denoise_step(0, 3):
            errors.append(float((model(q, k, v) - dense).norm()))
    assert errors[1] < 0.5 * errors[0]


def test_recall_and_the_guard_look_at_the_same_rows():
    model = torch.compile(
        Model(), backend="svg2", options=OPTIONS | {"recall_rows": 3, "lowering": "eager"}, fullgraph=True
    )
    alone = torch.compile(
        Model(), backend="svg2", options=OPTIONS | {"repair_rows": 0, "recall_rows": ROWS, "lowering": "eager"}
    )
    recalls = []
    for each in (model, alone):
        torch._dynamo.reset()
        with denoise_step(0, 3):
            each(*tokens(0))
        recalls.append(svg2_compile.report(each).sites[0].recall)
    assert recalls[0] == pytest.approx(recalls[1], abs=1e-6) and 0 < recalls[0] < 1


def test_a_second_generation_equals_the_first():
    model = torch.compile(Model(), backend="svg2", options=OPTIONS | {"lowering": "eager"}, fullgraph=True)
    generations = []
    for _ in range(2):
        results = []
        for step in range(3):
            with denoise_step(step, 3):
                results.append(model(*tokens(step)))
        generations.append(torch.stack(results))
    assert torch.equal(*generations)


def test_an_exported_graph_keeps_it():
    q, k, v = (each.cpu() for each in tokens(0))
    exported = torch.export.export(Model(), (q, k, v))
    config = dataclasses.replace(MEASURED, q_clusters=4, k_clusters=8, top_p=0.5)
    plan = sparsify(exported.module(), config, state="buffers")
    again = torch.export.export(plan.gm, (q, k, v))
    counted = ops(again.graph_module)
    assert counted["probe_rows"] == counted["repair_rows_"] == 1 and not counted["measure_recall"]


def test_explain_counts_its_work():
    q, k, v = tokens(0)
    works = []
    for rows in (0, ROWS):
        gm, _, _ = trace(Model(), {"q": q.cpu(), "k": k.cpu(), "v": v.cpu()})
        (site,) = sparsify(gm, dataclasses.replace(SPARSE, repair_rows=rows)).sites
        works.append([stage.work(site) for stage in site.stages])
    probes, repair = works[1][-3], works[1][-1]
    assert len(works[1]) == len(works[0]) + 2
    assert probes.product_flops == 4 * 2 * ROWS * TOKENS * DIM and probes.passed_elements == 2 * 2 * TOKENS * DIM
    assert repair.product_flops == 4 * 2 * TOKENS * DIM * 16 and repair.passed_elements == 2 * 2 * TOKENS * DIM
