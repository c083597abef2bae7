"""The clock: step, generation and CFG branch of every forward."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svg2_compile import denoise_step
from svg2_compile.clock import DenoiseClock, Tick, observe_cache_context
from svg2_compile.passes.config import SparseConfig
from svg2_compile.schedule import dense_step_count, is_dense


def ticks(clock: DenoiseClock, timesteps: list[float | None], model: str = "m") -> list[Tick]:
    return [clock.tick(model, each) for each in timesteps]


def test_step_advances_when_the_timestep_changes():
    seen = ticks(DenoiseClock(), [999, 999, 800, 800, 500, 500])
    assert [each.step for each in seen] == [0, 0, 1, 1, 2, 2]
    assert [each.stream for each in seen] == ["0", "1"] * 3
    assert len({each.run for each in seen}) == 1


@given(st.lists(st.floats(1, 1000), min_size=2, max_size=20, unique=True), st.booleans(), st.integers(1, 3))
def test_a_jump_back_begins_a_generation_whatever_the_direction(values, rising, branches):
    schedule = [each for value in sorted(values, reverse=not rising) for each in [value] * branches]
    clock = DenoiseClock()
    first, second = ticks(clock, schedule), ticks(clock, schedule)
    assert [each.step for each in second] == [each.step for each in first] or len(values) == 2
    assert len({each.run for each in first}) == 1
    assert second[0].run != first[0].run


def test_two_models_count_their_own_branches_and_share_the_step():
    clock = DenoiseClock()
    a, b = clock.tick("a", 999), clock.tick("b", 999)
    assert (a.step, a.stream) == (b.step, b.stream) == (0, "0")
    assert clock.tick("b", 500).step == 1


def test_a_new_pipeline_call_begins_a_generation_even_at_the_same_timestep():
    clock = DenoiseClock()
    first, second = clock.tick("m", 999, call=1), clock.tick("m", 999, call=2)
    assert first.run != second.run and second.step == 0 and second.stream == "0"


def test_without_a_timestep_every_call_is_a_step():
    assert [each.step for each in ticks(DenoiseClock(), [None, None, None])] == [0, 1, 2]


def test_denoise_step_overrides_everything():
    clock = DenoiseClock()
    clock.tick("m", 999)
    with denoise_step(7, total=10, stream="cond"):
        now = clock.tick("m", 999)
    assert (now.step, now.total, now.stream) == (7, 10, "cond")


def test_an_announced_step_does_not_read_the_timestep():
    # on a GPU the host would wait for it, which a CUDA graph of the whole step does not allow
    unreadable = torch.empty(1, device="meta")
    clock = DenoiseClock()
    with denoise_step(3, 10, "cond"):
        assert (clock.tick("m", unreadable).step, clock.now.stream) == (3, "cond")
    with pytest.raises((RuntimeError, NotImplementedError)):
        clock.tick("m", unreadable)


def test_a_smaller_explicit_step_begins_a_generation():
    clock = DenoiseClock()
    runs = []
    for index in (0, 1, 0):
        with denoise_step(index):
            runs.append(clock.tick("m", None).run)
    assert runs[0] == runs[1] != runs[2]


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

    class Model(nn.Module, CacheMixin):
        pass

    clock, model = DenoiseClock(), Model()
    with model.cache_context("uncond", step_index=3, num_inference_steps=9):
        now = clock.tick("m", 500)
    assert (now.stream, now.step, now.total) == ("uncond", 3, 9)
    assert clock.tick("m", 500).stream != "uncond"


def test_observing_twice_wraps_once():
    from diffusers.models.cache_utils import CacheMixin

    observe_cache_context()
    wrapped = CacheMixin.cache_context
    observe_cache_context()
    assert CacheMixin.cache_context is wrapped


def test_threads_have_clocks_of_their_own():
    from svg2_compile import clock

    clock.tick("m", 999)
    mine = clock.current_clock()
    others = []
    thread = threading.Thread(target=lambda: (clock.tick("m", 999), others.append(clock.current_clock())))
    thread.start()
    thread.join()
    assert others[0] is not mine and others[0].now.run != mine.now.run


@pytest.mark.parametrize(
    ("dense_steps", "total", "expected"),
    [(0, 50, 0), (3, 50, 3), (0.2, 50, 10), (0.3, 10, 3), (0.29, 100, 29), (0.2, None, 10)],
)
def test_dense_steps_are_a_count_or_a_share(dense_steps, total, expected):
    assert dense_step_count(SparseConfig(dense_steps=dense_steps), total) == expected


def test_first_steps_and_first_layers_are_dense():
    config = SparseConfig(dense_steps=2, dense_layers=1)

    def dense(step: int, layer: int | None) -> bool:
        return is_dense(config, Tick(run=1, step=step, stream="0", total=10), layer)

    assert dense(0, 5) and dense(1, None)
    assert dense(2, 0) and dense(9, 0)
    assert not dense(2, 1) and not dense(2, None)
