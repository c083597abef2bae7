"""The clock: step, generation and CFG branch of every forward, as far as inputs, loops and announcements tell."""

import itertools
import threading

import pytest
import torch
from clock_cases import Model, seen
from hypothesis import given
from hypothesis import strategies as st

from svg2_compile import denoise_step
from svg2_compile.announce import observe_cache_context
from svg2_compile.clock import DenoiseClock, Loop, Tick
from svg2_compile.passes.config import SparseConfig
from svg2_compile.schedule import dense_step_count, why_dense


def ticks(clock: DenoiseClock, model: Model, levels: list[float | None]) -> list[Tick]:
    """Tick once per noise level, with new latents each time it changes, as samplers have them."""
    found, latents, before = [], None, None
    for level in levels:
        if latents is None or level != before:
            latents, before = torch.zeros(1, 4, 3, 8, 8), level
        inputs = {} if level is None else {"x1": torch.tensor([float(level)])}
        found.append(clock.tick(model, seen(x0=latents, **inputs)))
    return found


def test_step_advances_when_the_noise_level_changes():
    found = ticks(DenoiseClock(), Model(), [999, 999, 800, 800, 500, 500])
    assert [each.step for each in found] == [0, 0, 1, 1, 2, 2]
    assert [each.stream for each in found] == ["0", "1"] * 3
    assert len({each.run for each in found}) == 1


@pytest.mark.parametrize(
    "level",
    [
        lambda t: torch.tensor([t]),
        lambda t: torch.tensor(t),
        lambda t: torch.tensor([int(t)]),
        lambda t: torch.tensor([t / 1000] * 4, dtype=torch.bfloat16),
        lambda t: torch.full((1, 300), t),
        lambda t: torch.full((1, 1, 5, 1, 1), t, dtype=torch.float64),
        lambda t: float(t),
        lambda t: int(t),
        lambda t: {"cond": [torch.tensor([t]), 3]},
        lambda t: (torch.ones(1), torch.tensor([[t]])),
        lambda t: torch.tensor([[0.0, t, t, t]]),
    ],
    ids=[
        "vector",
        "scalar",
        "integers",
        "thousandths",
        "tokens",
        "frames",
        "float",
        "int",
        "dict",
        "tuple",
        "first frame",
    ],
)
@pytest.mark.parametrize("name", ["timestep", "c", "noise_labels", "args"])
def test_the_noise_level_is_found_whatever_it_is_called_and_wherever_it_is(level, name):
    clock, model, found = DenoiseClock(), Model(), []
    prompts = torch.randn(2, 1, 12, 16)
    for t, prompt in itertools.product((900.0, 600.0, 300.0, 900.0, 600.0, 300.0), prompts):
        others = {"latents": torch.randn(1, 512, 8), "text": prompt, "guidance": torch.tensor([4.0]), "frames": 5}
        found.append(clock.tick(model, seen(**others, **{name: level(t)})))
    assert [(each.step, each.stream) for each in found] == [(step, str(b)) for step in (0, 1, 2) * 2 for b in (0, 1)]
    runs = [each.run for each in found]
    assert len({*runs[:6]}) == len({*runs[6:]}) == 1 and runs[0] != runs[6]
    assert clock.told.steps.startswith(f"read from input {name}")


@pytest.mark.parametrize("shape", [(1, 512, 8), (512, 8), (1, 16, 4), (1, 4, 3, 8, 8), (1, 77)])
def test_latents_and_embeddings_are_no_noise_level(shape):
    clock, model = DenoiseClock(), Model()
    for _ in range(6):
        clock.tick(model, seen(x=torch.randn(shape) * torch.randint(2, 9, ())))
    assert "guessed" in clock.told.steps and clock.told.guesses


@pytest.mark.parametrize("labels", [(207, 1000), (207.0, 1000.0), (torch.tensor([7]), torch.tensor([9]))], ids=str)
def test_labels_of_branches_are_no_noise_level_for_long(labels):
    clock, model, found = DenoiseClock(), Model(), []
    for t, label in itertools.product((0.9, 0.6, 0.4, 0.1), labels):
        found.append(clock.tick(model, seen(x=torch.randn(1, 9, 4, 4), y=label, c=torch.tensor([t]))))
    assert [(each.step, each.stream) for each in found[2:]] == [(step, str(b)) for step in (1, 2, 3) for b in (0, 1)]
    assert any("another one was taken" in each for each in clock.told.guesses)


def test_a_level_for_each_frame_moves_though_its_largest_does_not():
    clock, model = DenoiseClock(), Model()
    levels = [[9, 9, 9], [6, 9, 9], [3, 6, 9], [0, 3, 6], [0, 0, 3]]
    found = [clock.tick(model, seen(x=torch.randn(1, 3, 8, 8), t=torch.tensor([each]))) for each in levels]
    assert [each.step for each in found] == [0, 1, 2, 3, 4] and len({each.run for each in found}) == 1


@given(st.lists(st.floats(1, 1000), min_size=2, max_size=20, unique=True), st.booleans(), st.integers(1, 3))
def test_the_same_levels_again_are_another_generation_whatever_their_direction(values, rising, branches):
    values = sorted({float(torch.tensor(value)) for value in values}, reverse=not rising)
    schedule = [each for value in values for each in [value] * branches]
    clock, model = DenoiseClock(), Model()
    first, second = ticks(clock, model, schedule), ticks(clock, model, schedule)
    if len(values) > 1:
        assert [each.step for each in second] == [each.step for each in first]
        assert second[0].run not in {each.run for each in first}
        assert len({each.run for each in first}) == 1 or rising


def test_a_sampler_that_goes_back_stays_in_its_generation():
    clock, model, text = DenoiseClock(), Model(), torch.randn(1, 12, 16)
    levels = [1000, 900, 800, 850, 750, 650, 700, 600]
    found = [clock.tick(model, seen(x=torch.randn(1, 9, 4, 4), text=text, t=float(each))) for each in levels]
    assert [each.step for each in found] == list(range(8)) and len({each.run for each in found}) == 1
    assert any("goes back" in each for each in clock.told.guesses)


@pytest.mark.parametrize("start", [0, 2, 3])
def test_a_generation_that_begins_at_any_strength_does_not_continue_another_prompts(start):
    clock, model = DenoiseClock(), Model()
    levels = [1000.0, 800.0, 600.0, 400.0, 200.0]
    runs = []
    for first in (0, start, start):
        text = torch.randn(1, 12, 16)
        for level in levels[first:]:
            now = clock.tick(model, seen(x=torch.randn(1, 9, 4, 4), text=text, t=level))
        runs.append(now.run)
    assert len({*runs}) == 3


def test_many_calls_at_one_level_need_no_more_places_than_four():
    clock, model = DenoiseClock(), Model()
    found = ticks(clock, model, [999] * 20)
    assert {each.stream for each in found} == {"0", "1", "2", "3+"}
    overflow = [each.run for each in found if each.stream == "3+"]
    assert len({*overflow}) == len(overflow) and any("more than 3 calls" in each for each in clock.told.guesses)


def test_branches_that_shared_a_place_get_one_each_in_the_next_step():
    """A request of three branches that is left in its first step, and one of two that begins at the same level."""
    clock, model = DenoiseClock(), Model()
    left, prompts = torch.randn(3, 1, 12, 16).unbind(), torch.randn(2, 1, 12, 16).unbind()
    for text in (*left, *prompts):
        clock.tick(model, seen(x=torch.randn(1, 9, 4, 4), text=text, t=1000.0))
    for level in (800.0, 600.0):
        found = [clock.tick(model, seen(x=torch.randn(1, 9, 4, 4), text=text, t=level)) for text in prompts]
        assert [each.stream for each in found] == ["3", "4"] and found[0].run == found[1].run


def test_windows_keep_their_places_once_a_step_has_shown_how_many_there_are():
    clock, model = DenoiseClock(), Model()
    ticks(clock, model, [999] * 8)
    found = ticks(clock, model, [900] * 8 + [800] * 8)
    assert [each.stream for each in found] == [str(place) for place in range(8)] * 2
    assert len({each.run for each in found}) == 1


def test_a_branch_is_known_by_its_prompt_in_any_order():
    clock, model, prompts = DenoiseClock(), Model(), torch.randn(3, 1, 12, 16).unbind()
    orders = [(0, 1, 2), (2, 0, 1), (1,), (1, 0), (2, 1, 0)]
    for step, order in enumerate(orders):
        for branch in order:
            now = clock.tick(model, seen(x=torch.randn(1, 9, 4, 4), text=prompts[branch], t=1.0 - step / 9))
            assert (now.step, now.stream) == (step, str(branch))
    assert not clock.told.guesses


@pytest.mark.parametrize("branches", [2, 3])
def test_another_prompt_at_the_level_where_a_generation_was_left_takes_no_place_of_its_branches(branches):
    """Interrupted between two branches, and followed by a request that begins at the very level."""
    clock, model = DenoiseClock(), Model()
    old, new = torch.randn(branches, 1, 12, 16).unbind(), torch.randn(branches, 1, 12, 16).unbind()
    places = {}
    for prompt, level in [*((p, t) for t in (1000.0, 750.0) for p in old), (old[0], 500.0), *((p, 500.0) for p in new)]:
        now = clock.tick(model, seen(x=torch.randn(1, 9, 4, 4), text=prompt, t=level))
        places.setdefault((now.run, now.stream), set()).add(id(prompt))
    assert all(len(each) == 1 for each in places.values())
    assert any("one more branch" in each for each in clock.told.guesses)


def test_a_branch_that_is_made_anew_in_each_step_keeps_its_place():
    clock, model, prompt = DenoiseClock(), Model(), torch.randn(1, 12, 16)
    for step in range(5):
        for place, text in enumerate((prompt, torch.zeros(1, 12, 16))):
            now = clock.tick(model, seen(x=torch.randn(1, 9, 4, 4), text=text, t=1000.0 - step))
            assert (now.step, now.stream) == (step, str(place))
    assert not clock.told.guesses


def test_steps_with_fewer_calls_are_a_guess_where_only_order_tells():
    clock, model = DenoiseClock(), Model()
    ticks(clock, model, [999, 999, 800, 800, 600, 400])
    assert any("by their order" in each for each in clock.told.guesses)


def test_two_models_count_their_own_branches_and_share_the_step():
    clock, first, second = DenoiseClock(), Model(), Model()
    ((a,), (b,)) = ticks(clock, first, [999]), ticks(clock, second, [999])
    assert (a.step, a.stream) == (b.step, b.stream) == (0, "0")
    assert ticks(clock, second, [500])[0].step == 1


def test_a_new_generation_of_a_pipeline_begins_even_at_the_same_level():
    clock, model = DenoiseClock(), Model()
    first, second = (
        clock.tick(model, seen(Loop("pipeline", call, 1, (999.0,)), t=torch.tensor([999.0]))) for call in (1, 2)
    )
    assert first.run != second.run and second.step == 0 and second.stream == "0"


@pytest.mark.parametrize("unit", [1, 1000])
def test_a_step_of_a_pipeline_is_its_place_in_the_schedule(unit):
    levels = (1000.0, 900.0, 700.0, 400.0, 100.0)
    clock, model = DenoiseClock(), Model()
    late = clock.tick(model, seen(Loop("pipeline", 1, 5, levels), t=torch.tensor([700.0 / unit], dtype=torch.bfloat16)))
    assert (late.step, late.total) == (2, 5)
    skips = clock.tick(model, seen(Loop("pipeline", 1, 5, levels), t=torch.tensor([100.0 / unit])))
    assert skips.step == 4
    # a pipeline that runs the last three of its scheduler's levels
    part = clock.tick(model, seen(Loop("pipeline", 2, 3, levels), t=torch.tensor([700.0 / unit])))
    assert (part.step, part.total) == (0, 3)


def test_a_loop_with_a_scheduler_has_as_many_steps_as_are_left_of_it():
    levels = (1000.0, 900.0, 700.0, 400.0, 100.0)
    clock, model = DenoiseClock(), Model()
    found = [clock.tick(model, seen(Loop("scheduler", 1, 5, levels), t=level)) for level in levels[2:]]
    assert [(each.step, each.total) for each in found] == [(0, 3), (1, 3), (2, 3)]


def test_the_total_is_learnt_where_nobody_tells():
    clock, model = DenoiseClock(), Model()
    first = ticks(clock, model, [900, 600, 300])
    assert {each.total for each in first} == {None} and "50 are assumed" in clock.told.total
    assert {each.total for each in ticks(clock, model, [900, 600, 300])} == {3}
    assert "learnt" in clock.told.total


def test_without_a_noise_level_every_call_is_a_step_and_that_is_said():
    clock, model = DenoiseClock(), Model()
    assert [each.step for each in ticks(clock, model, [None, None, None])] == [0, 1, 2]
    assert any("no noise level was found" in each for each in clock.told.guesses)


def test_denoise_step_overrides_everything():
    clock, model = DenoiseClock(), Model()
    ticks(clock, model, [999])
    with denoise_step(7, total=10, stream="cond"):
        (now,) = ticks(clock, model, [999])
    assert (now.step, now.total, now.stream) == (7, 10, "cond")
    assert clock.told.steps == "announced by denoise_step"


def test_a_smaller_explicit_step_begins_a_generation():
    clock, model = DenoiseClock(), Model()
    runs = []
    for index in (0, 1, 0):
        with denoise_step(index):
            runs.append(ticks(clock, model, [None])[0].run)
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("stream", [None, "cond"])
def test_an_exception_ends_an_announced_generation(stream):
    clock, model, runs = DenoiseClock(), Model(), []
    for fails in (True, False, False):
        try:
            with denoise_step(0, 4, stream):
                runs.append(ticks(clock, model, [None])[0].run)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
    assert runs[0] != runs[1]


def test_named_requests_that_take_turns_have_generations_of_their_own():
    clock, model, runs = DenoiseClock(), Model(), {}
    for step in range(4):
        for request, shift in (("a", 0), ("b", 2)):
            if (index := step - shift) >= 0:
                for branch in ("cond", "uncond"):
                    with denoise_step(index, 4, f"{request} {branch}"):
                        now = ticks(clock, model, [None])[0]
                    runs.setdefault(now.stream, set()).add(now.run)
                    assert now.step == index
    assert all(len(each) == 1 for each in runs.values()) and len(set.union(*runs.values())) == 4


def test_windows_of_two_sizes_under_one_name_are_one_generation():
    clock, model, runs = DenoiseClock(), Model(), {}
    for step, size in itertools.product(range(3), (4, 6)):
        with denoise_step(step, 3, "cond"):
            now = clock.tick(model, seen(x=torch.zeros(1, 9, size, 8)))
        runs.setdefault(size, set()).add(now.run)
    assert all(len(each) == 1 for each in runs.values())


@pytest.mark.parametrize(("index", "total"), [(-1, None), (5, 5)])
def test_denoise_step_refuses_an_index_outside_the_generation(index, total):
    with (
        pytest.raises(ValueError, match=rf"index must be .*, got {index}; count steps from 0"),
        denoise_step(index, total),
    ):
        pass


def test_the_branch_name_comes_from_cache_context():
    observe_cache_context()
    from diffusers.models.cache_utils import CacheMixin
    from torch import nn

    class Announcing(nn.Module, CacheMixin):
        pass

    clock, model = DenoiseClock(), Announcing()
    with model.cache_context("uncond", step_index=3, num_inference_steps=9):
        (now,) = ticks(clock, model, [500])
    assert (now.stream, now.step, now.total) == ("uncond", 3, 9)
    assert ticks(clock, model, [500])[0].stream != "uncond"


def test_observing_twice_wraps_once():
    from diffusers.models.cache_utils import CacheMixin

    observe_cache_context()
    wrapped = CacheMixin.cache_context
    observe_cache_context()
    assert CacheMixin.cache_context is wrapped


def test_threads_have_clocks_of_their_own():
    from svg2_compile.clock import current_clock

    mine, others = current_clock(), []
    thread = threading.Thread(target=lambda: others.append(current_clock()))
    thread.start()
    thread.join()
    assert mine is current_clock() and others[0] is not mine


@pytest.mark.parametrize(
    ("dense_steps", "total", "expected"),
    [
        (0, 50, 0),
        (3, 50, 3),
        (0.2, 50, 10),
        (0.3, 10, 3),
        (0.29, 100, 29),
        (0.2, None, 10),
        # a share above zero leaves a step dense where there are two
        (0.2, 4, 1),
        (0.1, 8, 1),
        (0.2, 2, 1),
        (0.2, 1, 0),
        (0.0, 4, 0),
    ],
)
def test_dense_steps_are_a_count_or_a_share(dense_steps, total, expected):
    assert dense_step_count(SparseConfig(dense_steps=dense_steps), total) == expected


def test_first_steps_and_first_layers_are_dense():
    config = SparseConfig(dense_steps=2, dense_layers=1)

    def why(step: int, layer: int | None) -> str:
        return why_dense(config, Tick(run=1, step=step, stream="0", total=10), layer)

    assert why(0, 5) == why(1, None) == "first steps"
    assert why(2, 0) == why(9, 0) == "first layers"
    assert why(2, 1) == why(2, None) == ""


@pytest.mark.usefixtures("no_grad_and_a_fresh_start")
def test_a_reset_reaches_the_clocks_of_all_threads():
    from loop_cases import CHANNELS, OPTIONS, TOKENS, Dit

    import svg2_compile
    from svg2_compile.clock import current_clock

    model, text = Dit().eval(), torch.randn(1, 1, CHANNELS)
    model.compile(backend="svg2", options=OPTIONS)
    has_stepped, may_go_on, told = threading.Event(), threading.Event(), []

    def work() -> None:
        with torch.no_grad():
            for level in (900.0, 600.0, 300.0):
                model(torch.randn(1, TOKENS, CHANNELS), torch.tensor([level]), text)
                told.append(current_clock().now)
                if len(told) == 2:
                    has_stepped.set()
                    may_go_on.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert has_stepped.wait(120)
    svg2_compile.reset()
    may_go_on.set()
    thread.join()
    assert [now.step for now in told] == [0, 1, 0]
    assert told[1].run == told[0].run != told[2].run
