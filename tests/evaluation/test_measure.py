"""Models that generate in turns: one step each, and a failing one holds up nobody."""

from types import SimpleNamespace

import pytest

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
