"""Turn hand-written softmax attention into scaled_dot_product_attention, in place.

Before::

    transpose = k.transpose(-1, -2)
    matmul = q @ transpose
    mul = matmul * 0.125
    masked_fill = mul.masked_fill(mask, -inf)
    softmax = torch.nn.functional.softmax(masked_fill, dim=-1)
    output = softmax @ v

After::

    logical_not = torch.ops.aten.logical_not.default(mask)
    scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention(
        q, k, v, attn_mask=logical_not, scale=0.125)
    output = torch.ops.aten.contiguous.default(scaled_dot_product_attention)

A softmax, whole or written out, is the anchor. Upwards, casts, scales, masks and what is the same for all keys are read
off until the product of queries and keys; downwards, casts, permutations and inactive dropout until the product with
the values. Every product is read as an einsum, so all spellings are one case. What was made of the scores and is read
by nobody goes with them. The output keeps dtype and layout and equals the old one to rounding, except in rows whose
keys are all masked: zeros where the hand-written form gave NaN.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from svg2_compile.passes.decide_by_size import decide
from svg2_compile.passes.hand_written import HandWritten, Obstacle
from svg2_compile.passes.nodes import module_path, shape_of
from svg2_compile.passes.read_attention import read_attention
from svg2_compile.passes.records import Rejection, size_hint
from svg2_compile.passes.write_attention import write_attention

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CanonicalizeResult:
    """What became an SDPA node, and what looked like attention but did not."""

    rewritten: tuple[str, ...]
    """Names of the new SDPA nodes, in program order."""

    declined: tuple[Rejection, ...]


def canonicalize(gm: GraphModule, min_tokens: int = 0) -> CanonicalizeResult:
    """Turn hand-written softmax attention in ``gm`` into SDPA nodes, in place.

    Args:
        gm: a Dynamo-level graph whose nodes carry values in their meta.
        min_tokens: sequences below it are dense by design, so declining them is nothing to complain about.

    Returns:
        The names of the new nodes, and a rejection for each attention that stays as it is written.

    Promises:
        Twice is once; a graph without hand-written attention is not touched; no guard is added, except on whether what
        is declined is short; values are true.
    """
    plans: list[HandWritten] = []
    declined: list[Rejection] = []
    for node in gm.graph.nodes:
        match read_attention(node):
            case HandWritten() as plan:
                plans.append(plan)
            case Obstacle(reason, hint):
                log.debug("%s stays hand-written: %s", node.name, reason)
                by_design = _is_short(node, min_tokens)
                declined.append(Rejection(node.name, module_path(node), reason, hint, by_design))
    # Backwards: an earlier output may be an operand of a later attention, whose plan must not hold a replaced node.
    rewritten = [write_attention(gm.graph, plan) for plan in reversed(plans)]
    if rewritten:
        gm.graph.lint()
        gm.recompile()
    return CanonicalizeResult(tuple(reversed(rewritten)), tuple(declined))


def _is_short(softmax: Node, min_tokens: int) -> bool:
    """Say whether the softmax is over fewer than ``min_tokens`` keys, or has fewer queries."""
    sizes = (shape_of(softmax) or ())[-2:]
    return any(size_hint(size) is not None and decide(lambda n: n < min_tokens, size) for size in sizes)
