"""Writes to slices become concatenations with the same bits."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from svg2_compile.passes.join_slices import join_slices

X = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0))
A, B, C = (torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3))


def write(x, source, dim, start, end, step=1):
    index = [slice(None)] * 3
    index[dim] = slice(start, end, step)
    return torch.slice_scatter(x, source[tuple(index)], dim, start, end, step)


def rotation(x, a, b, c):
    return write(write(torch.empty_like(x), a, -1, 0, None, 2), b, -1, 1, None, 2)


def rotation_in_another_precision(x, a, b, c):
    return rotation(x.bfloat16(), a, b, c)


def assigned(x, a, b, c):
    """As functionalization writes ``out[..., 0::2] = a; out[..., 1::2] = b``."""
    out = torch.empty_like(x)
    for start, source in ((0, a), (1, b)):
        part = torch.ops.aten.copy(out[..., start::2], source[..., start::2])
        out = torch.slice_scatter(out, part, -1, start, None, 2)
    return out


def thirds_in_any_order(x, a, b, c):
    return write(write(write(x, a, 1, 2, None, 3), b, 1, 0, 9999, 3), c, 1, 1, None, 3)


def written_twice(x, a, b, c):
    return write(write(write(x, a, -1, 0, None, 2), b, -1, 0, None, 2), c, -1, 1, None, 2)


def read_between(x, a, b, c):
    half = write(write(x, c, 1, 3, 5), a, -1, 0, 3)
    return write(half, b, -1, 3, None) + half


def only_evens(x, a, b, c):
    return write(x, a, -1, 0, None, 2)


def part_of_the_odds(x, a, b, c):
    return write(write(x, a, -1, 0, None, 2), b, -1, 1, 4, 2)


def crosswise(x, a, b, c):
    return write(write(x, a, 1, 0, None, 2), b, 2, 1, None, 2)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (rotation, 0),
        (assigned, 0),
        (rotation_in_another_precision, 0),
        (thirds_in_any_order, 0),
        (written_twice, 0),
        (read_between, 0),
        (lambda x, a, b, c: write(x, a, 1, 2, 5), 0),
        (lambda x, a, b, c: write(x, a, 1, -3, None), 0),
        (lambda x, a, b, c: write(x, a, 1, 0, None), 0),
        (only_evens, 1),
        (part_of_the_odds, 2),
        (crosswise, 2),
    ],
    ids=[
        "rotation",
        "assigned",
        "bfloat16",
        "thirds",
        "twice",
        "between",
        "middle",
        "end",
        "all",
        "evens",
        "part",
        "crosswise",
    ],
)
def test_the_bits_stay_and_the_scatters_go(function, left):
    gm = make_fx(lambda *tensors: (function(*tensors),), tracing_mode="fake")(X, A, B, C)
    join_slices(gm)
    gm.graph.lint()
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.slice_scatter.default)) == left
    assert torch.equal(gm(X, A, B, C)[0], function(X, A, B, C))
    before = str(gm.graph)
    assert join_slices(gm) == 0 and str(gm.graph) == before


@pytest.mark.parametrize("function", [rotation, assigned])
def test_what_is_overwritten_is_not_kept(function):
    gm = make_fx(lambda *tensors: (function(*tensors),), tracing_mode="fake")(X, A, B, C)
    join_slices(gm)
    assert not [node for node in gm.graph.nodes if "empty" in str(node.target)]
