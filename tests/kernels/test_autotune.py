"""Candidates are timed once per kind, the fastest is kept, and nothing is timed where it would do harm."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import subprocess
import sys
import threading

import pytest
import torch

from svg2_compile.kernels import autotune
from svg2_compile.kernels.autotune import TuningKey, fastest
from svg2_compile.kernels.tiles import AttentionTiles

TABLED, OTHER, THIRD = (AttentionTiles(block_m, 64, 16, 8, 3) for block_m in (128, 64, 32))
KEY = TuningKey(capability=90, implementation="pointer", block_d=128, dtype=torch.bfloat16, has_context=False)
OTHER_KEYS = [
    dataclasses.replace(KEY, capability=80),
    dataclasses.replace(KEY, implementation="descriptor"),
    dataclasses.replace(KEY, block_d=64),
    dataclasses.replace(KEY, dtype=torch.float16),
    dataclasses.replace(KEY, has_context=True),
]


class Clock:
    """Takes as long as it is told, and remembers what it timed."""

    def __init__(self, **ms_by_block_m: float) -> None:
        self.ms = {int(name.removeprefix("m")): ms for name, ms in ms_by_block_m.items()}
        self.timed: list[int] = []
        self.running = 0

    def run(self, tiles: AttentionTiles) -> None:
        self.running = tiles.block_m

    def time_ms(self, launch):
        launch()
        self.timed.append(self.running)
        return self.ms[self.running]


@pytest.fixture(autouse=True)
def _nothing_is_known():
    autotune.clear()
    yield
    autotune.clear()


@pytest.mark.parametrize(
    ("times", "expected"),
    [((2.0, 1.0, 3.0), OTHER), ((1.0, 2.0, 3.0), TABLED), ((3.0, 2.0, 1.0), THIRD), ((1.0, 1.0, 1.0), TABLED)],
)
def test_the_fastest_is_kept_and_the_table_wins_a_draw(times, expected):
    clock = Clock(**dict(zip(("m128", "m64", "m32"), times)))
    assert fastest(KEY, (TABLED, OTHER, THIRD), clock.run, clock.time_ms) is expected
    assert clock.timed == [128, 64, 32]


def test_a_kind_is_timed_once_and_again_after_clear():
    clock = Clock(m128=2, m64=1)
    for _ in range(3):
        assert fastest(KEY, (TABLED, OTHER), clock.run, clock.time_ms) is OTHER
    assert clock.timed == [128, 64]
    autotune.clear()
    clock.ms[128] = 0
    assert fastest(KEY, (TABLED, OTHER), clock.run, clock.time_ms) is TABLED


@pytest.mark.parametrize("key", OTHER_KEYS, ids=str)
def test_every_part_of_the_key_tells_kinds_apart(key):
    first, second = Clock(m128=2, m64=1), Clock(m128=1, m64=2)
    assert fastest(KEY, (TABLED, OTHER), first.run, first.time_ms) is OTHER
    assert fastest(key, (TABLED, OTHER), second.run, second.time_ms) is TABLED
    assert fastest(KEY, (TABLED, OTHER), second.run, second.time_ms) is OTHER


def test_a_single_candidate_is_not_timed():
    clock = Clock()
    assert fastest(KEY, (TABLED,), clock.run, clock.time_ms) is TABLED
    assert not clock.timed


def test_nothing_is_timed_while_a_cuda_graph_records_and_the_table_is_not_remembered(monkeypatch):
    clock = Clock(m128=2, m64=1)
    monkeypatch.setattr(autotune, "is_capturing", lambda: True)
    assert fastest(KEY, (TABLED, OTHER), clock.run, clock.time_ms) is TABLED
    assert not clock.timed
    monkeypatch.setattr(autotune, "is_capturing", lambda: False)
    assert fastest(KEY, (TABLED, OTHER), clock.run, clock.time_ms) is OTHER
    monkeypatch.setattr(autotune, "is_capturing", lambda: True)
    assert fastest(KEY, (TABLED, OTHER), clock.run, clock.time_ms) is OTHER


def errors_of_a_launch() -> list[Exception]:
    errors: list[Exception] = [torch.OutOfMemoryError("no memory")]
    if importlib.util.find_spec("triton") is not None:
        from triton.runtime.errors import OutOfResources, PTXASError

        errors += [OutOfResources(300_000, 232_448, "shared memory"), PTXASError("no registers")]
    return errors


@pytest.mark.parametrize("error", errors_of_a_launch(), ids=lambda error: type(error).__name__)
def test_a_candidate_that_cannot_be_launched_is_skipped_and_logged(error, caplog):
    clock = Clock(m64=2, m32=3)

    def run(tiles):
        if tiles is TABLED:
            raise error
        clock.run(tiles)

    with caplog.at_level(logging.INFO, logger=autotune.__name__):
        assert fastest(KEY, (TABLED, OTHER, THIRD), run, clock.time_ms) is OTHER
    skipped, kept = (record.getMessage() for record in caplog.records)
    assert f"skipped {TABLED}" in skipped and str(error) in skipped
    assert f"{OTHER} at 2.000 ms is the fastest of 2" in kept
    assert str(KEY) in kept


def test_where_nothing_can_be_launched_the_error_of_the_table_s_tiles_is_raised_and_nothing_remembered():
    def run(tiles):
        raise torch.OutOfMemoryError(f"no memory for {tiles.block_m}")

    with pytest.raises(torch.OutOfMemoryError, match="no memory for 128"):
        fastest(KEY, (TABLED, OTHER), run, lambda launch: launch())
    clock = Clock(m128=2, m64=1)
    assert fastest(KEY, (TABLED, OTHER), clock.run, clock.time_ms) is OTHER


def test_a_mistake_is_not_taken_for_a_candidate_that_does_not_fit():
    def run(tiles):
        if tiles is OTHER:
            raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        fastest(KEY, (TABLED, OTHER), run, lambda launch: launch() or 1.0)


def test_two_threads_time_a_kind_once():
    clock, ready = Clock(m128=2, m64=1), threading.Barrier(2)
    answers: list[AttentionTiles] = []

    def slow_time_ms(launch):
        ms = clock.time_ms(launch)
        threading.Event().wait(0.05)
        return ms

    def work():
        ready.wait()
        answers.append(fastest(KEY, (TABLED, OTHER), clock.run, slow_time_ms))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [OTHER, OTHER]
    assert clock.timed == [128, 64]


def test_the_timer_takes_the_median_of_timed_launches_after_one_that_is_not(monkeypatch):
    """Stand-ins for CUDA events on a clock that each launch moves by the next of ``durations``."""
    durations = [100.0, 1.0, 9.0, 2.0, 3.0, 8.0]
    now = 0.0
    events = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.at, self.is_done = None, False
            events.append(self)

        def record(self):
            self.at = now

        def synchronize(self):
            self.is_done = True

        def elapsed_time(self, stop):
            assert stop.is_done
            return stop.at - self.at

    def launch():
        nonlocal now
        now += durations.pop(0)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert autotune.cuda_ms(launch) == 3.0
    assert not durations
    assert len(events) == 2 * autotune.RUNS


def test_it_can_be_imported_without_triton():
    code = "import sys; sys.modules['triton'] = None; from svg2_compile.kernels import autotune, launch, why_not"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA events need a GPU")
def test_cuda_events_tell_a_long_launch_from_a_short_one():
    x = torch.randn(4096, 4096, device="cuda")

    def run(tiles):
        for _ in range(tiles.block_m // 32):
            x @ x

    assert fastest(KEY, (TABLED, OTHER, THIRD), run) is THIRD
