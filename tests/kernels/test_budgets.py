"""``svg2::select_blocks`` with a budget of each head's own: a share, a floor and a cap."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import selection_cases

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.select_blocks import BUDGETS, block_logits
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.kernels.work_list import kept_keys

PROPERTY = settings(max_examples=60, deadline=None)
svg2 = torch.ops.svg2


def select(case, budgets=None, errors=None, **changes):
    """Return who attends to which key, and the statistics."""
    *arguments, statistics = dataclasses.replace(case, **changes).arguments()
    runs, counts = svg2.select_blocks(*arguments, statistics, None, errors, None, budgets)
    return kept_keys(runs, counts, 100), statistics


def errors_for(case):
    shape = *case.q_sizes.shape, case.k_sizes.shape[2]
    return 10 * torch.randn(shape, generator=torch.Generator().manual_seed(7))


@st.composite
def cases_with_budgets(draw):
    case = draw(selection_cases())
    clusters = case.k_sizes.shape[2]
    heads = []
    for _ in range(case.q_sizes.shape[1]):
        least = draw(st.integers(0, clusters))
        share = draw(st.sampled_from([0.01, 0.5, 0.9, 1.0]))
        heads.append((share, least, draw(st.integers(least, clusters))))
    return case, torch.tensor(heads, dtype=torch.float32)


@PROPERTY
@given(selection_cases(), st.booleans(), st.sampled_from([None, 1.0]))
def test_equal_budgets_of_all_heads_give_the_bits_of_none(case, routed, everything):
    errors = errors_for(case) if routed else None
    top_p, clusters = everything or case.top_p, case.k_sizes.shape[2]
    row = [top_p, math.floor(case.min_keep_ratio * clusters), clusters]
    budgets = torch.tensor([row] * case.q_sizes.shape[1], dtype=torch.float32)
    plain = select(case, errors=errors, top_p=top_p)
    # what stands beside budgets is not looked at
    ours = select(case, budgets, errors, top_p=0.37, min_keep_ratio=0.7)
    assert torch.equal(plain[0], ours[0]) and torch.equal(plain[1], ours[1])


@PROPERTY
@given(cases_with_budgets(), st.booleans())
def test_a_head_has_what_it_would_have_alone(given_case, routed):
    case, budgets = given_case
    errors = errors_for(case) if routed else None
    keys, statistics = select(case, budgets, errors)
    for head, row in enumerate(budgets):
        alone = select(case, row.expand_as(budgets).contiguous(), errors)
        assert torch.equal(keys[:, head], alone[0][:, head])
        assert torch.equal(statistics[:, head], alone[1][:, head])


@PROPERTY
@given(cases_with_budgets())
def test_the_cap_wins_over_share_and_floor_and_the_likeliest_stay(given_case):
    case, budgets = given_case
    uncapped = budgets.clone()
    uncapped[:, BUDGETS.index("most_clusters")] = case.k_sizes.shape[2]
    capped, free = (select(case, each)[0] for each in (budgets, uncapped))
    assert (capped <= free).all() and capped.any(-1).all()
    logits = block_logits(case.q_centroids, case.k_centroids, case.k_sizes, case.scale)
    ranks = logits.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    sizes = case.for_every_query_head(case.k_sizes).unsqueeze(2).expand_as(ranks)
    most = budgets[:, BUDGETS.index("most_clusters")].clamp(min=1).view(-1, 1, 1)
    within = (ranks < most) & (sizes > 0)
    keys = torch.nn.functional.pad(capped, (0, 1))
    keep = keys.gather(-1, sizes.long().cumsum(-1) - sizes) & (sizes > 0)
    of_free = torch.nn.functional.pad(free, (0, 1)).gather(-1, sizes.long().cumsum(-1) - sizes) & (sizes > 0)
    assert torch.equal(keep, of_free & within)


@PROPERTY
@given(cases_with_budgets(), st.integers(0, 2))
def test_more_of_any_number_keeps_a_superset(given_case, column):
    case, budgets = given_case
    larger = budgets.clone()
    larger[:, column] = 1.0 if column == 0 else case.k_sizes.shape[2]
    assert (select(case, budgets)[0] <= select(case, larger)[0]).all()


def test_opcheck_and_a_compiled_function():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 5, 8, generator=generator) for _ in "qk")
    sizes = torch.full((1, 2, 5), 3).int()
    statistics = torch.zeros(1, 2, 5, len(STATISTICS))
    budgets = torch.tensor([[0.4, 1, 4], [0.9, 0, 5]])
    arguments = (q, k, sizes, sizes, 1.0, 0.5, 0.0, statistics, None, None, None, budgets)
    torch.library.opcheck(svg2.select_blocks.default, arguments)
    compiled = torch.compile(lambda *each: svg2.select_blocks(*each)[1], backend="eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), svg2.select_blocks(*arguments)[1])


@pytest.mark.parametrize(
    ("budgets", "error", "words"),
    [
        (torch.zeros(3, 3), ValueError, "budgets must have shape (2, 3)"),
        (torch.zeros(2, 2), ValueError, "budgets must have shape (2, 3)"),
        (torch.zeros(2, 3, dtype=torch.float64), TypeError, "budgets must be torch.float32"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(budgets, error, words):
    x, sizes = torch.zeros(1, 2, 4, 8), torch.ones(1, 2, 4).int()
    statistics = torch.zeros(1, 2, 4, len(STATISTICS))
    with pytest.raises(error) as raised:
        svg2.select_blocks(x, x, sizes, sizes, 1.0, 0.5, 0.0, statistics, None, None, None, budgets)
    assert words in str(raised.value)


def test_half_of_the_floor_of_the_head_goes_by_mass_where_errors_choose():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 3, 8, generator=generator), torch.randn(1, 1, 40, 8, generator=generator)
    errors = 10 * torch.randn(1, 1, 3, 40, generator=generator)
    sizes = torch.ones(1, 1, 3).int(), torch.ones(1, 1, 40).int()

    def chosen(top_p, floor, budgets):
        statistics = torch.zeros(1, 1, 3, len(STATISTICS))
        runs, counts = svg2.select_blocks(q, k, *sizes, 1.0, top_p, floor, statistics, None, errors, None, budgets)
        return kept_keys(runs, counts, 40)

    plain = chosen(0.5, 0.1, None)
    assert torch.equal(chosen(0.5, 1.0, torch.tensor([[0.5, 4.0, 40.0]])), plain)
    assert not torch.equal(chosen(0.5, 0.1, torch.tensor([[0.5, 20.0, 40.0]])), plain)
