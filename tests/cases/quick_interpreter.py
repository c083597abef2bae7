"""Triton's interpreter in less time, with the same results: most of the time of the tests of kernels goes there.

What is replaced is private. It was read in Triton 3.9; where another version has other names, tests take longer and are
the same. ``tests/kernels/test_quick_interpreter.py`` compares both.
"""

import functools

import numpy as np

OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def quicken():
    """Replace what the interpreter does again and again, or number by number."""
    from triton import language
    from triton.language import semantic
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):
        replace(interpreter, "_patch_lang", functools.partial(once_a_launch, interpreter, language))
    replace(interpreter, "_get_np_dtype", remembering_types)
    replace(language.core.block_type, "__init__", remembering_blocks)
    replace(language.core.tensor, "__init__", remembering_shapes)
    replace(language.core.tuple, "__eq__", comparing_sizes)
    if hasattr(semantic, "TritonSemantic"):
        replace(semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", looking_for_overflow)
    if hasattr(interpreter, "ScanOps"):
        replace(interpreter.ScanOps, "generic_scan", scanning_by_slices)


def replace(owner, name, quicker):
    """Replace what ``owner`` has by that name, if it has, by what ``quicker`` makes of it."""
    if hasattr(owner, name):
        setattr(owner, name, quicker(getattr(owner, name)))


def once_a_launch(interpreter, language, patch):
    """Do not look through Triton's language again for every call of a function within a kernel.

    A launch replaces what kernels call by what NumPy computes, and each such call does it again: two fifths of the
    time of these tests. What is replaced is still replaced then, except for ``tl.core`` at the first call.
    """
    languages = (language, language.core)

    @functools.cache
    def languages_of(function):
        seen = {id(value) for value in function.__globals__.values()}
        return [each for each in languages if id(each) in seen]

    def patch_if_needed(function):
        # a launch undoes what it replaced, so that it is asked of the language itself
        seen = languages_of(function)
        if seen and not any(language.core.is_builtin(each.arange) for each in seen):
            return interpreter._LangPatchScope()
        return patch(function)

    return patch_if_needed


def remembering_types(numpys):
    """Do not build the table of types for every look at it."""
    known = {}

    def remembered(dtype):
        # the elements of a block have its NumPy type
        name = dtype.scalar.name
        if name not in known:
            known[name] = numpys(dtype)
        return known[name]

    return remembered


def remembering_blocks(begin):
    """Do not check each shape anew, and write its name."""
    known = {}

    def begin_remembered(self, element_ty, shape):
        key = (element_ty.name, *map(int, shape))
        if key not in known:
            begin(self, element_ty, shape)
            known[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        vars(self).update(known[key], element_ty=element_ty)

    return begin_remembered


def remembering_shapes(begin):
    """Do not wrap each size of a tensor anew: but for its values and their type, all follows from its shape."""
    known = {}

    def begin_remembered(self, handle, type):
        shape = type.shape if type.is_block() else ()
        if shape not in known:
            begin(self, handle, type)
            known[shape] = {
                name: value for name, value in vars(self).items() if name not in ("handle", "type", "dtype")
            }
        vars(self).update(known[shape], handle=handle, type=type, dtype=type.scalar)

    return begin_remembered


def comparing_sizes(equal):
    """Compare a shape with plain sizes as they are; ``equal`` wraps each of them first."""
    from triton.language import constexpr

    def compare(self, other):
        sizes = other if type(other) is list else getattr(other, "values", None)
        if type(sizes) is list and all(type(size) is int for size in sizes):
            return constexpr(self.values == sizes)
        return equal(self, other)

    return compare


def looking_for_overflow(check):
    """Compute the exact result with NumPy; only where it is out of range, ``check`` says so, one operation of many."""

    def look(self, lhs, rhs, binary_op):
        dtype, operation = lhs.type.scalar, OPERATIONS.get(binary_op.__name__)
        if operation is not None and dtype.is_int() and dtype.int_bitwidth < 64 and rhs.type.scalar == dtype:
            exact = operation(lhs.handle.data, rhs.handle.data, dtype=np.int64)
            if exact.min() >= dtype.get_int_min_value() and exact.max() <= dtype.get_int_max_value():
                return
        check(self, lhs, rhs, binary_op)

    return look


def scanning_by_slices(_):
    """Combine at once what lies side by side on the other axes, not number by number."""

    def scan(self, input):
        data = [np.moveaxis(each.handle.data, self.axis, 0) for each in input]
        results = [np.empty_like(each) for each in data]
        before = None
        for place in range(len(data[0])):
            here = tuple(self.to_tensor(each[place], tensor.dtype) for each, tensor in zip(data, input))
            combined = here if before is None else self.combine_fn.fn(*before, *here)
            combined = combined if isinstance(combined, tuple) else (combined,)
            for result, each in zip(results, combined):
                values = each.handle.data if hasattr(each, "handle") else each
                result[place] = np.reshape(values, result[place].shape)
            before = tuple(self.to_tensor(each[place], tensor.dtype) for each, tensor in zip(results, input))
        return [self.to_tensor(np.moveaxis(each, 0, self.axis), tensor.dtype) for each, tensor in zip(results, input)]

    return scan
