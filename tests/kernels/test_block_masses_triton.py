"""``svg2::block_masses`` in Triton: the reference's masses, up to rounding, the same bits every time."""

import dataclasses
import math

import pytest
import torch
from masses_cases import Case, one_of_many, random_case
from triton_interpreter import (
    DEVICE,
    INTERPRETED,
    assert_passes_under_the_interpreter,
    runs_kernels,
    starts_the_interpreter,
)

from svg2_compile.kernels.block_masses import block_masses_reference

# The interpreter has no bf16 products.
DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16, torch.float32]


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


def on_device(case):
    return Case(*(each.to(DEVICE) if isinstance(each, torch.Tensor) else each for each in case.arguments()))


def masses(case):
    from svg2_compile.kernels.block_masses_triton import block_masses_triton

    return block_masses_triton(*on_device(case).arguments())


def assert_right(case):
    torch.testing.assert_close(masses(case).cpu().double(), case.exact(), rtol=0, atol=case.tolerance())


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 60.0])
@pytest.mark.parametrize("clusters", [(1, 1), (5, 7), (3, 140)])
def test_masses_are_those_of_every_query(clusters, sharpness, dtype):
    assert_right(random_case(clusters=clusters, sharpness=sharpness, dtype=dtype, tokens=150, dim=24, batch=1))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [4, 64, 80, 128, 256])
def test_any_head_dimension(dim, dtype):
    assert_right(random_case(dim=dim, batch=1, groups=1, clusters=(5, 70), dtype=dtype))


@runs_kernels
@pytest.mark.parametrize("tokens", [1, 128, 129, 1300])
def test_any_number_of_queries_in_one_cluster_and_in_many(tokens):
    for clusters in ((1, 7), (17, 7)):
        assert_right(random_case(tokens=tokens, batch=1, groups=1, clusters=clusters, dtype=torch.float16))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_giants_between_empty_clusters_and_clusters_of_one(dtype):
    case = random_case(tokens=700, batch=1, groups=1, clusters=(8, 70), dtype=dtype)
    sizes = torch.tensor([[0, 1, 1, 500, 0, 1, 197, 0], [700, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    assert_right(dataclasses.replace(case, q_sizes=sizes.view(1, 2, 8)))


@runs_kernels
@pytest.mark.parametrize("which", [0, 127, 128, 299])
def test_a_key_cluster_that_one_query_in_300_wants_has_its_mass(which):
    assert masses(one_of_many(which)).flatten().tolist() == pytest.approx([299 / 300, 1 / 300], rel=1e-4)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_clusters_on_either_side_whatever_they_hold(dtype):
    case = random_case(clusters=(8, 150), used=0.5, batch=1, groups=1, dtype=dtype)
    # Empty ones last, and first: a block of keys without any, before and after the others.
    for sizes in (case.k_sizes, case.k_sizes.flip(-1)):
        case = dataclasses.replace(case, k_sizes=sizes)
        got = masses(case)
        torch.testing.assert_close(got.cpu().double(), case.exact(), rtol=0, atol=case.tolerance())
        poisoned = case.k_centroids.masked_fill((case.k_sizes == 0).unsqueeze(-1), math.nan)
        assert torch.equal(masses(dataclasses.replace(case, k_centroids=poisoned)), got)


@runs_kernels
def test_an_empty_key_cluster_has_no_mass_where_all_scores_are_very_low():
    case = random_case(clusters=(3, 7), used=0.6, dtype=torch.float16)
    case = dataclasses.replace(case, q=case.q.abs() + 9, k_centroids=-case.k_centroids.abs() - 9)
    assert (case.k_sizes == 0).any()
    assert_right(case)


@runs_kernels
@pytest.mark.parametrize("tile", [(32, 16), (64, 32), (128, 128)], ids=str)
def test_any_tile(monkeypatch, tile):
    from svg2_compile.kernels import block_masses_triton

    names = ("BLOCK_M", "BLOCK_C", "num_warps", "num_stages")
    monkeypatch.setattr(block_masses_triton, "_tile", lambda *_: dict(zip(names, (*tile, 4, 2))))
    assert_right(random_case(tokens=300, batch=1, groups=1, clusters=(3, 140), dtype=torch.float16))


@runs_kernels
def test_any_strides_and_every_time_the_same_bits():
    case = random_case(groups=1, dim=24)
    first = masses(case)
    token_major = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    columns = case.q.mT.contiguous().mT
    for q in (case.q, token_major, columns):
        assert torch.equal(masses(dataclasses.replace(case, q=q)), first)
    transposed = case.k_centroids.mT.contiguous().mT
    assert torch.equal(masses(dataclasses.replace(case, k_centroids=transposed)), first)


@runs_kernels
def test_every_element_is_written():
    assert masses(random_case(clusters=(9, 33), used=0.5)).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_op_takes_it_at_the_size_of_a_video():
    case = on_device(
        random_case(batch=1, groups=4, repeats=1, tokens=9000, dim=128, clusters=(16, 500), dtype=torch.bfloat16)
    )
    got = torch.ops.svg2.block_masses(*case.arguments())
    assert torch.equal(got, masses(case))
    exact = block_masses_reference(
        *(each.cpu() if isinstance(each, torch.Tensor) else each for each in case.arguments())
    )
    torch.testing.assert_close(got.cpu(), exact, rtol=0, atol=case.tolerance())
