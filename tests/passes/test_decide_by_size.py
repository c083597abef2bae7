"""What is decided by a size holds for every call of the graph: another graph is made where it would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from svg2_compile.passes.config import MANY_TOKENS, SparseConfig
from svg2_compile.passes.records import Rejection
from svg2_compile.passes.sparsify import Sparsified, sparsify

WIDTH, HEADS = 16, 2
CONFIG = SparseConfig(min_tokens=1000, dense_layers=0)
AUTO = SparseConfig()


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Compiled:
    """A function, and what was decided about each graph that Dynamo made of it."""

    def __init__(self, function: Callable[..., Tensor], config: SparseConfig = CONFIG, is_open: bool = False) -> None:
        """Args: ``is_open`` where every length is marked as dynamic; fixing one would be an error then."""
        self.graphs: list[Sparsified] = []
        self._config, self._is_open = config, is_open
        self._compiled = torch.compile(function, backend=self._backend, fullgraph=True)

    def _backend(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(sparsify(gm, self._config))
        return gm.forward

    def __call__(self, *args: Tensor) -> Sparsified | None:
        """Run it, and return what was decided about the new graph; None where an old one served."""
        before = len(self.graphs)
        for each in args if self._is_open else ():
            torch._dynamo.mark_dynamic(each, 1)
        with torch.no_grad():
            self._compiled(*args)
        return self.graphs[-1] if len(self.graphs) > before else None


def rows(count: int) -> Tensor:
    return torch.randn(1, count, WIDTH)


def attend(x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
    q, k = (each.view(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for each in (x, x if y is None else y))
    return F.scaled_dot_product_attention(q, k, k, **options)


def joined(text: Tensor, video: Tensor) -> Tensor:
    return attend(torch.cat((text, video), 1))


def of(found: Sparsified | None) -> tuple[int, int] | str:
    """Return the cluster counts of the one attention, or why it is dense."""
    assert found is not None
    (decision,) = found.decisions
    return decision.reason if isinstance(decision, Rejection) else (decision.q_clusters, decision.k_clusters)


@given(st.integers(1, MANY_TOKENS + 2000))
def test_the_lengths_with_the_same_counts_are_exactly_those(tokens):
    shortest, longest = AUTO.lengths_like(tokens)
    counts = AUTO.clusters_for(tokens)
    assert AUTO.clusters_for(shortest) == counts and (shortest == 0 or AUTO.clusters_for(shortest - 1) != counts)
    if longest is None:
        assert AUTO.clusters_for(100 * MANY_TOKENS) == counts
    else:
        assert tokens <= longest and AUTO.clusters_for(longest) == counts != AUTO.clusters_for(longest + 1)


def test_ties_go_to_the_even_count_as_ever():
    assert [AUTO.clusters_for(tokens)[1] for tokens in (2475, 2476, 2625, 2624)] == [16, 17, 18, 17]
    assert AUTO.lengths_like(2500) == (2476, 2624)


def test_given_counts_serve_every_length():
    assert SparseConfig(q_clusters=3, k_clusters=5).lengths_like(4096) == (0, None)
    compiled = Compiled(attend, SparseConfig(min_tokens=100, q_clusters=3, k_clusters=5, dense_layers=0))
    assert of(compiled(rows(200))) == of(compiled(rows(300))) == (3, 5)
    assert compiled(rows(4000)) is None and compiled(rows(100)) is None


@pytest.mark.parametrize("is_open", [False, True])
def test_each_length_has_its_own_counts_whatever_came_before(is_open):
    compiled = Compiled(attend, is_open=is_open)
    for tokens in (3000, 4800, 3000, 19200, 4800, 2476):
        found = compiled(rows(tokens))
        assert found is None or of(found) == CONFIG.clusters_for(tokens)
    assert len(compiled.graphs) == 4


def test_lengths_with_the_same_counts_share_a_graph():
    compiled = Compiled(attend, is_open=True)
    assert of(compiled(rows(2500))) == (16, 17)
    assert compiled(rows(2476)) is None and compiled(rows(2624)) is None
    assert of(compiled(rows(2475))) == (16, 16) and of(compiled(rows(2625))) == (16, 18)


def test_a_short_length_does_not_make_a_long_one_dense_nor_the_other_way_round():
    compiled = Compiled(attend, SparseConfig(min_tokens=1000, q_clusters=3, k_clusters=5, dense_layers=0))
    assert "short: 600 tokens" in of(compiled(rows(600))) and "short: 700 tokens" in of(compiled(rows(700)))
    assert of(compiled(rows(1000))) == (3, 5)
    assert compiled(rows(999)) is None and compiled(rows(5000)) is None


def test_a_short_video_beside_text_does_not_make_a_long_one_dense():
    compiled = Compiled(joined, SparseConfig(min_tokens=1000, q_clusters=3, k_clusters=5, dense_layers=0), is_open=True)
    assert "short: 800 video tokens" in of(compiled(rows(300), rows(800)))
    assert of(compiled(rows(300), rows(1200))) == (3, 5)
    assert compiled(rows(250), rows(900)) is None


def test_a_length_that_decides_nothing_stays_open():
    compiled = Compiled(joined, is_open=True)
    assert of(compiled(rows(30), rows(2500))) == (16, 17)
    assert compiled(rows(300), rows(2500)) is None and compiled(rows(7), rows(2501)) is None


def test_which_rows_are_video_is_decided_for_the_lengths_at_hand():
    compiled = Compiled(joined, is_open=True)
    for text, video in ((30, 2500), (2500, 1200)):
        (site,) = compiled(rows(text), rows(video)).sites
        told = {segment.source: segment.is_video for segment in site.segments}
        assert told == {"l_text_": text > video, "l_video_": text < video}


def test_rows_of_equal_number_are_video_in_the_order_of_the_graph():
    compiled = Compiled(joined, is_open=True)
    (site,) = compiled(rows(1200), rows(1200)).sites
    assert [segment.is_video for segment in site.segments] == [True, False]
    (site,) = compiled(rows(1200), rows(1201)).sites
    assert [segment.is_video for segment in site.segments] == [False, True]


def test_too_much_context_is_decided_for_the_lengths_at_hand():
    config = SparseConfig(min_tokens=1000, q_clusters=3, k_clusters=5, dense_layers=0, max_context_ratio=0.25)
    compiled = Compiled(joined, config, is_open=True)
    counts = []
    for text in (100, 900, 300, 1000):
        found = compiled(rows(text), rows(1500))
        counts.append(None if found is None else len(found.sites[0].segments))
    assert counts == [2, 1, None, None]


def test_more_clusters_than_tokens_are_declined_for_those_lengths_only():
    config = SparseConfig(min_tokens=100, q_clusters=3, k_clusters=500, dense_layers=0)
    compiled = Compiled(attend, config, is_open=True)
    assert "500 clusters for 400 video tokens" in of(compiled(rows(400)))
    assert of(compiled(rows(500))) == (3, 500)


def of_the_last_rows(video, text):
    return attend(video[:, text.shape[1] :], video)


def test_queries_that_are_some_of_the_rows_are_found_after_other_lengths_too():
    compiled = Compiled(of_the_last_rows)
    for text, video in ((100, 2500), (90, 2400), (80, 2600), (90, 2400)):
        found = compiled(rows(text + video), rows(text))
        if found is not None:
            (site,) = found.sites
            segments = [(segment.length, segment.is_video) for segment in site.segments]
            assert segments == [(text, False), (video, True)]
    assert len(compiled.graphs) == 3
    assert "cross-attention: 500 queries" in of(compiled(rows(600), rows(100)))


def test_queries_that_are_some_of_the_rows_stay_dense_where_lengths_were_marked():
    compiled = Compiled(of_the_last_rows, is_open=True)
    assert "cross-attention: 2500 queries, 2600 keys" in of(compiled(rows(2600), rows(100)))


def test_what_is_declined_as_hand_written_is_short_for_short_lengths_only():
    def squared(x):
        scores = (x @ x.mT).softmax(-1) ** 2
        return scores @ x

    def reasons(found):
        return [(each.reason, each.by_design) for each in found.rejections]

    compiled = Compiled(squared, is_open=True)
    short, long = reasons(compiled(rows(500))), reasons(compiled(rows(1500)))
    assert [reason for reason, _ in short] == [reason for reason, _ in long]
    assert {by_design for _, by_design in short} <= {True} and {by_design for _, by_design in long} <= {False}


def test_who_promised_a_range_of_lengths_gets_one_graph_and_is_told_for_which_length_it_was_made():
    compiled = Compiled(attend)
    x = rows(2500)
    torch._dynamo.mark_dynamic(x, 1, min=2000, max=6000)
    (site,) = compiled(x).sites
    assert site.clusters_told == "16 query and 17 key clusters, chosen for 2500 tokens"


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_graph_keeps_the_choice_for_the_length_that_it_was_exported_with(strict):
    class Attention(torch.nn.Module):
        def forward(self, x):
            return attend(x)

    length = torch.export.Dim("length", min=2, max=100_000)
    with torch.no_grad():
        program = torch.export.export(Attention(), (rows(4800),), dynamic_shapes=({1: length},), strict=strict)
    (site,) = sparsify(program.module(), CONFIG, state="buffers").sites
    assert site.clusters_told == "16 query and 32 key clusters, chosen for 4800 tokens"
    given_counts = SparseConfig(min_tokens=1000, dense_layers=0, q_clusters=3, k_clusters=5)
    (site,) = sparsify(program.module(), given_counts, state="buffers").sites
    assert site.clusters_told == "3 query and 5 key clusters"
