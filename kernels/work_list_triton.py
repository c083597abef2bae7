"""``query_tiles_reference`` in one launch, without the host ever knowing how large the clusters are."""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.launch import padded_power_of_two
from svg2_compile.kernels.work_list import max_tiles

NUM_WARPS = 4
BLOCK_SLOTS = 32


@triton.jit(do_not_specialize=["clusters", "tile_slots"])
def _query_tiles_kernel(
    sizes_ptr,
    tiles_ptr,
    clusters,
    tile_slots,
    BLOCK_M: tl.constexpr,
    BLOCK_CLUSTERS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Write the tiles of one query cluster."""
    row = tl.program_id(0).to(tl.int64)  # of [B, H, C_q]
    head = row // clusters
    cluster = (row % clusters).to(tl.int32)
    offs_c = tl.arange(0, BLOCK_CLUSTERS)
    sizes = tl.load(sizes_ptr + head * clusters + offs_c, mask=offs_c < clusters, other=0)
    num_tiles = (sizes + BLOCK_M - 1) // BLOCK_M
    # The tiles of this cluster come after those of the clusters before it.
    first_row = tl.sum(tl.where(offs_c < cluster, sizes, 0))
    last_row = first_row + tl.sum(tl.where(offs_c == cluster, sizes, 0))
    first_tile = tl.sum(tl.where(offs_c < cluster, num_tiles, 0))
    last_tile = first_tile + tl.sum(tl.where(offs_c == cluster, num_tiles, 0))
    # The last cluster also clears the slots that are left over.
    slots = tl.where(cluster == clusters - 1, tile_slots, last_tile)
    offs_slot = tl.arange(0, BLOCK_SLOTS)
    for start in range(first_tile, slots, BLOCK_SLOTS):
        slot = start + offs_slot
        used = slot < last_tile
        tile_row = first_row + (slot - first_tile) * BLOCK_M
        tile_ptrs = tiles_ptr + (head * tile_slots + slot) * 3
        tl.store(tile_ptrs, tl.where(used, cluster, 0), mask=slot < slots)
        tl.store(tile_ptrs + 1, tl.where(used, tile_row, 0), mask=slot < slots)
        tl.store(tile_ptrs + 2, tl.where(used, tl.minimum(tile_row + BLOCK_M, last_row), 0), mask=slot < slots)


def query_tiles_triton(q_sizes: Tensor, q_tokens: int, block_m: int) -> Tensor:
    """Compute ``query_tiles_reference``."""
    q_sizes = q_sizes.contiguous()
    batch, heads, clusters = q_sizes.shape
    tile_slots = max_tiles(q_tokens, clusters, block_m)
    tiles = torch.empty((batch, heads, tile_slots, 3), dtype=torch.int32, device=q_sizes.device)
    with torch.cuda.device_of(q_sizes):
        _query_tiles_kernel[(q_sizes.numel(),)](
            q_sizes, tiles, clusters, tile_slots, num_warps=NUM_WARPS, **_constexprs(clusters, block_m)
        )
    return tiles


@cache
def _constexprs(clusters: int, block_m: int) -> dict[str, int]:
    """Return the compile-time arguments."""
    return {"BLOCK_M": block_m, "BLOCK_CLUSTERS": padded_power_of_two(clusters), "BLOCK_SLOTS": BLOCK_SLOTS}


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernels of this module as they are launched."""
    pointers = {"sizes_ptr": "*i32", "tiles_ptr": "*i32"}
    return [
        AotVariant(
            name=f"query_tiles_{clusters}",
            fn=_query_tiles_kernel,
            signature=pointers | {"clusters": "i32", "tile_slots": "i32"},
            constexprs=dict(_constexprs(clusters, 128)),
            num_warps=NUM_WARPS,
            num_stages=3,
            divisible_by_16=tuple(pointers),
        )
        for clusters in (100, 300)
    ]
