"""Tiles of queries: they cover every query once, and the kernel makes the same ones."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sizes_of_clusters import random_sizes
from triton_interpreter import DEVICE, assert_passes_under_the_interpreter, runs_kernels, starts_the_interpreter

from svg2_compile.kernels.work_list import max_tiles, query_tiles_reference

PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


@st.composite
def query_clusters(draw):
    """Return q_sizes, q_tokens, block_m."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["uneven", "half empty", "giant", "singletons"]))
    tokens = draw(st.integers(1, 600))
    sizes = random_sizes(
        generator, draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 40)), tokens, kind
    )
    return sizes, tokens, draw(st.sampled_from([16, 64, 128]))


@PROPERTY
@given(query_clusters())
def test_tiles_cover_every_query_once_and_stay_in_their_cluster(case):
    q_sizes, q_tokens, block_m = case
    tiles = query_tiles_reference(*case)
    assert tiles.shape == (*q_sizes.shape[:2], max_tiles(q_tokens, q_sizes.shape[2], block_m), 3)
    for sizes, head_tiles in zip(q_sizes.flatten(0, 1), tiles.flatten(0, 1), strict=True):
        cluster_of_token = torch.arange(len(sizes)).repeat_interleave(sizes.long())
        times_listed = torch.zeros(q_tokens, dtype=torch.int64)
        for cluster, start, stop in head_tiles.tolist():
            assert 0 <= stop - start <= block_m
            assert (cluster_of_token[start:stop] == cluster).all()
            times_listed[start:stop] += 1
        assert (times_listed == 1).all()


@runs_kernels
@settings(PROPERTY, max_examples=15)
@given(query_clusters())
def test_the_kernel_makes_the_same_tiles(case):
    from svg2_compile.kernels.work_list_triton import query_tiles_triton

    q_sizes, q_tokens, block_m = case
    assert torch.equal(query_tiles_triton(q_sizes.to(DEVICE), q_tokens, block_m).cpu(), query_tiles_reference(*case))


@runs_kernels
def test_the_kernel_writes_every_slot():
    from svg2_compile.kernels.work_list_triton import query_tiles_triton

    q_sizes = torch.tensor([[[0, 200, 0], [1, 0, 199]]], dtype=torch.int32)
    assert torch.equal(query_tiles_triton(q_sizes.to(DEVICE), 200, 64).cpu(), query_tiles_reference(q_sizes, 200, 64))
