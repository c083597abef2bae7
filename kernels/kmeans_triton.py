"""``svg2::kmeans_`` in Triton: Lloyd iterations without a device synchronisation.

An iteration assigns every token to a centroid, sorts the labels, and averages the tokens of every cluster. As many
iterations are launched as either kind of call may need; ``calls`` is read on the device, and the kernels of an
iteration that is not needed return at once. So does the kernel that orders the centroids, unless it is the first call.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.launch import AotVariant, cdiv, padded_power_of_two, persistent_grid
from svg2_compile.kernels.sort_labels_triton import SortedLabels, launch_sort, tiles_to_do

SUM_BYTES = 16384  # of x, added up by one program at a time
SLOT_ELEMENTS = 2048  # of the partial sums, added up by one program at a time
START_CLUSTERS = 16  # clusters started by one program at a time
WALK_COLUMNS = 16  # of all centroids of a head, compared at a time
MOVE_COLUMNS = 8  # of the same, moved at a time
SUM_WARPS = 4
MEAN_WARPS = 4
PROGRAMS_PER_PROCESSOR = 8


@triton.jit
def mix32(x):
    """Return MurmurHash3's 32-bit finaliser of ``x``, uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def store_operand(operand_ptr, half_norms_ptr, rows, clusters, mask, BLOCK_D: tl.constexpr):
    """Store centroids [n, BLOCK_D] as the assignment wants them: rounded, with half the squared norm of the rounded."""
    operand = clusters.to(operand_ptr.dtype.element_ty)
    rounded = operand.to(tl.float32)
    half_norms = tl.sum(rounded * rounded, 1) * 0.5
    tl.store(operand_ptr + rows[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], operand, mask=mask[:, None])
    tl.store(half_norms_ptr + rows, half_norms, mask=mask)


@triton.jit(do_not_specialize=["heads", "batch_heads", "tokens", "seed_hash", "iters_init", "iters_step"])
def start_kernel(
    x_ptr,
    centroids_ptr,
    calls_ptr,
    operand_ptr,
    half_norms_ptr,
    needed_ptr,
    stride_x_b,
    stride_x_h,
    stride_x_n,
    heads,
    batch_heads,
    tokens,
    clusters,
    padded_clusters,
    seed_hash,
    iters_init,
    iters_step,
    DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the iterations this call needs and, on the first call, the starting centroids; prepare the assignment.

    ``initial_tokens`` of the reference, in 32-bit arithmetic.
    """
    is_first_call = tl.load(calls_ptr) == 0
    if tl.program_id(0) == 0:
        tl.store(needed_ptr, tl.where(is_first_call, iters_init, iters_step))
    tiles_per_head = tl.cdiv(padded_clusters, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    is_dim = (offs_d < DIM)[None, :]
    started = tl.where(is_first_call, clusters, 0)
    for tile in range(tl.program_id(0), batch_heads * tiles_per_head, tl.num_programs(0)):
        tile_index = tl.cast(tile, tl.int64)
        batch_head = tile_index // tiles_per_head
        batch, head = batch_head // heads, batch_head % heads
        cluster = (tile_index % tiles_per_head) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (cluster < clusters)[:, None] & is_dim
        is_started = (cluster < started)[:, None] & is_dim

        first = cluster * tokens // clusters
        length = ((cluster + 1) * tokens // clusters - first).to(tl.uint32)
        seed = seed_hash.to(tl.uint32) + head.to(tl.uint32)
        draw = mix32(mix32(seed) + cluster.to(tl.uint32))
        token = first + tl.umulhi(draw, length).to(tl.int64)
        x_rows = x_ptr + batch * stride_x_b + head * stride_x_h + token * stride_x_n
        x_pointers = x_rows[:, None] + offs_d[None, :]
        rows = tl.load(x_pointers, mask=is_started, other=0.0).to(tl.float32)

        pointers = centroids_ptr + (batch_head * clusters + cluster)[:, None] * DIM + offs_d[None, :]
        rows = tl.where(is_started, rows, tl.load(pointers, mask=mask, other=0.0))
        tl.store(pointers, rows, mask=is_started)
        operand_rows = batch_head * padded_clusters + cluster
        store_operand(operand_ptr, half_norms_ptr, operand_rows, rows, cluster < padded_clusters, BLOCK_D)
        # Nobody is nearest to a cluster that only fills the last tile.
        is_padding = (cluster >= clusters) & (cluster < padded_clusters)
        tl.store(half_norms_ptr + operand_rows, tl.full([BLOCK_C], float("inf"), tl.float32), mask=is_padding)


@triton.jit
def permute_columns(pointers, order, stride, mask):
    """Let row i of a tile of columns become what row ``order[i]`` was; ``pointers`` [1, columns] are those of row 0."""
    rows = tl.load(pointers + order[:, None] * stride, mask=mask)
    # Every thread has read before any of them writes.
    tl.debug_barrier()
    tl.store(pointers + tl.arange(0, order.shape[0])[:, None] * stride, rows, mask=mask)


@triton.jit(do_not_specialize=["batch_heads"])
def order_kernel(
    centroids_ptr,
    operand_ptr,
    half_norms_ptr,
    calls_ptr,
    batch_heads,
    clusters,
    padded_clusters,
    DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WALK_COLUMNS: tl.constexpr,
    MOVE_COLUMNS: tl.constexpr,
):
    """On the first call, put the centroids and what the assignment reads of them into the order of the reference.

    A program walks one head, its distances in registers. Every step reads the centroids that are left, 2 C^2 D bytes
    altogether. On Hopper, with 50 bytes per clock from L2, 300 clocks before them for every tile of columns and 700 for
    the minimum, that is about 2 ms for 500 clusters of 128 and 5 ms for 1000, once per generation: an estimate.
    """
    offs_c = tl.arange(0, BLOCK_C)
    is_cluster = offs_c < clusters
    largest = tl.full([BLOCK_C], 3.4028234663852886e38, tl.float32)
    todo = tl.where(tl.load(calls_ptr) == 0, batch_heads, 0)
    for item in range(tl.program_id(0), todo, tl.num_programs(0)):
        batch_head = tl.cast(item, tl.int64)
        head_ptr = centroids_ptr + batch_head * clusters * DIM
        order = tl.zeros([BLOCK_C], tl.int32)
        current = tl.min(order, 0)
        is_left = is_cluster & (offs_c > 0)
        for position in range(1, clusters):
            squares = tl.zeros([BLOCK_C, WALK_COLUMNS], tl.float32)
            for first in range(0, BLOCK_D, WALK_COLUMNS):
                offs_d = first + tl.arange(0, WALK_COLUMNS)
                is_dim = offs_d < DIM
                here = tl.load(head_ptr + current * DIM + offs_d, mask=is_dim, other=0.0)
                pointers = head_ptr + offs_c[:, None] * DIM + offs_d[None, :]
                rows = tl.load(pointers, mask=is_left[:, None] & is_dim[None, :], other=0.0)
                difference = rows - here[None, :]
                squares += difference * difference
            distances = tl.sum(squares, 1)
            distances = tl.where(distances < largest, distances, largest)
            current = tl.argmin(tl.where(is_left, distances, float("inf")), 0)
            is_left = is_left & (offs_c != current)
            order = tl.where(offs_c == position, current, order)

        for first in range(0, BLOCK_D, MOVE_COLUMNS):
            offs_d = (first + tl.arange(0, MOVE_COLUMNS))[None, :]
            mask = is_cluster[:, None] & (offs_d < DIM)
            permute_columns(head_ptr + offs_d, order, DIM, mask)
            operand_row = operand_ptr + batch_head * padded_clusters * BLOCK_D
            permute_columns(operand_row + offs_d, order, BLOCK_D, mask)
        half_norm_row = half_norms_ptr + batch_head * padded_clusters + tl.zeros([1, 1], tl.int32)
        permute_columns(half_norm_row, order, 1, is_cluster[:, None])


@triton.jit(do_not_specialize=["heads", "batch_heads", "tokens", "iteration"])
def assign_kernel(
    x_ptr,
    operand_ptr,
    half_norms_ptr,
    labels_ptr,
    needed_ptr,
    stride_x_b,
    stride_x_h,
    stride_x_n,
    heads,
    batch_heads,
    tokens,
    padded_clusters,
    iteration,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the label of every token: argmax_j (x . c_j - ||c_j||^2 / 2), the lowest of equal ones."""
    tiles_per_head = tl.cdiv(tokens, BLOCK_N)
    tiles = tiles_to_do(batch_heads * tiles_per_head, needed_ptr, iteration)
    in_tile = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_index = tl.cast(tile, tl.int64)
        batch_head = tile_index // tiles_per_head
        batch, head = batch_head // heads, batch_head % heads
        offs_n = (tile_index % tiles_per_head) * BLOCK_N + in_tile
        is_token = offs_n < tokens
        x_rows = x_ptr + batch * stride_x_b + head * stride_x_h + offs_n * stride_x_n
        x_pointers = x_rows[:, None] + offs_d[None, :]
        x = tl.load(x_pointers, mask=is_token[:, None] & (offs_d < DIM)[None, :], other=0.0)

        # A running maximum for every column of the tile, so that columns are compared only once, at the end.
        best = tl.full([BLOCK_N, BLOCK_C], float("-inf"), tl.float32)
        best_first = tl.zeros([BLOCK_N, BLOCK_C], tl.int32)
        operand_pointers = operand_ptr + batch_head * padded_clusters * BLOCK_D
        operand_pointers += offs_c[None, :] * BLOCK_D + offs_d[:, None]
        half_norm_pointers = half_norms_ptr + batch_head * padded_clusters + offs_c
        for first in range(0, padded_clusters, BLOCK_C):
            operand = tl.load(operand_pointers + first * BLOCK_D)  # [BLOCK_D, BLOCK_C]
            half_norms = tl.load(half_norm_pointers + first)
            scores = tl.broadcast_to(-half_norms[None, :], [BLOCK_N, BLOCK_C])
            scores = tl.dot(x, operand, scores, input_precision="ieee")
            is_better = scores > best
            best = tl.where(is_better, scores, best)
            best_first = tl.where(is_better, first, best_first)
        cluster = tl.where(best == tl.max(best, 1)[:, None], best_first + offs_c[None, :], padded_clusters)
        tl.store(labels_ptr + batch_head * tokens + offs_n, tl.min(cluster, 1), mask=is_token)


@triton.jit(do_not_specialize=["heads", "batch_heads", "tokens", "iteration"])
def sum_kernel(
    x_ptr,
    labels_ptr,
    order_ptr,
    sums_ptr,
    needed_ptr,
    stride_x_b,
    stride_x_h,
    stride_x_n,
    heads,
    batch_heads,
    tokens,
    slots,
    iteration,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add up the tokens of every cluster within every tile of the sorted tokens.

    The sum of cluster c in tile t goes to slot t + c. Along the sorted tokens one of the two grows at every step, so
    no slot is taken twice, and the slots of a cluster are neighbours.
    """
    tiles_per_head = tl.cdiv(tokens, BLOCK_N)
    tiles = tiles_to_do(batch_heads * tiles_per_head, needed_ptr, iteration)
    offs_d = tl.arange(0, BLOCK_D)
    is_dim = offs_d < DIM
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_index = tl.cast(tile, tl.int64)
        batch_head = tile_index // tiles_per_head
        batch, head = batch_head // heads, batch_head % heads
        tile_of_head = tile_index % tiles_per_head
        position = tile_of_head * BLOCK_N + tl.arange(0, BLOCK_N)
        is_token = position < tokens
        token = tl.load(order_ptr + batch_head * tokens + position, mask=is_token, other=0).to(tl.int64)
        label = tl.load(labels_ptr + batch_head * tokens + token, mask=is_token, other=-1)
        x_rows = x_ptr + batch * stride_x_b + head * stride_x_h + token * stride_x_n
        x_pointers = x_rows[:, None] + offs_d[None, :]
        rows = tl.load(x_pointers, mask=is_token[:, None] & is_dim[None, :], other=0.0).to(tl.float32)
        last = tl.max(label, 0)
        lowest = tl.min(tl.where(is_token, label, last), 0)
        slot_row = sums_ptr + (batch_head * slots + tile_of_head) * DIM
        for cluster in range(lowest, last + 1):
            total = tl.sum(tl.where((label == cluster)[:, None], rows, 0.0), 0)
            tl.store(slot_row + cluster * DIM + offs_d, total, mask=is_dim)


@triton.jit(do_not_specialize=["batch_heads", "iteration"])
def mean_kernel(
    sums_ptr,
    sizes_ptr,
    starts_ptr,
    centroids_ptr,
    operand_ptr,
    half_norms_ptr,
    needed_ptr,
    batch_heads,
    clusters,
    padded_clusters,
    slots,
    iteration,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the mean of every cluster that is not empty, and prepare the next assignment."""
    offs_d = tl.arange(0, BLOCK_D)
    is_dim = offs_d < DIM
    for item in range(tl.program_id(0), tiles_to_do(batch_heads * clusters, needed_ptr, iteration), tl.num_programs(0)):
        item_index = tl.cast(item, tl.int64)
        batch_head = item_index // clusters
        cluster = item_index % clusters
        size = tl.load(sizes_ptr + item_index)
        start = tl.load(starts_ptr + item_index)
        if size > 0:
            # The tiles of the sum kernel that the cluster reaches into.
            first = start // BLOCK_N
            reached = (start + size - 1) // BLOCK_N - first + 1
            slot_row = sums_ptr + (batch_head * slots + first + cluster) * DIM
            totals = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
            for done in range(0, reached, BLOCK_S):
                slot = done + tl.arange(0, BLOCK_S)
                pointers = slot_row + slot[:, None] * DIM + offs_d[None, :]
                totals += tl.load(pointers, mask=(slot < reached)[:, None] & is_dim[None, :], other=0.0)
            mean = tl.div_rn(tl.sum(totals, 0), tl.full([BLOCK_D], 1.0, tl.float32) * size.to(tl.float32))
            tl.store(centroids_ptr + item_index * DIM + offs_d, mean, mask=is_dim)
            operand_row = batch_head * padded_clusters + cluster + tl.zeros([1], tl.int64)
            store_operand(operand_ptr, half_norms_ptr, operand_row, mean[None, :], operand_row >= 0, BLOCK_D)


@dataclass(frozen=True, slots=True)
class AssignTile:
    """The shape of the assignment's product."""

    block_n: int
    """Tokens."""
    block_c: int
    """Clusters."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Tiles of centroids in flight."""


def assign_tile(dtype: torch.dtype, block_d: int) -> AssignTile:
    """Return the tile for tokens of ``dtype`` and rows padded to ``block_d``."""
    if dtype == torch.float32:
        return AssignTile(32, 32, 4, 1)
    if block_d > 128:
        return AssignTile(64, 64, 4, 2)
    return AssignTile(128, 32, 4, 3)


def order_warps(block_c: int) -> int:
    """Return the warps that order ``block_c`` clusters: four clusters a thread; one processor holds all of them."""
    return min(8, max(1, block_c // 128))


def kmeans_triton(x: Tensor, centroids: Tensor, calls: Tensor, iters_init: int, iters_step: int, seed: int) -> Tensor:
    """Compute ``kmeans_reference`` for rows of at most ``MAX_HEAD_DIM`` and at most ``MAX_CLUSTERS`` clusters.

    For fp16 and bf16 tokens the assignment rounds the centroids to the dtype of the tokens, products and norms alike:
    a label is the exact nearest of the rounded centroids. The means, kept in fp32, are those of the returned labels.
    Rows whose elements are not neighbours are copied.
    """
    # Strided rows would be added up in another order, which shows in the last bits of the means.
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, tokens, dim = x.shape
    clusters = centroids.shape[2]
    batch_heads = batch * heads
    block_d = padded_power_of_two(dim)
    tile = assign_tile(x.dtype, block_d)
    padded_clusters = cdiv(clusters, tile.block_c) * tile.block_c
    sum_rows = SUM_BYTES // (block_d * x.element_size())
    slots = cdiv(tokens, sum_rows) + clusters - 1

    labels = torch.empty((batch, heads, tokens), dtype=torch.int32, device=x.device)
    result = SortedLabels.empty(labels, clusters)
    means = centroids.contiguous()
    operand = x.new_empty((batch, heads, padded_clusters, block_d))
    half_norms = means.new_empty((batch, heads, padded_clusters))
    sums = means.new_empty((batch, heads, slots, dim))
    needed = torch.empty_like(calls)

    strides = x.stride()[:3]
    start_grid = persistent_grid(x.device, batch_heads * cdiv(padded_clusters, START_CLUSTERS), PROGRAMS_PER_PROCESSOR)
    assign_grid = persistent_grid(x.device, batch_heads * cdiv(tokens, tile.block_n), PROGRAMS_PER_PROCESSOR)
    sum_grid = persistent_grid(x.device, batch_heads * cdiv(tokens, sum_rows), PROGRAMS_PER_PROCESSOR)
    mean_grid = persistent_grid(x.device, batch_heads * clusters, PROGRAMS_PER_PROCESSOR)
    block_c = padded_power_of_two(clusters)
    with torch.cuda.device_of(x):
        start_kernel[start_grid](
            x,
            means,
            calls,
            operand,
            half_norms,
            needed,
            *strides,
            heads,
            batch_heads,
            tokens,
            clusters,
            padded_clusters,
            _seed_hash(seed),
            iters_init,
            iters_step,
            DIM=dim,
            BLOCK_C=START_CLUSTERS,
            BLOCK_D=block_d,
            num_warps=MEAN_WARPS,
        )
        for iteration in range(max(iters_init, iters_step)):
            if iteration == iters_init - 1:
                order_kernel[(batch_heads,)](
                    means,
                    operand,
                    half_norms,
                    calls,
                    batch_heads,
                    clusters,
                    padded_clusters,
                    DIM=dim,
                    BLOCK_C=block_c,
                    BLOCK_D=block_d,
                    WALK_COLUMNS=WALK_COLUMNS,
                    MOVE_COLUMNS=MOVE_COLUMNS,
                    num_warps=order_warps(block_c),
                    num_stages=1,
                )
            assign_kernel[assign_grid](
                x,
                operand,
                half_norms,
                labels,
                needed,
                *strides,
                heads,
                batch_heads,
                tokens,
                padded_clusters,
                iteration,
                DIM=dim,
                BLOCK_N=tile.block_n,
                BLOCK_C=tile.block_c,
                BLOCK_D=block_d,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
            launch_sort(labels, result, needed, iteration)
            sum_kernel[sum_grid](
                x,
                labels,
                result.order,
                sums,
                needed,
                *strides,
                heads,
                batch_heads,
                tokens,
                slots,
                iteration,
                DIM=dim,
                BLOCK_N=sum_rows,
                BLOCK_D=block_d,
                num_warps=SUM_WARPS,
                num_stages=1,
            )
            mean_kernel[mean_grid](
                sums,
                result.sizes,
                result.starts,
                means,
                operand,
                half_norms,
                needed,
                batch_heads,
                clusters,
                padded_clusters,
                slots,
                iteration,
                DIM=dim,
                BLOCK_N=sum_rows,
                BLOCK_S=SLOT_ELEMENTS // block_d,
                BLOCK_D=block_d,
                num_warps=MEAN_WARPS,
                num_stages=1,
            )
    if means is not centroids:
        centroids.copy_(means)
    calls.add_(1)
    return labels


def _seed_hash(seed: int) -> int:
    """Return the seed's contribution to the hash of ``initial_tokens``, as a signed 32-bit number."""
    spread = seed * 0x9E3779B9 % 2**32
    return spread - 2**32 if spread >= 2**31 else spread


def aot_variants() -> list[AotVariant]:
    """Return every kernel for the usual rows, and for padded and fp32 ones."""
    strides = ["stride_x_b", "stride_x_h", "stride_x_n"]
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    variants = []
    for dtype, dim in (
        (torch.bfloat16, 128),
        (torch.bfloat16, 64),
        (torch.float16, 80),
        (torch.bfloat16, 256),
        (torch.float32, 64),
        (torch.float32, 128),
    ):
        block_d = padded_power_of_two(dim)
        tile = assign_tile(dtype, block_d)
        sum_rows = SUM_BYTES // (block_d * dtype.itemsize)
        x_type = f"*{names[dtype]}"
        x_strides = dict.fromkeys(strides, "i32")
        centroid_types = {"centroids_ptr": "*fp32", "operand_ptr": x_type, "half_norms_ptr": "*fp32"}
        x_sizes = dict.fromkeys(("heads", "batch_heads", "tokens"), "i32")
        shape: dict[str, object] = {"DIM": dim, "BLOCK_D": block_d}
        blocks = shape | {"BLOCK_N": sum_rows}
        start = (
            {"x_ptr": x_type, **centroid_types, "calls_ptr": "*i32", "needed_ptr": "*i32"}
            | x_strides
            | x_sizes
            | dict.fromkeys(("clusters", "padded_clusters", "seed_hash", "iters_init", "iters_step"), "i32")
        )
        assign = (
            {"x_ptr": x_type, "operand_ptr": x_type, "half_norms_ptr": "*fp32", "labels_ptr": "*i32"}
            | {"needed_ptr": "*i32"}
            | x_strides
            | x_sizes
            | dict.fromkeys(("padded_clusters", "iteration"), "i32")
        )
        add = (
            {"x_ptr": x_type, "labels_ptr": "*i32", "order_ptr": "*i32", "sums_ptr": "*fp32", "needed_ptr": "*i32"}
            | x_strides
            | x_sizes
            | dict.fromkeys(("slots", "iteration"), "i32")
        )
        mean = {
            "sums_ptr": "*fp32",
            "sizes_ptr": "*i32",
            "starts_ptr": "*i32",
            **centroid_types,
            "needed_ptr": "*i32",
        } | dict.fromkeys(("batch_heads", "clusters", "padded_clusters", "slots", "iteration"), "i32")
        assign_shape = shape | {"BLOCK_N": tile.block_n, "BLOCK_C": tile.block_c}
        for fn, signature, constexprs, warps, stages in (
            (start_kernel, start, shape | {"BLOCK_C": START_CLUSTERS}, MEAN_WARPS, 3),
            (assign_kernel, assign, assign_shape, tile.num_warps, tile.num_stages),
            (sum_kernel, add, blocks, SUM_WARPS, 1),
            (mean_kernel, mean, blocks | {"BLOCK_S": SLOT_ELEMENTS // block_d}, MEAN_WARPS, 1),
        ):
            aligned = tuple(name for name, kind in signature.items() if kind.startswith("*") or name in strides)
            if "padded_clusters" in signature:
                aligned += ("padded_clusters",)
            variants.append(
                AotVariant(
                    name=f"{fn.__name__}_{names[dtype]}_d{dim}",
                    fn=fn,
                    signature=signature,
                    constexprs=constexprs,
                    num_warps=warps,
                    num_stages=stages,
                    divisible_by_16=aligned,
                )
            )
    return variants + _order_variants()


def _order_variants() -> list[AotVariant]:
    """Return the ordering kernel for the usual numbers of clusters, and for padded rows."""
    variants = []
    for dtype, dim, block_c in (
        ("bf16", 128, 128),
        ("bf16", 128, 512),
        ("bf16", 128, 1024),
        ("bf16", 64, 1024),
        ("fp16", 80, 64),
        ("bf16", 256, 1024),
        ("fp32", 64, 512),
    ):
        pointers = {"centroids_ptr": "*fp32", "operand_ptr": f"*{dtype}", "half_norms_ptr": "*fp32"}
        variants.append(
            AotVariant(
                name=f"order_kernel_{dtype}_d{dim}_c{block_c}",
                fn=order_kernel,
                signature=pointers
                | {"calls_ptr": "*i32"}
                | dict.fromkeys(("batch_heads", "clusters", "padded_clusters"), "i32"),
                constexprs={
                    "DIM": dim,
                    "BLOCK_C": block_c,
                    "BLOCK_D": padded_power_of_two(dim),
                    "WALK_COLUMNS": WALK_COLUMNS,
                    "MOVE_COLUMNS": MOVE_COLUMNS,
                },
                num_warps=order_warps(block_c),
                num_stages=1,
                divisible_by_16=(*pointers, "calls_ptr", "padded_clusters"),
            )
        )
    return variants
