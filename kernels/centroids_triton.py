"""The centroids of ``svg2::kmeans_`` in Triton: where a first call starts, their order, and the means.

Whatever writes centroids also writes them as the assignment reads them: rounded to the dtype of the tokens, rows and
number padded to whole tiles, with half their squared norms.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.assign_tile import operand_c
from svg2_compile.kernels.cluster_sums import SUM_N
from svg2_compile.kernels.launch import padded_power_of_two
from svg2_compile.kernels.sides import SIZES, locate, row_start, tiles_to_do
from svg2_compile.kernels.token_variants import NAMES, ROWS, token_variant

SLOT_ELEMENTS = 2048  # of the partial sums, added up by one program at a time
START_CLUSTERS = 16  # clusters started by one program at a time
WALK_COLUMNS = 16  # of all centroids of a head, compared at a time
MOVE_COLUMNS = 8  # of the same, moved at a time
MOST_METRIC_COLUMNS = 32  # of a metric, in a product at a time
MEAN_WARPS = 4


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


@triton.jit(do_not_specialize=[*SIZES, "seed_hash", "iters_init", "iters_step"])
def start_kernel(
    q_ptr,
    k_ptr,
    q_centroids_ptr,
    k_centroids_ptr,
    q_calls_ptr,
    k_calls_ptr,
    operand_ptr,
    half_norms_ptr,
    needed_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_n,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    batch,
    q_heads,
    k_heads,
    q_tokens,
    k_tokens,
    q_clusters,
    k_clusters,
    seed_hash,
    iters_init,
    iters_step,
    DIM: tl.constexpr,
    START_CLUSTERS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the iterations this call needs and, on the first call, the starting centroids; prepare the assignment.

    ``initial_tokens`` of the reference, in 32-bit arithmetic.
    """
    q_is_first = tl.load(q_calls_ptr) == 0
    k_is_first = tl.load(k_calls_ptr) == 0
    if tl.program_id(0) == 0:
        tl.store(needed_ptr, tl.where(q_is_first, iters_init, iters_step))
        tl.store(needed_ptr + 1, tl.where(k_is_first, iters_init, iters_step))
    q_padded, k_padded = tl.cdiv(q_clusters, BLOCK_C) * BLOCK_C, tl.cdiv(k_clusters, BLOCK_C) * BLOCK_C
    q_tiles = tiles_to_do(batch, q_heads, q_padded, None, 0, START_CLUSTERS, 0)
    k_tiles = tiles_to_do(batch, k_heads, k_padded, None, 0, START_CLUSTERS, 1)
    offs_d = tl.arange(0, BLOCK_D)
    is_dim = (offs_d < DIM)[None, :]
    for tile in range(tl.program_id(0), q_tiles + k_tiles, tl.num_programs(0)):
        is_k, row, tile_of_row = locate(tile, q_tiles, q_padded, k_padded, START_CLUSTERS)
        heads = tl.where(is_k, k_heads, q_heads)
        tokens = tl.cast(tl.where(is_k, k_tokens, q_tokens), tl.int64)
        clusters = tl.where(is_k, k_clusters, q_clusters)
        padded = tl.where(is_k, k_padded, q_padded)
        started = tl.where(tl.where(is_k, k_is_first, q_is_first), clusters, 0)
        batch_index, head = tl.cast(row // heads, tl.int64), tl.cast(row % heads, tl.int64)
        cluster = tl.cast(tile_of_row, tl.int64) * START_CLUSTERS + tl.arange(0, START_CLUSTERS)
        mask = (cluster < clusters)[:, None] & is_dim
        is_started = (cluster < started)[:, None] & is_dim

        first = cluster * tokens // clusters
        length = ((cluster + 1) * tokens // clusters - first).to(tl.uint32)
        seed = seed_hash.to(tl.uint32) + head.to(tl.uint32)
        draw = mix32(mix32(seed) + cluster.to(tl.uint32))
        token = first + tl.umulhi(draw, length).to(tl.int64)
        x_rows = tl.where(is_k, k_ptr, q_ptr) + batch_index * tl.where(is_k, stride_k_b, stride_q_b)
        x_rows += head * tl.where(is_k, stride_k_h, stride_q_h)
        x_pointers = (x_rows + token * tl.where(is_k, stride_k_n, stride_q_n))[:, None] + offs_d[None, :]
        rows = tl.load(x_pointers, mask=is_started, other=0.0).to(tl.float32)

        centroids = tl.where(is_k, k_centroids_ptr, q_centroids_ptr)
        pointers = centroids + (tl.cast(row, tl.int64) * clusters + cluster)[:, None] * DIM + offs_d[None, :]
        rows = tl.where(is_started, rows, tl.load(pointers, mask=mask, other=0.0))
        tl.store(pointers, rows, mask=is_started)
        operand_rows = row_start(is_k, row, batch * q_heads, q_padded, k_padded) + cluster
        store_operand(operand_ptr, half_norms_ptr, operand_rows, rows, cluster < padded, BLOCK_D)
        # Nobody is nearest to a cluster that only fills the last tile.
        is_padding = (cluster >= clusters) & (cluster < padded)
        infinity = tl.full([START_CLUSTERS], float("inf"), tl.float32)
        tl.store(half_norms_ptr + operand_rows, infinity, mask=is_padding)


@triton.jit
def permute_columns(pointers, order, stride, mask):
    """Let row i of a tile of columns become what row ``order[i]`` was; ``pointers`` [1, columns] are those of row 0."""
    rows = tl.load(pointers + order[:, None] * stride, mask=mask)
    # Every thread has read before any of them writes.
    tl.debug_barrier()
    tl.store(pointers + tl.arange(0, order.shape[0])[:, None] * stride, rows, mask=mask)


@triton.jit(do_not_specialize=["batch", "q_heads", "k_heads", "q_clusters", "k_clusters"])
def order_kernel(
    q_centroids_ptr,
    k_centroids_ptr,
    q_calls_ptr,
    k_calls_ptr,
    operand_ptr,
    half_norms_ptr,
    batch,
    q_heads,
    k_heads,
    q_clusters,
    k_clusters,
    DIM: tl.constexpr,
    OPERAND_C: tl.constexpr,
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
    largest = tl.full([BLOCK_C], 3.4028234663852886e38, tl.float32)
    q_rows = tl.where(tl.load(q_calls_ptr) == 0, batch * q_heads, 0)
    k_rows = tl.where(tl.load(k_calls_ptr) == 0, batch * k_heads, 0)
    q_padded, k_padded = tl.cdiv(q_clusters, OPERAND_C) * OPERAND_C, tl.cdiv(k_clusters, OPERAND_C) * OPERAND_C
    for item in range(tl.program_id(0), q_rows + k_rows, tl.num_programs(0)):
        is_k, row, _ = locate(item, q_rows, 1, 1, 1)
        clusters = tl.where(is_k, k_clusters, q_clusters)
        is_cluster = offs_c < clusters
        head_ptr = tl.where(is_k, k_centroids_ptr, q_centroids_ptr) + tl.cast(row, tl.int64) * clusters * DIM
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

        operand_start = row_start(is_k, row, batch * q_heads, q_padded, k_padded)
        for first in range(0, BLOCK_D, MOVE_COLUMNS):
            offs_d = (first + tl.arange(0, MOVE_COLUMNS))[None, :]
            mask = is_cluster[:, None] & (offs_d < DIM)
            permute_columns(head_ptr + offs_d, order, DIM, mask)
            permute_columns(operand_ptr + operand_start * BLOCK_D + offs_d, order, BLOCK_D, mask)
        half_norms = half_norms_ptr + operand_start + tl.zeros([1, 1], tl.int32)
        permute_columns(half_norms, order, 1, is_cluster[:, None])


@triton.jit(do_not_specialize=[*SIZES, "iteration", "iterations"])
def mean_kernel(
    sums_ptr,
    starts_ptr,
    q_centroids_ptr,
    k_centroids_ptr,
    q_calls_ptr,
    k_calls_ptr,
    operand_ptr,
    half_norms_ptr,
    needed_ptr,
    batch,
    q_heads,
    k_heads,
    q_tokens,
    k_tokens,
    q_clusters,
    k_clusters,
    iteration,
    iterations,
    DIM: tl.constexpr,
    SUM_N: tl.constexpr,
    OPERAND_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the mean of every cluster that is not empty, and prepare the next assignment. The last launch counts."""
    q_items = tiles_to_do(batch, q_heads, q_clusters, needed_ptr, iteration, 1, 0)
    k_items = tiles_to_do(batch, k_heads, k_clusters, needed_ptr, iteration, 1, 1)
    offs_d = tl.arange(0, BLOCK_D)
    is_dim = offs_d < DIM
    if (tl.program_id(0) == 0) & (iteration == iterations - 1):
        # No later kernel reads them.
        tl.store(q_calls_ptr, tl.load(q_calls_ptr) + 1)
        if k_heads > 0:
            tl.store(k_calls_ptr, tl.load(k_calls_ptr) + 1)
    for item in range(tl.program_id(0), q_items + k_items, tl.num_programs(0)):
        is_k, row, cluster = locate(item, q_items, q_clusters, k_clusters, 1)
        clusters = tl.where(is_k, k_clusters, q_clusters)
        starts = starts_ptr + row_start(is_k, row, batch * q_heads, q_clusters + 1, k_clusters + 1) + cluster
        start = tl.load(starts)
        size = tl.load(starts + 1) - start
        if size > 0:
            # The tiles of the sum kernel that the cluster reaches into.
            first = start // SUM_N
            reached = (start + size - 1) // SUM_N - first + 1
            q_slots = tl.cdiv(q_tokens, SUM_N) + q_clusters - 1
            k_slots = tl.cdiv(k_tokens, SUM_N) + k_clusters - 1
            slot_row = sums_ptr + (row_start(is_k, row, batch * q_heads, q_slots, k_slots) + first + cluster) * DIM
            totals = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
            for done in range(0, reached, BLOCK_S):
                slot = done + tl.arange(0, BLOCK_S)
                pointers = slot_row + slot[:, None] * DIM + offs_d[None, :]
                totals += tl.load(pointers, mask=(slot < reached)[:, None] & is_dim[None, :], other=0.0)
            mean = tl.div_rn(tl.sum(totals, 0), tl.full([BLOCK_D], 1.0, tl.float32) * size.to(tl.float32))
            centroids = tl.where(is_k, k_centroids_ptr, q_centroids_ptr)
            centroids += (tl.cast(row, tl.int64) * clusters + cluster) * DIM
            tl.store(centroids + offs_d, mean, mask=is_dim)
            q_padded, k_padded = tl.cdiv(q_clusters, OPERAND_C) * OPERAND_C, tl.cdiv(k_clusters, OPERAND_C) * OPERAND_C
            operand_row = row_start(is_k, row, batch * q_heads, q_padded, k_padded) + cluster + tl.zeros([1], tl.int64)
            store_operand(operand_ptr, half_norms_ptr, operand_row, mean[None, :], operand_row >= 0, BLOCK_D)


@triton.jit
def columns_in_metric(centroids, metric_ptr, first, DIM: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr):
    """Return some columns [n, COLUMNS] of centroids [n, BLOCK_D] times a metric."""
    offs_d, offs_c = tl.arange(0, BLOCK_D), first + tl.arange(0, COLUMNS)
    mask = (offs_d < DIM)[:, None] & (offs_c < DIM)[None, :]
    metric = tl.load(metric_ptr + offs_d[:, None] * DIM + offs_c[None, :], mask=mask, other=0.0)
    return tl.dot(centroids, metric, input_precision="ieee")


def metric_columns(block_d: int) -> int:
    """Return how many columns of a metric a product takes at a time."""
    return min(MOST_METRIC_COLUMNS, block_d)


@triton.jit(do_not_specialize=["rows", "clusters"])
def measure_kernel(
    q_centroids_ptr,
    metric_ptr,
    operand_ptr,
    half_norms_ptr,
    rows,
    clusters,
    DIM: tl.constexpr,
    START_CLUSTERS: tl.constexpr,
    OPERAND_C: tl.constexpr,
    METRIC_COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Prepare an assignment by cosines in a metric: rounded M c / sqrt(c . M c), with nothing to subtract."""
    # what does not fit into a row would be written into the next one, which another program writes
    tl.static_assert(BLOCK_D % METRIC_COLUMNS == 0)
    offs_d = tl.arange(0, BLOCK_D)
    tiles = tl.cdiv(clusters, START_CLUSTERS)
    for tile in range(tl.program_id(0), rows * tiles, tl.num_programs(0)):
        row = tl.cast(tile // tiles, tl.int64)
        cluster = (tile % tiles) * START_CLUSTERS + tl.arange(0, START_CLUSTERS)
        is_cluster = cluster < clusters
        pointers = q_centroids_ptr + (row * clusters + cluster)[:, None] * DIM + offs_d[None, :]
        centroids = tl.load(pointers, mask=is_cluster[:, None] & (offs_d < DIM)[None, :], other=0.0)
        head_metric = metric_ptr + row * DIM * DIM
        squares = tl.zeros([START_CLUSTERS], tl.float32)
        for first in range(0, BLOCK_D, METRIC_COLUMNS):
            offs_c = first + tl.arange(0, METRIC_COLUMNS)
            columns = columns_in_metric(centroids, head_metric, first, DIM, BLOCK_D, METRIC_COLUMNS)
            mask = is_cluster[:, None] & (offs_c < DIM)[None, :]
            here = q_centroids_ptr + (row * clusters + cluster)[:, None] * DIM + offs_c[None, :]
            squares += tl.sum(columns * tl.load(here, mask=mask, other=0.0), 1)
        lengths = tl.sqrt_rn(tl.where(squares > 0, squares, 1.0))
        operand_rows = row * tl.cdiv(clusters, OPERAND_C) * OPERAND_C + cluster
        for first in range(0, BLOCK_D, METRIC_COLUMNS):
            offs_c = first + tl.arange(0, METRIC_COLUMNS)
            columns = columns_in_metric(centroids, head_metric, first, DIM, BLOCK_D, METRIC_COLUMNS)
            columns = tl.where(
                (squares > 0)[:, None], tl.div_rn(columns, lengths[:, None] + tl.zeros_like(columns)), 0.0
            )
            operand = columns.to(operand_ptr.dtype.element_ty)
            place = operand_ptr + operand_rows[:, None] * BLOCK_D + offs_c[None, :]
            tl.store(place, operand, mask=is_cluster[:, None])
        tl.store(half_norms_ptr + operand_rows, tl.zeros([START_CLUSTERS], tl.float32), mask=is_cluster)


def order_warps(block_c: int) -> int:
    """Return the warps that order ``block_c`` clusters: two clusters a thread; one processor holds all of them."""
    return min(16, max(1, block_c // 64))


def order_registers(block_c: int) -> int:
    """Return the most registers of a thread that orders ``block_c`` clusters: its share of a processor's."""
    return min(255, 65536 // (32 * order_warps(block_c)))


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernels for the usual rows, and the ordering one for the usual numbers of clusters as well."""
    variants = []
    for dtype, dim in ROWS:
        block_d = padded_power_of_two(dim)
        shape: dict[str, object] = {"DIM": dim, "BLOCK_D": block_d}
        block_c = operand_c(dtype, dim, capability)
        start = shape | {"START_CLUSTERS": START_CLUSTERS, "BLOCK_C": block_c}
        mean = shape | {"SUM_N": SUM_N, "OPERAND_C": block_c, "BLOCK_S": SLOT_ELEMENTS // block_d}
        suffix = f"{NAMES[dtype]}_d{dim}"
        variants.append(token_variant(f"start_kernel_{suffix}", start_kernel, dtype, start, MEAN_WARPS, 3))
        variants.append(token_variant(f"mean_kernel_{suffix}", mean_kernel, dtype, mean, MEAN_WARPS, 1))
        at_a_time = metric_columns(block_d)
        measure = shape | {"START_CLUSTERS": START_CLUSTERS, "OPERAND_C": block_c, "METRIC_COLUMNS": at_a_time}
        variants.append(token_variant(f"measure_kernel_{suffix}", measure_kernel, dtype, measure, MEAN_WARPS, 1))
    columns = {"WALK_COLUMNS": WALK_COLUMNS, "MOVE_COLUMNS": MOVE_COLUMNS}
    for dtype, dim, block_c in (
        (torch.bfloat16, 128, 128),
        (torch.bfloat16, 128, 512),
        (torch.bfloat16, 128, 1024),
        (torch.bfloat16, 64, 1024),
        (torch.float16, 80, 64),
        (torch.bfloat16, 256, 1024),
        (torch.float32, 64, 512),
    ):
        block_d = padded_power_of_two(dim)
        operand = {"DIM": dim, "OPERAND_C": operand_c(dtype, dim, capability), "BLOCK_C": block_c, "BLOCK_D": block_d}
        name = f"order_kernel_{NAMES[dtype]}_d{dim}_c{block_c}"
        warps, registers = order_warps(block_c), order_registers(block_c)
        variants.append(token_variant(name, order_kernel, dtype, {**operand, **columns}, warps, 1, registers))
    return variants
