"""Tests see the installed package: the repository root, where `kernels` is our folder, must not be importable.

What several files of tests share is in ``cases``; no test module is imported by another one.
"""

import gc
import logging
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != TESTS.parent]
sys.path.append(str(TESTS / "cases"))
# their assertions, too, say what the values were
pytest.register_assert_rewrite(*(path.stem for path in (TESTS / "cases").iterdir() if path.stem != "__pycache__"))


def pytest_collection_modifyitems(items):
    """Begin with the files that have slow tests: with several workers, the last tests should be short ones."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """Leave out what each test would pay for again: looking for garbage among what imports made, and timing guards."""
    gc.collect()
    gc.freeze()
    guards = sys.modules.get("torch._dynamo.guards")
    if hasattr(guards, "profile_guard_manager"):
        # Dynamo empties the caches of the processor at each compilation, to say in a log how long guards take
        guards.profile_guard_manager = lambda *arguments: 0.0


def pytest_unconfigure():
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    keep_pytest_off_torchs_trace()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    keep_pytest_off_torchs_trace()


def keep_pytest_off_torchs_trace():
    """Take away the handlers that pytest gives to each logger that does not propagate.

    Whatever handler torch's structured trace has, torch writes every graph, guard and event of every compilation for
    it. Without that and without looking through imports, tests that compile take a seventh less time. ``TORCH_TRACE``
    still has a handler of torch's own.
    """
    trace = logging.getLogger("torch.__trace")
    for handler in [each for each in trace.handlers if type(each).__module__.startswith("_pytest")]:
        trace.removeHandler(handler)


@pytest.fixture
def no_grad_and_a_fresh_start():
    """Compile anew, start generations anew, and compute no gradients, as pipelines do."""
    import torch

    import svg2_compile

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    svg2_compile.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
