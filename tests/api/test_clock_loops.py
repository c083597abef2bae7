"""Random loops against an oracle that knows the truth: the clock is never wrong without saying so.

``SVG2_EXAMPLES=10000`` runs as many; some seconds of them are part of every run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from clock_cases import Call, Followed, Model, seen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svg2_compile import denoise_step
from svg2_compile.clock import DenoiseClock, Loop

EXAMPLES = int(os.environ.get("SVG2_EXAMPLES", "150"))
MANY = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

LEVELS = {
    "vector": lambda t: torch.tensor([t]),
    "scalar": lambda t: torch.tensor(t, dtype=torch.float64),
    "integer": lambda t: torch.tensor([round(t)]),
    "number": lambda t: t,
    "thousandth": lambda t: torch.tensor([t / 1000]),
    "each token": lambda t: torch.full((1, 40), t),
    "each frame": lambda t: torch.tensor([[0.0, t, t, t, t]]),
}


@dataclass(frozen=True)
class Spelling:
    """How a loop calls its model."""

    level: str
    name: str
    prompts_stay: bool
    """The prompts are the same tensors in each step; else they are made anew for each call."""
    latents_are_shared: bool
    """The branches of a step get one tensor of latents; else each gets its own."""
    label: bool
    """A class label tells the branches apart, beside the prompt."""


spellings = st.builds(
    Spelling,
    st.sampled_from(sorted(LEVELS)),
    st.sampled_from(["timestep", "noise_level", "c", "args[1]"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


@dataclass(frozen=True)
class Generation:
    """One video."""

    steps: int
    start: int
    """The first step that runs, above 0 for video-to-video."""
    orders: tuple[tuple[int, ...], ...]
    """The branches that run in each step, in their order."""
    calls: int
    """After so many calls it is interrupted."""


@st.composite
def generations(draw: st.DrawFn, *, may_shuffle: bool, least_steps: int) -> Generation:
    steps = draw(st.integers(least_steps, 7))
    start = draw(st.integers(0, steps - least_steps))
    branches = draw(st.integers(1, 3))
    plain = tuple(range(branches))
    orders = []
    for _ in range(steps - start):
        kept = draw(st.sets(st.sampled_from(plain), min_size=1)) if may_shuffle and draw(st.booleans()) else {*plain}
        orders.append(tuple(draw(st.permutations(sorted(kept)))) if may_shuffle else plain)
    orders[0] = plain  # all branches show themselves at first
    whole = sum(map(len, orders))
    least = branches * least_steps
    return Generation(steps, start, tuple(orders), draw(st.integers(min(least, whole), whole)))


def calls_of(videos: list[Generation], how: Spelling, loop: str | None, *, falls: bool = True) -> list[Call]:
    """Return the calls of a loop that makes these videos one after the other."""
    made: list[Call] = []
    for number, video in enumerate(videos):
        prompts = torch.randn(3, 1, 12, 16).unbind()
        levels = [1000.0 * (video.steps - step) / video.steps for step in range(video.steps)]
        if not falls:
            levels = [1000.0 - each for each in levels]
        around = None
        if loop is not None:
            total = video.steps if loop == "scheduler" else video.steps - video.start
            around = Loop(loop, number, total, tuple(levels))
        calls = []
        for place, order in enumerate(video.orders):
            latents = torch.randn(1, 4, 3, 8, 8)
            for branch in order:
                text = prompts[branch] if how.prompts_stay else prompts[branch].clone()
                inputs: dict[str, Any] = {
                    "x": latents if how.latents_are_shared else latents.clone(),
                    "text": text,
                    "frames": 3,
                    how.name: LEVELS[how.level](levels[video.start + place]),
                }
                if how.label:
                    inputs["label"] = torch.tensor([branch])
                calls.append(Call(inputs, number, place, branch, 10 * number + branch, around))
        made += calls[: video.calls]
    return made


def assert_no_centroids_of_another_prompt(calls: list[Call], followed: Followed) -> None:
    """What is kept under one place, a generation and a branch, is one prompt's; or a guess says that it may not be."""
    prompts: dict[tuple[int, str], set[int]] = {}
    for call, tick in zip(calls, followed.ticks):
        prompts.setdefault((tick.run, tick.stream), set()).add(call.prompt)
    assert followed.guesses or all(len(each) == 1 for each in prompts.values()), prompts


@MANY
@given(st.data(), spellings)
def test_in_a_pipeline_every_step_branch_and_generation_is_right(data, how):
    """A pipeline's calls and schedule are known; branches, too, where the prompts stay or come in one order."""
    few = generations(may_shuffle=how.prompts_stay, least_steps=1)
    videos = data.draw(st.lists(few, min_size=1, max_size=4))
    calls = calls_of(videos, how, "pipeline", falls=data.draw(st.booleans()))
    followed = Followed().follow(calls, Model())
    assert_no_centroids_of_another_prompt(calls, followed)
    settled = {number for number, _ in enumerate(videos)}
    for call, tick in zip(calls, followed.ticks):
        if call.generation in settled and not followed.guesses:
            assert (tick.step, tick.total) == (call.step, videos[call.generation].steps - videos[call.generation].start)
    runs = [{tick.run for call, tick in zip(calls, followed.ticks) if call.generation == n} for n in settled]
    assert (all(len(each) == 1 for each in runs) and len(set.union(*runs)) == len(videos)) or followed.guesses


@MANY
@given(st.data(), spellings)
def test_without_a_pipeline_what_is_wrong_is_said(data, how):
    """Generations of two steps and more, that begin with the highest level or with prompts of their own."""
    few = generations(may_shuffle=how.prompts_stay, least_steps=2)
    videos = data.draw(st.lists(few, min_size=1, max_size=4))
    if not how.prompts_stay:
        # nothing but the level tells: it must be the highest again
        whole = [Generation(each.steps, 0, each.orders, each.calls) for each in videos if not each.start]
        videos = whole or [Generation(2, 0, ((0,), (0,)), 2)]
    calls = calls_of(videos, how, data.draw(st.sampled_from([None, "scheduler"])))
    followed = Followed().follow(calls, Model())
    assert_no_centroids_of_another_prompt(calls, followed)
    if not followed.guesses:
        assert [tick.step for tick in followed.ticks] == [call.step for call in calls]


@MANY
@given(st.data(), spellings, st.integers(2, 9))
def test_samplers_that_go_back_stay_in_their_generation(data, how, steps):
    level, levels = 1000.0, []
    for _ in range(steps):
        levels.append(level)
        level += 45.0 if len(levels) > 2 and data.draw(st.booleans()) and levels[-1] < levels[-2] else -100.0
    prompts = torch.randn(2, 1, 12, 16).unbind()
    calls = []
    for step, each in enumerate(levels):
        for branch, prompt in enumerate(prompts):
            inputs = {"x": torch.randn(1, 4, 3, 8, 8), "text": prompt, how.name: LEVELS[how.level](each)}
            calls.append(Call(inputs, 0, step, branch, branch))
    followed = Followed().follow(calls, Model())
    assert [tick.step for tick in followed.ticks] == [call.step for call in calls]
    assert len({tick.run for tick in followed.ticks}) == 1


@MANY
@given(st.data(), st.integers(2, 4))
def test_named_requests_in_any_mixture_do_not_disturb_each_other(data, requests):
    clock, model, runs = DenoiseClock(), Model(), {}
    steps = {number: data.draw(st.integers(1, 5)) for number in range(requests)}
    at = dict.fromkeys(range(requests), 0)
    while any(at[number] < steps[number] for number in at):
        number = data.draw(st.sampled_from([each for each in at if at[each] < steps[each]]))
        with denoise_step(at[number], steps[number], f"request {number}"):
            tick = clock.tick(model, seen(x=torch.zeros(1, 4, 3, 8, 8)))
        assert (tick.step, tick.total) == (at[number], steps[number])
        runs.setdefault(number, set()).add(tick.run)
        at[number] += 1
    expected = [each for found in runs.values() for each in found]
    assert len(expected) == len({*expected}) == requests
    assert not clock.told.guesses


@pytest.mark.parametrize("falls", [True, False])
def test_a_wrong_first_guess_about_the_direction_costs_one_warm_start(falls):
    video = Generation(6, 0, ((0, 1),) * 6, 12)
    how = Spelling("vector", "c", prompts_stay=True, latents_are_shared=True, label=False)
    calls = calls_of([video, video], how, None, falls=falls)
    followed = Followed().follow(calls, Model())
    assert [tick.step for tick in followed.ticks] == [call.step for call in calls]
    assert bool(followed.guesses) is not falls
