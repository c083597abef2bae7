"""Permutations fold into the attention and clusterings into one op, and only where nothing else sees the parts."""

import operator

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.work_list import kept_runs_reference
from svg2_compile.passes.fuse import Q_ORDER, fuse
from svg2_compile.passes.nodes import emit, target_name
from svg2_compile.passes.sparsify import fake_mode_of

ops = torch.ops.svg2
HEADS, TOKENS, DIM, CLUSTERS = 2, 33, 16, 4


def inputs():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, TOKENS, DIM, generator=generator) for _ in range(3))
    order, other = (torch.rand(1, HEADS, TOKENS, generator=generator).argsort(-1).int() for _ in range(2))
    sizes = torch.tensor([10, 0, 15, 8], dtype=torch.int32).expand(1, HEADS, CLUSTERS).contiguous()
    keep = torch.rand(1, HEADS, CLUSTERS, CLUSTERS, generator=generator) < 0.6
    kept = kept_runs_reference(keep, sizes)
    return q, k, v, order, other, sizes, (kept.runs, kept.counts)


def attend(q, k, v, sizes, kept):
    return ops.block_sparse_attention(q, k, v, sizes, *kept, None, None, None, None, 0.2)


def plain(q, k, v, order, other, sizes, kept):
    return (ops.unpermute_tokens(attend(ops.permute_tokens(q, order), k, v, sizes, kept)[0], order) + 1,)


def restored_otherwise(q, k, v, order, other, sizes, kept):
    return (ops.unpermute_tokens(attend(ops.permute_tokens(q, order), k, v, sizes, kept)[0], other),)


def log_sum_exp_is_read(q, k, v, order, other, sizes, kept):
    out, lse = attend(ops.permute_tokens(q, order), k, v, sizes, kept)
    return ops.unpermute_tokens(out, order), lse


def result_is_read(q, k, v, order, other, sizes, kept):
    out, _ = attend(ops.permute_tokens(q, order), k, v, sizes, kept)
    return ops.unpermute_tokens(out, order), out * 2


def result_is_not_restored(q, k, v, order, other, sizes, kept):
    return (attend(ops.permute_tokens(q, order), k, v, sizes, kept)[0],)


def permuted_queries_are_read(q, k, v, order, other, sizes, kept):
    permuted = ops.permute_tokens(q, order)
    return ops.unpermute_tokens(attend(permuted, k, v, sizes, kept)[0], order), permuted.sum()


def permuted_queries_are_keys_too(q, k, v, order, other, sizes, kept):
    permuted = ops.permute_tokens(q, order)
    return (ops.unpermute_tokens(attend(permuted, permuted, v, sizes, kept)[0], order),)


def queries_are_not_permuted(q, k, v, order, other, sizes, kept):
    return (ops.unpermute_tokens(attend(q, k, v, sizes, kept)[0], order),)


LEFT_ALONE = [
    restored_otherwise,
    log_sum_exp_is_read,
    result_is_read,
    result_is_not_restored,
    permuted_queries_are_read,
    permuted_queries_are_keys_too,
    queries_are_not_permuted,
]


def traced(function):
    gm = make_fx(function, tracing_mode="fake")(*inputs())
    gm.graph.eliminate_dead_code()  # make_fx unpacks results that nobody asked for
    gm.recompile()
    return gm


def run(gm):
    with fake_mode_of(gm):
        return fuse(gm)


def names(gm):
    return [target_name(node).split(".")[0] for node in gm.graph.nodes if node.op == "call_function"]


def test_both_permutations_of_the_queries_fold_into_the_attention():
    gm = traced(plain)
    expected = gm(*inputs())
    assert run(gm) == 1
    assert "permute_tokens" not in names(gm) and "unpermute_tokens" not in names(gm)
    (attention,) = gm.graph.find_nodes(op="call_function", target=ops.block_sparse_attention.default)
    assert [attention.args[0].name, attention.args[Q_ORDER].name] == ["q_1", "order_1"]
    assert torch.equal(gm(*inputs())[0], expected[0])


def test_twice_is_once():
    gm = traced(plain)
    run(gm)
    code = gm.code
    assert run(gm) == 0
    assert gm.code == code


@pytest.mark.parametrize("function", LEFT_ALONE)
def test_what_something_else_sees_is_left_alone(function):
    gm = traced(function)
    code = gm.code
    assert run(gm) == 0
    assert gm.code == code


Q_CLUSTERS, K_CLUSTERS = 4, 6


def cluster_inputs(k_tokens=TOKENS + 5):
    """Queries, keys, values, and the state of a first call."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, n, DIM, generator=generator) for n in (TOKENS, k_tokens, k_tokens))
    q_centroids, k_centroids = (torch.zeros(1, HEADS, clusters, DIM) for clusters in (Q_CLUSTERS, K_CLUSTERS))
    return [q, k, v, q_centroids, k_centroids, *(torch.zeros(1, dtype=torch.int32) for _ in "qk")]


def clustered(q, k, v, q_centroids, k_centroids, q_calls, k_calls):
    """What the graph of a site does up to the attention, with the centroids read in the end."""
    q_order, q_sizes = ops.sort_labels(ops.kmeans_(q, q_centroids, q_calls, 3, 2, 0), Q_CLUSTERS)
    k_order, k_sizes = ops.sort_labels(ops.kmeans_(k, k_centroids, k_calls, 3, 2, 0), K_CLUSTERS)
    means = q_centroids.sum() + k_centroids.sum()
    return q_order, q_sizes, k_sizes, ops.permute_tokens(k, k_order), ops.permute_tokens(v, k_order), means


def twice(q, k, v, *state):
    """Two sites after one another; the second one sees what the first one made."""
    first = clustered(q, k, v, *(each.clone() for each in state))
    return *first, *clustered(q, first[3], first[4], *state)


def cluster_graph():
    """Return the traced graph and the nodes in it: k-means and sort of queries and keys, permuted keys and values."""
    gm = traced_clustering(clustered)
    kmeans = gm.graph.find_nodes(op="call_function", target=ops.kmeans_.default)
    sorts = gm.graph.find_nodes(op="call_function", target=ops.sort_labels.default)
    permutes = gm.graph.find_nodes(op="call_function", target=ops.permute_tokens.default)
    return gm, kmeans, sorts, permutes


def traced_clustering(function, inputs=None):
    gm = make_fx(function, tracing_mode="fake")(*(inputs or cluster_inputs()))
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


@pytest.mark.parametrize("function", [clustered, twice])
def test_clustering_queries_and_keys_becomes_one_op(function):
    gm = traced_clustering(function, cluster_inputs(TOKENS))
    inputs, expected_inputs = cluster_inputs(TOKENS), cluster_inputs(TOKENS)
    expected = gm(*expected_inputs)
    sites = names(gm).count("kmeans_") // 2
    assert run(gm) == sites
    assert names(gm).count("cluster_tokens_") == sites
    assert not {"kmeans_", "sort_labels", "permute_tokens"} & set(names(gm))
    for first, second in zip(gm(*inputs), expected, strict=True):
        assert torch.equal(first, second)
    for first, second in zip(inputs, expected_inputs, strict=True):
        assert torch.equal(first, second)
    for node in gm.graph.find_nodes(op="call_function", target=operator.getitem):
        assert isinstance(node.meta["val"], torch.Tensor)


def test_clustering_twice_is_once():
    gm = traced_clustering(clustered)
    run(gm)
    code = gm.code
    assert run(gm) == 0
    assert gm.code == code


def append_output(gm, node):
    (output,) = gm.graph.find_nodes(op="output")
    output.args = ((*output.args[0], node),)


def labels_are_read(gm, kmeans, sorts, permutes):
    append_output(gm, kmeans[1])


def order_of_the_keys_is_read(gm, kmeans, sorts, permutes):
    append_output(gm, permutes[0].args[1])


def keys_are_sorted_by_other_labels(gm, kmeans, sorts, permutes):
    permutes[0].update_arg(1, permutes[1].args[0])


def values_are_permuted_twice(gm, kmeans, sorts, permutes):
    permutes[0].update_arg(0, permutes[1].args[0])


def something_else_is_permuted(gm, kmeans, sorts, permutes):
    with gm.graph.inserting_before(permutes[0]):
        append_output(gm, emit(gm.graph, ops.permute_tokens.default, permutes[0].args[0], permutes[0].args[1]))


def more_clusters_are_sorted(gm, kmeans, sorts, permutes):
    sorts[1].update_arg(1, K_CLUSTERS + 1)


def iterations_differ(gm, kmeans, sorts, permutes):
    kmeans[1].update_arg(3, 4)


def seeds_differ(gm, kmeans, sorts, permutes):
    kmeans[0].update_arg(5, 1)


def calls_are_counted_together(gm, kmeans, sorts, permutes):
    kmeans[1].update_arg(2, kmeans[0].args[2])


def something_reads_the_centroids_in_between(gm, kmeans, sorts, permutes):
    with gm.graph.inserting_before(kmeans[1]):
        append_output(gm, emit(gm.graph, torch.ops.aten.sum.default, kmeans[1].args[1]))


def values_are_computed_later(gm, kmeans, sorts, permutes):
    with gm.graph.inserting_before(permutes[1]):
        permutes[1].update_arg(0, emit(gm.graph, torch.ops.aten.neg.default, permutes[1].args[0]))


def keys_are_written_before_they_are_permuted(gm, kmeans, sorts, permutes):
    with gm.graph.inserting_before(permutes[0]):
        emit(gm.graph, torch.ops.aten.neg_.default, permutes[0].args[0])


def values_are_written_before_they_are_permuted(gm, kmeans, sorts, permutes):
    with gm.graph.inserting_before(permutes[1]):
        emit(gm.graph, torch.ops.aten.neg_.default, permutes[1].args[0])


def values_have_longer_rows(gm, kmeans, sorts, permutes):
    with gm.graph.inserting_before(kmeans[0]):
        v = permutes[1].args[0]
        permutes[1].update_arg(0, emit(gm.graph, torch.ops.aten.cat.default, [v, v], 3))


def values_have_another_dtype(gm, kmeans, sorts, permutes):
    with gm.graph.inserting_before(kmeans[0]):
        half = emit(gm.graph, torch.ops.aten.to.dtype, permutes[1].args[0], torch.float16)
        permutes[1].update_arg(0, half)


CHANGES = [
    labels_are_read,
    order_of_the_keys_is_read,
    keys_are_sorted_by_other_labels,
    values_are_permuted_twice,
    something_else_is_permuted,
    more_clusters_are_sorted,
    iterations_differ,
    seeds_differ,
    calls_are_counted_together,
    something_reads_the_centroids_in_between,
    values_are_computed_later,
    keys_are_written_before_they_are_permuted,
    values_are_written_before_they_are_permuted,
    values_have_longer_rows,
    values_have_another_dtype,
]


@pytest.mark.parametrize("change", CHANGES)
def test_clusterings_that_are_more_than_that_are_left_alone(change):
    gm, *nodes = cluster_graph()
    with fake_mode_of(gm):
        change(gm, *nodes)
    gm.recompile()
    code = gm.code
    assert run(gm) == 0
    assert gm.code == code
