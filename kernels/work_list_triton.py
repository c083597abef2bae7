"""``work_list_reference`` in one launch, without the host ever knowing what is kept."""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.launch import AotVariant, padded_power_of_two
from svg2_compile.kernels.work_list import LENGTH_BITS, WorkList, max_pieces, max_tiles

NUM_WARPS = 4


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


@triton.jit
def _min(a, b):
    return tl.minimum(a, b)


@triton.jit(do_not_specialize=["repeats", "q_clusters", "k_clusters", "tile_slots", "piece_slots"])
def _work_list_kernel(
    q_sizes_ptr,
    k_sizes_ptr,
    keep_ptr,
    tiles_ptr,
    pieces_ptr,
    counts_ptr,
    repeats,
    q_clusters,
    k_clusters,
    tile_slots,
    piece_slots,
    LENGTH_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_Q_CLUSTERS: tl.constexpr,
    BLOCK_K_CLUSTERS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Write the tiles and the pieces of one query cluster."""
    row = tl.program_id(0).to(tl.int64)  # of [B, H, C_q]
    head = row // q_clusters
    cluster = (row % q_clusters).to(tl.int32)

    # The tiles of this query cluster come after those of the clusters before it.
    offs_q = tl.arange(0, BLOCK_Q_CLUSTERS)
    q_size = tl.load(q_sizes_ptr + head * q_clusters + offs_q, mask=offs_q < q_clusters, other=0)
    q_tiles = (q_size + BLOCK_M - 1) // BLOCK_M
    first_row = tl.sum(tl.where(offs_q < cluster, q_size, 0))
    last_row = first_row + tl.sum(tl.where(offs_q == cluster, q_size, 0))
    first_tile = tl.sum(tl.where(offs_q < cluster, q_tiles, 0))
    last_tile = first_tile + tl.sum(tl.where(offs_q == cluster, q_tiles, 0))
    # The last cluster also clears the slots that are left over.
    slots = tl.where(cluster == q_clusters - 1, tile_slots, last_tile)
    offs_slot = tl.arange(0, BLOCK_SLOTS)
    for start in range(first_tile, slots, BLOCK_SLOTS):
        slot = start + offs_slot
        used = slot < last_tile
        tile_row = first_row + (slot - first_tile) * BLOCK_M
        tile_ptrs = tiles_ptr + (head * tile_slots + slot) * 3
        tl.store(tile_ptrs, tl.where(used, cluster, 0), mask=slot < slots)
        tl.store(tile_ptrs + 1, tl.where(used, tile_row, 0), mask=slot < slots)
        tl.store(tile_ptrs + 2, tl.where(used, tl.minimum(tile_row + BLOCK_M, last_row), 0), mask=slot < slots)

    offs_k = tl.arange(0, BLOCK_K_CLUSTERS)
    k_size = tl.load(k_sizes_ptr + (head // repeats) * k_clusters + offs_k, mask=offs_k < k_clusters, other=0)
    keep = tl.load(keep_ptr + row * k_clusters + offs_k, mask=offs_k < k_clusters, other=0) != 0
    keep = keep & (k_size > 0)
    dropped = (keep == 0) & (k_size > 0)
    kept_size = tl.where(keep, k_size, 0)
    # Positions count kept keys only: a run is a stretch of positions between two dropped clusters.
    position = tl.cumsum(kept_size, 0) - kept_size
    kept_keys = tl.sum(kept_size)
    run_start = tl.associative_scan(tl.where(dropped, position, 0), 0, _max)
    run_stop = tl.associative_scan(tl.where(dropped, position, kept_keys), 0, _min, reverse=True)
    key_shift = tl.cumsum(k_size - kept_size, 0)  # a kept key's index less its position

    # Of its run's full pieces, numbered from 0, a cluster writes those that start in it.
    run_full = (run_stop - run_start) // PIECE
    first = tl.minimum((position - run_start + PIECE - 1) // PIECE, run_full)
    stop = tl.minimum((position + kept_size - run_start + PIECE - 1) // PIECE, run_full)
    num_full = tl.where(keep, stop - first, 0)
    full_slot = tl.cumsum(num_full, 0) - num_full
    full_pieces = tl.sum(num_full)
    pieces_ptr += row * piece_slots
    key = run_start + key_shift + first * PIECE
    for i in range(tl.max(num_full)):
        tl.store(pieces_ptr + full_slot + i, ((key + i * PIECE) << LENGTH_BITS) + PIECE, mask=i < num_full)

    ragged_start = run_start + run_full * PIECE
    is_ragged = keep & (ragged_start < run_stop) & (ragged_start >= position) & (ragged_start < position + kept_size)
    num_ragged = is_ragged.to(tl.int32)
    ragged_slot = full_pieces + tl.cumsum(num_ragged, 0) - num_ragged
    ragged_piece = ((ragged_start + key_shift) << LENGTH_BITS) + run_stop - ragged_start
    tl.store(pieces_ptr + ragged_slot, ragged_piece, mask=is_ragged)
    tl.store(counts_ptr + row * 2, full_pieces)
    tl.store(counts_ptr + row * 2 + 1, full_pieces + tl.sum(num_ragged))


def work_list_triton(
    q_sizes: Tensor, k_sizes: Tensor, keep: Tensor, q_tokens: int, k_tokens: int, block_m: int, piece: int
) -> WorkList:
    """Compute ``work_list_reference``."""
    q_sizes, k_sizes, keep = q_sizes.contiguous(), k_sizes.contiguous(), keep.contiguous()
    batch, heads, q_clusters, k_clusters = keep.shape
    tile_slots = max_tiles(q_tokens, q_clusters, block_m)
    piece_slots = max_pieces(k_tokens, k_clusters, piece)
    tiles = torch.empty((batch, heads, tile_slots, 3), dtype=torch.int32, device=keep.device)
    pieces = torch.empty((batch, heads, q_clusters, piece_slots), dtype=torch.int32, device=keep.device)
    counts = torch.empty((batch, heads, q_clusters, 2), dtype=torch.int32, device=keep.device)
    with torch.cuda.device_of(keep):
        _work_list_kernel[(batch * heads * q_clusters,)](
            q_sizes,
            k_sizes,
            keep.view(torch.uint8),
            tiles,
            pieces,
            counts,
            heads // k_sizes.shape[1],
            q_clusters,
            k_clusters,
            tile_slots,
            piece_slots,
            num_warps=NUM_WARPS,
            **_constexprs(q_clusters, k_clusters, block_m, piece),
        )
    return WorkList(tiles, pieces, counts)


def _constexprs(q_clusters: int, k_clusters: int, block_m: int, piece: int) -> dict[str, int]:
    """Return the compile-time arguments."""
    return {
        "LENGTH_BITS": LENGTH_BITS,
        "BLOCK_M": block_m,
        "PIECE": piece,
        "BLOCK_Q_CLUSTERS": padded_power_of_two(q_clusters),
        "BLOCK_K_CLUSTERS": padded_power_of_two(k_clusters),
        "BLOCK_SLOTS": 32,
    }


def aot_variants() -> list[AotVariant]:
    """Return the kernels of this module as they are launched."""
    pointers = {"q_sizes_ptr": "*i32", "k_sizes_ptr": "*i32", "keep_ptr": "*u8"}
    pointers |= dict.fromkeys(("tiles_ptr", "pieces_ptr", "counts_ptr"), "*i32")
    scalars = dict.fromkeys(("repeats", "q_clusters", "k_clusters", "tile_slots", "piece_slots"), "i32")
    return [
        AotVariant(
            name=f"work_list_{q_clusters}_{k_clusters}",
            fn=_work_list_kernel,
            signature=pointers | scalars,
            constexprs=dict(_constexprs(q_clusters, k_clusters, 128, 16)),
            num_warps=NUM_WARPS,
            num_stages=3,
            divisible_by_16=tuple(pointers),
        )
        for q_clusters, k_clusters in ((100, 500), (300, 1000))
    ]
