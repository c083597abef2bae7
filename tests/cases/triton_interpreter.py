"""Where tests run Triton kernels: on the GPU if there is one, else under Triton's interpreter, in their own process.

A test that launches a kernel is marked ``runs_kernels``, and its file also has::

    @starts_the_interpreter
    def test_the_kernels_pass_under_the_interpreter():
        assert_passes_under_the_interpreter(__file__)
"""

import functools
import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="run by test_the_kernels_pass_under_the_interpreter, in its own process"
)


def replace_the_language_once_a_launch():
    """Let the interpreter not look through Triton's language again for every call of a function within a kernel.

    A launch replaces what kernels call by what NumPy computes, and each such call does it again: two fifths of the
    time of these tests. What is replaced is still replaced then, except for ``tl.core`` at the first call. Read in
    Triton 3.9; where another one has other names, its tests take longer and are the same.
    """
    from triton import language
    from triton.runtime import interpreter

    replace, scope = (getattr(interpreter, name, None) for name in ("_patch_lang", "_LangPatchScope"))
    if replace is None or scope is None:
        return
    languages = (language, language.core)

    @functools.cache
    def languages_of(function):
        seen = {id(value) for value in function.__globals__.values()}
        return [each for each in languages if id(each) in seen]

    def replace_if_needed(function):
        # a launch undoes what it replaced, so that it is asked of the language itself
        seen = languages_of(function)
        if seen and not any(language.core.is_builtin(each.arange) for each in seen):
            return scope()
        return replace(function)

    interpreter._patch_lang = replace_if_needed


if INTERPRETED:
    replace_the_language_once_a_launch()


def starts_the_interpreter(test):
    """Mark the test that runs the others of its file."""
    test = pytest.mark.slow(test)
    test = pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")(test)
    return pytest.mark.skipif(DEVICE == "cuda", reason="the device itself runs the other tests")(test)


def assert_passes_under_the_interpreter(test_file):
    """Run a file of tests in a process with the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    # Triton decides at import whether to compile or to interpret, for the whole process.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", test_file]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
