"""Every attention of a graph is found and read, or declined with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.match import Candidate, match
from svg2_compile.passes.nodes import shape_of
from svg2_compile.passes.records import Rejection

BATCH, HEADS, TOKENS, CHANNELS = 2, 3, 41, 8
FULL = (BATCH, HEADS, TOKENS, CHANNELS)
CONFIG = SparseConfig(min_tokens=40)
SDPA = torch._C._nn.scaled_dot_product_attention


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def operand(*shape: int | torch.SymInt, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def graph_of(
    q: Tensor | None, k: Tensor | None = None, v: Tensor | None = None, target: Any = SDPA, **options: Any
) -> GraphModule:
    """Return a graph that is one attention call; tensors among the options become inputs."""
    graph = Graph()

    def argument(name: str, value: Any) -> Any:
        if value is not None and not isinstance(value, Tensor):
            return value
        node = graph.placeholder(name)
        if value is not None:
            node.meta["example_value"] = value
        return node

    key, value = (q if x is None else x for x in (k, v))
    operands = tuple(argument(name, x) for name, x in (("query", q), ("key", key), ("value", value)))
    output = graph.call_function(target, operands, {name: argument(name, each) for name, each in options.items()})
    graph.output((output,))
    return GraphModule(nn.Module(), graph)


def only(gm: GraphModule, config: SparseConfig = CONFIG) -> Candidate | Rejection:
    (found,) = match(gm, config)
    return found


def capture(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> list[GraphModule]:
    """Return the graphs that Dynamo traces while ``function`` runs."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*args)
    return graphs


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(FULL), torch.randn(FULL), torch.randn(FULL)


SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "positional": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "keyword": lambda q, k, v: F.scaled_dot_product_attention(value=v, key=k, query=q),
    "all positional": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, False),
    "every keyword": lambda q, k, v: F.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ),
    "aten": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention.default(q, k, v),
    "aten packet": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_call_is_read_alike(spelling):
    (gm,) = capture(SPELLINGS[spelling], *qkv())
    found = only(gm)
    assert isinstance(found, Candidate)
    assert [node.name for node in (found.query, found.key, found.value)] == ["l_q_", "l_k_", "l_v_"]
    assert (found.index, found.key_mask, found.sequence, found.scale) == (0, None, TOKENS, 1 / math.sqrt(CHANNELS))


@pytest.mark.parametrize("spelling", ["positional", "every keyword"])
def test_an_exported_attention_is_read_like_a_traced_one(spelling):
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return SPELLINGS[spelling](q, k, v)

    exported = torch.export.export(Attention(), qkv()).module()
    found = only(exported)
    assert isinstance(found, Candidate)
    assert [node.name for node in (found.query, found.key, found.value)] == ["q", "k", "v"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_supported_dtypes_are_accepted(dtype):
    assert isinstance(only(graph_of(operand(*FULL, dtype=dtype))), Candidate)


@pytest.mark.parametrize("scale", [0.5, 1, 2.0])
def test_a_given_scale_is_kept(scale):
    found = only(graph_of(operand(*FULL), scale=scale))
    assert isinstance(found, Candidate) and found.scale == scale


def test_grouped_heads_are_accepted_with_enable_gqa():
    keys = operand(BATCH, 1, TOKENS, CHANNELS)
    assert isinstance(only(graph_of(operand(*FULL), keys, keys, enable_gqa=True)), Candidate)


def test_inputs_that_require_gradients_are_accepted_where_none_are_computed():
    with torch.no_grad():
        assert isinstance(only(graph_of(operand(*FULL, grad=True))), Candidate)


def test_a_length_known_only_at_run_time_is_not_called_short():
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        length = mode.shape_env.create_unbacked_symint()
        found = only(graph_of(torch.empty(BATCH, HEADS, length, CHANNELS)))
    assert isinstance(found, Candidate)


def two_lengths_known_at_run_time() -> GraphModule:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        lengths = [mode.shape_env.create_unbacked_symint() for _ in range(2)]
        query, key = (torch.empty(BATCH, HEADS, length, CHANNELS) for length in lengths)
    return graph_of(query, key, key)


def multi_head(query: Tensor, key: Tensor | None = None) -> Callable[[], GraphModule]:
    return lambda: graph_of(query, key, key, target=F.multi_head_attention_forward)


def no_mask(reason: str) -> str:
    return f"attn_mask is {reason}"


def with_dynamic_heads() -> GraphModule:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        heads = mode.shape_env.create_unbacked_symint()
        return graph_of(torch.empty(BATCH, heads, TOKENS, CHANNELS))


def scaled_at_run_time() -> GraphModule:
    return graph_of(operand(*FULL), scale=operand())


def with_unknown_mask() -> GraphModule:
    gm = graph_of(operand(*FULL), attn_mask=operand(1))
    next(node for node in gm.graph.nodes if node.name == "attn_mask").meta.clear()
    return gm


def flex() -> GraphModule:
    return graph_of(operand(*FULL), target=torch.ops.higher_order.flex_attention)


KEY_MASK_HINT = "drop the mask if it hides nothing, or give one of shape (batch, 1, 1, keys) that hides keys"
BATCH_HINT = "expand keys and values before the attention"
SHORT = operand(BATCH, HEADS, 39, CHANNELS)
FEWER_HEADS = operand(BATCH, 1, TOKENS, CHANNELS)
NARROW = operand(BATCH, HEADS, TOKENS, 4)
ONE = operand(1, HEADS, TOKENS, CHANNELS)
THREE_AXES = operand(HEADS, TOKENS, CHANNELS)

DECLINED: dict[str, tuple[Callable[[], GraphModule], str, str, bool]] = {
    "no shape": (lambda: graph_of(None), "its operands have no known shape", "please report this model", False),
    "three axes": (
        lambda: graph_of(THREE_AXES),
        "expected 4-D (batch, heads, tokens, head dim) operands, got 3-D, 3-D, 3-D",
        "give all three the same leading axes, as (batch, heads, tokens, head dim)",
        False,
    ),
    "cross-attention": (
        lambda: graph_of(operand(*FULL), SHORT, SHORT),
        "cross-attention: 41 queries, 39 keys",
        "",
        True,
    ),
    "short": (lambda: graph_of(SHORT), "short: 39 tokens", "lower min_tokens=40 to include it", True),
    **{
        f"{dtype}": (
            lambda dtype=dtype: graph_of(operand(*FULL, dtype=dtype)),
            f"{str(dtype).removeprefix('torch.')} attention",
            "run the model in float32, float16 or bfloat16",
            False,
        )
        for dtype in (torch.float64, torch.complex64, torch.int32)
    },
    "causal": (lambda: graph_of(operand(*FULL), is_causal=True), "causal attention", "", True),
    "dropout": (
        lambda: graph_of(operand(*FULL), dropout_p=0.1),
        "attention dropout is active",
        "call model.eval()",
        False,
    ),
    "dropout known at run time": (
        lambda: graph_of(operand(*FULL), dropout_p=operand()),
        "attention dropout is active",
        "call model.eval()",
        False,
    ),
    "gradients": (
        lambda: graph_of(operand(*FULL, grad=True)),
        "gradients are required",
        "run under torch.no_grad() or torch.inference_mode()",
        False,
    ),
    "dynamic heads": (
        with_dynamic_heads,
        "heads or head dim are dynamic",
        "compile with dynamic=None, so that only lengths are dynamic",
        False,
    ),
    "value width": (
        lambda: graph_of(operand(*FULL), operand(*FULL), NARROW),
        "keys have head dim 8, values 4",
        "",
        False,
    ),
    "grouped heads": (
        lambda: graph_of(operand(*FULL), FEWER_HEADS, FEWER_HEADS),
        "3 query heads over 1 key heads without enable_gqa",
        "",
        False,
    ),
    "broadcast keys": (
        lambda: graph_of(operand(*FULL), ONE, ONE),
        "operands broadcast over batch or heads",
        BATCH_HINT,
        False,
    ),
    "broadcast values": (
        lambda: graph_of(operand(*FULL), operand(*FULL), FEWER_HEADS),
        "operands broadcast over batch or heads",
        BATCH_HINT,
        False,
    ),
    "mask of whole numbers": (
        lambda: graph_of(operand(*FULL), attn_mask=operand(BATCH, 1, 1, TOKENS, dtype=torch.int64)),
        no_mask("int64 2×1×1×41, not a key mask"),
        KEY_MASK_HINT,
        False,
    ),
    "mask of one key": (
        lambda: graph_of(operand(*FULL), attn_mask=operand(BATCH, 1, 1, 1, dtype=torch.bool)),
        no_mask("bool 2×1×1×1, not a key mask"),
        KEY_MASK_HINT,
        False,
    ),
    "flat mask": (
        lambda: graph_of(operand(*FULL), attn_mask=operand(TOKENS, TOKENS, dtype=torch.bool)),
        no_mask("bool 41×41, not a key mask"),
        KEY_MASK_HINT,
        False,
    ),
    "unknown mask": (with_unknown_mask, no_mask("not a tensor of the graph"), KEY_MASK_HINT, False),
    "run-time scale": (scaled_at_run_time, "scale is computed at run time", "pass scale as a number", False),
    "two lengths known at run time": (
        two_lengths_known_at_run_time,
        "its lengths are known only at run time: u0 queries, u1 keys",
        "compile without fullgraph=True, or block by block, so that lengths are numbers",
        False,
    ),
    "few queries, more keys": (
        lambda: graph_of(SHORT, operand(*FULL), operand(*FULL)),
        "cross-attention: 39 queries, 41 keys",
        "",
        True,
    ),
    "multi-head module": (
        multi_head(operand(TOKENS, BATCH, CHANNELS)),
        "runs multi_head_attention_forward, not SDPA",
        "only scaled_dot_product_attention is rewritten; call it in place of torch.nn.MultiheadAttention",
        False,
    ),
    "short multi-head module": (multi_head(operand(5, BATCH, CHANNELS)), "short: 5 tokens", "", True),
    "multi-head cross-attention": (
        multi_head(operand(TOKENS, BATCH, CHANNELS), operand(5, BATCH, CHANNELS)),
        "cross-attention: 41 queries, 5 keys",
        "",
        True,
    ),
    "foreign": (
        flex,
        "runs flex_attention, not SDPA",
        'only scaled_dot_product_attention is rewritten; call model.set_attention_backend("native")',
        False,
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_cannot_be_sparse_is_declined_with_its_reason_and_advice(case):
    build, reason, hint, by_design = DECLINED[case]
    gm = build()
    found = only(gm)
    node = next(node for node in gm.graph.nodes if node.op == "call_function")
    assert found == Rejection(node.name, node.name, reason, hint, by_design)


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "key mask": lambda m: m,
    "expanded over the queries": lambda m: m.expand(-1, 1, TOKENS, -1),
    "repeated over the queries": lambda m: m.repeat(1, 1, TOKENS, 1),
    "cloned and cast": lambda m: m.expand(-1, -1, TOKENS, -1).contiguous().bool().to(torch.bool).clone(),
    "outer product": lambda m: m & m.transpose(2, 3),
    "outer product the other way": lambda m: torch.logical_and(m.transpose(-1, -2), m),
    "outer product by keyword": lambda m: torch.logical_and(m, other=m.transpose(2, 3)),
    "outer product of repeats": lambda m: (lambda rows: rows & rows.transpose(2, 3))(m.repeat(1, 1, TOKENS, 1)),
}


@pytest.mark.parametrize("spelling", MASKS)
def test_a_key_mask_is_recognised(spelling):
    mask = torch.arange(TOKENS).view(1, 1, 1, -1).repeat(BATCH, 1, 1, 1) < TOKENS - 3

    def attend(q, k, v, m):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=MASKS[spelling](m))

    (gm,) = capture(attend, *qkv(), mask)
    found = only(gm)
    assert isinstance(found, Candidate) and found.key_mask is not None
    assert shape_of(found.key_mask) == (BATCH, 1, 1, TOKENS)
    assert found.key_mask.name == "l_m_"


LOOKALIKE_MASKS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "keys repeated": ((BATCH, 1, 1, TOKENS), lambda m: m[..., :1].repeat(1, 1, TOKENS, TOKENS)),
    "one key expanded": ((BATCH, 1, 1, 1), lambda m: m.expand(-1, 1, TOKENS, TOKENS)),
    "batch repeated": ((1, 1, 1, TOKENS), lambda m: torch.cat((m, ~m)).repeat(2, 1, 1, 1)[:BATCH].repeat(1, 1, 41, 1)),
    "queries hidden": ((BATCH, 1, TOKENS, 1), lambda m: m.expand(-1, 1, -1, TOKENS)),
    "product of two masks": ((BATCH, 1, 1, TOKENS), lambda m: m & m.flip(-1).transpose(2, 3)),
    "transposed along the wrong axes": ((BATCH, 1, 1, TOKENS), lambda m: (m & m.transpose(1, 2)).expand(-1, 1, 41, -1)),
    "sum": ((BATCH, 1, 1, TOKENS), lambda m: m | m.transpose(2, 3)),
    "inverted after the product": ((BATCH, 1, 1, TOKENS), lambda m: ~(m & m.transpose(2, 3))),
}


@pytest.mark.parametrize("spelling", LOOKALIKE_MASKS)
def test_a_mask_that_only_looks_like_a_key_mask_is_never_replaced_by_another(spelling):
    shape, build = LOOKALIKE_MASKS[spelling]
    mask = torch.rand(shape) < 0.7

    def attend(q, k, v, m):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=build(m))

    (gm,) = capture(attend, *qkv(), mask)
    found = only(gm)
    if isinstance(found, Candidate):
        meant = torch.fx.Interpreter(gm)
        wanted: dict[str, Tensor] = {}
        meant.run_node = lambda node: wanted.setdefault(node.name, torch.fx.Interpreter.run_node(meant, node))
        with torch.no_grad():
            meant.run(*inputs_of(gm, {"l_m_": mask}))
        assert torch.equal(
            wanted[found.key_mask.name].expand(BATCH, 1, TOKENS, TOKENS), build(mask).expand(BATCH, 1, TOKENS, TOKENS)
        )
    else:
        assert found.reason.startswith("attn_mask is bool")


@pytest.mark.parametrize(
    "mask",
    [
        lambda: torch.ones(BATCH, TOKENS, dtype=torch.int32).bool().view(BATCH, 1, 1, -1).expand(-1, 1, TOKENS, -1),
        lambda: torch.ones(TOKENS, TOKENS, dtype=torch.bool),
    ],
    ids=["padding", "square"],
)
def test_a_mask_made_of_ones_in_the_graph_is_no_mask(mask):
    (gm,) = capture(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask()), *qkv())
    found = only(gm)
    assert isinstance(found, Candidate)
    assert found.key_mask is None


def overwritten(mask: Tensor) -> Tensor:
    mask[0, :3] = 0
    return mask.bool()


def overwritten_through_a_view(mask: Tensor) -> Tensor:
    kept = mask.view(-1)
    kept[:3] = 0
    return mask.bool()


@pytest.mark.parametrize("spoil", [overwritten, overwritten_through_a_view, lambda mask: mask.cumsum(1).eq(1)])
def test_ones_that_do_not_stay_ones_are_a_mask(spoil):
    def attention(q, k, v):
        mask = spoil(torch.ones(BATCH, TOKENS, dtype=torch.int32))
        return F.scaled_dot_product_attention(q, k, v, mask.view(BATCH, 1, 1, -1).expand(-1, 1, TOKENS, -1))

    (gm,) = capture(attention, *qkv())
    found = only(gm)
    assert isinstance(found, Rejection) or found.key_mask is not None


def test_a_product_of_masks_across_the_batch_is_no_outer_product_of_keys():
    """With as many heads as batch elements, mask[b, h] = m[b] & m[h] has a shape that attention takes."""

    def attend(x, m):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=m & m.transpose(0, 1))

    (gm,) = capture(attend, torch.randn(2, 2, TOKENS, CHANNELS), torch.rand(2, 1, 1, TOKENS) < 0.7)
    found = only(gm)
    assert isinstance(found, Rejection) and found.reason == "attn_mask is bool 2×2×1×41, not a key mask"


def inputs_of(gm: GraphModule, given: dict[str, Tensor]) -> list[Tensor]:
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    return [given[name] if name in given else torch.randn(FULL) for name in names]


def test_a_mask_shared_by_the_batch_is_a_key_mask():
    found = only(graph_of(operand(*FULL), attn_mask=operand(1, 1, 1, TOKENS, dtype=torch.bool)))
    assert isinstance(found, Candidate)


def test_a_graph_without_attention_has_nothing_to_match():
    (gm,) = capture(lambda q, k, v: (q @ k.mT).relu() @ v, *qkv())
    assert match(gm, CONFIG) == []


def test_attentions_are_numbered_in_program_order_and_foreign_ones_are_not_counted():
    graph = Graph()
    q = graph.placeholder("q")
    q.meta["example_value"] = operand(*FULL)
    for target in (SDPA, torch.ops.higher_order.flex_attention, SDPA, SDPA):
        node = graph.call_function(target, (q, q, q))
    graph.output(node)
    found = match(GraphModule(nn.Module(), graph), CONFIG)
    assert [each.index if isinstance(each, Candidate) else None for each in found] == [0, None, 1, 2]


def test_matching_reads_only_and_twice_is_once():
    (gm,) = capture(SPELLINGS["keyword"], *qkv())
    before = gm.print_readable(print_output=False)
    assert match(gm, CONFIG) == match(gm, CONFIG)
    assert gm.print_readable(print_output=False) == before


LIBRARIES = [torch.library.Library(name, "FRAGMENT") for name in ("_flash_attn3_b4a2d0f", "sageattention")]
for library in LIBRARIES:
    library.define("fwd(Tensor q, Tensor k, Tensor v) -> Tensor")


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.ops._flash_attn3_b4a2d0f.fwd.default, "_flash_attn3_b4a2d0f::fwd"),
        (torch.ops._flash_attn3_b4a2d0f.fwd, "_flash_attn3_b4a2d0f::fwd"),
        (torch.ops.sageattention.fwd.default, "sageattention::fwd"),
        (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
            "aten::_scaled_dot_product_flash_attention_for_cpu",
        ),
    ],
)
def test_kernels_of_other_libraries_are_reported_by_their_full_name(target, name):
    found = only(graph_of(operand(*FULL), target=target))
    assert isinstance(found, Rejection)
    assert found.reason == f"runs {name}, not SDPA"
    assert "set_attention_backend" in found.hint and not found.by_design


def test_flex_attention_as_dynamo_traces_it_is_reported():
    from torch.nn.attention.flex_attention import flex_attention

    (gm,) = capture(lambda q, k, v: flex_attention(q, k, v), *qkv())
    (found,) = match(gm, CONFIG)
    assert isinstance(found, Rejection) and found.reason == "runs flex_attention, not SDPA"


class Attend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attend()
        self.branches = nn.ModuleList([Attend()])

    def forward(self, x: Tensor) -> Tensor:
        return self.branches[0](self.attn1(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.named = nn.ModuleDict({"last": Attend()})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.named["last"](x)


PATHS = ["blocks.0.attn1", "blocks.0.branches.0", "blocks.1.attn1", "blocks.1.branches.0", "named.last"]


def test_the_path_of_a_site_in_a_whole_model_names_its_module():
    (gm,) = capture(Model(), torch.randn(FULL))
    assert [found.path for found in match(gm, CONFIG)] == PATHS


def test_the_path_of_a_site_in_an_exported_model_names_its_module():
    gm = torch.export.export(Model(), (torch.randn(FULL),)).module()
    assert [found.path for found in match(gm, CONFIG)] == PATHS


def test_the_path_of_a_site_in_a_regional_frame_is_relative_to_the_block():
    model = Model()
    block = model.blocks[1]
    (gm,) = capture(block, torch.randn(FULL))
    assert [found.path for found in match(gm, CONFIG)] == ["attn1", "branches.0"]


def test_the_path_of_a_site_outside_any_module_is_the_name_of_its_node():
    (gm,) = capture(lambda x: F.scaled_dot_product_attention(x, x, x), torch.randn(FULL))
    found = only(gm)
    assert found.path == found.node.name
