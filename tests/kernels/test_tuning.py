"""Every GPU gets tiles: tuned ones where there is a table, safe ones elsewhere."""

from __future__ import annotations

import pytest
import torch

from svg2_compile.kernels import tuned
from svg2_compile.kernels.tiles import AttentionTiles
from svg2_compile.kernels.tuning import GLUON, SAFE_FP32, attention_candidates, attention_tiles, chosen_tiles
from svg2_compile.kernels.why_not import GLUON_DIMS
from svg2_compile.kernels.work_list import PIECES

GENERATIONS = (80, 86, 89, 90, 100, 120)
UNTABLED = (87, 103, 121, None)
HALVES = (torch.float16, torch.bfloat16)
DIMS = (16, 32, 64, 128, 256)

BIG = AttentionTiles(128, 64, 16, 8, 3)
SMALL = AttentionTiles(64, 32, 16, 4, 3)
FEW_KEYS = AttentionTiles(128, 32, 16, 8, 3)
WIDE_ROWS = AttentionTiles(64, 32, 16, 8, 2)
# (block_m, block_n, piece, num_warps, num_stages), by padded head dimension; those of the pointer kernel elsewhere.
POINTER = {(86, 64): BIG, (89, 64): BIG, (90, 64): BIG, (100, 64): BIG, (90, 128): BIG, (100, 128): BIG}
POINTER_ELSEWHERE = {16: FEW_KEYS, 32: FEW_KEYS, 64: FEW_KEYS, 128: SMALL, 256: WIDE_ROWS}
TALL = AttentionTiles(128, 128, 16, 8, 2)
DESCRIPTOR = {(90, 64): TALL, (90, 128): TALL, (100, 64): TALL, (100, 128): TALL}
FLAT = AttentionTiles(128, 64, 16, 8, 2)
DESCRIPTOR_ELSEWHERE = {16: FLAT, 32: FLAT, 64: FLAT, 128: AttentionTiles(64, 64, 16, 8, 2)}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("capability", [*GENERATIONS, *UNTABLED])
def test_the_chosen_tiles_are_these(capability, dim, dtype):
    pointer = POINTER.get((capability, dim), POINTER_ELSEWHERE[dim])
    assert attention_tiles(capability, dim, dtype) == pointer
    assert attention_tiles(capability, dim, dtype, "pointer") == pointer
    if dim <= 128:
        descriptor = DESCRIPTOR.get((capability, dim), DESCRIPTOR_ELSEWHERE[dim])
        assert attention_tiles(capability, dim, dtype, "descriptor") == descriptor
    if dim in GLUON_DIMS:
        assert attention_tiles(capability, dim, dtype, "gluon") == GLUON[dim]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("capability", [*GENERATIONS, *UNTABLED])
def test_fp32_has_the_same_tiles_everywhere_and_nothing_to_tune(capability, dim):
    assert attention_tiles(capability, dim, torch.float32) == SAFE_FP32
    assert attention_candidates(capability, dim, torch.float32) == (SAFE_FP32,)


def test_there_is_a_table_for_every_generation_that_is_compiled_for():
    assert tuple(tuned.ATTENTION) == tuple(tuned.CANDIDATES) == GENERATIONS
    for capability in GENERATIONS:
        assert {("pointer", 64), ("pointer", 128)} <= set(tuned.ATTENTION[capability])
        has_descriptors = any(implementation == "descriptor" for implementation, _ in tuned.ATTENTION[capability])
        assert has_descriptors == (capability >= 90)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("capability", GENERATIONS)
def test_candidates_are_two_to_four_different_tiles_the_chosen_one_first(capability, dtype):
    for dim in (64, 128):
        candidates = attention_candidates(capability, dim, dtype)
        assert candidates[0] == attention_tiles(capability, dim, dtype)
        assert 2 <= len(candidates) == len(set(candidates)) <= 4
    for implementation, dim in tuned.CANDIDATES[capability]:
        candidates = attention_candidates(capability, dim, dtype, implementation)
        assert candidates[0] == attention_tiles(capability, dim, dtype, implementation)
        assert 2 <= len(candidates) == len(set(candidates)) <= 4


def test_candidates_of_one_implementation_are_not_given_to_another():
    assert attention_candidates(90, 128, torch.bfloat16, "gluon") == (GLUON[128],)
    pointer = attention_candidates(90, 128, torch.bfloat16, "pointer")
    assert not set(pointer) & set(attention_candidates(90, 128, torch.bfloat16, "descriptor"))


@pytest.mark.parametrize("capability", UNTABLED)
@pytest.mark.parametrize("implementation", ["gluon", "descriptor", "pointer"])
def test_a_generation_without_a_table_has_nothing_to_tune(capability, implementation):
    chosen = attention_tiles(capability, 128, torch.bfloat16, implementation)
    assert attention_candidates(capability, 128, torch.bfloat16, implementation) == (chosen,)


def every_tile():
    """Return (capability, implementation, tiles) for all in the tables."""
    for capability, table in tuned.ATTENTION.items():
        for (implementation, _), tiles in table.items():
            yield capability, implementation, tiles
    for capability, table in tuned.CANDIDATES.items():
        for (implementation, _), several in table.items():
            for tiles in several:
                yield capability, implementation, tiles


@pytest.mark.parametrize(("capability", "implementation", "tiles"), list(every_tile()), ids=str)
def test_pieces_have_16_keys_and_descriptors_need_a_memory_accelerator(capability, implementation, tiles):
    assert tiles.piece == 16
    assert implementation == "pointer" or (capability >= 90 and tiles.block_n in PIECES)


def test_tiles_of_a_user_are_taken_in_the_order_of_the_op():
    assert chosen_tiles((64, 32, 8, 5)) == AttentionTiles(block_m=64, block_n=32, piece=16, num_warps=8, num_stages=5)
