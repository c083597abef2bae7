"""``svg2::sort_labels`` in Triton: a stable counting sort, without atomics.

Three launches: count the labels of every block of tokens; add the counts up over blocks and clusters; place every
token behind the equal labels before it.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.launch import AotVariant, cdiv, padded_power_of_two, persistent_grid

BLOCK_N = 256  # tokens counted together; the table of counts takes 4 * C / 256 bytes a token
CHUNK_N = 32  # tokens a block is compared with at a time
SCAN_ELEMENTS = 8192  # counts added up at a time
# tl.histogram wants a bin for every thread of a warp.
MIN_BLOCK_C = 32
NUM_WARPS = 4
SCAN_WARPS = 8
PROGRAMS_PER_PROCESSOR = 16


@triton.jit
def tiles_to_do(tiles, needed_ptr, iteration):
    """Return ``tiles``, or 0 where fewer iterations are needed; without a pointer there is only one iteration."""
    if needed_ptr is not None:
        tiles = tl.where(tl.load(needed_ptr) > iteration, tiles, 0)
    return tiles


@triton.jit(do_not_specialize=["heads", "tokens", "iteration"])
def count_kernel(
    labels_ptr,
    counts_ptr,
    needed_ptr,
    heads,
    tokens,
    clusters,
    iteration,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Count the labels of every block: labels [heads, tokens] to counts [heads, blocks, clusters]."""
    blocks = tl.cdiv(tokens, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    for tile in range(tl.program_id(0), tiles_to_do(heads * blocks, needed_ptr, iteration), tl.num_programs(0)):
        tile_index = tl.cast(tile, tl.int64)
        head = tile_index // blocks
        offs_n = (tile_index % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_token = offs_n < tokens
        label = tl.load(labels_ptr + head * tokens + offs_n, mask=is_token, other=0)
        counts = tl.histogram(label, BLOCK_C, mask=is_token)
        tl.store(counts_ptr + tile_index * clusters + offs_c, counts, mask=offs_c < clusters)


@triton.jit(do_not_specialize=["heads", "tokens", "iteration"])
def scan_kernel(
    counts_ptr,
    sizes_ptr,
    starts_ptr,
    needed_ptr,
    heads,
    tokens,
    clusters,
    iteration,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Turn the counts of each block into those of the blocks before it, and write every cluster's size and start."""
    blocks = tl.cdiv(tokens, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    is_cluster = offs_c < clusters
    for head_index in range(tl.program_id(0), tiles_to_do(heads, needed_ptr, iteration), tl.num_programs(0)):
        head = tl.cast(head_index, tl.int64)
        sizes = tl.zeros([BLOCK_C], tl.int32)
        for first_block in range(0, blocks, BLOCK_B):
            offs_b = first_block + tl.arange(0, BLOCK_B)
            pointers = counts_ptr + (head * blocks + offs_b)[:, None] * clusters + offs_c[None, :]
            mask = (offs_b < blocks)[:, None] & is_cluster[None, :]
            counts = tl.load(pointers, mask=mask, other=0)
            # In place: an element is overwritten only with a sum it is part of, hence after it was read.
            tl.store(pointers, sizes[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
            sizes += tl.sum(counts, 0)
        tl.store(sizes_ptr + head * clusters + offs_c, sizes, mask=is_cluster)
        tl.store(starts_ptr + head * clusters + offs_c, tl.cumsum(sizes, 0) - sizes, mask=is_cluster)


@triton.jit(do_not_specialize=["heads", "tokens", "iteration"])
def place_kernel(
    labels_ptr,
    counts_ptr,
    starts_ptr,
    order_ptr,
    needed_ptr,
    heads,
    tokens,
    clusters,
    iteration,
    BLOCK_N: tl.constexpr,
    CHUNK_N: tl.constexpr,
):
    """Write every token to its sorted position: its cluster's start plus the equal labels before it."""
    blocks = tl.cdiv(tokens, BLOCK_N)
    in_block = tl.arange(0, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_to_do(heads * blocks, needed_ptr, iteration), tl.num_programs(0)):
        tile_index = tl.cast(tile, tl.int64)
        head = tile_index // blocks
        first = (tile_index % blocks) * BLOCK_N
        offs_n = first + in_block
        is_token = offs_n < tokens
        label = tl.load(labels_ptr + head * tokens + offs_n, mask=is_token, other=0)
        rank = tl.zeros([BLOCK_N], tl.int32)
        for chunk in range(0, BLOCK_N, CHUNK_N):
            other = chunk + tl.arange(0, CHUNK_N)
            other_label = tl.load(labels_ptr + head * tokens + first + other, mask=first + other < tokens, other=-1)
            # Tokens along the last axis, where threads lie: each counts for its own tokens.
            is_before = (other_label[:, None] == label[None, :]) & (other[:, None] < in_block[None, :])
            rank += tl.sum(is_before.to(tl.int32), 0)
        start = tl.load(starts_ptr + head * clusters + label, mask=is_token, other=0)
        before = tl.load(counts_ptr + tile_index * clusters + label, mask=is_token, other=0)
        tl.store(order_ptr + head * tokens + (start + before + rank), offs_n.to(tl.int32), mask=is_token)


@dataclass(frozen=True, slots=True)
class SortedLabels:
    """What the sort writes, with its table of counts."""

    order: Tensor
    """int32 [B, H, N], the token found at each sorted position."""
    sizes: Tensor
    """int32 [B, H, C], tokens per cluster."""
    starts: Tensor
    """int32 [B, H, C], the sorted position of each cluster's first token."""
    counts: Tensor
    """int32 [B, H, ceil(N / BLOCK_N), C]."""

    @classmethod
    def empty(cls, labels: Tensor, clusters: int) -> "SortedLabels":
        """Return uninitialised tensors for ``labels``, int32 [B, H, N]."""
        batch, heads, tokens = labels.shape
        return cls(
            order=labels.new_empty((batch, heads, tokens)),
            sizes=labels.new_empty((batch, heads, clusters)),
            starts=labels.new_empty((batch, heads, clusters)),
            counts=labels.new_empty((batch, heads, cdiv(tokens, BLOCK_N), clusters)),
        )


def sort_labels_triton(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Compute ``sort_labels_reference``, with the same result, for at most ``MAX_CLUSTERS`` clusters."""
    labels = labels.contiguous()
    result = SortedLabels.empty(labels, clusters)
    launch_sort(labels, result)
    return result.order, result.sizes


def launch_sort(labels: Tensor, result: SortedLabels, needed: Tensor | None = None, iteration: int = 0) -> None:
    """Sort ``labels``, int32 [B, H, N] and contiguous, into ``result``.

    Does nothing where ``needed``, int32 [1] on the device, is given and not above ``iteration``.
    """
    heads, tokens = labels.shape[0] * labels.shape[1], labels.shape[2]
    clusters = result.sizes.shape[2]
    block_c = padded_power_of_two(clusters, MIN_BLOCK_C)
    blocks_grid = persistent_grid(labels.device, heads * cdiv(tokens, BLOCK_N), PROGRAMS_PER_PROCESSOR)
    scan_grid = persistent_grid(labels.device, heads, PROGRAMS_PER_PROCESSOR)
    with torch.cuda.device_of(labels):
        count_kernel[blocks_grid](
            labels,
            result.counts,
            needed,
            heads,
            tokens,
            clusters,
            iteration,
            BLOCK_N=BLOCK_N,
            BLOCK_C=block_c,
            num_warps=NUM_WARPS,
        )
        scan_kernel[scan_grid](
            result.counts,
            result.sizes,
            result.starts,
            needed,
            heads,
            tokens,
            clusters,
            iteration,
            BLOCK_N=BLOCK_N,
            BLOCK_B=_scan_blocks(block_c),
            BLOCK_C=block_c,
            num_warps=SCAN_WARPS,
            num_stages=1,
        )
        place_kernel[blocks_grid](
            labels,
            result.counts,
            result.starts,
            result.order,
            needed,
            heads,
            tokens,
            clusters,
            iteration,
            BLOCK_N=BLOCK_N,
            CHUNK_N=CHUNK_N,
            num_warps=NUM_WARPS,
            num_stages=1,
        )


def _scan_blocks(block_c: int) -> int:
    """Return how many blocks the scan adds up at a time."""
    return min(16, SCAN_ELEMENTS // block_c)


def aot_variants() -> list[AotVariant]:
    """Return the kernels as they are launched for few and for many clusters, alone and inside k-means."""
    variants = []
    sizes = {"heads": "i32", "tokens": "i32", "clusters": "i32", "iteration": "i32"}
    for clusters, gated in ((100, False), (1000, True)):
        block_c = padded_power_of_two(clusters, MIN_BLOCK_C)
        needed = {"needed_ptr": "*i32"} if gated else {}
        absent: dict[str, object] = {} if gated else {"needed_ptr": None}
        suffix = f"c{block_c}" + ("_gated" if gated else "")
        aligned = ("labels_ptr", "counts_ptr", "sizes_ptr", "starts_ptr", "order_ptr", "needed_ptr")
        for fn, pointers, constexprs, warps, stages in (
            (count_kernel, ("labels_ptr", "counts_ptr"), {"BLOCK_N": BLOCK_N, "BLOCK_C": block_c}, NUM_WARPS, 3),
            (
                scan_kernel,
                ("counts_ptr", "sizes_ptr", "starts_ptr"),
                {"BLOCK_N": BLOCK_N, "BLOCK_B": _scan_blocks(block_c), "BLOCK_C": block_c},
                SCAN_WARPS,
                1,
            ),
            (
                place_kernel,
                ("labels_ptr", "counts_ptr", "starts_ptr", "order_ptr"),
                {"BLOCK_N": BLOCK_N, "CHUNK_N": CHUNK_N},
                NUM_WARPS,
                1,
            ),
        ):
            signature = dict.fromkeys(pointers, "*i32") | needed | sizes
            variants.append(
                AotVariant(
                    name=f"{fn.__name__}_{suffix}",
                    fn=fn,
                    signature=signature,
                    constexprs=constexprs | absent,
                    num_warps=warps,
                    num_stages=stages,
                    divisible_by_16=tuple(name for name in aligned if name in signature),
                )
            )
    return variants
