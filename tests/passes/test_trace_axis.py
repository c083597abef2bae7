"""Following the sequence axis of an attention back to where its rows came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from svg2_compile.passes.nodes import is_sdpa, sdpa_arguments
from svg2_compile.passes.records import size_hint
from svg2_compile.passes.trace_axis import AxisOrigin, trace_axis

BATCH, HEADS, CHANNELS, TEXT, VIDEO = 2, 2, 8, 7, 45
ALL = TEXT + VIDEO
attend = F.scaled_dot_product_attention


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def inputs(text: int = TEXT, video: int = VIDEO) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(BATCH, text, 16), torch.randn(BATCH, video, 16), torch.randn(48, 16)


def value_origin(gm: GraphModule) -> AxisOrigin:
    last = [node for node in gm.graph.nodes if is_sdpa(node)][-1]
    value = sdpa_arguments(last).value
    assert isinstance(value, Node)
    return trace_axis(value, 2)


def trace(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> AxisOrigin:
    """Return the origin of the last attention's value rows, and check that looking for it added no guard."""
    origins: list[AxisOrigin] = []

    def backend(gm: GraphModule, _: list[Any]) -> Callable[..., Any]:
        shape_env = torch._guards.TracingContext.get().fake_mode.shape_env
        guards = len(shape_env.guards)
        origins.append(value_origin(gm))
        assert len(shape_env.guards) == guards
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    (origin,) = origins
    return origin


def heads(x: Tensor) -> Tensor:
    return x.view(BATCH, -1, HEADS, CHANNELS).transpose(1, 2)


def self_attention(x: Tensor) -> Tensor:
    return attend(heads(x), heads(x), heads(x))


def cat_then_project(text, video, w):
    q, k, v = F.linear(torch.cat((text, video), 1), w).chunk(3, -1)
    return attend(heads(q), heads(k), heads(v))


def normed_view_and_permute(text, video, w):
    x = F.layer_norm(torch.cat([text, video], dim=1), (16,)) * 2 + 1
    x = F.rms_norm(x, (16,)).view(BATCH, -1, HEADS, CHANNELS).permute(0, 2, 1, 3)
    return attend(x, x, x)


def permuted_by_keyword(text, video, w):
    x = torch.permute(torch.cat([text, video], dim=1).unflatten(2, (HEADS, -1)), dims=(0, 2, 1, 3))
    return attend(x, x, x)


def permuted_by_a_list(text, video, w):
    x = torch.cat([text, video], dim=1).unflatten(-1, (HEADS, -1)).permute([0, 2, 1, 3])
    return attend(x, x, x)


def cat_after_the_heads(text, video, w):
    x = torch.cat([heads(text), heads(video)], dim=2).contiguous()
    return attend(x, x, x)


def cat_negative_axis(text, video, w):
    x = torch.concat([heads(text), heads(video)], dim=-2)
    return attend(x, x, x)


def stacked_and_unbound(text, video, w):
    x = torch.cat((text, video), 1)
    q, k, v = torch.stack((x, x + 1, x * 2), dim=0).unbind(0)
    return attend(heads(q), heads(k), heads(v))


def unflattened_projection(text, video, w):
    qkv = F.linear(torch.cat((text, video), 1), w).unflatten(2, (3, HEADS, CHANNELS)).permute(2, 0, 3, 1, 4)
    return attend(qkv[0], qkv[1], qkv[2])


def split_with_sizes_of_channels(text, video, w):
    q, k, v = F.linear(torch.cat((text, video), 1), w).split([16, 16, 16], dim=2)
    return attend(heads(q), heads(k), heads(v))


def indexed_projection(text, video, w):
    x = F.linear(torch.cat((text, video), 1), w)
    return attend(heads(x[..., :16]), heads(x[:, :, 16:32]), heads(x[..., 32:]))


def new_axis_and_back(text, video, w):
    x = torch.cat((text, video), 1)[:, None, :, :]
    return self_attention(x.squeeze(1).unsqueeze(3)[..., 0])


def rotary_by_stack(text, video, w):
    x = heads(torch.cat((text, video), 1))
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    x = x + torch.stack([-imaginary, real], dim=-1).flatten(3)
    return attend(x, x, x)


def rotary_by_setitem(text, video, w):
    x = heads(torch.cat((text, video), 1))
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] - x[..., 1::2]
    out[..., 1::2] = x[..., 0::2] + x[..., 1::2]
    return attend(out, out, out)


def rotary_by_complex_numbers(text, video, w):
    x = torch.view_as_complex(heads(torch.cat((text, video), 1)).unflatten(-1, (-1, 2)))
    x = torch.view_as_real(x * 1j).flatten(3)
    return attend(x, x, x)


def modulated(text, video, w):
    x = torch.cat((text, video), 1)
    return self_attention(x * (1 + video.mean(1, keepdim=True)) + text.mean(dim=1)[:, None])


def gated_by_its_mean(text, video, w):
    x = torch.cat((text, video), 1)
    return self_attention(x.mean(-1, keepdim=True).expand(-1, -1, 16).repeat(1, 1, 1))


def repeated_heads(text, video, w):
    x = heads(torch.cat((text, video), 1))[:, :1].repeat_interleave(HEADS, dim=1)
    return attend(x, x, x)


def matmul_projection(text, video, w):
    return self_attention(torch.cat((text, video), 1) @ w[:16])


def single_stream(text, video, w):
    """An earlier attention, split and joined again, as in blocks that follow double-stream blocks."""
    out = self_attention(torch.cat((text, video), 1)).transpose(1, 2).flatten(2)
    text, video = out[:, : text.shape[1]], out[:, text.shape[1] :]
    return self_attention(torch.cat((text, video), 1))


def single_stream_without_a_new_cat(text, video, w):
    x = torch.cat((text, video), 1)
    return self_attention(x + self_attention(x).transpose(1, 2).flatten(2))


def after_cross_attention(text, video, w):
    x = torch.cat((text, video), 1)
    return self_attention(attend(heads(x), heads(text), heads(text)).transpose(1, 2).flatten(2))


def padded_channels(text, video, w):
    return self_attention(F.pad(torch.cat((text, video), 1), (0, 16))[..., 16:] + 0)


JOINED = [
    cat_then_project,
    normed_view_and_permute,
    permuted_by_keyword,
    permuted_by_a_list,
    cat_after_the_heads,
    cat_negative_axis,
    stacked_and_unbound,
    unflattened_projection,
    split_with_sizes_of_channels,
    indexed_projection,
    new_axis_and_back,
    rotary_by_stack,
    rotary_by_setitem,
    rotary_by_complex_numbers,
    modulated,
    gated_by_its_mean,
    repeated_heads,
    matmul_projection,
    single_stream,
    single_stream_without_a_new_cat,
    after_cross_attention,
    padded_channels,
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", JOINED, ids=lambda function: function.__name__)
def test_rows_are_followed_to_the_cat_that_joined_them(function, dynamic):
    origin = trace(function, *inputs(), dynamic=dynamic)
    assert origin.joined
    assert [size_hint(piece.length) for piece in origin.pieces] == [TEXT, VIDEO]
    assert [piece.kind for piece in origin.pieces] == ["cat", "cat"]
    assert [size_hint(piece.node.meta["example_value"].shape[piece.axis]) for piece in origin.pieces] == [TEXT, VIDEO]


def test_pieces_keep_the_order_of_the_rows():
    origin = trace(lambda text, video, w: self_attention(torch.cat((video, text, video), 1)), *inputs())
    assert [piece.length for piece in origin.pieces] == [VIDEO, TEXT, VIDEO]


def test_an_empty_operand_of_a_cat_is_no_piece():
    origin = trace(lambda text, video, w: self_attention(torch.cat((text[:, :0], text, video), 1)), *inputs())
    assert [piece.length for piece in origin.pieces] == [TEXT, VIDEO]


def test_a_cat_along_another_axis_is_passed():
    def function(text, video, w):
        x = torch.cat((text, video), 1)
        return self_attention(torch.cat((x[..., :4], x[..., 4:]), -1))

    assert [piece.length for piece in trace(function, *inputs()).pieces] == [TEXT, VIDEO]


def test_a_cat_with_nothing_is_passed():
    origin = trace(lambda text, video, w: self_attention(torch.cat((video[:, :0], video), 1)), *inputs())
    assert (origin.joined, [piece.kind for piece in origin.pieces]) == (False, ["placeholder"])


CUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "slice": lambda x, n: x[:, n:],
    "negative slice": lambda x, n: x[:, -VIDEO:],
    "narrow": lambda x, n: x.narrow(1, n, VIDEO),
    "split": lambda x, n: x.split([n, VIDEO], dim=1)[1],
    "last of a split": lambda x, n: x.split([n, VIDEO], dim=1)[-1],
    "ellipsis": lambda x, n: x[..., n:, :],
    "aten slice": lambda x, n: torch.ops.aten.slice.Tensor(x, 1, n, ALL),
}


@pytest.mark.parametrize("cut", CUTS)
def test_the_rows_that_a_cat_brought_in_are_found_again_behind_a_cut(cut):
    """Double-stream blocks cut the sequence apart, work on the pieces, and join them in any order."""

    def function(text, video, w):
        joined = torch.cat((text, video), 1)
        return self_attention(CUTS[cut](joined * 2, text.shape[1]))

    (piece,) = trace(function, *inputs()).pieces
    assert (piece.node.name, piece.length, piece.kind) == ("l_video_", VIDEO, "placeholder")


def test_a_chunk_of_equal_pieces_is_followed():
    def function(text, video, w):
        return self_attention(torch.cat((text, text + 1, video), 1)[:, : 2 * TEXT].chunk(2, 1)[1])

    (piece,) = trace(function, *inputs()).pieces
    assert (piece.kind, piece.length) == ("slice of a slice", TEXT)

    def plain(text, video, w):
        return self_attention(torch.cat((text, text), 1).chunk(2, dim=1)[0])

    torch._dynamo.reset()
    (piece,) = trace(plain, *inputs()).pieces
    assert (piece.node.name, piece.length) == ("l_text_", TEXT)


def test_an_input_is_a_trusted_end():
    (piece,) = trace(lambda text, video, w: self_attention(F.linear(video, w[:16])), *inputs()).pieces
    assert (piece.node.name, piece.axis, piece.length, piece.kind) == ("l_video_", 1, VIDEO, "placeholder")


def conv_patches(text, video, w):
    x = F.conv1d(video.transpose(1, 2), w[:16, :, None]).transpose(1, 2)
    return self_attention(x)


STOPS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "conv1d": (conv_patches, "conv1d"),
    "merged axes": (lambda t, v, w: self_attention(v.unflatten(1, (5, 9)).mul(2).flatten(1, 2)), "split axis"),
    "part of a cat": (lambda t, v, w: self_attention(torch.cat((t, v), 1)[:, 3:20]), "part of a cat"),
    "strided slice": (lambda t, v, w: self_attention(torch.cat((t, v), 1)[:, ::2]), "slice of a slice"),
    "roll": (lambda t, v, w: self_attention(torch.cat((t, v), 1).roll(3, 1)), "roll"),
    "flip": (lambda t, v, w: self_attention(torch.cat((t, v), 1).flip(1)), "flip"),
    "gather": (lambda t, v, w: self_attention(v[:, torch.arange(VIDEO)]), "gather"),
    "index_select": (lambda t, v, w: self_attention(v.index_select(1, torch.arange(VIDEO))), "index_select"),
    "einsum": (lambda t, v, w: self_attention(torch.einsum("bnc,dc->bnd", v, w[:16])), "einsum"),
    "zeros": (lambda t, v, w: self_attention(torch.zeros(BATCH, VIDEO, 16)), "zeros"),
    "tile": (lambda t, v, w: self_attention(t.tile(1, 3, 1)), "tile"),
    "repeat": (lambda t, v, w: self_attention(t.repeat(1, 3, 1)), "repeat"),
    "pad": (lambda t, v, w: self_attention(F.pad(v, (0, 0, 0, 3))), "pad"),
    "stack": (lambda t, v, w: attend(*3 * (torch.stack([heads(v)[:, :, 0]] * 9, 2),)), "stack"),
    "square": (
        lambda t, v, w: attend(
            *3 * (torch.matmul(w[:, 0], heads(v)[:, :, :1].expand(-1, -1, 48, -1)[0, 0]).expand(2, 2, 9, 8),)
        ),
        "expand",
    ),
}


@pytest.mark.parametrize("case", STOPS)
def test_the_walk_stops_where_rows_lose_their_place_and_says_at_what(case):
    function, kind = STOPS[case]
    origin = trace(function, *inputs())
    assert not origin.joined
    assert [piece.kind for piece in origin.pieces] == [kind]


def test_a_parameter_of_an_exported_model_is_an_end():
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(torch.randn(BATCH, VIDEO, 16))

        def forward(self, x):
            return self_attention(self.tokens * 2) + x

    gm = torch.export.export(Learned(), (torch.zeros(()),)).module()
    (piece,) = value_origin(gm).pieces
    assert (piece.kind, piece.length) == ("get_attr", VIDEO)


@pytest.mark.parametrize("function", [cat_then_project, single_stream, rotary_by_setitem, stacked_and_unbound])
def test_an_exported_graph_is_followed_like_a_traced_one(function):
    class Model(nn.Module):
        def forward(self, text, video, w):
            return function(text, video, w)

    origin = value_origin(torch.export.export(Model(), inputs()).module())
    assert [piece.length for piece in origin.pieces] == [TEXT, VIDEO]


@pytest.mark.parametrize("function", [cat_then_project, single_stream])
def test_following_symbolic_lengths_keeps_one_graph_for_all_lengths(function):
    graphs = []

    def backend(gm, _):
        graphs.append(value_origin(gm))
        return gm.forward

    compiled = torch.compile(function, backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for text, video in ((7, 45), (11, 80), (60, 20)):
            compiled(*inputs(text, video))
    assert len(graphs) == 1


def test_a_walk_ends_somewhere_even_in_a_very_deep_graph():
    gm = torch.fx.symbolic_trace(lambda x: x)
    graph = gm.graph
    node = next(iter(graph.nodes))
    node.meta["example_value"] = torch.empty(1, 2, 5, 4, device="meta")
    with graph.inserting_after(node):
        for _ in range(4001):
            with graph.inserting_after(node):
                node = graph.call_function(torch.relu, (node,))
            node.meta["example_value"] = torch.empty(1, 2, 5, 4, device="meta")
    assert trace_axis(node, 2).pieces[0].kind == "too far"
