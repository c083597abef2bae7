"""Check that a rewritten graph still means what its metadata says; changes nothing.

Checked: the graph is well formed; the outputs have the shape, dtype and device they had; exactly the accepted
attentions are gone; each sparse attention restores the order of its queries, itself or by one inverse permutation; no
clustering state is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from svg2_compile.passes.dynamo_graphs import OpOverload, schema_of
from svg2_compile.passes.errors import InternalError
from svg2_compile.passes.nodes import is_sdpa, tensor_of
from svg2_compile.passes.records import AttentionSite

Q_ORDER = 9
"""Where the sparse attention takes the order of its queries."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What ``verify`` compares a rewritten graph with."""

    attentions: int
    outputs: tuple[torch.Tensor | None, ...]


def snapshot(gm: GraphModule) -> Snapshot:
    """Record the graph's attentions and outputs before a rewrite."""
    return Snapshot(_count_attentions(gm), tuple(tensor_of(node) for node in _outputs(gm)))


def verify(gm: GraphModule, before: Snapshot, sites: Sequence[AttentionSite]) -> None:
    """Raise when ``gm`` cannot be the graph of ``before`` with exactly ``sites`` rewritten.

    Raises:
        InternalError: saying what differs.
    """
    gm.graph.lint()
    gone = before.attentions - _count_attentions(gm)
    sparse = _count(gm, torch.ops.svg2.block_sparse_attention.default)
    restored = _count(gm, torch.ops.svg2.unpermute_tokens.default) + _count_restoring(gm)
    if not len(sites) == gone == sparse == restored:
        raise InternalError(
            f"verify: {len(sites)} sites accepted, {gone} attentions gone, {sparse} sparse attentions entered, "
            f"{restored} inverse permutations"
        )
    _check_state(gm)
    verify_outputs(gm, before)


def verify_outputs(gm: GraphModule, before: Snapshot) -> None:
    """Raise when the outputs of ``gm`` are not what they were.

    Raises:
        InternalError: saying what differs.
    """
    outputs = [tensor_of(node) for node in _outputs(gm)]
    if len(outputs) != len(before.outputs):
        raise InternalError(f"verify: {len(before.outputs)} outputs became {len(outputs)}")
    for position, (old, new) in enumerate(zip(before.outputs, outputs)):
        if _describe(old) != _describe(new):
            raise InternalError(f"verify: output {position} was {_describe(old)} and is now {_describe(new)}")


def _count(gm: GraphModule, target: object) -> int:
    return sum(1 for node in gm.graph.nodes if node.target is target)


def _count_restoring(gm: GraphModule) -> int:
    """Return how many sparse attentions take the order of their queries and undo it."""
    attentions = gm.graph.find_nodes(op="call_function", target=torch.ops.svg2.block_sparse_attention.default)
    return sum(1 for node in attentions if node.args[Q_ORDER] is not None)


def _count_attentions(gm: GraphModule) -> int:
    return sum(1 for node in gm.graph.nodes if is_sdpa(node))


def _outputs(gm: GraphModule) -> list[Node]:
    return list(gm.graph.find_nodes(op="output")[0].all_input_nodes)


def _describe(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "no tensor"
    return f"{tensor.dtype} ({', '.join(str(size) for size in tensor.shape)}) on {tensor.device}"


def _check_state(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            writers = sum(1 for user in node.users if _writes(user, node))
            if writers > 1:
                raise InternalError(f"verify: the state {node.name} is updated by {writers} ops")


def _writes(user: Node, given: Node) -> bool:
    """Say whether ``user`` is one of our ops and updates ``given`` in place."""
    if not isinstance(user.target, OpOverload) or user.target.namespace != "svg2":
        return False
    declared = schema_of(user.target).arguments
    return any(argument is given and each.is_write for argument, each in zip(user.args, declared))
