"""New memory of the tests of kernels holds values that no test accepts, so what is read before it is written is seen.

Also in the process with Triton's interpreter. The ways in which our code asks for memory are patched by name. PyTorch
can fill all new memory (``torch.utils.deterministic.fill_uninitialized_memory``), but only together with deterministic
algorithms: other ones than users run, and on a GPU some ops refuse them.
"""

import functools
import math
import os

import pytest
import torch

WAYS = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
]


def poison_for(dtype: torch.dtype) -> float | int | bool:
    """Return NaN; of integers the largest one: as a size or place it is outside of everything."""
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return True if dtype is torch.bool else torch.iinfo(dtype).max


def poisoned(allocate):
    """Return ``allocate`` with what it returns filled."""

    @functools.wraps(allocate)
    def allocate_and_poison(*args, **options):
        tensor = allocate(*args, **options)
        tensor.detach().fill_(poison_for(tensor.dtype))
        return tensor

    return allocate_and_poison


# ``torch.device`` and Dynamo remember these functions when they first need them: they must know the unpatched ones
with torch.device("meta"):
    torch.empty(0)
if os.environ.get("TRITON_INTERPRET") != "1":
    # not in the interpreter's process, which compiles nothing: Dynamo takes seconds to import
    torch.compile(torch.empty_like, backend="eager")(torch.zeros(1))


@pytest.fixture(autouse=True)
def _new_memory_is_poisoned():
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in WAYS:
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield
