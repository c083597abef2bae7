"""The assignment of ``svg2::kmeans_`` for Hopper: warps that load, warps that multiply, a warp that counts.

One program to a processor takes neighbouring blocks of tokens, mostly of one head, and keeps the centroids of the head
in shared memory; more than fit there pass through it for every tile of tokens. Two groups of four warps label 64
tokens each, which they hold in registers: tensor cores score the tokens of one group while the other compares.

The comparison carries the number of the tile of clusters in the last bits of a score, so that a maximum is two
instructions: scores of different tiles that agree in all other bits count as equal.
"""

# Gluon has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"
# mypy: disable-error-code="assignment"

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.assign_tile import GLUON_ASSIGN_C as BLOCK_C
from svg2_compile.kernels.card import MAX_CLUSTERS
from svg2_compile.kernels.counting_sort import COUNT_N, TABLE_COLUMNS
from svg2_compile.kernels.gluon_names import element_type, load_box, shared_layout, thread_barrier
from svg2_compile.kernels.launch import RepeatableLaunch
from svg2_compile.kernels.sides import SIZES

ROWS = 64  # tokens of either group of warps
CENTROID_BYTES = 128 * 1024  # of shared memory
BINS = 256  # labels counted at a time
NUM_WARPS = 4
CONSUMER_REGISTERS = 216
PRODUCER_REGISTERS = 72
NUMBERS = gl.constexpr(2 * MAX_CLUSTERS // BLOCK_C - 1)


class Sizes(NamedTuple):
    """Both sides, and the share of this program."""

    batch: Any
    q_heads: Any
    k_heads: Any
    q_tokens: Any
    k_tokens: Any
    q_clusters: Any
    k_clusters: Any
    q_first: Any
    q_count: Any
    k_first: Any
    k_count: Any


class Block(NamedTuple):
    """A block of tokens to be labelled and counted together."""

    is_k: Any
    row: Any
    """Batch element and head."""
    heads: Any
    tokens: Any
    first_token: Any
    centroid_tiles: Any
    centroid_row: Any
    """Where the centroids of the head begin."""
    block: Any
    stays: Any
    """Whether the centroids of the head fit into shared memory."""
    is_last: Any
    """Whether the next block is of another head."""


class Shared(NamedTuple):
    """What the warps of a program share."""

    c_smem: Any  # [STAGES, BLOCK_C, DIM]
    x_smem: Any  # [2, 1, 1, ROWS, DIM]
    labels_smem: Any  # [2, COUNT_N]
    c_bars: Any
    """Centroids arrived, centroids used; of every stage."""
    x_bars: Any
    """Tokens arrived, tokens read; of either group."""
    label_bars: Any
    """Labels written, labels read; of either half of their memory."""


@gluon.jit
def _share(blocks, program):
    """Return the first block of a program and how many it takes: neighbours, as many as the others or one more."""
    programs = gl.num_programs(0)
    extra = blocks % programs
    count = blocks // programs + (program < extra).to(gl.int32)
    return program * (blocks // programs) + gl.minimum(program, extra), count


@gluon.jit
def _locate(sizes, item, COUNT_N: gl.constexpr, BLOCK_C: gl.constexpr, STAGES: gl.constexpr):
    """Return a block of the program's share: blocks of queries come first."""
    is_k = item >= sizes.q_count
    tile = gl.where(is_k, sizes.k_first + item - sizes.q_count, sizes.q_first + item)
    tokens = gl.where(is_k, sizes.k_tokens, sizes.q_tokens)
    blocks = gl.cdiv(tokens, COUNT_N)
    row = tile // blocks
    clusters = gl.where(is_k, sizes.k_clusters, sizes.q_clusters)
    q_tiles = gl.cdiv(sizes.q_clusters, BLOCK_C)
    centroid_tiles = gl.cdiv(clusters, BLOCK_C)
    before = gl.where(is_k, sizes.batch * sizes.q_heads * q_tiles, 0) + row * centroid_tiles
    return Block(
        is_k,
        row,
        gl.where(is_k, sizes.k_heads, sizes.q_heads),
        tokens,
        tile % blocks * COUNT_N,
        centroid_tiles,
        before * BLOCK_C,
        tile % blocks,
        centroid_tiles <= STAGES,
        (tile % blocks == blocks - 1) | (item == sizes.q_count - 1) | (item == sizes.q_count + sizes.k_count - 1),
    )


@gluon.jit
def _releases(block, first_token, COUNT_N: gl.constexpr, TOKENS: gl.constexpr):
    """Return whether nobody needs the centroids in shared memory after ``TOKENS`` tokens of a block."""
    next_token = first_token + TOKENS
    is_end = (next_token >= block.tokens) | (next_token == block.first_token + COUNT_N)
    return (not block.stays) | (block.is_last & is_end)


@gluon.jit
def _produce(shared, sizes, q_desc, k_desc, c_desc, COUNT_N: gl.constexpr):
    """Load tokens, and centroids where those of the head are not there or do not stay."""
    STAGES: gl.constexpr = shared.c_smem.shape[0]
    BLOCK_C: gl.constexpr = shared.c_smem.shape[1]
    ROWS: gl.constexpr = shared.x_smem.shape[3]
    DIM: gl.constexpr = shared.x_smem.shape[4]
    BYTES: gl.constexpr = shared.x_smem.dtype.primitive_bitwidth // 8 * DIM
    slot = 0
    step = 0
    is_needed = True
    for item in range(sizes.q_count + sizes.k_count):
        block = _locate(sizes, item, COUNT_N, BLOCK_C, STAGES)
        b, h = block.row // block.heads, block.row % block.heads
        for i in range(COUNT_N // (2 * ROWS)):
            first_token = block.first_token + i * 2 * ROWS
            if first_token < block.tokens:
                for half in gl.static_range(2):
                    mbarrier.wait(shared.x_bars.index(2 + half), (step & 1) ^ 1)
                    mbarrier.expect(shared.x_bars.index(half), ROWS * BYTES)
                    coord = [b, h, first_token + half * ROWS, 0]
                    if block.is_k:
                        load_box(k_desc, coord, shared.x_bars.index(half), shared.x_smem.index(half))
                    else:
                        load_box(q_desc, coord, shared.x_bars.index(half), shared.x_smem.index(half))
                step += 1
                if is_needed:
                    for tile in range(block.centroid_tiles):
                        stage = (slot + tile) % STAGES
                        phase = ((slot + tile) // STAGES) & 1
                        mbarrier.wait(shared.c_bars.index(STAGES + stage), phase ^ 1)
                        mbarrier.expect(shared.c_bars.index(stage), BLOCK_C * BYTES)
                        row = block.centroid_row + tile * BLOCK_C
                        load_box(c_desc, [row, 0], shared.c_bars.index(stage), shared.c_smem.index(stage))
                is_needed = _releases(block, first_token, COUNT_N, 2 * ROWS)
                slot += gl.where(is_needed, block.centroid_tiles, 0)


@gluon.jit
def _highest(best, scores, number):
    """Return the maximum of every column so far, with the number of its half tile in the last bits.

    Of equal positive scores the one of the lower number wins. Clusters that fill the last tile score -inf, which the
    number makes a NaN; a maximum does not take it.
    """
    packed = (scores.to(gl.int32, bitcast=True) & ~NUMBERS) | (NUMBERS - number)
    return gl.maximum(best, packed.to(gl.float32, bitcast=True))


@gluon.jit
def _label(shared, half, step, slot, releases, block, half_norms_ptr):
    """Return the labels of the tokens of one group of warps."""
    STAGES: gl.constexpr = shared.c_smem.shape[0]
    BLOCK_C: gl.constexpr = shared.c_smem.shape[1]
    ROWS: gl.constexpr = shared.x_smem.shape[3]
    DIM: gl.constexpr = shared.x_smem.shape[4]
    COLUMNS: gl.constexpr = BLOCK_C // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=s_layout, k_width=2)
    mbarrier.wait(shared.x_bars.index(half), step & 1)
    x = shared.x_smem.index(half).reshape([ROWS, DIM]).load(operand_layout)
    offs_c = gl.arange(0, COLUMNS, gl.SliceLayout(0, s_layout))
    half_norm_ptrs = half_norms_ptr + block.centroid_row + offs_c
    best = gl.full([ROWS, COLUMNS], -float("inf"), gl.float32, s_layout)
    for tile in range(block.centroid_tiles):
        stage = (slot + tile) % STAGES
        before_norms = gl.load(half_norm_ptrs + tile * BLOCK_C)
        centroids = shared.c_smem.index(stage)
        mbarrier.wait(shared.c_bars.index(stage), ((slot + tile) // STAGES) & 1)
        zeros = gl.zeros([ROWS, COLUMNS], gl.float32, s_layout)
        before = warpgroup_mma(x, centroids.slice(0, COLUMNS).permute((1, 0)), zeros, use_acc=False, is_async=True)
        after = warpgroup_mma(x, centroids.slice(COLUMNS, COLUMNS).permute((1, 0)), zeros, use_acc=False, is_async=True)
        before = warpgroup_mma_wait(1, deps=(before,))
        if tile == 0:
            # Only a product that has read the registers proves that the tokens have arrived in them.
            thread_barrier()
            mbarrier.arrive(shared.x_bars.index(2 + half), count=1)
        best = _highest(best, before - before_norms[None, :], 2 * tile)
        after_norms = gl.load(half_norm_ptrs + tile * BLOCK_C + COLUMNS)
        after = warpgroup_mma_wait(0, deps=(after,))
        if releases:
            mbarrier.arrive(shared.c_bars.index(STAGES + stage), count=1)
        best = _highest(best, after - after_norms[None, :], 2 * tile + 1)
    highest = gl.max(best, 1)
    tile = NUMBERS - (highest.to(gl.int32, bitcast=True) & NUMBERS)
    column = gl.min(gl.where(best == highest[:, None], offs_c[None, :], COLUMNS), 1)
    # A token that is not a number has no highest score.
    return gl.where(highest == -float("inf"), 0, tile * COLUMNS + column)


@gluon.jit
def _consume(half, shared, sizes, half_norms_ptr, COUNT_N: gl.constexpr):
    """Label every other 128 tokens of every block."""
    BLOCK_C: gl.constexpr = shared.c_smem.shape[1]
    ROWS: gl.constexpr = shared.x_smem.shape[3]
    slot = 0
    step = 0
    for item in range(sizes.q_count + sizes.k_count):
        block = _locate(sizes, item, COUNT_N, BLOCK_C, shared.c_smem.shape[0])
        mbarrier.wait(shared.label_bars.index(2 + item % 2), ((item // 2) & 1) ^ 1)
        for i in range(COUNT_N // (2 * ROWS)):
            first_token = block.first_token + i * 2 * ROWS
            if first_token < block.tokens:
                releases = _releases(block, first_token, COUNT_N, 2 * ROWS)
                labels = _label(shared, half, step, slot, releases, block, half_norms_ptr)
                written = shared.labels_smem.index(item % 2)
                for step_of_block in gl.static_range(COUNT_N // (2 * ROWS)):
                    if i == step_of_block:
                        written.slice((2 * step_of_block + half) * ROWS, ROWS).store(labels)
                step += 1
                slot += gl.where(releases, block.centroid_tiles, 0)
        thread_barrier()
        mbarrier.arrive(shared.label_bars.index(item % 2), count=1)


@gluon.jit
def _count(
    shared, sizes, labels_ptr, counts_ptr, COUNT_N: gl.constexpr, TABLE_COLUMNS: gl.constexpr, BINS: gl.constexpr
):
    """Write the labels of every block, and how often each of them occurs."""
    BLOCK_C: gl.constexpr = shared.c_smem.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    offs_n = gl.arange(0, COUNT_N, layout)
    offs_c = gl.arange(0, BINS, layout)
    q_columns = gl.cdiv(sizes.q_clusters, TABLE_COLUMNS) * TABLE_COLUMNS
    k_columns = gl.cdiv(sizes.k_clusters, TABLE_COLUMNS) * TABLE_COLUMNS
    q_rows = sizes.batch * sizes.q_heads
    for item in range(sizes.q_count + sizes.k_count):
        block = _locate(sizes, item, COUNT_N, BLOCK_C, shared.c_smem.shape[0])
        q_part, k_part = gl.where(block.is_k, q_rows, block.row), gl.where(block.is_k, block.row, 0)
        q_part, k_part = q_part.to(gl.int64), k_part.to(gl.int64)
        columns = gl.where(block.is_k, k_columns, q_columns)
        q_table, k_table = gl.cdiv(sizes.q_tokens, COUNT_N) * q_columns, gl.cdiv(sizes.k_tokens, COUNT_N) * k_columns
        labels_row = labels_ptr + q_part * sizes.q_tokens + k_part * sizes.k_tokens + block.first_token
        counts_row = counts_ptr + q_part * q_table + k_part * k_table + block.block.to(gl.int64) * columns
        is_token = offs_n < block.tokens - block.first_token
        mbarrier.wait(shared.label_bars.index(item % 2), (item // 2) & 1)
        labels = shared.labels_smem.index(item % 2).load(layout)
        gl.store(labels_row + offs_n, labels, mask=is_token)
        thread_barrier()
        mbarrier.arrive(shared.label_bars.index(2 + item % 2), count=1)
        for first in range(0, columns, BINS):
            is_here = is_token & (labels >= first) & (labels < first + BINS)
            counts = gl.histogram(gl.where(is_here, labels - first, 0), BINS, mask=is_here, layout=layout)
            gl.store(counts_row + first + offs_c, counts, mask=first + offs_c < columns)


@gluon.jit(do_not_specialize=[*SIZES, "iteration"])
def assign_gluon_kernel(
    q_desc,
    k_desc,
    c_desc,
    half_norms_ptr,
    labels_ptr,
    counts_ptr,
    needed_ptr,
    batch,
    q_heads,
    k_heads,
    q_tokens,
    k_tokens,
    q_clusters,
    k_clusters,
    iteration,
    DIM: gl.constexpr,
    COUNT_N: gl.constexpr,
    TABLE_COLUMNS: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_C: gl.constexpr,
    STAGES: gl.constexpr,
    BINS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Write the label of every token, argmax_j (x . c_j - ||c_j||^2 / 2), and count the labels."""
    program = gl.program_id(0)
    q_blocks = batch * q_heads * gl.cdiv(q_tokens, COUNT_N)
    k_blocks = batch * k_heads * gl.cdiv(k_tokens, COUNT_N)
    q_blocks = gl.where(gl.load(needed_ptr) > iteration, q_blocks, 0)
    k_blocks = gl.where(gl.load(needed_ptr + 1) > iteration, k_blocks, 0)
    q_first, q_count = _share(q_blocks, program)
    # Who has one block of queries more has none of keys more.
    k_first, k_count = _share(k_blocks, gl.num_programs(0) - 1 - program)
    sizes = Sizes(
        batch, q_heads, k_heads, q_tokens, k_tokens, q_clusters, k_clusters, q_first, q_count, k_first, k_count
    )

    dtype: gl.constexpr = c_desc.dtype
    c_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_C, DIM], dtype)
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, ROWS, DIM], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    c_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_C, DIM], c_layout)
    x_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, DIM], x_layout)
    labels_smem = gl.allocate_shared_memory(gl.int32, [2, COUNT_N], plain)
    c_bars = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    x_bars = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    label_bars = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(c_bars.index(stage), count=1)
        mbarrier.init(c_bars.index(STAGES + stage), count=2)
    for half in gl.static_range(2):
        mbarrier.init(x_bars.index(half), count=1)
        mbarrier.init(x_bars.index(2 + half), count=1)
        mbarrier.init(label_bars.index(half), count=2)
        mbarrier.init(label_bars.index(2 + half), count=1)
    fence_async_shared()
    shared = Shared(c_smem, x_smem, labels_smem, c_bars, x_bars, label_bars)
    gl.warp_specialize(
        [
            (_consume, (0, shared, sizes, half_norms_ptr, COUNT_N)),
            (_consume, (1, shared, sizes, half_norms_ptr, COUNT_N)),
            (_produce, (shared, sizes, q_desc, k_desc, c_desc, COUNT_N)),
            (_count, (shared, sizes, labels_ptr, counts_ptr, COUNT_N, TABLE_COLUMNS, BINS)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )


def launch_assign(
    grid: tuple[int], q: Tensor, k: Tensor, operand: Tensor, buffers: tuple[Tensor, ...], sizes: tuple[int, ...]
) -> RepeatableLaunch:
    """Label the tokens of both sides, as iteration 0.

    Args:
        grid: no more programs than processors.
        q: [B, H, N, D], tokens that ``why_not_gluon_assign`` and ``why_not_boxes`` have nothing against.
        k: the same of the second side; anything like it where there is none.
        operand: [padded C of all heads, D], the centroids in the dtype of the tokens.
        buffers: half squared norms, labels, counts and needed iterations, as ``assign_gluon_kernel`` takes them.
        sizes: those of ``Sides``.
    """
    centroids = _descriptor(operand, [BLOCK_C, operand.shape[1]])
    tokens = [_descriptor(x, [1, 1, ROWS, x.shape[3]]) for x in (q, k)]
    iteration = 0
    constexprs = _constexprs(operand.shape[1])
    return RepeatableLaunch.first(
        assign_gluon_kernel, grid, *tokens, centroids, *buffers, *sizes, iteration, **constexprs, num_warps=NUM_WARPS
    )


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Return a tensor to be loaded block by block."""
    # A dimension of one element may have any stride.
    strides = [stride if size > 1 else x.shape[-1] for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)]
    layout = shared_layout(tuple(block), element_type(x.dtype))
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


def _constexprs(dim: int) -> dict[str, int]:
    """Return the compile-time arguments."""
    return {
        "DIM": dim,
        "COUNT_N": COUNT_N,
        "TABLE_COLUMNS": TABLE_COLUMNS,
        "ROWS": ROWS,
        "BLOCK_C": BLOCK_C,
        "STAGES": CENTROID_BYTES // (BLOCK_C * dim * 2),
        "BINS": BINS,
        "CONSUMER_REGISTERS": CONSUMER_REGISTERS,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
    }


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel as launched on Hopper; nothing elsewhere."""
    if capability != 90:
        return []
    variants = []
    for dtype, name in ((gl.bfloat16, "bf16"), (gl.float16, "fp16")):
        for dim in (64, 128):
            types = dict.fromkeys(assign_gluon_kernel.arg_names, "i32") | {"half_norms_ptr": "*fp32"}
            types |= dict.fromkeys(("labels_ptr", "counts_ptr", "needed_ptr"), "*i32")
            for argument, block in (
                ("q_desc", [1, 1, ROWS, dim]),
                ("k_desc", [1, 1, ROWS, dim]),
                ("c_desc", [BLOCK_C, dim]),
            ):
                layout = shared_layout(tuple(block), dtype)
                types[argument] = f"tensordesc<{name}{block},{layout!r}>"
            constexprs: dict[str, object] = {**_constexprs(dim)}
            signature = {argument: type_ for argument, type_ in types.items() if argument not in constexprs}
            variants.append(
                AotVariant(
                    name=f"assign_{name}_{dim}",
                    fn=assign_gluon_kernel,
                    signature=signature,
                    constexprs=constexprs,
                    num_warps=NUM_WARPS,
                    num_stages=1,
                    divisible_by_16=tuple(argument for argument in signature if argument.endswith("_ptr")),
                )
            )
    return variants
