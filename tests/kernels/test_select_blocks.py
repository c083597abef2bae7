"""``svg2::select_blocks``: the kept key clusters carry top_p of the mass, and no more than they need to."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import Case, selection_cases
from sizes_of_clusters import random_sizes

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.select_blocks import LEAST_MASS, block_logits
from svg2_compile.kernels.selection_statistics import TILE_KEYS
from svg2_compile.kernels.work_list import kept_keys, kept_runs_reference

PROPERTY = settings(max_examples=60, deadline=None)


@PROPERTY
@given(selection_cases())
def test_the_runs_are_the_kept_clusters(case):
    runs, counts = case.select()
    blocks = case.for_every_query_head(case.k_sizes).unsqueeze(2)
    keep = case.keep()
    expected = kept_runs_reference(keep, case.k_sizes)
    assert torch.equal(runs, expected.runs)
    assert torch.equal(counts, expected.counts)
    assert torch.equal(kept_keys(runs, counts, 100).sum(-1), (keep * blocks).sum(-1))


@PROPERTY
@given(selection_cases())
def test_kept_mass_reaches_top_p(case):
    kept_mass = (case.probability() * case.keep()).sum(-1)
    assert (kept_mass >= case.top_p - case.tolerance()).all()


@PROPERTY
@given(selection_cases())
def test_no_kept_cluster_could_be_spared(case):
    keep = case.keep(min_keep_ratio=0.0)
    probability = case.probability()
    weakest = probability.masked_fill(~keep, math.inf).amin(-1)
    mass_without_it = (probability * keep).sum(-1) - weakest
    assert (mass_without_it <= case.top_p + case.tolerance()).all()


@PROPERTY
@given(selection_cases())
def test_kept_clusters_are_the_likeliest(case):
    probability, keep = case.probability(), case.keep()
    weakest_kept = probability.masked_fill(~keep, math.inf).amin(-1)
    strongest_dropped = probability.masked_fill(keep, 0).amax(-1)
    assert (weakest_kept >= strongest_dropped - case.tolerance()).all()


@PROPERTY
@given(selection_cases())
def test_every_row_keeps_a_non_empty_cluster(case):
    occupied = case.for_every_query_head(case.k_sizes).unsqueeze(2) > 0
    assert (case.keep() & occupied).any(-1).all()


@PROPERTY
@given(selection_cases())
def test_the_floor_keeps_its_share_of_the_clusters(case):
    at_least = max(1, math.floor(case.min_keep_ratio * case.k_sizes.shape[-1]))
    assert (case.keep().sum(-1) >= at_least).all()


@PROPERTY
@given(selection_cases())
def test_the_floor_keeps_no_cluster_beyond_its_share(case):
    floor = math.floor(case.min_keep_ratio * case.k_sizes.shape[-1])
    assert torch.equal(case.keep().sum(-1), case.keep(min_keep_ratio=0.0).sum(-1).clamp(min=floor))


@PROPERTY
@given(selection_cases())
def test_a_larger_top_p_keeps_a_superset(case):
    smaller, larger = case.keep(top_p=0.5 * case.top_p), case.keep()
    assert (smaller <= larger).all()


@PROPERTY
@given(selection_cases(), st.sampled_from([1.0, 1.5]))
def test_top_p_of_one_keeps_everything(case, top_p):
    assert case.keep(top_p=top_p).all()


@PROPERTY
@given(selection_cases())
def test_grouped_key_heads_equal_repeated_ones(case):
    repeated = dataclasses.replace(
        case,
        k_centroids=case.for_every_query_head(case.k_centroids),
        k_sizes=case.for_every_query_head(case.k_sizes),
    )
    assert torch.equal(case.keep(), repeated.keep())


@PROPERTY
@given(selection_cases())
def test_an_empty_cluster_cannot_influence_the_rest(case):
    empty = (case.k_sizes == 0).unsqueeze(-1)
    assert torch.equal(case.keep(k_centroids=case.k_centroids.masked_fill(empty, math.nan)), case.keep())


@PROPERTY
@given(selection_cases())
def test_statistics_are_density_kept_mass_and_padding(case):
    keep, probability = case.keep(), case.probability()
    q_share = case.q_sizes.double() / 100
    kept = (keep * case.for_every_query_head(case.k_sizes).unsqueeze(2)).sum(-1)
    mass = (probability * keep).sum(-1)
    full, runs = case.select()[1][..., 1], case.select()[1][..., 0]
    tiles = (full + runs + 7) // 8
    expected = torch.stack(
        [
            torch.ones_like(mass),
            q_share * kept / 100,
            q_share * mass,
            mass.masked_fill(case.q_sizes == 0, 1.0),
            q_share * tiles * TILE_KEYS / 100,
        ],
        dim=-1,
    )
    # each row is as accurate as its sum over key clusters, plus one rounding of the result
    atol = case.tolerance() + torch.finfo(torch.float32).eps * float(expected.max())
    torch.testing.assert_close(case.statistics().double(), expected, rtol=0, atol=atol)


def near_a_boundary(case, masses):
    """Return for which rows rounding may choose otherwise.

    Those where the mass before a cluster is near top_p, where the last cluster kept is nearly as likely as the first
    one dropped, and where it has no mass in fp32, which several may share.
    """
    ranked = masses.double().sort(-1, descending=True).values
    before = ranked.cumsum(-1) - ranked
    near_top_p = (before - case.top_p).abs().amin(-1) <= case.tolerance()
    logits = block_logits(case.q_centroids.double(), case.k_centroids.double(), case.k_sizes, case.scale)
    occupied = logits.isfinite()
    is_kept, is_dropped = case.keep() & occupied, ~case.keep() & occupied
    gap = logits.masked_fill(~is_kept, math.inf).amin(-1) - logits.masked_fill(~is_dropped, -math.inf).amax(-1)
    # Exact ties stay exact, and go to the lowest index.
    near_tie = (gap != 0) & (gap.abs() <= case.tolerance())
    return near_top_p | near_tie | (masses.masked_fill(~is_kept, math.inf).amin(-1) <= LEAST_MASS)


def random_case():
    generator = torch.Generator().manual_seed(0)
    return Case(
        q_centroids=torch.randn(2, 4, 5, 8, generator=generator),
        k_centroids=torch.randn(2, 2, 7, 8, generator=generator),
        q_sizes=random_sizes(generator, 2, 4, 5, 63, "uneven"),
        k_sizes=random_sizes(generator, 2, 2, 7, 63, "uneven"),
    )


def test_given_masses_of_the_centroids_select_what_the_centroids_do():
    compared = {"sharp": [], "flat": []}

    # The same examples every time: chance must not decide how many of them are compared.
    @settings(PROPERTY, derandomize=True, database=None)
    @given(selection_cases())
    def check(case):
        *arguments, statistics = case.arguments()
        logits = block_logits(case.q_centroids, case.k_centroids, case.k_sizes, case.scale)
        masses = logits.softmax(-1)
        runs, counts = torch.ops.svg2.select_blocks(*arguments, statistics, masses)
        doubtful = near_a_boundary(case, masses)
        kept, expected = kept_keys(runs, counts, 100), kept_keys(*case.select(), 100)
        assert ((kept == expected).all(-1) | doubtful).all()
        tolerance = case.tolerance() + torch.finfo(torch.float32).eps * 4
        expected = case.statistics()
        close = ((statistics - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all(-1)
        assert (close | doubtful).all()
        sharp = masses.amax(-1) > 0.9
        compared["sharp"] += (~doubtful[sharp]).tolist()
        compared["flat"] += (~doubtful[~sharp]).tolist()

    check()
    for name, rows in compared.items():
        assert rows and sum(rows) / len(rows) > 0.5, (name, sum(rows), len(rows))


def test_given_masses_need_not_be_what_the_centroids_say():
    case = random_case()
    masses = torch.zeros(2, 4, 5, 7)
    masses[..., 6], masses[..., 2] = 0.6, 0.4
    *arguments, statistics = dataclasses.replace(case, top_p=0.5).arguments()
    runs, counts = torch.ops.svg2.select_blocks(*arguments, statistics, masses)
    sizes = case.for_every_query_head(case.k_sizes)
    assert (kept_keys(runs, counts, 63).sum(-1) == sizes[..., 6:]).all()
    assert statistics[..., 3][case.q_sizes > 0].tolist() == pytest.approx([0.6] * int((case.q_sizes > 0).sum()))


def test_density_weighs_clusters_by_their_tokens():
    axes = torch.eye(2).view(1, 1, 2, 2)
    case = Case(
        q_centroids=100 * axes,
        k_centroids=axes,
        q_sizes=torch.tensor([[[3, 1]]], dtype=torch.int32),
        k_sizes=torch.tensor([[[1, 3]]], dtype=torch.int32),
        scale=1.0,
    )
    assert torch.equal(case.keep(), torch.eye(2, dtype=torch.bool).view(1, 1, 2, 2))
    assert case.statistics()[0, 0, :, 1].tolist() == [3 * 1 / 16, 1 * 3 / 16]


def test_statistics_accumulate_over_calls():
    arguments = random_case().arguments()
    torch.ops.svg2.select_blocks(*arguments)
    once = arguments[-1].clone()
    torch.ops.svg2.select_blocks(*arguments)
    assert torch.equal(arguments[-1], 2 * once)


def test_equal_probabilities_keep_the_lowest_indices():
    case = Case(
        q_centroids=torch.zeros(1, 1, 1, 4),
        k_centroids=torch.zeros(1, 1, 8, 4),
        q_sizes=torch.full((1, 1, 1), 8, dtype=torch.int32),
        k_sizes=torch.ones(1, 1, 8, dtype=torch.int32),
        top_p=0.5,
    )
    # The cluster that crosses top_p is kept: the fifth still has only 0.5 before it.
    assert case.keep().flatten().tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"top_p": 0.0}, ValueError, "top_p must be above 0, got 0.0"),
        ({"top_p": math.nan}, ValueError, "top_p must be above 0, got nan"),
        ({"min_keep_ratio": 1.5}, ValueError, r"min_keep_ratio must be in \[0, 1\], got 1.5"),
        ({"k_centroids": torch.zeros(2, 3, 7, 8)}, ValueError, "multiple of the key/value heads, got 4 and 3"),
        (
            {"k_centroids": torch.zeros(2, 2, 0, 8), "k_sizes": torch.zeros(2, 2, 0).int()},
            ValueError,
            "at least 1 clus",
        ),
        ({"q_sizes": torch.zeros(2, 4, 6).int()}, ValueError, r"q_sizes must have shape \(2, 4, 5\), got \(2, 4, 6\)"),
        ({"k_sizes": torch.zeros(2, 2, 7)}, TypeError, "k_sizes must be torch.int32, got torch.float32"),
        ({"q_centroids": torch.zeros(2, 4, 5, 8).int()}, TypeError, "q_centroids must be .* got torch.int32"),
        ({"masses": torch.zeros(2, 4, 7, 5)}, ValueError, r"masses must have shape \(2, 4, 5, 7\), got \(2, 4, 7, 5\)"),
        ({"masses": torch.zeros(2, 4, 5, 7).half()}, TypeError, "masses must be torch.float32, got torch.float16"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    case = {name: value for name, value in changes.items() if name != "masses"}
    arguments = dataclasses.replace(random_case(), **case).arguments()
    with pytest.raises(error, match=message):
        torch.ops.svg2.select_blocks(*arguments, changes.get("masses"))


def test_opcheck():
    arguments = random_case().arguments()
    torch.library.opcheck(torch.ops.svg2.select_blocks.default, arguments)
    torch.library.opcheck(torch.ops.svg2.select_blocks.default, (*arguments, torch.rand(2, 4, 5, 7)))


def test_compiled_equals_eager():
    arguments, expected_arguments = random_case().arguments(), random_case().arguments()
    compiled = torch.compile(lambda *args: torch.ops.svg2.select_blocks(*args), fullgraph=True)
    for got, expected in zip(compiled(*arguments), torch.ops.svg2.select_blocks(*expected_arguments), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(arguments[-1], expected_arguments[-1])
