"""Fold what the rewritten graph does in steps into ops that do it in one.

Clustering, sorting and permuting become one op, which launches for queries and keys together, sorts once, and writes
the keys where it has read them anyway:

    q_labels = kmeans_(q, q_centroids, q_calls, ...)
    q_order, q_sizes = sort_labels(q_labels, ...)          q_order, q_sizes, k_sizes, k', v' = cluster_tokens_(
    k_labels = kmeans_(k, k_centroids, k_calls, ...)   →       q, k, v, q_centroids, k_centroids, q_calls, k_calls, ...)
    k_order, k_sizes = sort_labels(k_labels, ...)
    k' = permute_tokens(k, k_order)
    v' = permute_tokens(v, k_order)

It stands where the first of them stood, so whoever reads the centroids reads them as before. Left alone where anything
else sees the labels or the order of the keys, stands between the two ``kmeans_``, or writes keys or values before they
are permuted; where the values are not yet computed; and where the op does not take the tensors.

The attention op gathers its queries and scatters its results itself:

    q'   = permute_tokens(q, order)
    o, _ = block_sparse_attention(q', ..., None, scale)    →    o, _ = block_sparse_attention(q, ..., order, scale)
    o    = unpermute_tokens(o, order)

Saves writing and reading the queries and the results once each. Keys and values stay permuted: an attention reads
them many times. Left alone where anything else sees the permuted queries or results, or the orders differ.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from svg2_compile.passes.nodes import emit, is_written, same_size, tensor_of

Q, Q_ORDER = 0, 9
"""Where the op takes the queries and their order."""


def fuse(gm: GraphModule) -> int:
    """Fold what can be folded, in place, and return how many ops were. Runs inside the graph's fake mode."""
    attentions = gm.graph.find_nodes(op="call_function", target=torch.ops.svg2.block_sparse_attention.default)
    folded = sum(_fold(gm, attention) for attention in attentions) + _fold_clusterings(gm)
    if folded:
        gm.graph.lint()
        gm.recompile()
    return folded


def _fold(gm: GraphModule, attention: Node) -> bool:
    queries, restored = attention.args[Q], _only_restored(attention)
    if restored is None or attention.args[Q_ORDER] is not None or not isinstance(queries, Node):
        return False
    order = restored.args[1]
    is_permuted = queries.target is torch.ops.svg2.permute_tokens.default and queries.args[1] is order
    if not is_permuted or len(queries.users) > 1 or attention.args.count(queries) > 1:
        return False
    arguments = list(attention.args)
    arguments[Q], arguments[Q_ORDER] = queries.args[0], order
    results = restored.args[0]
    assert isinstance(results, Node)
    with gm.graph.inserting_before(attention):
        gathering = emit(gm.graph, attention.target, *arguments, like=attention)  # type: ignore[arg-type]
        output = emit(gm.graph, operator.getitem, gathering, 0, like=attention)
    restored.replace_all_uses_with(output)
    for node in (restored, results, attention, queries):
        gm.graph.erase_node(node)
    return True


def _only_restored(attention: Node) -> Node | None:
    """Return the inverse permutation that is all the graph does with the attention, None where it does more."""
    if [(user.target, user.args[1:]) for user in attention.users] != [(operator.getitem, (0,))]:
        return None
    users = list(next(iter(attention.users)).users)
    is_restored = len(users) == 1 and users[0].target is torch.ops.svg2.unpermute_tokens.default
    return users[0] if is_restored else None


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Tokens that are clustered and whose labels are sorted, as the graph has it."""

    kmeans: Node
    sort: Node
    order: Node
    sizes: Node

    @property
    def tokens(self) -> Node:
        tokens = self.kmeans.args[0]
        assert isinstance(tokens, Node)
        return tokens

    @property
    def state(self) -> tuple[Node, Node]:
        _, centroids, calls = self.kmeans.all_input_nodes
        return centroids, calls

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.kmeans, self.sort, self.order, self.sizes


def _fold_clusterings(gm: GraphModule) -> int:
    """Fold pairs of neighbours, and return how many were."""
    kmeans = gm.graph.find_nodes(op="call_function", target=torch.ops.svg2.kmeans_.default)
    folded, q = 0, None
    for k in map(_sorted, kmeans):
        if q is not None and k is not None and (permuted := _permuted(q, k)):
            _cluster_together(gm, q, k, *permuted)
            folded, k = folded + 1, None
        q = k
    return folded


def _sorted(kmeans: Node) -> _Sorted | None:
    """Return what becomes of the labels, None where that is anything but being sorted once."""
    users = list(kmeans.users)
    if len(users) != 1 or users[0].target is not torch.ops.svg2.sort_labels.default:
        return None
    sort = users[0]
    parts = {user.args[1]: user for user in sort.users if user.target is operator.getitem}
    centroids = tensor_of(kmeans.args[1])
    is_whole = len(kmeans.all_input_nodes) == 3 and len(sort.users) == len(parts) and set(parts) == {0, 1}
    if not is_whole or centroids is None or sort.args[1] != centroids.shape[2]:
        return None
    return _Sorted(kmeans, sort, parts[0], parts[1])


def _permuted(q: _Sorted, k: _Sorted) -> tuple[Node, Node] | None:
    """Return the permuted keys and values, None where ``cluster_tokens_`` cannot stand for all of it."""
    permuted = list(k.order.users)
    permute = torch.ops.svg2.permute_tokens.default
    if len(permuted) != 2 or any(node.target is not permute or node.args[1] is not k.order for node in permuted):
        return None
    if permuted[0].args[0] is not k.tokens:
        permuted.reverse()
    keys, values = permuted
    v = values.args[0]
    if keys.args[0] is not k.tokens or not isinstance(v, Node) or not v < q.kmeans or not k.tokens < q.kmeans:
        return None
    if (
        q.kmeans.args[3:] != k.kmeans.args[3:]
        or len({*q.state, *k.state}) != 4
        or not _are_alike(q.tokens, k.tokens, v)
    ):
        return None
    between, own = q.kmeans.next, (*q.nodes, *k.nodes)
    while between is not k.kmeans:
        if between not in own:
            return None
        between = between.next
    if is_written(k.tokens, q.kmeans, keys, own) or is_written(v, q.kmeans, values, own):
        return None
    return keys, values


def _are_alike(q: Node, k: Node, v: Node) -> bool:
    """Say whether ``cluster_tokens_`` takes these together."""
    tensors = tensor_of(q), tensor_of(k), tensor_of(v)
    if any(each is None or each.dim() != 4 for each in tensors):
        return False
    (q_like, k_like, v_like) = (each for each in tensors if each is not None)
    return (
        q_like.dtype is k_like.dtype is v_like.dtype
        and all(same_size(*sizes) for sizes in zip(k_like.shape, v_like.shape))
        and all(same_size(q_like.shape[axis], k_like.shape[axis]) for axis in (0, 3))
    )


def _cluster_together(gm: GraphModule, q: _Sorted, k: _Sorted, keys: Node, values: Node) -> None:
    """Replace the nodes of both sides by one op and its results."""
    (q_centroids, q_calls), (k_centroids, k_calls) = q.state, k.state
    tokens = (q.tokens, k.tokens, values.args[0])
    state = (q_centroids, k_centroids, q_calls, k_calls)
    with gm.graph.inserting_before(q.kmeans):
        cluster = torch.ops.svg2.cluster_tokens_.default
        clustered = emit(gm.graph, cluster, *tokens, *state, *q.kmeans.args[3:], like=q.kmeans)
        for index, old in enumerate((q.order, q.sizes, k.sizes, keys, values)):
            old.replace_all_uses_with(emit(gm.graph, operator.getitem, clustered, index, like=q.kmeans))
    for node in (keys, values, *reversed(k.nodes), *reversed(q.nodes)):
        gm.graph.erase_node(node)
