"""Undo functionalization where it copied the tensors that our ops update.

    new = auto_functionalized_v2(svg2.kmeans_, x=x, _all_bases=[state])    →    labels = svg2.kmeans_(x, state)
    labels, updated = new[0], new[1]                                            ... every reader of updated reads state
    copy_(state, updated)

The result is the same; what goes is a copy of every state tensor before the op and one after it. An update of anything
but an input of the graph, or of an input that is read again for its old value, stays as it is, which is right too.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from svg2_compile.passes.dynamo_graphs import AUTO_FUNCTIONALIZED, bases_of, place_among_bases, schema_of


def restore_mutation(gm: GraphModule) -> int:
    """Let ops update the graph's inputs in place again; return how many ops do."""
    restored = 0
    for node in gm.graph.find_nodes(op="call_function", target=AUTO_FUNCTIONALIZED):
        arguments = _plain_arguments(node)
        if arguments is not None and all(_is_last_word_on(node, position) for position in range(len(_bases(node)))):
            _restore(gm, node, arguments)
            restored += 1
    gm.recompile()
    return restored


def _bases(node: Node) -> list[Node]:
    return list(bases_of(node))


def _returns(node: Node) -> int:
    """Return where the updated tensors begin among the results; an op without results still takes one place."""
    return max(1, len(schema_of(node.args[0]).returns))  # type: ignore[arg-type]


def _plain_arguments(node: Node) -> list[Argument] | None:
    """Return the arguments of the op in order; None where one of them is a view of what the graph holds."""
    arguments: list[Argument] = []
    taken = 1  # the bases themselves
    for declared in schema_of(node.args[0]).arguments:  # type: ignore[arg-type]
        index = place_among_bases(node, declared.name)
        if isinstance(index, int):
            arguments.append(_bases(node)[index])
        elif declared.name in node.kwargs:
            arguments.append(node.kwargs[declared.name])
        else:
            return None
        taken += 1
    return arguments if taken == len(node.kwargs) else None


def _updated(node: Node, position: int) -> list[Node]:
    """Return the readers of one updated tensor."""
    wanted = _returns(node) + position
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == wanted]


def _is_last_word_on(node: Node, position: int) -> bool:
    """Say whether the base is an input that afterwards is only written, once, with what ``node`` made of it."""
    base = _bases(node)[position]
    later = [user for user in base.users if user is not node and node < user]
    return base.op == "placeholder" and len(later) == 1 and _writes(later[0], base, _updated(node, position))


def _writes(user: Node, base: Node, sources: list[Node]) -> bool:
    return user.target is torch.ops.aten.copy_.default and user.args[0] is base and user.args[1] in sources


def _restore(gm: GraphModule, node: Node, arguments: list[Argument]) -> None:
    op = node.args[0]
    with gm.graph.inserting_before(node):
        call = gm.graph.call_function(op, tuple(arguments))  # type: ignore[arg-type]
    call.meta |= node.meta
    count = len(schema_of(op).returns)  # type: ignore[arg-type]
    call.meta["val"] = node.meta["val"][:count] if count > 1 else node.meta["val"][0]
    for position, base in enumerate(_bases(node)):
        for updated in _updated(node, position):
            for user in list(updated.users):
                if _writes(user, base, [updated]):
                    gm.graph.erase_node(user)
            updated.replace_all_uses_with(base)
            gm.graph.erase_node(updated)
    for result in list(node.users):
        if count > 1:
            result.replace_input_with(node, call)
        else:
            result.replace_all_uses_with(call)
            gm.graph.erase_node(result)
    gm.graph.erase_node(node)
