"""Models that generate in turns: one step each, and a failing one holds up nobody."""

from types import SimpleNamespace

import pytest
import torch

from svg2_compile.kernels.card import PARTS
from svg2_compile.kernels.ops import CARDS
from svg2_compile.video import measure


class Pipeline:
    """As much of a diffusers pipeline as taking turns needs."""

    def __init__(self, transformer=None, scheduler=None):
        self.transformer, self.scheduler = transformer, scheduler

    @property
    def components(self):
        return {"transformer": self.transformer, "scheduler": self.scheduler}


@pytest.fixture
def steps(monkeypatch):
    """What was generated, in order, as (model, step); the model "bad" fails at its second step."""
    done = []

    def generate(pipeline, video, after_step):
        for step in range(3):
            if pipeline.transformer == "bad" and step == 1:
                raise RuntimeError("out of memory")
            done.append((pipeline.transformer, step))
            after_step()
        return pipeline

    monkeypatch.setattr(measure, "generate", generate)
    return done


def test_every_model_takes_one_step_in_turn_with_a_scheduler_of_its_own(steps):
    ended = []
    scheduler = SimpleNamespace(name="shared")
    generations = measure.generate_in_turns(Pipeline(scheduler=scheduler), "abc", None, ended.append)
    assert steps == [(model, step) for step in range(3) for model in "abc"]
    assert ended == [0, 1, 2] * 3
    assert [each.transformer for each in generations] == ["a", "b", "c"]
    assert len({id(each.scheduler) for each in generations} | {id(scheduler)}) == 4


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_failing_model_is_reported_and_the_others_finish(steps, place):
    models = ["a", "b"]
    models.insert(place, "bad")
    with pytest.raises(RuntimeError, match="out of memory"):
        measure.generate_in_turns(Pipeline(), models, None)
    assert [step for step in steps if step[0] == "a"] == [("a", 0), ("a", 1), ("a", 2)]
    assert [step for step in steps if step[0] == "b"] == [("b", 0), ("b", 1), ("b", 2)]


class Event:
    """As much of a profile's event as counting it needs."""

    def __init__(self, name, microseconds, parent=None):
        self.name, self.cpu_parent = name, parent
        self.cpu_time_total = self.device_time_total = microseconds


def test_every_op_counts_to_the_part_that_its_card_says():
    for card in CARDS.values():
        seconds = measure.seconds_of_parts([Event(f"svg2::{card.name}", 5e6)], on_gpu=False)
        assert seconds == {part: 5.0 if part == card.part else 0.0 for part in PARTS}
    parts = {card.name: card.part for card in CARDS.values()}
    assert parts["unpermute_tokens"] == "clustering"
    assert parts["keep_dense_heads_"] == "selection"
    assert parts["measure_recall"] == "recall"


def test_attention_inside_of_an_op_that_is_counted_is_not_counted_again():
    outer = Event("svg2::context_attention", 3e6)
    middle = Event("aten::scaled_dot_product_attention", 2e6, outer)
    inner = Event("aten::_scaled_dot_product_flash_attention", 1e6, middle)
    alone = Event("aten::_scaled_dot_product_flash_attention", 4e6, Event("aten::scaled_dot_product_attention", 4e6))
    seconds = measure.seconds_of_parts([outer, middle, inner, alone, Event("aten::mm", 9e6)], on_gpu=True)
    assert seconds == {"clustering": 0.0, "selection": 0.0, "attention": 7.0, "recall": 0.0}


def test_a_real_profile_counts_text_rows_once():
    q = torch.randn(1, 2, 512, 32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.svg2.context_attention(q, q, q, None, 0.1)
    (op,) = (event for event in profile.events() if event.name == "svg2::context_attention")
    assert measure.seconds_of_parts(profile.events(), on_gpu=False)["attention"] == op.cpu_time_total / 1e6
