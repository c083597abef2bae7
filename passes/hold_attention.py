"""Make every attention that is still dense opaque, so that no compiler takes it apart or takes it in.

    scaled_dot_product_attention(q, k, v, attn_mask=mask)   →   svg2.dense_attention(q, k, v, mask, 0.0, False, ...)

Runs on Dynamo's graph, before AOTAutograd would choose a kernel or write the softmax out.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch.fx import GraphModule

from svg2_compile.kernels import ops as _registers_the_ops  # noqa: F401
from svg2_compile.passes.nodes import SdpaArguments, emit, is_sdpa, sdpa_arguments, tensor_of, value_mode


def hold_attention(gm: GraphModule) -> int:
    """Replace the attentions of ``gm``, which must be ours to change; return how many."""
    attentions = [node for node in gm.graph.nodes if is_sdpa(node)]
    for node in attentions:
        given = sdpa_arguments(node)
        arguments = [getattr(given, field.name) for field in fields(SdpaArguments)]
        with gm.graph.inserting_before(node), value_mode(tensor_of(node)):
            held = emit(gm.graph, torch.ops.svg2.dense_attention.default, *arguments, like=node)
        node.replace_all_uses_with(held)
        gm.graph.erase_node(node)
    gm.recompile()
    return len(attentions)
