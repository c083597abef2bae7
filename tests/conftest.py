"""Tests see the installed package: the repository root, where `kernels` is our folder, must not be importable.

Test modules can be imported by others, which test the same cases.
"""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != TESTS.parent]
sys.path += [str(TESTS / folder) for folder in ("cases", "kernels", "passes")]


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
