"""``svg2::select_blocks`` in Triton: the reference's selection, up to rounding at the boundary."""

import itertools
import math

import pytest
import torch
from triton_interpreter import DEVICE, assert_passes_under_the_interpreter, runs_kernels, starts_the_interpreter

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.block_sparse_attention import block_sparse_attention_reference
from svg2_compile.kernels.select_blocks import clusters_within, routed_clusters, select_blocks_reference
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.kernels.work_list import kept_keys, kept_runs_reference


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


# Query clusters, key clusters, query heads of a key head, head dimension.
SHAPES = [
    (1, 1, 1, 64),
    (2, 2, 1, 16),
    (3, 3, 2, 4),
    (3, 16, 2, 80),
    (2, 65, 1, 128),
    (33, 20, 1, 16),
    (2, 500, 1, 64),
]


def random_case(q_clusters, k_clusters, repeats, dim, sharpness=1.0, kind="uneven", batch=1, groups=1):
    """Return centroids and sizes of ``groups`` key heads with ``repeats`` query heads each."""
    generator = torch.Generator().manual_seed(q_clusters * k_clusters)
    q = sharpness * torch.randn(batch, groups * repeats, q_clusters, dim, generator=generator)
    k = torch.randn(batch, groups, k_clusters, dim, generator=generator)
    q_sizes = torch.randint(0, 9, (batch, groups * repeats, q_clusters), generator=generator).int()
    # Runs of every class, and empty clusters within them.
    k_sizes = (torch.randint(-30, 70, (batch, groups, k_clusters), generator=generator)).clamp(min=0).int()
    q_sizes[..., -1] = 7
    k_sizes[..., -1] = 5
    if kind == "giant":
        k_sizes[..., :-1] = 0
        k_sizes[..., -1] = 75600
    elif kind == "singletons":
        k_sizes.fill_(1)
    return [tensor.to(DEVICE) for tensor in (q, k, q_sizes, k_sizes)]


def select(case, top_p, min_keep_ratio=0.0, scale=0.125, masses=None, errors=None, least=None, budgets=None):
    """Return the runs, the counts and the statistics."""
    from svg2_compile.kernels.select_blocks_triton import select_blocks_triton

    statistics = torch.zeros(*case[2].shape, len(STATISTICS), device=DEVICE)
    chosen = select_blocks_triton(*case, scale, top_p, min_keep_ratio, statistics, masses, errors, least, budgets)
    return *chosen, statistics


def used(runs, counts):
    """Return the runs, with 0 where a slot is undefined."""
    return runs * (torch.arange(runs.shape[3], device=runs.device) < counts[..., :1]).unsqueeze(-1)


def per_query_head(case, x):
    return x.repeat_interleave(case[0].shape[1] // case[1].shape[1], dim=1)


def kept(case, runs, counts):
    """Return which clusters with keys are kept; the runs cannot tell of empty ones."""
    sizes = per_query_head(case, case[3]).long().unsqueeze(2).expand(-1, -1, runs.shape[2], -1)
    keys = torch.nn.functional.pad(kept_keys(runs, counts, int(sizes.sum(-1).max())), (0, 1))
    return keys.gather(-1, sizes.cumsum(-1) - sizes) & (sizes > 0)


def keep(case, *arguments, **changes):
    return kept(case, *select(case, *arguments, **changes)[:2])


def probability_of(case, scale=0.125):
    """Return P of section 1.3 in fp64."""
    k, k_sizes = per_query_head(case, case[1]).double(), per_query_head(case, case[3]).double()
    return (case[0].double() @ k.mT * scale + k_sizes.log().unsqueeze(2)).softmax(-1)


def shares_of(case, masses):
    """Return given masses as P, in fp64."""
    masses = masses.double() * (per_query_head(case, case[3]) > 0).unsqueeze(2)
    return masses / masses.sum(-1, keepdim=True)


def tolerance_of(case, scale=0.125):
    """Return what fp32 may err by in a mass: a step per summed cluster, and some of either score of a ratio."""
    largest = case[0].norm(dim=-1).max() * case[1].norm(dim=-1).max() * scale
    return torch.finfo(torch.float32).eps * (case[1].shape[2] + 4 * float(largest) + 16)


def check_against_the_reference(case, top_p, min_keep_ratio, masses=None):
    expected_statistics = torch.zeros(*case[2].shape, len(STATISTICS), device=DEVICE)
    expected = select_blocks_reference(*case, 0.125, top_p, min_keep_ratio, expected_statistics, masses)
    runs, counts, statistics = select(case, top_p, min_keep_ratio, masses=masses)
    keep = kept(case, runs, counts)
    of_keep = kept_runs_reference(keep, case[3])
    assert torch.equal(counts, of_keep.counts)
    assert torch.equal(used(runs, counts), of_keep.runs)

    probability, tolerance = probability_of(case) if masses is None else shares_of(case, masses), tolerance_of(case)
    # The mass of the likelier clusters decides; within rounding of top_p, or of each other, either is right.
    likelier = (probability.unsqueeze(-1) > probability.unsqueeze(-2)).double()  # [..., j, i]: j before i
    before = (probability.unsqueeze(-2) @ likelier).squeeze(-2)
    tied = (probability.unsqueeze(-1) - probability.unsqueeze(-2)).abs() <= tolerance
    doubtful = ((before - top_p).abs() <= tolerance) | (tied.sum(-1) > 1)
    expected_keep = kept(case, *expected)
    assert ((keep == expected_keep) | doubtful).all()
    assert ((probability * keep).sum(-1) >= top_p - tolerance).all()
    if torch.equal(keep, expected_keep):
        # A mass is as accurate as its sum; then there are a share, a product and a quotient to round.
        rtol = 4 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(statistics, expected_statistics, rtol=rtol, atol=tolerance)


@runs_kernels
@pytest.mark.parametrize(
    ("kind", "sharpness"), [("uneven", 0.0), ("uneven", 8.0), ("giant", 1.0), ("singletons", 60.0)]
)
@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_the_runs_are_those_of_the_reference_selection_but_at_the_boundary(shape, sharpness, kind):
    case = random_case(*shape, sharpness, kind)
    for top_p, min_keep_ratio in ((0.5, 0.0), (0.9, 0.1)):
        check_against_the_reference(case, top_p, min_keep_ratio)


@runs_kernels
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] < 4])
def test_given_masses_take_the_place_of_the_centroids(shape):
    case = random_case(*shape, batch=1 if shape[1] > 100 else 2)
    generator = torch.Generator().manual_seed(0)
    masses = torch.rand(*case[2].shape, shape[1], generator=generator).pow(6).to(DEVICE)
    masses = masses / masses.sum(-1, keepdim=True)
    for top_p, min_keep_ratio in ((0.5, 0.0), (0.9, 0.1)):
        check_against_the_reference(case, top_p, min_keep_ratio, masses)
    runs, counts, statistics = select(case, 0.9, masses=masses)
    strided = select(case, 0.9, masses=masses.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(used(*strided[:2]), used(runs, counts))
    assert torch.equal(strided[2], statistics)


def random_errors(case, spread=30.0):
    generator = torch.Generator().manual_seed(case[1].shape[2])
    return (spread * torch.randn(*case[2].shape, case[1].shape[2], generator=generator)).to(DEVICE)


def check_routing(case, errors, top_p, min_keep_ratio, masses=None):
    """Assert that errors keep what the rule says, given what the kernel itself keeps by mass."""
    runs, counts, statistics = select(case, top_p, min_keep_ratio, masses=masses, errors=errors)
    keep = kept(case, runs, counts)
    of_keep = kept_runs_reference(keep, case[3])
    assert torch.equal(counts, of_keep.counts)
    assert torch.equal(used(runs, counts), of_keep.runs)
    by_mass = kept(case, *select(case, top_p, min_keep_ratio, masses=masses)[:2])
    sizes, probability = (
        per_query_head(case, case[3]),
        probability_of(case) if masses is None else shares_of(case, masses),
    )
    logits = probability.log()
    budget = (sizes.unsqueeze(2) * by_mass).sum(-1, keepdim=True)
    wanted = routed_clusters(budget, logits, errors, sizes, min_keep_ratio) & (sizes > 0).unsqueeze(2)
    assert torch.equal(keep, wanted)
    rows = case[2].float() / case[2].sum(-1, keepdim=True)
    mass = rows * (probability.float() * keep).sum(-1)
    column = STATISTICS.index("kept_mass_sum")
    torch.testing.assert_close(statistics[..., column], mass, rtol=1e-4, atol=tolerance_of(case))


@runs_kernels
@pytest.mark.parametrize("kind", ["uneven", "giant", "singletons"])
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_choose_as_many_keys_as_the_masses_would(shape, kind):
    case = random_case(*shape, kind=kind)
    for top_p, min_keep_ratio in ((0.3, 0.0), (0.9, 0.2)):
        check_routing(case, random_errors(case), top_p, min_keep_ratio)


@runs_kernels
def test_errors_choose_beside_given_masses_and_for_grouped_heads():
    case = random_case(3, 40, 2, 16, batch=2, groups=2)
    masses = torch.rand(*case[2].shape, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check_routing(case, random_errors(case), 0.6, 0.1, masses)


@runs_kernels
def test_of_equal_errors_per_key_the_lowest_indices_are_kept():
    case = random_case(3, 65, 1, 16, kind="singletons")
    check_routing(case, torch.zeros_like(random_errors(case)), 0.5, 0.1)


@runs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_errors_that_are_no_number_still_keep_enough_keys_within_bounds(value):
    case = random_case(3, 40, 1, 16)
    by_mass = kept(case, *select(case, 0.5)[:2])
    errors = torch.full_like(random_errors(case), value)
    runs, counts, _ = select(case, 0.5, errors=errors)
    sizes = per_query_head(case, case[3]).unsqueeze(2)
    assert ((kept(case, runs, counts) * sizes).sum(-1) >= (by_mass * sizes).sum(-1)).all()
    assert (used(runs, counts) <= sizes.sum()).all()


def check_raising(case, share, top_p=0.5, min_keep_ratio=0.0, masses=None, errors=None):
    """Assert that a floor of a share of the keys keeps what the rule says, given what the kernel keeps by mass."""
    sizes = per_query_head(case, case[3])
    least = (sizes.sum(-1) * share).int()
    least[:, -1] = 0
    runs, counts, statistics = select(case, top_p, min_keep_ratio, masses=masses, errors=errors, least=least)
    keep = kept(case, runs, counts)
    of_keep = kept_runs_reference(keep, case[3])
    assert torch.equal(counts, of_keep.counts) and torch.equal(used(runs, counts), of_keep.runs)
    by_mass = kept(case, *select(case, top_p, min_keep_ratio, masses=masses)[:2])
    probability = probability_of(case) if masses is None else shares_of(case, masses)
    budget = torch.maximum((sizes.unsqueeze(2) * by_mass).sum(-1, keepdim=True), least[..., None, None])
    if errors is None:
        wanted = clusters_within(budget, probability.log(), sizes)
    else:
        wanted = routed_clusters(budget, probability.log(), errors, sizes, min_keep_ratio)
    assert torch.equal(keep, wanted & (sizes > 0).unsqueeze(2))
    mass = case[2].float() / case[2].sum(-1, keepdim=True) * (probability.float() * keep).sum(-1)
    column = STATISTICS.index("kept_mass_sum")
    torch.testing.assert_close(statistics[..., column], mass, rtol=1e-4, atol=tolerance_of(case))


@runs_kernels
@pytest.mark.parametrize("kind", ["uneven", "giant", "singletons"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_floor_in_keys_raises_those_below_it(shape, kind):
    case = random_case(*shape, sharpness=4.0, kind=kind)
    for share in (0.4, 1.0):
        check_raising(case, share)


@runs_kernels
def test_a_floor_goes_with_given_masses_and_errors_and_grouped_heads():
    case = random_case(5, 33, 2, 16, batch=2, groups=2)
    masses = torch.rand(*case[2].shape, 33, generator=torch.Generator().manual_seed(0)).pow(6).to(DEVICE)
    check_raising(case, 0.6, masses=masses)
    check_raising(case, 0.6, min_keep_ratio=0.2, errors=random_errors(case))
    check_raising(case, 0.6, masses=masses, errors=random_errors(case))


@runs_kernels
def test_where_everything_is_kept_errors_choose_nothing():
    case = random_case(3, 40, 1, 16)
    for got, wanted in zip(select(case, 1.0, errors=random_errors(case)), select(case, 1.0)):
        assert torch.equal(got, wanted)


@runs_kernels
@pytest.mark.parametrize("kind", ["uneven", "singletons"])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("shape", [(3, 40, 2, 16), (3, 65, 1, 16), (1, 500, 1, 64)])
def test_equal_budgets_of_all_heads_give_the_bits_of_none(shape, routed, kind):
    case = random_case(*shape, kind=kind, batch=2, groups=2)
    errors = random_errors(case) if routed else None
    for top_p, floor in ((0.6, 0.2), (1.0, 0.0)):
        least = math.floor(floor * shape[1])
        rows = [[top_p, least, shape[1]]] * case[0].shape[1]
        # what stands beside budgets is not looked at
        ours = select(case, 0.1, 0.9, errors=errors, budgets=torch.tensor(rows, device=DEVICE, dtype=torch.float32))
        plain = select(case, top_p, floor, errors=errors)
        assert torch.equal(used(*ours[:2]), used(*plain[:2]))
        assert torch.equal(ours[1], plain[1]) and torch.equal(ours[2], plain[2])


@runs_kernels
@pytest.mark.parametrize("routed", [False, True])
def test_every_head_has_the_selection_of_its_own_budget(routed):
    case = random_case(3, 65, 2, 16, sharpness=0.3, kind="singletons", batch=2, groups=2)
    errors = random_errors(case) if routed else None
    budgets = [(0.3, 0, 65), (1.0, 0, 65), (0.9, 26, 65), (0.9, 0, 9)]
    budget_rows = torch.tensor(budgets, device=DEVICE, dtype=torch.float32)
    runs, counts, statistics = select(case, 0.5, errors=errors, budgets=budget_rows)
    found = kept(case, runs, counts)
    for head, (top_p, least, most) in enumerate(budgets[:3]):
        alone = select(case, top_p, least / 65, errors=errors)
        assert torch.equal(found[:, head], kept(case, *alone[:2])[:, head])
        assert torch.equal(statistics[:, head], alone[2][:, head])
    assert (found[:, 3].sum(-1) == 9).all()
    # nine of equal size: the likeliest, unless errors choose
    if not routed:
        likeliest = probability_of(case).sort(-1, descending=True).indices[:, 3, :, :9]
        assert found[:, 3].gather(-1, likeliest).all()


@runs_kernels
def test_a_cap_keeps_the_first_of_equal_clusters_and_never_nothing():
    q, k = torch.zeros(1, 2, 1, 4, device=DEVICE), torch.zeros(1, 2, 40, 4, device=DEVICE)
    case = [q, k, torch.ones(1, 2, 1).int().to(DEVICE), torch.ones(1, 2, 40).int().to(DEVICE)]
    budgets = torch.tensor([[0.9, 0, 5], [0.9, 0, 0]], device=DEVICE)
    found = keep(case, 0.5, budgets=budgets)[0, :, 0].cpu()
    assert torch.equal(found, torch.arange(40) < torch.tensor([[5], [1]]))


@runs_kernels
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_masses_that_are_nothing_or_no_number_still_keep_keys_within_bounds(value):
    case = random_case(3, 65, 1, 16)
    masses = torch.full((1, 1, 3, 65), 1 / 65, device=DEVICE)
    masses[0, 0, 1] = value
    runs, counts, _ = select(case, 0.9, 0.1, masses=masses)
    assert (counts[..., 0] >= 1).all()
    assert ((used(runs, counts) >= 0) & (used(runs, counts) <= int(case[3].sum()))).all()


@runs_kernels
def test_as_many_clusters_as_the_tiles_hold():
    for k_clusters in (1000, 1024):
        check_against_the_reference(random_case(1, k_clusters, 1, 16, 4.0), 0.8, 0.1)


@runs_kernels
def test_batches_and_grouped_key_heads_equal_the_reference():
    check_against_the_reference(random_case(2, 5, 2, 16, batch=2, groups=2), 0.9, 0.1)


@runs_kernels
def test_as_many_runs_as_there_can_be_have_room():
    # Every other cluster is likely, and ends a run: 512 of them, a full count in 16 bits of one class.
    case = [torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1024, 4), torch.ones(1, 1, 1).int(), torch.ones(1, 1, 1024).int()]
    case[1][:, :, ::2] = 100.0
    case = [tensor.to(DEVICE) for tensor in case]
    runs, counts, _ = select(case, 0.9999)
    assert counts.flatten().tolist() == [512, 0, 0, 0]
    assert torch.equal(runs[0, 0, 0].cpu(), torch.stack([torch.arange(0, 1024, 2), torch.arange(1, 1025, 2)], -1).int())


@runs_kernels
@pytest.mark.parametrize("sharpness", [0.0, 8.0])
def test_a_larger_top_p_keeps_a_superset(sharpness):
    case = random_case(1, 100, 1, 64, sharpness)
    selections = [keep(case, top_p) for top_p in (0.01, 0.3, 0.9, 0.999, 1.0)]
    for smaller, larger in itertools.pairwise(selections):
        assert (smaller <= larger).all()
    assert torch.equal(selections[-1], (case[3] > 0).unsqueeze(2))


@runs_kernels
def test_keeping_all_is_one_run():
    case = random_case(5, 65, 1, 16)
    for top_p in (1.0, 1.5):
        runs, counts, _ = select(case, top_p)
        tokens = int(case[3].sum())
        assert (counts == torch.tensor([1, tokens // 16, tokens // 64, tokens // 128], device=DEVICE)).all()
        assert (runs[..., 0, :] == torch.tensor([0, tokens], device=DEVICE)).all()


@runs_kernels
def test_the_floor_keeps_its_share_and_no_more():
    case = random_case(3, 65, 1, 16, sharpness=60.0, kind="singletons")
    assert (keep(case, 1e-6, 0.5).sum(-1) == 32).all()


@runs_kernels
def test_a_floor_above_the_clusters_with_keys_keeps_those():
    case = random_case(3, 65, 1, 16)
    assert torch.equal(keep(case, 0.5, 1.0), (case[3] > 0).unsqueeze(2).expand(-1, -1, 3, -1))


@runs_kernels
@pytest.mark.parametrize("clusters", [8, 65])
def test_equal_probabilities_keep_the_lowest_indices(clusters):
    sizes = torch.full((1, 1, 1), 8).int().to(DEVICE), torch.ones(1, 1, clusters).int().to(DEVICE)
    # What crosses top_p is kept.
    most = clusters // 2 + 1
    for zero in (0.0, -0.0):
        q, k = torch.full((1, 1, 1, 4), zero, device=DEVICE), torch.ones(1, 1, clusters, 4, device=DEVICE)
        k[:, :, ::3] *= -1
        case = [q, k, *sizes]
        assert keep(case, 0.5).flatten().tolist() == [True] * most + [False] * (clusters - most)
        assert keep(case, 1e-6, 0.25).sum() == clusters // 4


@runs_kernels
def test_some_of_the_equal_ones_are_kept_beside_the_likelier():
    # One of half the mass, and then equal ones of an eighth: before the third of those there are 3/4.
    q, k = torch.zeros(1, 1, 1, 4, device=DEVICE), torch.zeros(1, 1, 5, 4, device=DEVICE)
    case = [q, k, torch.ones(1, 1, 1).int().to(DEVICE), torch.tensor([[[1, 1, 4, 1, 1]]]).int().to(DEVICE)]
    assert keep(case, 0.75).flatten().tolist() == [True, True, True, True, False]
    assert keep(case, 0.7).flatten().tolist() == [True, True, True, False, False]


@runs_kernels
def test_neighbouring_numbers_are_told_apart_beside_far_ones():
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 66, 4)
    q[..., 0], k[0, 0, :64, 0] = 1.0, 1 + torch.finfo(torch.float32).eps * order
    k[0, 0, 64, 0], k[0, 0, 65, 0] = -1e30, -1e36
    case = [q, k, torch.ones(1, 1, 1).int(), torch.ones(1, 1, 66).int()]
    selected = keep([tensor.to(DEVICE) for tensor in case], 1e-6, 0.5, scale=1.0).flatten().cpu()
    assert torch.equal(selected, torch.cat([order >= 64 - 33, torch.tensor([False, False])]))


@runs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_is_no_number_still_keeps_keys_within_bounds(value):
    case = random_case(3, 65, 1, 16)
    case[0][0, 0, 1] = value
    tokens = int(case[3].sum())
    runs, counts, _ = select(case, 0.9, 0.1)
    assert (counts[..., 0] >= 1).all()
    assert ((used(runs, counts) >= 0) & (used(runs, counts) <= tokens)).all()
    assert torch.equal(keep(case, 0.9, 0.1)[:, :, [0, 2]], keep(random_case(3, 65, 1, 16), 0.9, 0.1)[:, :, [0, 2]])


@runs_kernels
def test_an_empty_cluster_cannot_influence_the_rest():
    case = random_case(3, 15, 2, 16)
    runs, counts, statistics = select(case, 0.9, 0.1)
    empty = (case[3] == 0).unsqueeze(-1)
    assert empty.any()
    for poison in (float("nan"), float("inf")):
        poisoned = [case[0], case[1].masked_fill(empty, poison), *case[2:]]
        runs_again, counts_again, statistics_again = select(poisoned, 0.9, 0.1)
        assert torch.equal(counts_again, counts)
        assert torch.equal(used(runs_again, counts), used(runs, counts))
        assert torch.equal(statistics_again, statistics)


@runs_kernels
def test_strided_inputs_and_repetition_do_not_change_the_bits():
    case = random_case(3, 15, 2, 80, batch=2)
    runs, counts, statistics = select(case, 0.9)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in case]
    for same in (case, strided):
        runs_again, counts_again, statistics_again = select(same, 0.9)
        assert torch.equal(counts_again, counts)
        assert torch.equal(used(runs_again, counts), used(runs, counts))
        assert torch.equal(statistics_again, statistics)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_centroids_may_have_fewer_bits(dtype):
    q, k, *sizes = random_case(3, 65, 1, 16)
    rounded = [q.to(dtype), k.to(dtype), *sizes]
    assert torch.equal(keep(rounded, 0.9), keep([x.float() for x in rounded[:2]] + sizes, 0.9))


@runs_kernels
def test_statistics_accumulate_over_calls_in_any_layout():
    from svg2_compile.kernels.select_blocks_triton import select_blocks_triton

    case = random_case(3, 15, 2, 16)
    *_, once = select(case, 0.9)
    statistics = torch.zeros(1, len(STATISTICS), 3, 2, device=DEVICE).transpose(1, 3)
    for _ in range(2):
        select_blocks_triton(*case, 0.125, 0.9, 0.0, statistics)
    assert torch.equal(statistics, 2 * once)


@runs_kernels
def test_the_attention_takes_the_selection_with_dense_heads():
    from svg2_compile.kernels.block_sparse_attention_pointer import block_sparse_attention_pointer
    from svg2_compile.kernels.select_blocks_triton import select_blocks_triton

    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([30, 0, 41, 29]).int().expand(1, 2, 4).contiguous().to(DEVICE)
    q, k, v = (torch.randn(1, 2, 100, 16, generator=generator).to(DEVICE) for _ in range(3))
    means = [torch.randn(1, 2, 4, 16, generator=generator).to(DEVICE) for _ in range(2)]
    statistics = [torch.zeros(1, 2, 4, len(STATISTICS), device=DEVICE) for _ in range(2)]
    runs, counts = select_blocks_triton(*means, sizes, sizes, 0.3, 0.2, 0.0, statistics[0])
    dense_heads = torch.tensor([[[0.0, 0.0], [1.0, 0.5]]], device=DEVICE)
    kept = torch.ops.svg2.keep_dense_heads_(runs, counts, sizes, sizes, dense_heads, *statistics)
    out, _ = block_sparse_attention_pointer(q, k, v, sizes, *kept, None, None, None, None, 0.3)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    sparse, _ = block_sparse_attention_reference(q, k, v, sizes, runs, counts, None, None, None, None, 0.3)
    torch.testing.assert_close(out[:, 1], dense[:, 1])
    torch.testing.assert_close(out[:, 0], sparse[:, 0])
    assert (out[:, 0] - dense[:, 0]).abs().max() > 1e-2
    sparse_density, dense_density = statistics[1][0, :, :, 1].sum(1).tolist()
    assert dense_density == pytest.approx(1) and sparse_density < 0.9
