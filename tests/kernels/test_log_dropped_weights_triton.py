"""``svg2::log_dropped_weights`` in Triton: the reference's weights, up to rounding, the same bits every time."""

import dataclasses
import math

import pytest
import torch
from triton_interpreter import (
    DEVICE,
    INTERPRETED,
    assert_passes_under_the_interpreter,
    runs_kernels,
    starts_the_interpreter,
)
from weights_cases import Case, random_case

# The interpreter has no bf16 products.
DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16, torch.float32]


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


def weights(case):
    from svg2_compile.kernels.log_dropped_weights_triton import log_dropped_weights_triton

    on_device = Case(*(each.to(DEVICE) if isinstance(each, torch.Tensor) else each for each in case.arguments()))
    return log_dropped_weights_triton(*on_device.arguments()).cpu()


def assert_right(case):
    case.assert_right(weights(case))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 60.0])
@pytest.mark.parametrize("clusters", [(1, 1), (5, 7), (3, 40)])
def test_weights_are_those_of_every_key(clusters, sharpness, dtype):
    assert_right(random_case(clusters=clusters, sharpness=sharpness, dtype=dtype, tokens=90, dim=24, batch=1))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [4, 64, 80, 128, 256])
def test_any_head_dimension(dim, dtype):
    assert_right(random_case(dim=dim, batch=1, groups=1, clusters=(70, 5), dtype=dtype))


@runs_kernels
@pytest.mark.parametrize("q_clusters", [1, 16, 129])
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
    assert torch.equal(weights(case.with_hidden(math.nan)), weights(case))


@runs_kernels
@pytest.mark.parametrize(("tile", "clusters"), [((16, 16), 1), ((64, 32), 3), ((128, 128), 64)], ids=str)
def test_any_tile_and_any_share_of_the_clusters(monkeypatch, tile, clusters):
    from svg2_compile.kernels import log_dropped_weights_triton

    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    monkeypatch.setattr(log_dropped_weights_triton, "_tile", lambda *_: dict(zip(names, (*tile, 4, 2))))
    monkeypatch.setattr(log_dropped_weights_triton, "CLUSTERS", clusters)
    assert_right(random_case(tokens=300, batch=1, groups=1, clusters=(33, 14), dtype=torch.float16))


@runs_kernels
def test_any_strides_and_every_time_the_same_bits():
    case = random_case(dim=24)
    first = weights(case)
    for layout in (
        lambda x: x,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.mT.contiguous().mT,
    ):
        names = ("log_sizes", "q_centroids", "k", "k_means")
        assert torch.equal(
            weights(dataclasses.replace(case, **{name: layout(getattr(case, name)) for name in names})), first
        )


@runs_kernels
def test_every_element_is_written(monkeypatch):
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: real(*size, **options).fill_(math.nan))
    assert not weights(random_case(clusters=(9, 33), used=0.5)).isnan().any()
