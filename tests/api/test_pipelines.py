"""Real diffusers pipelines around tiny models: schedule, CFG branches, generations, several pipelines at once."""

import threading
from contextlib import nullcontext

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from tiny_pipelines import (
    PIPELINES,
    STEPS,
    Entry,
    Prompt,
    compiled,
    expected,
    generate_hunyuan,
    generate_wan,
    hunyuan_pipeline,
    numbered,
    record_calls,
    sparse,
    wan_pipeline,
)

import svg2_compile
from svg2_compile.region import Region
from svg2_compile.state import store


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    svg2_compile.reset()


@pytest.fixture
def log(monkeypatch) -> list[Entry]:
    return record_calls(monkeypatch)


@pytest.fixture(params=PIPELINES, ids=lambda case: case.name)
def case(request):
    return request.param


def test_every_pipeline_follows_its_schedule_and_repeats_itself_after_a_reset(case, log):
    """The second generation has another prompt, of another length, and another size."""
    pipeline = compiled(case)
    first = case.generate(pipeline, seed=1)
    second = case.generate(pipeline, seed=2, height=96, prompt=Prompt(seed=1, valid=11))
    assert numbered(log) == expected(2, case.streams)
    assert first.isfinite().all() and second.isfinite().all() and first.shape != second.shape
    svg2_compile.reset()
    assert torch.equal(case.generate(pipeline, seed=1), first)


def test_two_pipelines_interleaved_do_not_disturb_each_other(case):
    """The second pipeline generates a whole video inside each step of the first."""
    outer, inner = compiled(case), compiled(case)
    alone = case.generate(outer, seed=1)
    inner_alone = case.generate(inner, seed=7, prompt=Prompt(seed=1))
    seen = []

    def generate_inner(pipe, step, timestep, tensors):
        seen.append(torch.equal(case.generate(inner, seed=7, prompt=Prompt(seed=1)), inner_alone))
        return tensors

    assert torch.equal(case.generate(outer, seed=1, callback_on_step_end=generate_inner), alone)
    assert seen == [True] * STEPS


def test_two_threads_do_not_disturb_each_other(case, log):
    """They compile at the same time, and wait for each other after each step."""
    meet = threading.Barrier(2, timeout=120)
    # torch runs a model's NumPy code under another default dtype, which is that of all threads: such steps take turns
    turn = threading.Lock() if case.runs_numpy else None
    pipelines = {seed: compiled(case) for seed in (1, 2)}
    together: dict[int, torch.Tensor] = {}

    def wait(pipe, step, timestep, tensors):
        if turn:
            turn.release()
        meet.wait()
        if turn:
            turn.acquire()
        return tensors

    def generate(seed: int) -> None:
        with turn or nullcontext():
            together[seed] = case.generate(pipelines[seed], seed, prompt=Prompt(seed), callback_on_step_end=wait)

    threads = [threading.Thread(target=generate, args=(seed,)) for seed in pipelines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = {entry[0] for entry in log}
    assert [numbered([entry for entry in log if entry[0] == run]) for run in runs] == [expected(1, case.streams)] * 2
    for seed, pipeline in pipelines.items():
        assert torch.equal(case.generate(pipeline, seed, prompt=Prompt(seed)), together[seed])


@pytest.mark.parametrize(("regional", "layers"), [(False, 1), (True, 2)], ids=["whole", "regional"])
def test_wan_follows_its_schedule_and_keeps_cond_and_uncond_apart(log, regional, layers):
    pipeline = wan_pipeline()
    sparse(pipeline.transformer, regional)
    first, second = generate_wan(pipeline, seed=1), generate_wan(pipeline, seed=2)
    assert numbered(log) == expected(2, ("cond", "uncond"), layers)
    assert not torch.equal(first, second)


def test_two_experts_share_one_graph_and_one_count_of_steps_but_no_state(log):
    pipeline = wan_pipeline(experts=2)
    sparse(pipeline.transformer)
    sparse(pipeline.transformer_2)
    generate_wan(pipeline)
    assert numbered(log) == expected(1, ("cond", "uncond"))
    assert svg2_compile.report(pipeline.transformer).sparse_sites[0].dense_calls > 0
    assert svg2_compile.report(pipeline.transformer_2).sparse_sites[0].sparse_calls > 0
    assert len([region for region in Region.instances if region.owners()]) == 1 and len(store.owners()) >= 1


@pytest.mark.parametrize(("true_cfg", "branches"), [(False, 1), (True, 2)])
def test_hunyuan_with_one_or_two_calls_a_step(log, true_cfg, branches):
    pipeline = hunyuan_pipeline()
    sparse(pipeline.transformer)
    generate_hunyuan(pipeline, true_cfg=true_cfg)
    seen = numbered(log)
    assert [entry[1] for entry in seen] == [step for step in range(STEPS) for _ in range(branches)]
    assert len({entry[2] for entry in seen}) == branches


def test_full_selection_through_the_whole_wan_pipeline_equals_dense():
    pipeline = wan_pipeline()
    dense = generate_wan(pipeline)
    sparse(pipeline.transformer, top_p=1.0, lowering="inductor")
    difference = (generate_wan(pipeline) - dense).abs().max()
    assert difference <= 2e-5 * dense.abs().max()  # fp32 rounding, carried through five steps of guidance


def test_full_selection_through_the_whole_hunyuan_pipeline_equals_dense():
    pipeline = hunyuan_pipeline()
    dense = generate_hunyuan(pipeline)
    sparse(pipeline.transformer, top_p=1.0, lowering="inductor")
    difference = (generate_hunyuan(pipeline) - dense).abs().max()
    assert difference <= 2e-5 * dense.abs().max()


def test_every_generation_is_the_same_whatever_came_before():
    pipeline = wan_pipeline()
    sparse(pipeline.transformer)
    first = generate_wan(pipeline)
    generate_wan(pipeline, seed=9)
    assert torch.equal(generate_wan(pipeline), first)
    generate_wan(pipeline, seed=3, height=192)
    assert torch.equal(generate_wan(pipeline), first)
    svg2_compile.reset()
    assert torch.equal(generate_wan(pipeline), first)


def test_an_interrupted_generation_leaves_nothing_behind():
    pipeline = wan_pipeline()
    sparse(pipeline.transformer)
    whole = generate_wan(pipeline)

    def stop(pipe, step, timestep, tensors):
        if step == 3:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        generate_wan(pipeline, seed=5, callback_on_step_end=stop)
    assert torch.equal(generate_wan(pipeline), whole)


def test_pipelines_that_share_a_transformer_do_not_share_centroids():
    outer = wan_pipeline()
    sparse(outer.transformer)
    inner = WanPipeline.from_pipe(outer)
    inner.set_progress_bar_config(disable=True)
    inner.scheduler = UniPCMultistepScheduler.from_config(outer.scheduler.config)
    alone = generate_wan(outer)

    def generate_inner(pipe, step, timestep, tensors):
        generate_wan(inner, seed=7)
        return tensors

    assert torch.equal(generate_wan(outer, callback_on_step_end=generate_inner), alone)
