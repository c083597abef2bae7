"""Video rows are told from context rows, and candidates become sites or rejections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from svg2_compile.passes.classify import classify
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.match import match
from svg2_compile.passes.records import AttentionSite, Rejection, size_hint

BATCH, HEADS, CHANNELS, TEXT, VIDEO = 2, 2, 8, 7, 45
WIDTH = HEADS * CHANNELS
CONFIG = SparseConfig(min_tokens=40, dense_layers=0, q_clusters=3, k_clusters=5)
attend = F.scaled_dot_product_attention


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def heads(x: Tensor) -> Tensor:
    return x.view(BATCH, -1, HEADS, CHANNELS).transpose(1, 2)


def self_attention(x: Tensor, **options: Any) -> Tensor:
    return attend(heads(x), heads(x), heads(x), **options)


def rows(count: int) -> Tensor:
    return torch.randn(BATCH, count, WIDTH)


def decide(
    function: Callable[..., Any],
    *args: Any,
    config: SparseConfig = CONFIG,
    dynamic: bool = False,
    fullgraph: bool = True,
) -> list[AttentionSite | Rejection]:
    """Return what becomes of each attention of ``function``; deciding must fix no size, and guards come once."""
    decided: list[AttentionSite | Rejection] = []

    def backend(gm: GraphModule, _: list[Any]) -> Callable[..., Any]:
        shape_env = torch._guards.TracingContext.get().fake_mode.shape_env
        before = gm.print_readable(print_output=False)
        found = match(gm, config)
        decided.extend(classify(found, config))
        guards = len(shape_env.guards)
        assert classify(found, config) == decided
        assert gm.print_readable(print_output=False) == before
        assert len(shape_env.guards) == guards and (dynamic or not guards)
        assert not shape_env.replacements and not any(guard.expr.is_Equality for guard in shape_env.guards)
        return gm.forward

    if dynamic:
        for each in args:
            torch._dynamo.mark_dynamic(each, 1)
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    return decided


def site(*args: Any, **options: Any) -> AttentionSite:
    (decision,) = decide(*args, **options)
    assert isinstance(decision, AttentionSite), decision
    return decision


def summary(decision: AttentionSite) -> list[tuple[int | None, bool]]:
    return [(size_hint(segment.length), segment.is_video) for segment in decision.segments]


def text_first(text, video):
    return self_attention(torch.cat((text, video), 1))


def video_first(text, video):
    return self_attention(torch.cat((video, text), 1))


def between_texts(text, video):
    return self_attention(torch.cat((text, video, text + 1), 1))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (text_first, [(TEXT, False), (VIDEO, True)]),
        (video_first, [(VIDEO, True), (TEXT, False)]),
        (between_texts, [(TEXT, False), (VIDEO, True), (TEXT, False)]),
    ],
    ids=["text first", "video first", "between texts"],
)
def test_the_longest_piece_is_video_and_the_rest_context_in_the_order_of_the_rows(function, expected, dynamic):
    found = site(function, rows(TEXT), rows(VIDEO), dynamic=dynamic)
    assert summary(found) == expected
    assert size_hint(found.tokens) == found.token_hint == VIDEO
    assert size_hint(found.context_tokens) == sum(length for length, is_video in expected if not is_video)
    sources = {"l_text_", "l_video_", "add"}
    assert {segment.source for segment in found.segments} <= sources
    assert {segment.source_axis for segment in found.segments} == {1}


def test_a_sequence_that_nothing_joined_is_all_video():
    found = site(lambda x: self_attention(x), rows(VIDEO))
    assert summary(found) == [(VIDEO, True)]
    assert (found.segments[0].source, found.context_tokens) == ("", 0)


@pytest.mark.parametrize(("ratio", "pieces"), [(0.0, 1), (0.13, 1), (0.14, 2), (1.0, 2)])
def test_more_context_than_max_context_ratio_makes_one_piece_of_all_rows(ratio, pieces):
    config = SparseConfig(min_tokens=40, dense_layers=0, max_context_ratio=ratio)
    found = site(text_first, rows(TEXT), rows(VIDEO), config=config)  # 7 of 52 rows are 0.1346
    assert len(found.segments) == pieces
    assert size_hint(found.tokens) == (VIDEO if pieces == 2 else TEXT + VIDEO)


def test_rows_joined_before_the_queries_only_are_told_apart_by_the_queries():
    def function(text, video, other):
        x = heads(torch.cat((text, video), 1))
        return attend(x, x, torch.einsum("bhnd->bhnd", heads(other)))

    assert summary(site(function, rows(TEXT), rows(VIDEO), rows(TEXT + VIDEO))) == [(TEXT, False), (VIDEO, True)]


def test_the_site_describes_the_attention():
    def function(x):
        return attend(x, x[:, :2], x[:, 2:], scale=0.3, enable_gqa=True)

    found = site(function, torch.randn(BATCH, 4, VIDEO, CHANNELS))
    assert (found.batch, found.q_heads, found.k_heads, found.head_dim) == (BATCH, 4, 2, CHANNELS)
    assert (found.dtype, found.device, found.scale) == (torch.float32, torch.device("cpu"), 0.3)
    assert (found.q_clusters, found.k_clusters, found.has_mask) == (3, 5, False)


def beside(make_mask: Callable[[Tensor, Any], Tensor]) -> Callable[..., Tensor]:
    """Attend in video before text, under what is made of a mask of the text and the length of the video."""

    def attention(video: Tensor, text: Tensor) -> Tensor:
        return self_attention(torch.cat((video, text), 1), attn_mask=make_mask(text[:, :, 0] > 0, video.shape[1]))

    return attention


def counted(
    m: Tensor, n: Any, bound: Callable[[Tensor], Tensor], places: Callable[..., Tensor] = torch.arange
) -> Tensor:
    keys = n + m.shape[1]
    ones = torch.ones(BATCH, keys, dtype=torch.bool)
    hidden = places(keys).unsqueeze(0) >= bound(m.sum(1)).unsqueeze(1)
    return ones.masked_fill(hidden, False).unsqueeze(1).unsqueeze(1)


def joined(m: Tensor, n: Any, spoil: Callable[[Tensor], object] = lambda ones: None) -> Tensor:
    ones = m.new_ones(BATCH, n)
    spoil(ones)
    return torch.cat((ones, m), 1)[:, None, None]


SHOWS_VIDEO = {
    "cat": joined,
    "cat, then converted": lambda m, n: torch.cat((torch.ones(BATCH, n), m.float()), -1).bool().view(BATCH, 1, 1, -1),
    "cat, for each query": lambda m, n: joined(m, n).expand(-1, 1, n + m.shape[1], -1),
    "pad": lambda m, n: F.pad(m, (n, 0), value=True).unsqueeze(1).unsqueeze(1),
    "pad of numbers": lambda m, n: F.pad(m.float(), (n, 0), value=1.0).bool()[:, None, None, :],
    "count": lambda m, n: counted(m, n, lambda text: n + text),
    "count, the other way round": lambda m, n: counted(m, n, lambda text: text + n),
}
MAY_HIDE_VIDEO = {
    "other order": lambda m, n: torch.cat((m, m.new_ones(BATCH, n)), 1)[:, None, None],
    "cat, too few": lambda m, n: torch.cat((m.new_ones(BATCH, n - 1), m, m[:, :1]), 1)[:, None, None],
    "cat, overwritten": lambda m, n: joined(m, n, spoil=lambda ones: ones[:, 3].zero_()),
    "cat, overwritten afterwards": lambda m, n: spoilt(joined(m, n)),
    "zeros": lambda m, n: torch.cat((m.new_zeros(BATCH, n), m), 1)[:, None, None],
    "pad on the other side": lambda m, n: F.pad(m, (0, n), value=True)[:, None, None],
    "pad, too few": lambda m, n: F.pad(torch.cat((m[:, :1], m), 1), (n - 1, 0), value=True)[:, None, None],
    "pad with zeros": lambda m, n: F.pad(m, (n, 0))[:, None, None],
    "pad with its edge": lambda m, n: F.pad(m.float(), (n, 0), mode="replicate").bool()[:, None, None],
    "count, fewer": lambda m, n: counted(m, n, lambda text: n - 1 + text),
    "count, of text alone": lambda m, n: counted(m, n, lambda text: m.shape[1] + text),
    "count, subtracted": lambda m, n: counted(m, n, lambda text: torch.add(n, text, alpha=-1)),
    "count, negated": lambda m, n: counted(m, n, lambda text: n + text.neg()),
    "count, from elsewhere": lambda m, n: counted(m, n, lambda text: n + text, lambda keys: torch.arange(1, keys + 1)),
    "count, backwards": lambda m, n: counted(m, n, lambda text: n + text, lambda keys: torch.arange(keys).flip(0)),
    "count, of numbers": lambda m, n: counted(m.float() - 9, n, lambda text: n + text),
    "count, overwritten": lambda m, n: counted(m, n, lambda text: spoilt(n + text, -9)),
}


def spoilt(x: Tensor, value: int = 0) -> Tensor:
    x[..., 1:2] = value
    return x


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [*SHOWS_VIDEO, *MAY_HIDE_VIDEO])
def test_a_mask_may_hide_video_unless_the_graph_shows_that_it_does_not(name, dynamic):
    make = (SHOWS_VIDEO | MAY_HIDE_VIDEO)[name]
    found = site(beside(make), rows(VIDEO), rows(TEXT), dynamic=dynamic)
    assert found.has_mask and summary(found)[0] == (VIDEO, True)
    assert found.may_hide_video == (name in MAY_HIDE_VIDEO)
    shown = make(torch.zeros(BATCH, TEXT, dtype=torch.bool), VIDEO)[0, 0, -1, :VIDEO].all()
    assert shown or found.may_hide_video


def test_a_mask_from_outside_may_hide_video_and_leaves_room_for_a_cluster_of_what_it_hides():
    """The kernels take 1024 clusters at most."""
    mask = torch.ones(BATCH, 1, 1, 1100 + TEXT, dtype=torch.bool)
    config = SparseConfig(min_tokens=40, dense_layers=0, q_clusters=1024, k_clusters=1024)

    def attention(video, text, m):
        return self_attention(torch.cat((video, text), 1), attn_mask=m)

    found = site(attention, rows(1100), rows(TEXT), mask, config=config)
    assert found.may_hide_video and (found.q_clusters, found.k_clusters) == (1024, 1023)
    without = site(lambda video, text: attention(video, text, None), rows(1100), rows(TEXT), config=config)
    assert (without.q_clusters, without.k_clusters) == (1024, 1024)


def test_a_mask_over_a_sequence_without_context_may_hide_any_row():
    mask = torch.ones(BATCH, 1, 1, VIDEO, dtype=torch.bool)
    found = site(lambda x, m: self_attention(x, attn_mask=m), rows(VIDEO), mask)
    assert found.has_mask and found.may_hide_video and summary(found) == [(VIDEO, True)]


def test_operands_projected_in_another_graph_are_declined_with_that_reason():
    """Nothing in the graph tells rows of one sequence from rows of two."""

    def attention(query, key, value):
        return attend(heads(query * 2), heads(key + 1), heads(value))

    (found,) = decide(attention, rows(VIDEO), rows(VIDEO), rows(VIDEO))
    assert isinstance(found, Rejection) and not found.by_design
    assert found.reason == "its queries and values are computed outside this graph, so what their rows are is unknown"
    assert "hooks on each layer" in found.hint


def cross(q, kv):
    return attend(heads(q), heads(kv), heads(kv))


def cross_conv(q, kv):
    weight = torch.ones(WIDTH, WIDTH, 1)
    return cross(F.conv1d(q.transpose(1, 2), weight).transpose(1, 2).contiguous(), kv)


def cross_joined(text, video, a, b):
    q, kv = torch.cat((text, video), 1), torch.cat((b, a), 1)
    return attend(heads(q), heads(kv), heads(kv))


def cross_from_a_table(table, x):
    return attend(heads(table), heads(x), heads(x))


def cross_with_shared_positions(q, kv, pe):
    return attend(heads(q) * pe, heads(kv) * pe, heads(kv))


def cross_with_shared_modulation(q, kv, per_token):
    q, kv = (F.layer_norm(each, (WIDTH,)) * (1 + per_token) for each in (q, kv))
    return cross(q, kv)


def cross_between_halves(x):
    return cross(x[:, :VIDEO], x[:, VIDEO:])


def cross_joined_alike(text, video, a, b):
    return cross(torch.cat((text, video), 1), torch.cat((a, b), 1))


def cross_from_joined(text, video, kv):
    return cross(torch.cat((text, video), 1), kv)


@pytest.mark.parametrize(
    ("function", "args", "sources"),
    [
        (cross, (rows(VIDEO), rows(VIDEO)), "l_q_ and l_kv_"),
        (cross_from_a_table, (rows(VIDEO), rows(VIDEO)), "l_table_ and l_x_"),
        (cross_with_shared_positions, (rows(VIDEO), rows(VIDEO), torch.randn(VIDEO, 1)), "l_q_ and l_kv_"),
        (cross_with_shared_modulation, (rows(VIDEO), rows(VIDEO), rows(VIDEO)), "l_q_ and l_kv_"),
        (cross_between_halves, (rows(2 * VIDEO),), "l_x_ and l_x_"),
        (cross_joined_alike, (rows(TEXT), rows(VIDEO), rows(TEXT), rows(VIDEO)), "l_text_ and l_a_"),
        (cross_from_joined, (rows(TEXT), rows(VIDEO), rows(TEXT + VIDEO)), "l_text_ and l_kv_"),
        (cross_conv, (rows(VIDEO), rows(VIDEO)), "conv1d and l_kv_"),
        (cross_joined, (rows(TEXT), rows(VIDEO), rows(TEXT), rows(VIDEO)), "l_text_ and l_b_"),
    ],
    ids=lambda each: each.__name__ if callable(each) else "",
)
def test_cross_attention_between_equal_lengths_is_declined(function, args, sources):
    (found,) = decide(function, *args)
    assert isinstance(found, Rejection)
    assert (found.reason, found.hint, found.by_design) == (
        f"cross-attention: queries and values come from {sources}",
        "",
        True,
    )


def video_asks(text, video):
    joined = torch.cat((heads(text), heads(video)), 2)
    return attend(heads(video), joined, joined)


def video_asks_with_positions(text, video, freqs):
    keys = torch.cat((heads(text), freqs * heads(video)), 2)
    return attend(freqs * heads(video), keys, torch.cat((heads(text), heads(video)), 2))


POSITIONS = torch.randn(BATCH, HEADS, VIDEO, CHANNELS)


@pytest.mark.parametrize(
    ("function", "args", "dynamic"),
    [(video_asks, (), False), (video_asks, (), True), (video_asks_with_positions, (POSITIONS,), False)],
    ids=["static", "dynamic", "with positions"],
)
def test_rows_that_ask_among_more_keys_are_video_and_the_other_keys_context(function, args, dynamic):
    found = site(function, rows(TEXT), rows(VIDEO), *args, dynamic=dynamic)
    assert summary(found) == [(TEXT, False), (VIDEO, True)]
    assert not found.has_context_queries
    assert site(text_first, rows(TEXT), rows(VIDEO)).has_context_queries


def other_asks(text, video, other):
    joined = torch.cat((heads(text), heads(video)), 2)
    return attend(heads(other), joined, joined)


def test_rows_that_ask_another_stream_are_cross_attention_though_a_piece_of_it_is_as_long():
    (found,) = decide(other_asks, rows(TEXT), rows(VIDEO), rows(VIDEO))
    assert isinstance(found, Rejection)
    assert (found.reason, found.by_design) == (f"cross-attention: {VIDEO} queries, {TEXT + VIDEO} keys", True)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (0, [(VIDEO, True), (2 * TEXT, False)]),
        (TEXT, [(TEXT, False), (VIDEO, True), (TEXT, False)]),
        (2 * TEXT, [(2 * TEXT, False), (VIDEO, True)]),
    ],
    ids=["first", "middle", "last"],
)
def test_rows_cut_from_the_sequence_they_ask_are_video_and_those_around_them_context(start, expected):
    def cut(x):
        return attend(heads(x[:, start : start + VIDEO]), heads(x), heads(x))

    found = site(cut, rows(VIDEO + 2 * TEXT))
    assert summary(found) == expected
    assert not found.has_context_queries


def test_rows_that_ask_a_later_cut_of_the_sequence_are_cross_attention():
    def ask_what_follows(x):
        return attend(heads(x[:, :VIDEO]), heads(x[:, TEXT:]), heads(x[:, TEXT:]))

    (found,) = decide(ask_what_follows, rows(2 * VIDEO))
    assert isinstance(found, Rejection)
    assert (found.reason, found.by_design) == (f"cross-attention: {VIDEO} queries, {2 * VIDEO - TEXT} keys", True)


def test_operands_made_before_a_graph_break_are_not_called_cross_attention():
    operands = [torch.randn(BATCH, HEADS, VIDEO, CHANNELS) for _ in range(3)]
    assert summary(site(lambda q, k, v: attend(q, k, v), *operands)) == [(VIDEO, True)]


def test_queries_among_mostly_context_keys_are_declined_with_advice():
    (found,) = decide(video_asks, rows(3 * VIDEO), rows(VIDEO))
    assert isinstance(found, Rejection)
    assert found.reason == (
        f"more context than max_context_ratio={CONFIG.max_context_ratio}: {VIDEO} queries are among {4 * VIDEO} keys"
    )
    assert (found.hint, found.by_design) == ("raise max_context_ratio to include it", False)


def rotary(x, cos, sin):
    q = heads(x) * cos + heads(x).flip(-1) * sin
    return attend(q, q, heads(x))


def by_matrix(x, pe):
    """FLUX: each pair of channels is multiplied by a matrix of its position."""
    pairs = heads(x).reshape(BATCH, HEADS, -1, CHANNELS // 2, 1, 2)
    q = (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).reshape(BATCH, HEADS, -1, CHANNELS)
    return attend(q, q, heads(x))


def by_complex_numbers(x, freqs):
    pairs = torch.view_as_complex(heads(x).reshape(BATCH, HEADS, -1, CHANNELS // 2, 2))
    q = torch.view_as_real(torch.view_as_complex(freqs) * pairs).flatten(-2)
    return attend(q, q, heads(x))


def positions_first(x, phases):
    q = phases * heads(x)
    return attend(q, heads(x), heads(x))


def added_to_queries_and_keys(x, table):
    """DETR: positions are added before the projections."""
    weight = torch.eye(WIDTH)
    q = heads(F.linear(table + x, weight))
    return attend(q, heads(F.linear(table + x, weight)), heads(F.linear(x, weight)))


def gated_values(x, gate):
    return attend(heads(x), heads(x), gate * heads(x))


def joined_apart(x, y, pe):
    """Double-stream blocks join queries, keys and values each by itself."""
    q, v = (torch.cat((heads(y * each), heads(x * each)), 2) for each in (1.5, 2.5))
    return attend(pe * q, pe * q, v)


def merged_axes(x, table):
    """Frames and places are one axis only in the attention."""
    q, v = (heads(F.linear(x, torch.eye(WIDTH)).unflatten(1, (5, 9)).mul(each).flatten(1, 2)) for each in (2, 3))
    return attend(q, q, v)


def convolved(x, table):
    q, k, v = (F.conv1d(x.transpose(1, 2), torch.ones(WIDTH, WIDTH, 1)).transpose(1, 2) for _ in range(3))
    return attend(heads(q), heads(k), heads(v))


SAME_ROWS = {
    "rotary": (rotary, (torch.randn(VIDEO, CHANNELS), torch.randn(VIDEO, CHANNELS))),
    "matrices": (by_matrix, (torch.randn(1, 1, VIDEO, CHANNELS // 2, 2, 2),)),
    "complex numbers": (by_complex_numbers, (torch.randn(1, 1, VIDEO, CHANNELS // 2, 2),)),
    "positions first": (positions_first, (torch.randn(BATCH, HEADS, VIDEO, CHANNELS),)),
    "positions for all": (positions_first, (torch.randn(VIDEO, 1),)),
    "added": (added_to_queries_and_keys, (rows(VIDEO),)),
    "gated values": (gated_values, (torch.randn(BATCH, HEADS, VIDEO, CHANNELS),)),
    "other operands": (lambda a, b: attend(heads(a * 2), heads(a), heads(a + b)), (rows(VIDEO),)),
    "other operands first": (lambda a, b: attend(heads(a * 2), heads(a), heads(b + a)), (rows(VIDEO),)),
    "merged axes": (merged_axes, (rows(VIDEO),)),
    "convolutions": (convolved, (rows(VIDEO),)),
}


@pytest.mark.parametrize("case", SAME_ROWS)
def test_what_is_multiplied_or_added_to_the_rows_is_not_mistaken_for_another_stream(case):
    function, tables = SAME_ROWS[case]
    assert summary(site(function, rows(VIDEO), *tables)) == [(VIDEO, True)]


def test_what_is_joined_for_queries_and_for_values_apart_is_one_stream():
    positions = torch.randn(1, 1, TEXT + VIDEO, CHANNELS)
    assert summary(site(joined_apart, rows(VIDEO), rows(TEXT), positions)) == [(TEXT, False), (VIDEO, True)]


def run_time_length(x):
    kept = x[0, 0].nonzero()[:, 0]
    torch._check(kept.shape[0] > 0)
    taken = torch.zeros(BATCH, kept.shape[0], WIDTH)
    return self_attention(taken)


DECLINED: dict[str, tuple[Callable[[], list[AttentionSite | Rejection]], str, str, bool]] = {
    "other stream": (
        lambda: decide(cross, rows(VIDEO), rows(VIDEO)),
        "cross-attention: queries and values come from l_q_ and l_kv_",
        "",
        True,
    ),
    "run-time length": (
        lambda: decide(run_time_length, rows(VIDEO)),
        "its length is known only at run time",
        "compile with fullgraph=True and static lengths",
        False,
    ),
    "short video": (
        lambda: decide(text_first, rows(TEXT), rows(39)),
        "short: 39 video tokens",
        "lower min_tokens=40 to include it",
        True,
    ),
    "too many clusters": (
        lambda: decide(text_first, rows(TEXT), rows(VIDEO), config=SparseConfig(min_tokens=40, q_clusters=46)),
        "46 clusters for 45 video tokens",
        'use q_clusters="auto" and k_clusters="auto"',
        False,
    ),
    "dense layer": (
        lambda: decide(Blocks(1, 0), rows(VIDEO), config=SparseConfig(min_tokens=40)),
        "among the first dense_layers=1 layers",
        "set dense_layers=0 to include it",
        True,
    ),
    "declined before": (
        lambda: decide(lambda x: self_attention(x, is_causal=True), rows(VIDEO)),
        "causal attention",
        "",
        True,
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_stays_dense_says_why_and_what_to_do(case):
    decide_it, reason, hint, by_design = DECLINED[case]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = decide_it()[-1]
    assert isinstance(found, Rejection)
    assert (found.reason, found.hint, found.by_design) == (reason, hint, by_design)


@pytest.mark.parametrize("clusters", [{"q_clusters": 46}, {"k_clusters": 46}], ids=["queries", "keys"])
def test_exactly_as_many_clusters_as_tokens_are_the_most(clusters):
    config = SparseConfig(min_tokens=40, dense_layers=0, **clusters)
    (declined,) = decide(lambda x: self_attention(x), rows(45), config=config)
    assert isinstance(declined, Rejection)
    torch._dynamo.reset()
    assert site(lambda x: self_attention(x), rows(46), config=config)


class Attend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self_attention(x).transpose(1, 2).flatten(2)


class Twice(nn.Module):
    """A block with two self-attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attend(), Attend()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn2(self.attn1(x))


class Blocks(nn.Module):
    """Two block lists: the second runs after the first and counts on."""

    def __init__(self, double: int, single: int) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Attend() for _ in range(double)])
        self.single_transformer_blocks = nn.ModuleList([Twice() for _ in range(single)])
        self.refiner_blocks = nn.ModuleList([Attend()])

    def forward(self, x: Tensor) -> Tensor:
        short = self.refiner_blocks[0](x[:, :TEXT])
        for block in [*self.transformer_blocks, *self.single_transformer_blocks]:
            x = block(x)
        return x + short.mean()


ORDER = [
    "transformer_blocks.0",
    "transformer_blocks.1",
    "single_transformer_blocks.0.attn1",
    "single_transformer_blocks.0.attn2",
    "single_transformer_blocks.1.attn1",
    "single_transformer_blocks.1.attn2",
]


@pytest.mark.parametrize(("dense_layers", "first_sparse"), [(0, 0), (1, 1), (2, 2), (3, 4), (4, 6), (9, 6)])
def test_dense_layers_counts_layers_in_the_order_in_which_they_run(dense_layers, first_sparse):
    config = SparseConfig(min_tokens=40, dense_layers=dense_layers)
    decided = decide(Blocks(2, 2), rows(VIDEO), config=config)
    assert [each.path for each in decided] == ["refiner_blocks.0", *ORDER]
    assert [each.path for each in decided if isinstance(each, AttentionSite)] == ORDER[first_sparse:]


def test_a_layer_without_a_number_is_left_to_the_run_time():
    assert site(Twice().attn1, rows(VIDEO), config=SparseConfig(min_tokens=40, dense_layers=9)).layer == ""
