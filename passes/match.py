"""Find every attention of the graph and read its operands.

    scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m, ...)   →   Candidate(q, k, v, key_mask, ...)
    the same with is_causal=True                                              →   Rejection("causal attention", ...)
    flex_attention(q, k, v, ...)                                              →   Rejection("flex_attention ...", ...)

What is declined here cannot be sparse whatever its length and rows; lengths and rows are the business of ``classify``.
The graph is only read.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from svg2_compile.kernels.key_mask import key_mask_reference
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.decide_by_size import decide
from svg2_compile.passes.dynamo_graphs import OpOverload, OpOverloadPacket, example_of, name_of_op, name_of_packet
from svg2_compile.passes.nodes import (
    SdpaArguments,
    argument,
    dtype_of,
    first_argument,
    is_sdpa,
    module_path,
    same_size,
    sdpa_arguments,
    shape_of,
    target_name,
    tensor_of,
)
from svg2_compile.passes.read_cache import UNKNOWN_ROWS, trace_values
from svg2_compile.passes.read_mask import before_new_axes, has_no_effect, is_given, key_mask_of
from svg2_compile.passes.records import Rejection, Size, size_hint, told
from svg2_compile.passes.trace_axis import asking_piece

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FOREIGN_ATTENTION = re.compile(
    r"flex_attention|flash_?attn|flash_attention|sage_?att|_attention_forward|efficient_attention|xformers|attn_varlen"
)
KEY_MASK_HINT = "drop the mask if it hides nothing, or give one of shape (batch, 1, 1, keys) that hides keys"
BEFORE_DECOMPOSITION = "sparsify an exported program before run_decompositions()"


@dataclass(frozen=True, slots=True)
class Candidate:
    """An attention whose form is supported. Axes: B batch, H query heads, G key heads, S sequence, D head dim."""

    index: int
    node: Node
    path: str
    query: Node
    key: Node
    value: Node
    key_mask: Node | None
    """Boolean, (B or 1, 1, 1, S), True where a key may be attended to; or one of any values, where it is checked."""
    scale: float
    is_mask_checked: bool = False
    """Only its values tell whether the mask hides keys alike for all queries."""

    @property
    def sequence(self) -> Size:
        """Queries."""
        shape = shape_of(self.query)
        assert shape is not None
        return shape[2]

    @property
    def keys(self) -> Size:
        """Keys: as many as queries, or more where the queries are but some of the rows."""
        shape = shape_of(self.key)
        assert shape is not None
        return shape[2]


def match(gm: GraphModule, config: SparseConfig) -> list[Candidate | Rejection]:
    """Return one entry per attention in program order: a candidate, or the reason why it stays dense."""
    found: list[Candidate | Rejection] = []
    ordinal = 0
    for node in gm.graph.nodes:
        if is_sdpa(node):
            found.append(_read(ordinal, node, config.min_tokens))
            ordinal += 1
        elif node.target is torch.ops.aten._softmax.default:
            found += _read_decomposed(node, config.min_tokens)
        elif node.op == "call_function" and FOREIGN_ATTENTION.search(_full_name(node)):
            found.append(_read_foreign(node, config.min_tokens))
    return found


def _full_name(node: Node) -> str:
    """Return the name of the called function, of an operator with its namespace: kernels name their ops ``fwd``."""
    if isinstance(node.target, OpOverloadPacket):
        return name_of_packet(node.target)
    return name_of_op(node.target) if isinstance(node.target, OpOverload) else target_name(node)


def _read_foreign(node: Node, min_tokens: int) -> Rejection:
    """Decline an attention that is not SDPA; one that would stay dense anyway needs no advice."""
    name, path = _full_name(node), module_path(node)
    hint = "only scaled_dot_product_attention is rewritten; "
    if name != "multi_head_attention_forward":
        hint += 'call model.set_attention_backend("native")'
        if name.startswith("aten::"):
            hint += f", and {BEFORE_DECOMPOSITION}"
        return Rejection(node.name, path, f"runs {name}, not SDPA", hint)
    queries, keys = (shape_of(argument(node, position, word)) for position, word in enumerate(("query", "key")))
    tokens = size_hint(queries[0]) if queries else None
    if queries and keys and not same_size(queries[0], keys[0]):
        return Rejection(
            node.name, path, f"cross-attention: {told(queries[0])} queries, {told(keys[0])} keys", "", True
        )
    if tokens is not None and queries and decide(lambda n: n < min_tokens, queries[0]):
        return Rejection(node.name, path, f"short: {tokens} tokens", "", True)
    return Rejection(
        node.name, path, f"runs {name}, not SDPA", hint + "call it in place of torch.nn.MultiheadAttention"
    )


def _read_decomposed(softmax: Node, min_tokens: int) -> list[Rejection]:
    """Decline what ``run_decompositions`` leaves of a long self-attention; of any other softmax, say nothing."""
    shape = shape_of(first_argument(softmax)) or ()
    tokens = size_hint(shape[-1]) if shape else None
    if len(shape) < 2 or not same_size(shape[-2], shape[-1]):
        return []
    if tokens is not None and decide(lambda n: n < min_tokens, shape[-1]):
        return []
    hint = f"{BEFORE_DECOMPOSITION}: give torch.export.export(...).module()"
    return [Rejection(softmax.name, module_path(softmax), "decomposed already, into aten::_softmax", hint)]


def _read(index: int, node: Node, min_tokens: int) -> Candidate | Rejection:
    call = sdpa_arguments(node)
    path = module_path(node)

    def decline(reason: str, hint: str = "", by_design: bool = False) -> Rejection:
        return Rejection(node.name, path, reason, hint, by_design)

    tensors = [tensor_of(each) for each in (call.query, call.key, call.value)]
    if any(each is None for each in tensors):
        return decline("its operands have no known shape", "please report this model")
    query, key, value = (each for each in tensors if each is not None)
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        ranks = ", ".join(f"{each.dim()}-D" for each in (query, key, value))
        hint = "give all three the same leading axes, as (batch, heads, tokens, head dim)"
        return decline(f"expected 4-D (batch, heads, tokens, head dim) operands, got {ranks}", hint)
    tokens = size_hint(query.shape[2])
    if not same_size(query.shape[2], key.shape[2]):
        keys = size_hint(key.shape[2])
        if tokens is None and keys is None:
            reason = f"its lengths are known only at run time: {query.shape[2]} queries, {key.shape[2]} keys"
            return decline(reason, "compile without fullgraph=True, or block by block, so that lengths are numbers")
        lengths = query.shape[2], key.shape[2]
        is_known = tokens is not None and keys is not None
        if is_known and decide(lambda n, k: n < min_tokens and n < k, *lengths) and _asks_its_own(call, node):
            reason = f"short: {told(query.shape[2])} queries among {told(key.shape[2])} keys"
            return decline(reason, f"lower min_tokens={min_tokens}", True)
        if not is_known or not decide(lambda n, k: min_tokens <= n < k, *lengths):
            reason = f"cross-attention: {told(query.shape[2])} queries, {told(key.shape[2])} keys"
            return decline(reason, by_design=True)
    if tokens is not None and decide(lambda n: n < min_tokens, query.shape[2]):
        return decline(f"short: {tokens} tokens", f"lower min_tokens={min_tokens} to include it", by_design=True)
    output = tensor_of(node)
    # under autocast the operands may differ from each other, and from the dtype that attention is computed in
    dtype = query.dtype if output is None else output.dtype
    if dtype not in SUPPORTED_DTYPES:
        name = str(dtype).removeprefix("torch.")
        return decline(f"{name} attention", "run the model in float32, float16 or bfloat16")
    if call.is_causal is not False:
        return decline("causal attention", by_design=True)
    if isinstance(call.dropout_p, Node) or call.dropout_p != 0:
        return decline("attention dropout is active", "call model.eval()")
    if any(each.requires_grad for each in (query, key, value)) and torch.is_grad_enabled():
        return decline("gradients are required", "run under torch.no_grad() or torch.inference_mode()")
    if not all(isinstance(each, int) for each in (query.shape[1], key.shape[1], query.shape[3], value.shape[3])):
        return decline("heads or head dim are dynamic", "compile with dynamic=None, so that only lengths are dynamic")
    if not same_size(query.shape[3], value.shape[3]):
        return decline(f"keys have head dim {key.shape[3]}, values {value.shape[3]}")
    grouped = not same_size(query.shape[1], key.shape[1])
    if grouped and (not call.enable_gqa or query.shape[1] % key.shape[1] != 0):
        return decline(f"{query.shape[1]} query heads over {key.shape[1]} key heads without enable_gqa")
    batch = query.shape[0]
    alike = ((key.shape[0], batch), (value.shape[0], batch), (value.shape[1], key.shape[1]))
    if not all(same_size(*each) for each in alike):
        return decline("operands broadcast over batch or heads", "expand keys and values before the attention")
    return _with_mask(index, node, path, call)


def _asks_its_own(call: SdpaArguments, node: Node) -> bool:
    """Say whether the rows that ask are some of the keys: a chunk over a cache, the video over text and video."""
    keys = trace_values(call.value, 2, node)
    return keys.pieces[0].kind == UNKNOWN_ROWS or asking_piece(call.query, 2, keys) is not None


def _with_mask(index: int, node: Node, path: str, call: SdpaArguments) -> Candidate | Rejection:
    query, key, value = call.query, call.key, call.value
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    key_mask, is_checked = None, False
    if call.attn_mask is not None and not has_no_effect(call.attn_mask, node):
        key_mask = key_mask_of(call.attn_mask, key)
        if key_mask is not None:
            is_checked = dtype_of(key_mask) is not torch.bool
        elif _covers(call.attn_mask, query, key) and is_given(call.attn_mask, node):
            key_mask, is_checked = call.attn_mask, True
        if key_mask is None or (is_checked and _does_more(key_mask)):
            return Rejection(node.name, path, f"attn_mask is {_describe(call.attn_mask)}", KEY_MASK_HINT)
    shape = shape_of(query)
    assert shape is not None
    scale = call.scale if call.scale is not None else 1.0 / math.sqrt(int(shape[3]))
    if isinstance(scale, Node):
        return Rejection(node.name, path, "scale is computed at run time", "pass scale as a number")
    assert isinstance(scale, int | float)
    return Candidate(index, node, path, query, key, value, key_mask, float(scale), is_checked)


def _does_more(mask: Node) -> bool:
    """Say whether ``mask`` is an input that did more than to hide keys when the graph was compiled."""
    source, shape = before_new_axes(mask), shape_of(mask)
    example = example_of(source) if source.op == "placeholder" else None
    if example is None or shape is None or not all(isinstance(size, int) for size in shape):
        return False
    _, is_key_mask = key_mask_reference(example.reshape([int(size) for size in shape]))
    return not bool(is_key_mask)


def _describe(mask: object) -> str:
    tensor = tensor_of(mask)
    if tensor is None:
        return "not a tensor of the graph"
    shape = "×".join(str(size) for size in tensor.shape)
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape}, not a key mask"


def _covers(mask: Node, query: Node, key: Node) -> bool:
    """True for a mask of four axes, of bool or to be added, that has a column for every key."""
    tensor, shape, queries, keys = tensor_of(mask), shape_of(mask), shape_of(query), shape_of(key)
    if tensor is None or shape is None or queries is None or keys is None or len(shape) != 4:
        return False
    if tensor.dtype is not torch.bool and not tensor.is_floating_point():
        return False
    rows = zip(shape[:3], queries[:3])
    return same_size(shape[3], keys[2]) and all(same_size(mine, 1) or same_size(mine, own) for mine, own in rows)
