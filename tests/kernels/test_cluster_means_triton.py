"""``svg2::cluster_means`` and ``svg2::log_dropped_sizes`` in Triton: what the references say, up to rounding."""

import math

import attention_cases
import pytest
import torch
from means_cases import by_hand, dropped_arguments, random_tokens
from triton_interpreter import DEVICE, assert_passes_under_the_interpreter, runs_kernels, starts_the_interpreter

from svg2_compile.kernels.log_dropped_sizes import log_dropped_sizes_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


def means(x, sizes):
    from svg2_compile.kernels.cluster_means_triton import cluster_means_triton

    return cluster_means_triton(x.to(DEVICE), sizes.to(DEVICE)).cpu()


def assert_right(x, sizes):
    step = torch.finfo(x.dtype).eps + x.shape[2] * torch.finfo(torch.float32).eps
    largest = x.nan_to_num(0).abs().max().double().item()
    torch.testing.assert_close(means(x, sizes).double(), by_hand(x, sizes), rtol=0, atol=step * largest)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [4, 64, 80, 256])
@pytest.mark.parametrize("kind", ["uneven", "half empty", "giant", "singletons"])
def test_means_of_any_rows_and_sizes(kind, dim, dtype):
    assert_right(*random_tokens(dtype=dtype, dim=dim, kind=kind, tokens=40))


@runs_kernels
@pytest.mark.parametrize("clusters", [1, 130])
def test_many_tokens_of_one_cluster_and_many_clusters(clusters):
    assert_right(*random_tokens(dtype=torch.float16, tokens=400, clusters=clusters, kind="giant"))


@runs_kernels
def test_hidden_tokens_and_other_clusters_are_not_even_read():
    x, sizes = random_tokens()
    x = x.contiguous()
    first = int(sizes[0, 0, 0])
    assert first > 0
    poisoned = x.clone()
    poisoned[:, :, -7:], poisoned[0, 0, 0] = math.nan, math.nan
    got, wanted = means(poisoned, sizes), means(x, sizes)
    assert got[0, 0, 0].isnan().all()
    got[0, 0, 0] = wanted[0, 0, 0]
    assert torch.equal(got, wanted)


@runs_kernels
def test_any_strides_and_every_time_the_same_bits():
    x, sizes = random_tokens()
    for other in (x, x.contiguous(), x.mT.contiguous().mT):
        assert torch.equal(means(other, torch.stack((sizes, sizes), -1)[..., 0]), means(x, sizes))


@runs_kernels
@pytest.mark.parametrize("k_kind", ["uneven", "half empty", "giant", "singletons"])
@pytest.mark.parametrize("k_clusters", [1, 2, 33, 70])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.1])
def test_logarithms_of_what_is_dropped(density, k_clusters, k_kind):
    from svg2_compile.kernels.log_dropped_sizes_triton import log_dropped_sizes_triton

    case = attention_cases.random_case(k_clusters=k_clusters, k_kind=k_kind, density=density, k_tokens=80)
    runs, counts, k_sizes = dropped_arguments(case)
    # nobody may look at slots past the runs
    unused = torch.arange(runs.shape[3]) >= counts[..., :1]
    with_others = torch.where(unused.unsqueeze(-1), torch.tensor([0, 2**31 - 1], dtype=torch.int32), runs)
    got = log_dropped_sizes_triton(*(each.to(DEVICE) for each in (with_others, counts, k_sizes)))
    torch.testing.assert_close(got.cpu(), log_dropped_sizes_reference(runs, counts, k_sizes), rtol=1e-5, atol=1e-6)
