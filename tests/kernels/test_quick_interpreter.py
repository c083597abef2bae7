"""What tests replace in Triton's interpreter does what it replaces."""

from types import SimpleNamespace

import numpy as np
import pytest
from quick_interpreter import (
    comparing_sizes,
    looking_for_overflow,
    remembering_blocks,
    remembering_shapes,
    remembering_types,
    replace,
    scanning_by_slices,
)
from triton_interpreter import INTERPRETED

tl = pytest.importorskip("triton.language", reason="Triton is not installed")
core = tl.core
interpreter = pytest.importorskip("triton.runtime.interpreter")

pytestmark = pytest.mark.skipif(INTERPRETED, reason="everything is replaced in this process")

DTYPES = [tl.int1, tl.int8, tl.uint32, tl.int64, tl.float16, tl.bfloat16, tl.float32, tl.pointer_type(tl.float32)]


def tensor_of(data, dtype):
    """Return a tensor as the interpreter has it."""
    return core.tensor(interpreter.TensorHandle(data, dtype), core.block_type(dtype, list(data.shape)))


def scan_of(quick, values, axis, combine):
    """Return the results of a scan of several arrays of int32, NumPy's."""
    scan = interpreter.ScanOps(axis, SimpleNamespace(fn=combine), reverse=False)
    run = scanning_by_slices(None) if quick else type(scan).generic_scan
    return [each.handle.data for each in run(scan, [tensor_of(each, tl.int32) for each in values])]


def after_one_another(left, right, later_left, later_right):
    """Combine x -> left x + right with the one after it; it matters which is first."""
    factor = later_left.handle.data * left.handle.data
    both = factor, later_left.handle.data * right.handle.data + later_right.handle.data
    return tuple(interpreter.ScanOps(0, None, False).to_tensor(each, tl.int32) for each in both)


@pytest.mark.parametrize(("shape", "axis"), [((4, 2, 8), 0), ((4, 2, 8), 1), ((4, 2, 8), 2), ((8,), 0), ((1, 4), 0)])
def test_a_scan_by_slices_is_the_scan_number_by_number(shape, axis):
    random = np.random.default_rng(0)
    values = [random.integers(-2, 3, shape, dtype=np.int32) for _ in range(2)]
    expected, found = (scan_of(quick, values, axis, after_one_another) for quick in (False, True))
    assert all(np.array_equal(one, other) and one.dtype == other.dtype for one, other in zip(expected, found))


def test_a_scan_by_slices_takes_a_single_result_as_it_is():
    values = [np.arange(8, dtype=np.int32).reshape(4, 2)]

    def add(left, right):
        return tensor_of(left.handle.data + right.handle.data, tl.int32)

    assert np.array_equal(scan_of(True, values, 0, add)[0], values[0].cumsum(0))


def test_types_are_remembered_as_they_are():
    remembered = remembering_types(interpreter._get_np_dtype)
    for dtype in DTYPES:
        for each in (dtype, core.block_type(dtype, [2, 4])):
            assert remembered(each) == remembered(each) == interpreter._get_np_dtype(each)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_and_tensors_are_remembered_as_they_are(dtype, monkeypatch):
    shapes = ([4], [2, 4], [4, 2], [core.constexpr(2), 4])
    expected = [core.block_type(dtype, shape) for shape in shapes]
    tensors = [core.tensor("handle", each) for each in (dtype, *expected)]
    monkeypatch.setattr(core.block_type, "__init__", remembering_blocks(core.block_type.__init__))
    monkeypatch.setattr(core.tensor, "__init__", remembering_shapes(core.tensor.__init__))
    for _ in range(2):
        # those of another type come between
        core.tensor("another", core.block_type(tl.float64, [4]))
        blocks = [core.block_type(dtype, shape) for shape in shapes]
        assert [described(each) for each in blocks] == [described(each) for each in expected]
        again = [core.tensor("handle", each) for each in (dtype, *blocks)]
        assert [described(each) for each in again] == [described(each) for each in tensors]


def described(each):
    return {name: str(value) for name, value in vars(each).items()}


def test_an_invalid_shape_is_still_refused(monkeypatch):
    monkeypatch.setattr(core.block_type, "__init__", remembering_blocks(core.block_type.__init__))
    for _ in range(2):
        with pytest.raises(ValueError, match="power of 2"):
            core.block_type(tl.int32, [3])


def test_shapes_are_equal_to_the_same_sizes_only():
    equal = core.tuple.__eq__
    compare = comparing_sizes(equal)
    shape = core.block_type(tl.int32, [2, 4]).shape
    others = [[2, 4], [4, 2], [2], (2, 4), [2, core.constexpr(4)], shape, core.block_type(tl.int8, [2, 4]).shape]
    assert [bool(compare(shape, each)) for each in others] == [bool(equal(shape, each)) for each in others]


@pytest.mark.parametrize(
    ("operation", "dtype", "left", "right", "overflows"),
    [
        ("add", tl.int32, 2**31 - 1, 1, True),
        ("add", tl.int32, 2**31 - 1, 0, False),
        ("sub", tl.uint32, 0, 1, True),
        ("sub", tl.int32, -(2**31), 1, True),
        ("mul", tl.int32, 2**16, 2**15, True),
        ("mul", tl.int32, 2**16, -(2**15), False),
        ("mul", tl.int16, 2**8, 2**7, True),
    ],
)
def test_the_check_is_asked_exactly_where_something_overflows(operation, dtype, left, right, overflows):
    asked = []
    look = looking_for_overflow(lambda *arguments: asked.append(arguments))
    numpys = interpreter._get_np_dtype(dtype)
    # one of two elements
    operands = [tensor_of(np.array([each, 0], dtype=numpys), dtype) for each in (left, right)]
    look(None, *operands, SimpleNamespace(__name__=operation))
    assert bool(asked) == overflows


def test_what_is_not_there_is_not_replaced():
    owner = SimpleNamespace(here=1)
    replace(owner, "here", lambda value: value + 1)
    replace(owner, "elsewhere", lambda value: value + 1)
    assert vars(owner) == {"here": 2}
