"""The tests of kernels would see what is read before it is written: new memory is NaN, or the largest integer."""

import math

import pytest
import torch
from triton_interpreter import DEVICE

WAYS = {
    "empty": lambda dtype: torch.empty(2, 3, dtype=dtype, device=DEVICE),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(2, 3, dtype=dtype, device=DEVICE)),
    "empty_strided": lambda dtype: torch.empty_strided((2, 3), (1, 2), dtype=dtype, device=DEVICE),
    "new_empty": lambda dtype: torch.zeros(1, device=DEVICE).new_empty((2, 3), dtype=dtype),
    "new_empty_strided": lambda dtype: torch.zeros(1, device=DEVICE).new_empty_strided((2, 3), (1, 2), dtype=dtype),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("way", WAYS)
def test_new_numbers_are_not_numbers(way, dtype):
    tensor = WAYS[way](dtype)
    assert tensor.dtype == dtype and tensor.shape == (2, 3) and tensor.isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("way", WAYS)
def test_new_integers_are_places_outside_of_everything(way, dtype):
    assert (WAYS[way](dtype) == torch.iinfo(dtype).max).all()


def test_an_op_that_forgets_an_element_is_noticed():
    x = torch.ones(65)
    forgetful = torch.empty_like(x)
    forgetful[:64] = x[:64]
    assert not torch.equal(forgetful, x) and math.isnan(forgetful.sum())
