"""``svg2::select_blocks`` in Triton: the reference's selection, up to rounding at the boundary."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.select_blocks import STATISTICS, select_blocks_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="run by test_the_kernels_pass_under_the_interpreter, in its own process"
)


@pytest.mark.skipif(DEVICE == "cuda", reason="the device itself runs the tests below")
@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_the_kernels_pass_under_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    # Triton decides at import whether to compile or to interpret, for the whole process.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


SHAPES = [(1, 1, 1, 64), (3, 16, 2, 80), (1, 65, 1, 128), (1, 257, 2, 16)]


def random_case(q_clusters, k_clusters, repeats, dim, sharpness=1.0, kind="uneven", batch=1, groups=1):
    """Return centroids and sizes of ``groups`` key heads with ``repeats`` query heads each."""
    generator = torch.Generator().manual_seed(q_clusters * k_clusters)
    q = sharpness * torch.randn(batch, groups * repeats, q_clusters, dim, generator=generator)
    k = torch.randn(batch, groups, k_clusters, dim, generator=generator)
    q_sizes = torch.randint(0, 9, (batch, groups * repeats, q_clusters), generator=generator).int()
    k_sizes = torch.randint(0, 9, (batch, groups, k_clusters), generator=generator).int()
    q_sizes[..., -1] = 7
    k_sizes[..., -1] = 5
    if kind == "giant":
        k_sizes[..., :-1] = 0
    elif kind == "singletons":
        k_sizes.fill_(1)
    return [tensor.to(DEVICE) for tensor in (q, k, q_sizes, k_sizes)]


def select(case, top_p, min_keep_ratio=0.0, scale=0.125):
    """Return the kept blocks and the statistics."""
    from svg2_compile.kernels.select_blocks_triton import select_blocks_triton

    statistics = torch.zeros(*case[2].shape[:2], len(STATISTICS), device=DEVICE)
    return select_blocks_triton(*case, scale, top_p, min_keep_ratio, statistics), statistics


def probability_of(case, scale=0.125):
    """Return P of section 1.3 in fp64."""
    q, k, _, k_sizes = case
    repeats = q.shape[1] // k.shape[1]
    k, k_sizes = k.repeat_interleave(repeats, 1).double(), k_sizes.repeat_interleave(repeats, 1).double()
    return (q.double() @ k.mT * scale + k_sizes.log().unsqueeze(2)).softmax(-1)


def tolerance_of(case, scale=0.125):
    """Return what fp32 may err by in a mass: a step per summed cluster, and some of either score of a ratio."""
    largest = case[0].norm(dim=-1).max() * case[1].norm(dim=-1).max() * scale
    return torch.finfo(torch.float32).eps * (case[1].shape[2] + 4 * float(largest) + 16)


def poison_new_tensors(monkeypatch):
    """Let every tensor the launcher allocates begin with values that no test would accept."""

    def poisoned(allocate):
        def new(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.dtype == torch.bool:
                return tensor.view(torch.uint8).fill_(77).view(torch.bool)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

        return new

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@runs_kernels
@pytest.mark.parametrize(
    ("kind", "sharpness"), [("uneven", 0.0), ("uneven", 8.0), ("giant", 1.0), ("singletons", 60.0)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_selection_equals_the_reference_but_at_the_boundary(shape, sharpness, kind, monkeypatch):
    check_against_the_reference(random_case(*shape, sharpness, kind), monkeypatch)


@runs_kernels
def test_batches_and_grouped_key_heads_equal_the_reference(monkeypatch):
    check_against_the_reference(random_case(2, 5, 2, 16, batch=2, groups=2), monkeypatch)


def check_against_the_reference(case, monkeypatch):
    for top_p, min_keep_ratio in ((0.5, 0.0), (0.9, 0.1)):
        expected_statistics = torch.zeros(*case[2].shape[:2], len(STATISTICS), device=DEVICE)
        expected = select_blocks_reference(*case, 0.125, top_p, min_keep_ratio, expected_statistics)
        with monkeypatch.context() as context:
            poison_new_tensors(context)
            keep, statistics = select(case, top_p, min_keep_ratio)
        assert (keep.view(torch.uint8) <= 1).all()
        probability, tolerance = probability_of(case), tolerance_of(case)
        # The mass of the likelier clusters decides; within rounding of top_p, or of each other, either is right.
        likelier = (probability.unsqueeze(-1) > probability.unsqueeze(-2)).double()  # [..., j, i]: j before i
        before = (probability.unsqueeze(-2) @ likelier).squeeze(-2)
        tied = (probability.unsqueeze(-1) - probability.unsqueeze(-2)).abs() <= tolerance
        doubtful = ((before - top_p).abs() <= tolerance) | (tied.sum(-1) > 1)
        assert ((keep == expected) | doubtful).all()
        assert ((probability * keep).sum(-1) >= top_p - tolerance).all()
        if torch.equal(keep, expected):
            torch.testing.assert_close(statistics, expected_statistics, rtol=0, atol=max(1e-6, tolerance))


@runs_kernels
@pytest.mark.parametrize("sharpness", [0.0, 8.0])
def test_a_larger_top_p_keeps_a_superset(sharpness):
    case = random_case(1, 100, 1, 64, sharpness)
    selections = [select(case, top_p)[0] for top_p in (0.01, 0.3, 0.9, 0.999, 1.0)]
    for smaller, larger in itertools.pairwise(selections):
        assert (smaller <= larger).all()
    assert selections[-1].all()


@runs_kernels
def test_the_floor_keeps_its_share_and_no_more():
    case = random_case(3, 65, 1, 16, sharpness=60.0)
    counts = select(case, 1e-6, 0.5)[0].sum(-1)
    assert (counts == 32).all()


@runs_kernels
def test_equal_probabilities_keep_the_lowest_indices():
    sizes = torch.full((1, 1, 1), 8).int().to(DEVICE), torch.ones(1, 1, 8).int().to(DEVICE)
    for zero in (0.0, -0.0):
        q, k = torch.full((1, 1, 1, 4), zero, device=DEVICE), torch.ones(1, 1, 8, 4, device=DEVICE)
        k[:, :, ::3] *= -1
        keep, _ = select([q, k, *sizes], 0.5)
        assert keep.flatten().tolist() == [True] * 5 + [False] * 3


@runs_kernels
def test_an_empty_cluster_cannot_influence_the_rest():
    case = random_case(3, 15, 2, 16)
    keep, statistics = select(case, 0.9, 0.1)
    empty = (case[3] == 0).unsqueeze(-1)
    for poison in (float("nan"), float("inf")):
        again, statistics_again = select([case[0], case[1].masked_fill(empty, poison), *case[2:]], 0.9, 0.1)
        assert torch.equal(again, keep)
        assert torch.equal(statistics_again, statistics)


@runs_kernels
def test_strided_inputs_and_repetition_do_not_change_the_bits():
    case = random_case(3, 15, 2, 80, batch=2)
    keep, statistics = select(case, 0.9)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in case]
    for same in (case, strided):
        again, statistics_again = select(same, 0.9)
        assert torch.equal(again, keep)
        assert torch.equal(statistics_again, statistics)


@runs_kernels
def test_statistics_accumulate_over_calls_in_any_layout():
    from svg2_compile.kernels.select_blocks_triton import select_blocks_triton

    case = random_case(3, 15, 2, 16)
    _, once = select(case, 0.9)
    statistics = torch.zeros(1, len(STATISTICS), 2, device=DEVICE).transpose(1, 2)
    for _ in range(2):
        select_blocks_triton(*case, 0.125, 0.9, 0.0, statistics)
    assert torch.equal(statistics, 2 * once)


@runs_kernels
def test_as_many_clusters_as_the_tiles_hold():
    case = random_case(1, 1024, 1, 16)
    expected = select_blocks_reference(*case, 0.125, 0.7, 0.0, torch.zeros(1, 1, len(STATISTICS), device=DEVICE))
    keep, _ = select(case, 0.7)
    probability = probability_of(case)
    mass, expected_mass = (probability * keep).sum(-1), (probability * expected).sum(-1)
    # At most the cluster at the boundary may differ.
    assert ((mass - expected_mass).abs() <= probability.amax(-1)).all()
    assert (mass >= 0.7 - tolerance_of(case)).all()
