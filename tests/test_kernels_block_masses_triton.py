"""``svg2::block_masses`` in Triton: the reference's masses, up to rounding, the same bits every time."""

import dataclasses
import math

import pytest
import torch

from svg2_compile.kernels.block_masses import block_masses_reference
from test_kernels_block_masses import Case, random_case
from triton_interpreter import (
    DEVICE,
    INTERPRETED,
    assert_passes_under_the_interpreter,
    runs_kernels,
    starts_the_interpreter,
)

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
@pytest.mark.parametrize("dim", [4, 64, 80, 128])
def test_any_head_dimension(dim):
    assert_right(random_case(dim=dim, batch=1, groups=1, dtype=torch.float16))


@runs_kernels
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300, 1000])
def test_any_number_of_queries_in_one_cluster_and_in_many(tokens):
    for clusters in ((1, 7), (131, 7)):
        assert_right(random_case(tokens=tokens, batch=1, groups=1, clusters=clusters, dtype=torch.float16))


@runs_kernels
def test_empty_clusters_on_either_side_whatever_they_hold():
    case = random_case(clusters=(8, 150), used=0.5)
    assert_right(case)
    poisoned = case.k_centroids.masked_fill((case.k_sizes == 0).unsqueeze(-1), math.nan)
    assert torch.equal(masses(dataclasses.replace(case, k_centroids=poisoned)), masses(case))


@runs_kernels
def test_any_strides_and_every_time_the_same_bits():
    case = random_case(dim=24)
    first = masses(case)
    token_major = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    columns = case.q.mT.contiguous().mT
    for q in (case.q, token_major, columns):
        assert torch.equal(masses(dataclasses.replace(case, q=q)), first)


@runs_kernels
def test_every_element_is_written(monkeypatch):
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: real(*size, **options).fill_(math.nan))
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
