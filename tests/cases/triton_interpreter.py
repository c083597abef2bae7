"""Where tests run Triton kernels: on the GPU if there is one, else under Triton's interpreter, in their own process.

A test that launches a kernel is marked ``runs_kernels``, and its file also has::

    @starts_the_interpreter
    def test_the_kernels_pass_under_the_interpreter():
        assert_passes_under_the_interpreter(__file__)
"""

import os
import subprocess
import sys

import pytest
import torch
from quick_interpreter import quicken

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if INTERPRETED:
    quicken()


def runs_kernels(test):
    """Mark a test that launches kernels."""
    reason = "run by test_the_kernels_pass_under_the_interpreter, in its own process"
    return pytest.mark.launches(pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason=reason)(test))


def starts_the_interpreter(test):
    """Mark the test that runs the others of its file."""
    test = pytest.mark.slow(test)
    test = pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")(test)
    return pytest.mark.skipif(DEVICE == "cuda", reason="the device itself runs the other tests")(test)


def assert_passes_under_the_interpreter(test_file):
    """Run the tests of a file that launch kernels in a process with the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    # Triton decides at import whether to compile or to interpret, for the whole process.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-m", "launches", test_file]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
