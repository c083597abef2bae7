"""``svg2::block_masses_by_keys`` in Triton: the reference's masses, up to rounding, the same bits every time."""

import dataclasses
import math

import pytest
import torch
from masses_by_keys_cases import Case, random_case
from triton_interpreter import (
    DEVICE,
    INTERPRETED,
    assert_passes_under_the_interpreter,
    runs_kernels,
    starts_the_interpreter,
)

from svg2_compile.kernels.block_masses_by_keys import block_masses_by_keys_reference

# The interpreter has no bf16 products.
DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16, torch.float32]


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


def on_device(case):
    return Case(*(each.to(DEVICE) if isinstance(each, torch.Tensor) else each for each in case.arguments()))


def masses(case):
    from svg2_compile.kernels.block_masses_by_keys_triton import block_masses_by_keys_triton

    return block_masses_by_keys_triton(*on_device(case).arguments())


def assert_right(case):
    torch.testing.assert_close(masses(case).cpu().double(), case.exact(), rtol=0, atol=case.tolerance())


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 60.0])
@pytest.mark.parametrize("clusters", [(1, 1), (5, 7), (3, 40)])
def test_masses_are_those_of_every_key(clusters, sharpness, dtype):
    assert_right(random_case(clusters=clusters, sharpness=sharpness, dtype=dtype, tokens=90, dim=24, batch=1))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [4, 64, 80, 128, 256])
def test_any_head_dimension(dim, dtype):
    assert_right(random_case(dim=dim, batch=1, groups=1, clusters=(70, 5), dtype=dtype))


@runs_kernels
@pytest.mark.parametrize("q_clusters", [1, 16, 129, 300])
def test_any_number_of_mean_queries(q_clusters):
    assert_right(random_case(tokens=70, batch=1, groups=1, clusters=(q_clusters, 9), dtype=torch.float16))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_giants_between_empty_clusters_and_clusters_of_one(dtype):
    case = random_case(tokens=700, batch=1, repeats=1, clusters=(5, 8), dtype=dtype)
    sizes = torch.tensor([[0, 1, 1, 500, 0, 1, 197, 0], [700, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    assert_right(dataclasses.replace(case, k_sizes=sizes.view(1, 2, 8)))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_are_not_even_read(dtype):
    case = random_case(tokens=90, hidden=40, repeats=1, clusters=(5, 9), dtype=dtype)
    assert_right(case)
    assert torch.equal(masses(case.with_hidden(math.nan)), masses(case))


@runs_kernels
def test_an_empty_key_cluster_has_no_mass_where_all_scores_are_very_low():
    case = random_case(clusters=(3, 7), used=0.6, dtype=torch.float16)
    case = dataclasses.replace(case, q_centroids=case.q_centroids.abs() + 9, k=-case.k.abs() - 9)
    assert (case.k_sizes == 0).any()
    assert_right(case)


@runs_kernels
@pytest.mark.parametrize(("tile", "clusters"), [((16, 16), 1), ((64, 32), 3), ((128, 128), 64)], ids=str)
def test_any_tile_and_any_share_of_the_clusters(monkeypatch, tile, clusters):
    from svg2_compile.kernels import block_masses_by_keys_triton

    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    monkeypatch.setattr(block_masses_by_keys_triton, "_tile", lambda *_: dict(zip(names, (*tile, 4, 2))))
    monkeypatch.setattr(block_masses_by_keys_triton, "CLUSTERS", clusters)
    assert_right(random_case(tokens=300, batch=1, groups=1, clusters=(33, 14), dtype=torch.float16))


@runs_kernels
def test_more_clusters_than_sizes_are_added_at_a_time():
    assert_right(random_case(tokens=400, batch=1, groups=1, repeats=1, clusters=(3, 150), dtype=torch.float16))


@runs_kernels
def test_any_strides_and_every_time_the_same_bits():
    case = random_case(dim=24)
    first = masses(case)
    token_major = case.k.transpose(1, 2).contiguous().transpose(1, 2)
    columns = case.k.mT.contiguous().mT
    for k in (case.k, token_major, columns):
        assert torch.equal(masses(dataclasses.replace(case, k=k)), first)
    transposed = case.q_centroids.mT.contiguous().mT
    assert torch.equal(masses(dataclasses.replace(case, q_centroids=transposed)), first)
    of_two = torch.stack((case.k_sizes, case.k_sizes), -1)[..., 0]
    assert torch.equal(masses(dataclasses.replace(case, k_sizes=of_two)), first)


@runs_kernels
def test_every_element_is_written(monkeypatch):
    real = torch.empty

    def filled(*size, dtype, **options):
        return real(*size, dtype=dtype, **options).fill_(math.nan if dtype.is_floating_point else 10**6)

    monkeypatch.setattr(torch, "empty", filled)
    assert masses(random_case(clusters=(9, 33), used=0.5)).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_op_takes_it_at_the_size_of_a_video():
    case = on_device(
        random_case(batch=1, groups=4, repeats=1, tokens=9000, dim=128, clusters=(100, 60), dtype=torch.bfloat16)
    )
    got = torch.ops.svg2.block_masses_by_keys(*case.arguments())
    assert torch.equal(got, masses(case))
    exact = block_masses_by_keys_reference(
        *(each.cpu() if isinstance(each, torch.Tensor) else each for each in case.arguments())
    )
    torch.testing.assert_close(got.cpu(), exact, rtol=0, atol=case.tolerance())
