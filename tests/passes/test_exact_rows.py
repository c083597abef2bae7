"""Rows that ``exact_rows`` names are computed as dense attention computes them, and every query keeps them as keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewritten_graphs import BATCH, CHANNELS, HEADS, TEXT, VIDEO, attend, joint_inputs, key_mask, trace, zeros
from torch import Tensor, nn

from svg2_compile.options import parse_options
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.records import Rejection, Segment
from svg2_compile.passes.sparsify import Sparsified, sparsify
from svg2_compile.passes.split_exact_rows import split_exact_rows

WIDTH = HEADS * CHANNELS
ROWS = TEXT + VIDEO
LITTLE = {"top_p": 0.2, "min_keep_ratio": 0.0, "min_tokens": 20, "dense_layers": 0, "q_clusters": 4, "k_clusters": 6}
SMALL = 1e-4


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Attention(nn.Module):
    """One attention over text and video, over video alone, or over both where only the video asks."""

    def __init__(self, how: str = "one sequence") -> None:
        super().__init__()
        self.how, self.qkv = how, nn.Linear(WIDTH, 3 * WIDTH)
        with torch.no_grad():
            self.qkv.weight *= 6  # a peaked softmax

    def forward(self, text: Tensor, video: Tensor, mask: Tensor | None = None) -> Tensor:
        x = torch.cat((text, video), 1) if self.how != "video" else video
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        q = q[:, :, TEXT:] if self.how == "video asks" else q
        return attend(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def computed(
    how: str, exact_rows: Any, mask: Tensor | None = None, **options: Any
) -> tuple[Sparsified, Tensor, Tensor]:
    """Return the plan, its output, and dense attention in fp64."""
    torch.manual_seed(0)
    model = Attention(how).eval()
    text, video = joint_inputs()
    inputs = {"text": text, "video": video} | ({} if mask is None else {"mask": mask})
    gm, given, _ = trace(model, inputs)
    torch._dynamo.reset()
    plan = sparsify(gm, SparseConfig(**LITTLE | options, exact_rows=exact_rows))
    with torch.no_grad():
        output = plan.gm(*given, *zeros(plan))[0]
        doubles = {name: each.double() if each.is_floating_point() else each for name, each in inputs.items()}
        exact = model.double()(**doubles)
    return plan, output, exact


def far(output: Tensor, exact: Tensor) -> Tensor:
    """Return which rows differ from dense attention by more than rounding."""
    return (output - exact).abs().amax((0, 2)) > SMALL * exact.abs().max()


RANGES = {
    "first": ((0, 7),),
    "last": ((-7, None),),
    "middle": ((20, 31),),
    "several": ((0, 3), (15, 20), (-4, None)),
    "overlapping": ((10, 25), (20, 30)),
    "beyond the end": ((40, 1000),),
    "from text into video": ((5, 17),),
}


@pytest.mark.parametrize("masked", [None, "bool", "added"], ids=["no mask", "bool", "added"])
@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("how", ["one sequence", "video", "video asks"])
def test_exact_rows_are_dense_and_the_others_are_not(how, name, masked):
    keys = VIDEO if how == "video" else ROWS
    mask = None if masked is None else key_mask(slice(12, 16), keys)
    if masked == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -1e4)
    plan, output, exact = computed(how, RANGES[name], mask)
    (site,) = plan.sites
    named = torch.zeros(keys, dtype=torch.bool)
    for start, end in RANGES[name]:
        named[start:end] = True
    if how != "video":
        named[:TEXT] = True  # rows that the graph tells are context are exact anyway
    assert sum(int(each.length) for each in site.segments) == keys and site.token_hint == int((~named).sum())
    rows = named[TEXT:] if how == "video asks" else named
    differs = far(output, exact)
    assert not differs[rows].any()
    assert differs[~rows].any()


@pytest.mark.parametrize("how", ["one sequence", "video", "video asks"])
def test_full_selection_with_exact_rows_is_dense_attention(how):
    _, output, exact = computed(how, ((15, 20), (-6, None)), top_p=1.0)
    assert not far(output, exact).any()


class Given(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)


def test_every_query_keeps_the_exact_keys():
    """Only one key has a value: a query that does not keep it gives nothing."""
    q, k, v = torch.randn(1, 1, VIDEO, 4), torch.randn(1, 1, VIDEO, 4) * 0.01, torch.zeros(1, 1, VIDEO, 4)
    v[:, :, 30] = 1000.0
    gm, given, expected = trace(Given(), {"q": q, "k": k, "v": v})
    torch._dynamo.reset()
    outputs = []
    for rows in (((30, 31),), ()):
        plan = sparsify(gm, SparseConfig(**LITTLE | {"top_p": 1e-6}, exact_rows=rows))
        with torch.no_grad():
            outputs.append(plan.gm(*given, *zeros(plan))[0])
    kept, left = outputs
    others = torch.arange(VIDEO) != 30
    # of fewer keys, the one weighs more
    assert (kept[:, :, others] > 1.01 * expected[:, :, others]).all()
    torch.testing.assert_close(kept[:, :, 30], expected[:, :, 30])
    assert (left == 0).any()


COMPENSATED = [{"compensate": "centroids"}, {"compensate": "centroids", "route": "error"}]
COMPENSATIONS = pytest.mark.parametrize("options", COMPENSATED, ids=["compensated", "routed"])


@COMPENSATIONS
@pytest.mark.parametrize("how", ["one sequence", "video", "video asks"])
def test_exact_rows_are_dense_beside_means_and_the_others_nearer_to_it(how, options):
    ranges = RANGES["several"]
    _, plain, exact = computed(how, ranges)
    plan, output, _ = computed(how, ranges, **options)
    assert len(plan.sites) == 1
    is_exact = ~far(plain, exact)
    assert is_exact.any() and not far(output, exact)[is_exact].any()
    assert (output - exact)[:, ~is_exact].norm() < (plain - exact)[:, ~is_exact].norm()


@COMPENSATIONS
def test_exact_keys_are_in_no_mean(options):
    """Keys that are alike have a mean that says all, unless keys that every query keeps were in it too."""
    kinds = torch.arange(VIDEO) % 3
    q, k, v = torch.randn(1, 1, VIDEO, 4), 3 * torch.eye(4)[kinds][None, None], torch.randn(3, 4)[kinds][None, None]
    for start, end in RANGES["several"]:
        k[:, :, start:end] += 2
        v[:, :, start:end] -= 50
    gm, given, expected = trace(Given(), {"q": q, "k": k, "v": v})
    torch._dynamo.reset()
    least = LITTLE | {"top_p": 1e-6}
    for each, is_dense in ((least, False), (least | options, True)):
        plan = sparsify(gm, SparseConfig(**each, exact_rows=RANGES["several"]))
        with torch.no_grad():
            output = plan.gm(*given, *zeros(plan))[0]
        assert torch.allclose(output, expected, rtol=1e-4, atol=1e-4) is is_dense


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_rows_are_named_by_their_place_and_nothing_is_lost(parts, data):
    segments = tuple(Segment(length, is_video, f"n{place}", 1) for place, (is_video, length) in enumerate(parts))
    total = sum(length for _, length in parts)
    bound = st.integers(-total - 3, total + 3)
    ranges = tuple(data.draw(st.lists(st.tuples(bound, st.one_of(st.none(), bound)), max_size=3)))
    found = split_exact_rows(segments, ranges)
    assert sum(each.length for each in found) == total and all(each.length > 0 for each in found)
    named = torch.zeros(total, dtype=torch.bool)
    for start, end in ranges:
        named[start:end] = True
    was_video = torch.cat([torch.full((length,), is_video) for is_video, length in parts])
    kinds = [torch.tensor([[each.is_video, each.is_exact]]).expand(each.length, 2) for each in found]
    is_video, is_exact = torch.cat(kinds).unbind(1)
    assert torch.equal(is_video, was_video & ~named)
    assert torch.equal(is_exact, was_video & named)


def test_rows_that_are_all_exact_leave_nothing_to_make_sparse():
    plan, output, exact = computed("video", ((0, None),))
    (rejection,) = plan.rejections
    assert (rejection.reason, rejection.by_design) == ("exact_rows names all of its video rows", True)
    assert not far(output, exact).any()


def test_too_few_rows_that_are_left_are_short():
    plan, _, _ = computed("video", ((10, None),))
    assert [each.reason for each in plan.rejections] == ["short: 10 video tokens"]


def compiled(model: nn.Module, found: list[Sparsified], exact_rows: Any, **options: Any) -> Any:
    """Return the model, compiled with the rewrite alone; its plans come into ``found``."""

    def backend(gm: Any, _: list[Any]) -> Any:
        plan = sparsify(gm, SparseConfig(**LITTLE | options, exact_rows=exact_rows))
        found.append(plan)
        return lambda *args: plan.gm(*args, *zeros(plan))

    return torch.compile(model, backend=backend, fullgraph=True)


@pytest.mark.parametrize("name", [name for name in RANGES if name != "beyond the end"])
@pytest.mark.parametrize("how", ["one sequence", "video"])
def test_rows_of_a_symbolic_length_are_exact_at_each_length(how, name):
    torch.manual_seed(0)
    model, found = Attention(how).eval(), list[Sparsified]()
    run, exact_model = compiled(model, found, RANGES[name]), Attention(how).eval().double()
    exact_model.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    for length in (VIDEO, VIDEO + 9):
        text, video = joint_inputs(video=length)
        torch._dynamo.mark_dynamic(video, 1)
        with torch.no_grad():
            differs = far(run(text, video), exact_model(text.double(), video.double()))
        rows = length if how == "video" else TEXT + length
        named = torch.zeros(rows, dtype=torch.bool)
        for start, end in RANGES[name]:
            named[start:end] = True
        if how != "video":
            named[:TEXT] = True
        assert not differs[named].any()
        assert differs[~named].any()
    assert len(found) == 1 and len(found[0].sites) == 1


def test_the_same_graph_serves_no_length_at_which_named_rows_meet():
    model, found = Attention("video").eval(), list[Sparsified]()
    run = compiled(model, found, ((0, 8), (-8, None)))
    for length in (VIDEO, 16, 12):
        text, video = joint_inputs(video=length)
        torch._dynamo.mark_dynamic(video, 1)
        with torch.no_grad():
            assert bool(far(run(text, video), model(text, video)).any()) is (length == VIDEO)
    assert [len(plan.sites) for plan in found] == [1, 0]


@pytest.mark.parametrize(
    ("how", "exact_rows"),
    [
        ("both", ((0, 5),)),
        ("both", ((-5, None),)),
        ("video", ((20, -20),)),
        ("video", ((30, 1000),)),
        ("video asks", ((20, 25),)),
    ],
)
def test_rows_whose_place_only_a_run_tells_are_declined_with_advice(how, exact_rows):
    model, found = Attention("one sequence" if how == "both" else how).eval(), list[Sparsified]()
    text, video = joint_inputs()
    torch._dynamo.mark_dynamic(video, 1)
    if how == "both":
        torch._dynamo.mark_dynamic(text, 1)
    with torch.no_grad():
        output = compiled(model, found, exact_rows)(text, video)
        assert not far(output, model(text, video)).any()
    (rejection,) = found[0].rejections
    assert isinstance(rejection, Rejection) and not rejection.by_design
    assert "which rows exact_rows names is known only at run time" in rejection.reason
    assert "dynamic=False" in rejection.hint


def test_a_graph_without_exact_rows_is_what_it_was():
    plan, _, _ = computed("one sequence", ())
    assert [(each.length, each.is_video) for each in plan.sites[0].segments] == [(TEXT, False), (VIDEO, True)]
    assert plan.sites[0].exact_tokens == 0


def test_exact_rows_can_be_written_on_the_command_line():
    options = parse_options("top_p=0.9,exact_rows=0:333/-50:,seed=3")
    assert SparseConfig(**options).exact_rows == ((0, 333), (-50, None))


def test_batches_share_the_rows():
    plan, _, _ = computed("video", ((0, 7),))
    assert (plan.sites[0].batch, plan.sites[0].exact_tokens, plan.sites[0].tokens) == (BATCH, 7, VIDEO - 7)
