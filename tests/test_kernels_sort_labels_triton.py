"""``svg2::sort_labels`` in Triton: the reference's result, to the last element."""

import os
import subprocess
import sys

import pytest
import torch

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.sort_labels import sort_labels_reference

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


def sort(labels, clusters):
    from svg2_compile.kernels.sort_labels_triton import SortedLabels, launch_sort

    result = SortedLabels.empty(labels, clusters)
    for tensor in (result.order, result.sizes, result.starts, result.counts):
        tensor.fill_(-1)
    launch_sort(labels.contiguous(), result)
    return result


def random_labels(tokens, clusters, kind):
    generator = torch.Generator().manual_seed(tokens + clusters)
    labels = torch.randint(0, clusters, (2, tokens, 3), generator=generator, dtype=torch.int32).transpose(1, 2)
    if kind == "giant":
        labels = torch.full_like(labels, clusters - 1)
    elif kind == "singletons":
        labels = torch.rand(labels.shape, generator=generator).argsort(-1).int() % clusters
    elif kind == "half empty":
        labels = labels // 2 * 2
    return labels.to(DEVICE)


@runs_kernels
@pytest.mark.parametrize("kind", ["uneven", "half empty", "giant", "singletons"])
@pytest.mark.parametrize(
    ("tokens", "clusters"), [(1, 1), (15, 5), (63, 16), (64, 5), (65, 100), (257, 16), (1000, 100)]
)
def test_order_and_sizes_equal_the_reference(tokens, clusters, kind):
    labels = random_labels(tokens, clusters, kind)
    result = sort(labels, clusters)
    order, sizes = sort_labels_reference(labels, clusters)
    assert torch.equal(result.order, order)
    assert torch.equal(result.sizes, sizes)
    assert torch.equal(result.starts, sizes.cumsum(-1).int() - sizes)


@runs_kernels
def test_as_many_clusters_as_the_tiles_hold():
    labels = torch.randint(0, 1024, (1, 1, 2500), dtype=torch.int32).to(DEVICE)
    result = sort(labels, 1024)
    order, sizes = sort_labels_reference(labels, 1024)
    assert torch.equal(result.order, order)
    assert torch.equal(result.sizes, sizes)


@runs_kernels
def test_no_tokens():
    from svg2_compile.kernels.sort_labels_triton import sort_labels_triton

    order, sizes = sort_labels_triton(torch.empty((1, 2, 0), dtype=torch.int32, device=DEVICE), 3)
    assert order.shape == (1, 2, 0)
    assert (sizes == 0).all()


@runs_kernels
def test_strided_labels_and_the_same_bits_twice():
    from svg2_compile.kernels.sort_labels_triton import sort_labels_triton

    labels = random_labels(257, 16, "uneven")
    assert not labels.is_contiguous()
    for first, second in zip(sort_labels_triton(labels, 16), sort_labels_triton(labels, 16), strict=True):
        assert first.is_contiguous()
        assert torch.equal(first, second)
    assert torch.equal(sort_labels_triton(labels, 16)[0], sort_labels_reference(labels, 16)[0])


@runs_kernels
@pytest.mark.parametrize("iteration", [1, 2])
def test_an_iteration_that_is_not_needed_writes_nothing(iteration):
    from svg2_compile.kernels.sort_labels_triton import SortedLabels, launch_sort

    labels = random_labels(257, 16, "uneven").contiguous()
    result = SortedLabels.empty(labels, 16)
    result.order.fill_(-1)
    result.sizes.fill_(-1)
    launch_sort(labels, result, torch.ones(1, dtype=torch.int32, device=DEVICE), iteration)
    assert (result.order == -1).all()
    assert (result.sizes == -1).all()
