"""State that AOTAutograd copied around an op is updated in place again, where nothing else needs the old value."""

import pytest
import torch
from torch._functorch.aot_autograd import aot_module_simplified
from torch.fx import symbolic_trace

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.passes.dynamo_graphs import AUTO_FUNCTIONALIZED
from svg2_compile.passes.restore_mutation import restore_mutation

HEADS, TOKENS, DIM, CLUSTERS = 2, 40, 8, 4
X = torch.randn(1, HEADS, TOKENS, DIM, generator=torch.Generator().manual_seed(0))


def state():
    return torch.zeros(1, HEADS, CLUSTERS, DIM), torch.zeros(1, dtype=torch.int32)


def cluster(x, centroids, calls):
    return torch.ops.svg2.kmeans_(x, centroids, calls, 3, 1, 0)


def updated_once(x, centroids, calls):
    labels = cluster(x, centroids, calls)
    return labels, centroids * 2


def updated_twice(x, centroids, calls):
    first = cluster(x, centroids, calls)
    return first, cluster(x + 1, centroids, calls)


def old_value_is_read(x, centroids, calls):
    old = centroids.clone()
    labels = cluster(x, centroids, calls)
    return labels, old + centroids


def a_view_is_updated(x, centroids, calls):
    return (cluster(x, centroids[:, :, :CLUSTERS], calls[0:1]),)


def overwritten_afterwards(x, centroids, calls):
    labels = cluster(x, centroids, calls)
    centroids.zero_()
    return (labels,)


def aten_of(function):
    """Return the graph that AOTAutograd hands to a compiler."""
    graphs = []

    def keep(gm, _):
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        aot_module_simplified(
            symbolic_trace(function), (X, *state()), keep, inference_compiler=keep, keep_inference_input_mutations=True
        )
    return graphs[0]


def functionalized(gm):
    return len(gm.graph.find_nodes(op="call_function", target=AUTO_FUNCTIONALIZED))


@pytest.mark.parametrize(
    ("function", "restored"),
    [
        (updated_once, 1),
        (old_value_is_read, 1),
        (updated_twice, 0),
        (a_view_is_updated, 0),
        (overwritten_afterwards, 0),
    ],
)
def test_outputs_and_state_are_those_of_eager_execution(function, restored):
    gm = aten_of(function)
    ops = functionalized(gm)
    assert restore_mutation(gm) == restored
    assert functionalized(gm) == ops - restored
    gm.graph.lint()
    mine, theirs = state(), state()
    for step in range(2):
        for got, wanted in zip(gm(X + step, *mine), function(X + step, *theirs), strict=True):
            assert torch.equal(got, wanted)
    assert all(map(torch.equal, mine, theirs))
    assert mine[1].item() == (4 if function is updated_twice else 2)


def test_no_copy_of_the_state_is_left():
    gm = aten_of(updated_once)
    assert gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    restore_mutation(gm)
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
