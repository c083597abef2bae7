"""A floor of a head in keys: the mean over its query clusters, and what ``svg2::select_blocks`` makes of one."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import selection_cases

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.select_blocks import block_logits
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.kernels.work_list import kept_keys

svg2 = torch.ops.svg2
PROPERTY = settings(max_examples=60, deadline=None)


def selected(case, least=None, errors=None, masses=None):
    """Return who attends to which key, and the statistics; ``least`` is one number or [B, H]."""
    *arguments, statistics = case.arguments()
    if isinstance(least, int):
        least = torch.full(case.q_sizes.shape[:2], least)
    least = None if least is None else least.int()
    runs, counts = svg2.select_blocks(*arguments, statistics, masses, errors, least)
    return kept_keys(runs, counts, 100), statistics


def keep(case, *arguments, **changes):
    """Return which clusters with keys are kept."""
    keys = torch.nn.functional.pad(selected(case, *arguments, **changes)[0], (0, 1))
    sizes = sizes_of(case).expand(-1, -1, keys.shape[2], -1).long()
    return keys.gather(-1, sizes.cumsum(-1) - sizes) & (sizes > 0)


def sizes_of(case):
    return case.for_every_query_head(case.k_sizes).unsqueeze(2)


def logits_of(case):
    return block_logits(case.q_centroids, case.k_centroids, case.k_sizes, case.scale)


@PROPERTY
@given(selection_cases(), st.integers(0, 120))
def test_every_query_cluster_has_enough_keys_and_not_one_cluster_too_many(case, least):
    plain, raised = keep(case), keep(case, least)
    before, after = ((each * sizes_of(case)).sum(-1) for each in (plain, raised))
    assert (after >= min(least, 100)).all()
    enough = before >= least
    assert torch.equal(raised[enough], plain[enough]) and (raised | ~plain).all()
    # what came last was needed
    last = logits_of(case).masked_fill(~raised, math.inf).argmin(-1, keepdim=True)
    of_last = sizes_of(case).expand_as(raised).gather(-1, last).squeeze(-1)
    assert ((after - of_last < least) | enough).all()


@PROPERTY
@given(selection_cases(), st.integers(0, 120))
def test_the_likeliest_come_first(case, least):
    raised, logits = keep(case, least), logits_of(case)
    assert (logits.masked_fill(~raised, math.inf).amin(-1) >= logits.masked_fill(raised, -math.inf).amax(-1)).all()


@PROPERTY
@given(selection_cases(), st.integers(0, 2**31), st.integers(0, 120))
def test_errors_choose_as_many_keys_as_the_floor_says(case, seed, least):
    errors = 10 * torch.randn(logits_of(case).shape, generator=torch.Generator().manual_seed(seed))
    by_errors = (keep(case, least, errors) * sizes_of(case)).sum(-1)
    budget = torch.maximum((keep(case) * sizes_of(case)).sum(-1), torch.tensor(min(least, 100)))
    assert (by_errors >= budget).all()
    assert torch.equal(keep(case, 0, errors), keep(case, None, errors))


@PROPERTY
@given(selection_cases())
def test_a_floor_of_nothing_changes_nothing_and_one_of_all_keeps_all(case):
    plain, nothing = selected(case), selected(case, 0)
    assert torch.equal(plain[0], nothing[0])
    torch.testing.assert_close(plain[1], nothing[1], rtol=1e-5, atol=1e-6)
    assert selected(case, 100)[0].all()
    everything = dataclasses.replace(case, top_p=1.0)
    assert all(map(torch.equal, selected(everything), selected(everything, 3)))


@PROPERTY
@given(selection_cases(), st.integers(0, 100))
def test_statistics_are_those_of_what_is_kept(case, least):
    keys, statistics = selected(case, least)
    density, mass = (statistics[..., STATISTICS.index(name)].sum(-1) for name in ("density_sum", "kept_mass_sum"))
    share = case.q_sizes / case.q_sizes.sum(-1, keepdim=True)
    torch.testing.assert_close(density, (share * keys.sum(-1) / 100).sum(-1), rtol=1e-5, atol=1e-6)
    of_keep = (case.probability() * keep(case, least)).sum(-1)
    torch.testing.assert_close(mass.double(), (share * of_keep).sum(-1), rtol=0, atol=10 * case.tolerance())


@PROPERTY
@given(selection_cases())
def test_the_floor_is_the_mean_over_the_queries_of_a_head(case):
    keys, statistics = selected(case)
    floors = torch.ones(*case.q_sizes.shape[:2], 2)
    least = svg2.least_keys_(statistics, case.k_sizes, floors)
    mean = (case.q_sizes * keys.sum(-1)).sum(-1).double() / case.q_sizes.sum(-1)
    assert least.dtype == torch.int32 and least.shape == case.q_sizes.shape[:2]
    assert (least - mean).abs().max() <= 0.5 + 1e-4
    torch.testing.assert_close(floors[..., 1].double(), 1 + mean / 100, rtol=0, atol=1e-5)
    assert (floors[..., 0] == 2).all()
    # of a head, the floor raises some query clusters or none, and never all
    kept = (keep(case, least) * sizes_of(case)).sum(-1)
    unchanged = (kept == (keep(case) * sizes_of(case)).sum(-1)) | (case.q_sizes == 0)
    has_more = (keys.sum(-1) > least.unsqueeze(-1)) & (case.q_sizes > 0)
    assert (unchanged | ~has_more).all() and (kept >= least.unsqueeze(-1)).all()


def test_of_a_head_without_keys_the_floor_is_0():
    statistics = torch.full((1, 2, 3, len(STATISTICS)), math.nan)
    assert torch.equal(
        svg2.least_keys_(statistics, torch.zeros(1, 1, 4).int(), torch.zeros(1, 2, 2)), torch.zeros(1, 2).int()
    )


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(2, 4, 3, 4), ValueError, r"call_statistics must have shape \(2, 4, 3, 5\)"),
        (0, torch.zeros(2, 4, 3, 5).half(), TypeError, "call_statistics must be .* got torch.float16"),
        (1, torch.zeros(2, 3, 7).int(), ValueError, "multiple of the key/value heads, got 4 and 3"),
        (1, torch.zeros(2, 2, 7), TypeError, "k_sizes must be torch.int32, got torch.float32"),
        (2, torch.zeros(2, 4, 3), ValueError, r"floors must have shape \(2, 4, 2\), got \(2, 4, 3\)"),
        (2, torch.zeros(2, 4, 2).double(), TypeError, "floors must be torch.float32, got torch.float64"),
    ],
)
def test_bad_input_is_named(position, value, error, message):
    arguments = [torch.zeros(2, 4, 3, 5), torch.ones(2, 2, 7).int(), torch.zeros(2, 4, 2)]
    arguments[position] = value
    with pytest.raises(error, match=message):
        svg2.least_keys_(*arguments)


@pytest.mark.parametrize(
    ("least", "error", "message"),
    [
        (torch.zeros(2).int(), ValueError, r"least_keys must have 2 axes|least_keys must have shape \(1, 2\)"),
        (torch.zeros(1, 2), TypeError, "least_keys must be torch.int32, got torch.float32"),
    ],
)
def test_a_bad_floor_of_a_selection_is_named(least, error, message):
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)
    sizes = torch.ones(1, 2, 3).int(), torch.ones(1, 2, 5).int()
    with pytest.raises(error, match=message):
        svg2.select_blocks(q, k, *sizes, 1.0, 0.9, 0.0, torch.zeros(1, 2, 3, len(STATISTICS)), None, None, least)


def test_opcheck():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, count, 4, generator=generator) for count in (3, 5))
    sizes = torch.ones(1, 2, 3).int(), torch.ones(1, 2, 5).int()
    statistics, floors = torch.rand(1, 2, 3, len(STATISTICS), generator=generator), torch.zeros(1, 2, 2)
    torch.library.opcheck(svg2.least_keys_.default, (statistics, sizes[1], floors))
    least = torch.full((1, 2), 3).int()
    torch.library.opcheck(
        svg2.select_blocks.default, (q, k, *sizes, 1.0, 0.5, 0.0, statistics.clone(), None, None, least)
    )
