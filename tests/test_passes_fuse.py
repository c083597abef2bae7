"""Permutations of queries and results fold into the attention, and only where nothing else sees them."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.work_list import kept_runs_reference
from svg2_compile.passes.fuse import Q_ORDER, fuse
from svg2_compile.passes.nodes import target_name
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
