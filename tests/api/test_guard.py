"""The guard: a head that keeps too little of the true attention mass is dense from then on, the others as before."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewritten_graphs import CASES, SPARSE, assert_equal_within_rounding, ops, run, traced
from selection_cases import selection_cases

import svg2_compile
from svg2_compile import denoise_step
from svg2_compile.kernels.judge_heads import DENSE_HEADS
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.passes.sparsify import sparsify

pytestmark = pytest.mark.usefixtures("no_grad_and_a_fresh_start")

svg2 = torch.ops.svg2
PROPERTY = settings(max_examples=60, deadline=None)


def guarded_selection(case, is_dense):
    """Return runs, counts and statistics after the guard."""
    *arguments, call_statistics = case.arguments()
    runs, counts = svg2.select_blocks(*arguments, call_statistics)
    dense_heads = torch.stack((is_dense.float(), torch.zeros_like(is_dense, dtype=torch.float32)), -1)
    statistics = torch.ones_like(call_statistics)
    kept = svg2.keep_dense_heads_(runs, counts, case.q_sizes, case.k_sizes, dense_heads, call_statistics, statistics)
    return *kept, statistics - 1


@PROPERTY
@given(selection_cases(), st.integers(0, 2**31))
def test_a_dense_head_keeps_what_top_p_of_one_keeps_and_the_others_what_they_kept(case, seed):
    is_dense = torch.rand(case.q_sizes.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.5
    runs, counts, statistics = guarded_selection(case, is_dense)
    everything = dataclasses.replace(case, top_p=1.0)
    for chosen, wanted in ((is_dense, everything), (~is_dense, case)):
        wanted_runs, wanted_counts = wanted.select()
        assert torch.equal(runs[chosen], wanted_runs[chosen])
        assert torch.equal(counts[chosen], wanted_counts[chosen])
        # the sums of a mass of 1, and of 1 + x, are rounded
        torch.testing.assert_close(statistics[chosen], wanted.statistics()[chosen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("repeats", [1, 2])
def test_opcheck(repeats):
    runs, counts = torch.zeros(2, 4, 3, 5, 2).int(), torch.zeros(2, 4, 3, 4).int()
    q_sizes, k_sizes = torch.full((2, 4, 3), 7).int(), torch.full((2, 4 // repeats, 9), 3).int()
    dense_heads = torch.tensor([0.0, 3.0]).view(1, 1, 2).expand(2, 4, len(DENSE_HEADS)).contiguous()
    statistics = torch.zeros(2, 4, 3, len(STATISTICS))
    arguments = (runs, counts, q_sizes, k_sizes, dense_heads, torch.ones_like(statistics), statistics)
    torch.library.opcheck(svg2.keep_dense_heads_.default, arguments)


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(2, 4, 3, 5, 2), TypeError, "runs must be torch.int32, got torch.float32"),
        (4, torch.zeros(2, 4), ValueError, r"dense_heads must have 3 axes, got shape \(2, 4\)"),
        (6, torch.zeros(2, 4, 3, 4), ValueError, r"statistics must have shape \(2, 4, 3, 5\), got \(2, 4, 3, 4\)"),
    ],
)
def test_bad_input_is_named(position, value, error, message):
    sizes = torch.ones(2, 4, 3).int()
    arguments = [torch.zeros(2, 4, 3, 5, 2).int(), torch.zeros(2, 4, 3, 4).int(), sizes, sizes, torch.zeros(2, 4, 2)]
    arguments += [torch.zeros(2, 4, 3, len(STATISTICS)) for _ in range(2)]
    arguments[position] = value
    with pytest.raises(error, match=message):
        svg2.keep_dense_heads_(*arguments)


@pytest.mark.parametrize("name", CASES)
def test_a_guard_that_wants_everything_makes_every_form_of_attention_dense(name):
    gm, inputs, expected = traced(name)
    plan = sparsify(gm, dataclasses.replace(SPARSE, min_recall=1.0))
    assert_equal_within_rounding(run(plan, inputs), expected, len(plan.sites))


@pytest.mark.parametrize("name", CASES)
def test_a_guard_adds_three_ops_a_site_and_one_that_wants_nothing_adds_none(name):
    gm, _, _ = traced(name)
    plain, guarded = sparsify(gm, SPARSE), sparsify(gm, dataclasses.replace(SPARSE, min_recall=0.5))
    added = ops(guarded.gm) - ops(plain.gm)
    sites = len(plain.sites)
    assert added.pop("getitem") == 2 * sites  # the selection before and after
    assert added == {
        "measure_recall": sites,
        "judge_heads_": sites,
        "add_": sites,
        "keep_dense_heads_": sites,
        "zeros_like": sites,
    }


TOKENS, DIM, CLUSTERS = 96, 16, 8
OPTIONS = {"top_p": 0.6, "min_keep_ratio": 0.0, "min_tokens": 64, "dense_layers": 0, "dense_steps": 0, "seed": 1}
OPTIONS |= {"q_clusters": CLUSTERS, "k_clusters": CLUSTERS, "min_recall": 0.6, "recall_rows": TOKENS}
STEPS, FALLS = 5, 2
"""Steps of a generation, and the one from which head 1 is adversarial."""


class Model(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def clusterable(generator):
    """Return queries or keys in groups that see nothing but themselves."""
    return 12 * torch.eye(DIM)[torch.arange(TOKENS) % CLUSTERS] + 0.1 * torch.randn(TOKENS, DIM, generator=generator)


def step_inputs(step, adversarial=True):
    """Return q, k, v of 3 heads; from ``FALLS`` on, those of head 1 have no clusters, and each row sees other keys."""
    generator = torch.Generator().manual_seed(step)
    q, k = (torch.stack([clusterable(generator) for _ in range(3)]) for _ in range(2))
    if adversarial and step >= FALLS:
        q[1], k[1] = (3 * torch.randn(TOKENS, DIM, generator=generator) for _ in range(2))
    return q[None], k[None], torch.randn(1, 3, TOKENS, DIM, generator=generator)


def errors_by_step(model, streams=("",), adversarial=(True,)):
    """Return, by CFG branch, the largest error of each head in each step of one generation, [steps, heads]."""
    errors = {stream: [] for stream in streams}
    for step in range(STEPS):
        for stream, each in zip(streams, adversarial):
            inputs = step_inputs(step, each)
            with denoise_step(step, STEPS, stream=stream or None):
                difference = model(*inputs) - Model()(*inputs)
            errors[stream].append(difference.abs().amax((0, 2, 3)))
    return {stream: torch.stack(each) for stream, each in errors.items()}


def compiled(**options):
    return torch.compile(Model(), backend="svg2", options=OPTIONS | options, fullgraph=True)


def test_without_a_guard_the_head_stays_sparse_and_wrong():
    model = compiled(min_recall=0.0, lowering="eager")
    assert (errors_by_step(model)[""][FALLS:, 1] > 0.1).all()
    assert svg2_compile.report(model).sites[0].dense_heads == ()


@pytest.mark.parametrize("lowering", ["inductor", "eager"])
def test_a_head_with_adversarial_keys_is_dense_from_its_call_on_and_the_others_stay_sparse(lowering):
    unguarded = errors_by_step(compiled(min_recall=0.0, lowering="eager"))[""]
    torch._dynamo.reset()
    model = compiled(lowering=lowering)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        errors = errors_by_step(model)[""]
    assert errors[FALLS:, 1].max() < 1e-5
    sparse = torch.ones_like(errors, dtype=torch.bool)
    sparse[FALLS:, 1] = False
    torch.testing.assert_close(errors[sparse], unguarded[sparse])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    (site,) = svg2_compile.report(model).sites
    (fallen,) = site.dense_heads
    assert (fallen.head, fallen.batch, fallen.since_call) == (1, 0, FALLS + 1)
    assert 0 < fallen.recall < OPTIONS["min_recall"]
    # an eighth of the pairs lies within the groups; the head that fell counts as whole since it did
    assert max(site.density_per_head[0], site.density_per_head[2]) < 0.3
    assert (STEPS - FALLS) / STEPS < site.density_per_head[1] < (STEPS - FALLS + 0.3 * FALLS) / STEPS
    assert min(site.recall_per_head) >= OPTIONS["min_recall"]
    assert "guard: head 1 of batch element 0" in str(svg2_compile.report(model))


def test_a_new_generation_and_a_reset_bring_the_head_back():
    model = compiled(lowering="eager")
    first = errors_by_step(model)[""]
    with denoise_step(0, STEPS):
        model(*step_inputs(0))
    assert svg2_compile.report(model).sites[0].dense_heads == ()
    svg2_compile.reset()
    again = errors_by_step(model)[""]
    assert torch.equal(first, again)
    assert [each.since_call for each in svg2_compile.report(model).sites[0].dense_heads] == [FALLS + 1]


def test_branches_fall_by_themselves():
    model = compiled(lowering="eager")
    errors_by_step(model, ("cond", "uncond"), (True, False))
    (site,) = svg2_compile.report(model).sites
    assert [(each.stream, each.head, each.since_call) for each in site.dense_heads] == [("cond", 1, FALLS + 1)]


def test_the_guard_looks_only_at_the_calls_of_its_interval():
    model = compiled(lowering="eager", recall_interval=4)
    errors = errors_by_step(model)[""]
    assert (errors[FALLS:4, 1] > 0.1).all() and errors[4, 1] < 1e-4
    assert [each.since_call for each in svg2_compile.report(model).sites[0].dense_heads] == [5]
