"""Let the attention op gather its queries and scatter its results itself.

    q'   = permute_tokens(q, order)
    o, _ = block_sparse_attention(q', ..., None, scale)    →    o, _ = block_sparse_attention(q, ..., order, scale)
    o    = unpermute_tokens(o, order)

Saves writing and reading the queries and the results once each. Keys and values stay permuted: an attention reads
them many times. Left alone where anything else sees the permuted queries or results, or the orders differ.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from svg2_compile.passes.nodes import emit

Q, Q_ORDER = 0, 9
"""Where the op takes the queries and their order."""


def fuse(gm: GraphModule) -> int:
    """Fold what can be folded, in place, and return how many attentions were. Runs inside the graph's fake mode."""
    attentions = gm.graph.find_nodes(op="call_function", target=torch.ops.svg2.block_sparse_attention.default)
    folded = [attention for attention in attentions if _fold(gm, attention)]
    if folded:
        gm.graph.lint()
        gm.recompile()
    return len(folded)


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
