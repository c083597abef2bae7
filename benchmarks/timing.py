"""Milliseconds of a call: by a clock, by events of the GPU, on the GPU alone, and of several calls in turns."""

import statistics
import time
from collections.abc import Callable

import torch

SLEEP_CYCLES = 40_000_000
"""Some 20 ms in which the host gets ahead of the GPU."""

Call = Callable[[], object]


def cpu_ms(call: Call) -> float:
    """Return the time of one call by the clock; of a call that launches on a GPU, that of the host."""
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def host_ms(call: Call, repeats: int) -> float:
    """Return the median time the host takes to launch a call on an idle GPU."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        times.append(cpu_ms(call))
    torch.cuda.synchronize()
    return statistics.median(times)


def time_once_ms(call: Call) -> float:
    """Return the time of one call on the GPU, which waits for the host where the host is slower."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def median_ms(call: Call, rep_ms: float) -> float:
    """Return the median time of a call on the GPU, of at least three calls and about ``rep_ms``."""
    from triton.testing import do_bench

    call()
    once_ms = max(time_once_ms(call), 1e-3)
    if once_ms * 3 > rep_ms:
        return statistics.median([once_ms, *(time_once_ms(call) for _ in range(2))])
    return float(do_bench(call, warmup=min(10.0, rep_ms), rep=rep_ms, return_mode="median"))


def device_ms(call: Call) -> float:
    """Return the time of one call on the GPU, launched while the GPU was busy, as it is behind a large attention."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def device_median_ms(call: Call, rounds: int) -> float:
    """Return the median time on the GPU alone, which in a model has other work while the host launches this."""
    call()
    return statistics.median(device_ms(call) for _ in range(rounds))


def medians_in_turns_ms(*calls: Call, repeats: int, time_ms: Callable[[Call], float] = cpu_ms) -> list[float]:
    """Return the median time of each call, taken in turns so that a change of the machine hits all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, record in zip(calls, times, strict=True):
            ms = time_ms(call)
            if repeat > 0:  # the first round warms up
                record.append(ms)
    return [statistics.median(record) for record in times]
