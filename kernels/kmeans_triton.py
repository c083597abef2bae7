"""``svg2::kmeans_`` in Triton: Lloyd iterations without a device synchronisation.

An iteration assigns every token to a centroid and counts the labels, sorts them, and averages the tokens of every
cluster. As many iterations are launched as either kind of call may need; ``calls`` is read on the device, and the
kernels of an iteration that is not needed return at once. So does the kernel that orders the centroids, unless it is
the first call. Where the host knows that it is not (``known_state``), it launches what a later call needs.

Queries and keys share the launches: tiles of queries come first, then tiles of keys, and a tile chooses its pointers
and sizes. ``kmeans_`` alone has no second side. The last needed sum of the keys can also write them, and the values, in
the order of the clusters: it reads those rows anyway.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.centroids_triton import (
    GLUON_ASSIGN_C,
    MEAN_WARPS,
    MOVE_COLUMNS,
    NAMES,
    ROWS,
    SLOT_ELEMENTS,
    START_CLUSTERS,
    SUM_N,
    WALK_COLUMNS,
    assign_tile,
    mean_kernel,
    order_kernel,
    order_registers,
    order_warps,
    start_kernel,
    token_variant,
)
from svg2_compile.kernels.known_state import is_known_as_clustered
from svg2_compile.kernels.launch import RepeatableLaunch, cdiv, padded_power_of_two, persistent_grid
from svg2_compile.kernels.sort_labels_triton import (
    COUNT_N,
    SIZES,
    TABLE_COLUMNS,
    Sides,
    SortedLabels,
    count_labels,
    launch_sort,
    locate,
    row_start,
    tiles_to_do,
)
from svg2_compile.kernels.why_not import capability_of, why_not_boxes, why_not_gluon_assign

SUM_BYTES = 8192  # of x, read together by one program
SUM_WARPS = 4
PROGRAMS_PER_PROCESSOR = 8
SUM_PROGRAMS_PER_PROCESSOR = 16  # rows are gathered in short chains of loads; many chains hide their latency


@triton.jit(do_not_specialize=[*SIZES, "iteration"])
def assign_kernel(
    q_ptr,
    k_ptr,
    operand_ptr,
    half_norms_ptr,
    labels_ptr,
    counts_ptr,
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
    iteration,
    DIM: tl.constexpr,
    COUNT_N: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr,
    COUNT_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the label of every token, argmax_j (x . c_j - ||c_j||^2 / 2), the lowest of equal ones; count the labels.

    A program takes a block of the table of counts, ``BLOCK_N`` tokens at a time. Blocks and steps within them are one
    loop: of two, the compiler would keep the addresses of the tokens in registers that another program could use.
    """
    STEPS: tl.constexpr = COUNT_N // BLOCK_N
    q_tiles = tiles_to_do(batch, q_heads, q_tokens, needed_ptr, iteration, COUNT_N, 0)
    k_tiles = tiles_to_do(batch, k_heads, k_tokens, needed_ptr, iteration, COUNT_N, 1)
    q_padded, k_padded = tl.cdiv(q_clusters, BLOCK_C) * BLOCK_C, tl.cdiv(k_clusters, BLOCK_C) * BLOCK_C
    in_tile = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    own_tiles = tl.cdiv(q_tiles + k_tiles - tl.program_id(0), tl.num_programs(0))
    for step in range(own_tiles * STEPS):
        tile = tl.program_id(0) + step // STEPS * tl.num_programs(0)
        is_k, row, block = locate(tile, q_tiles, q_tokens, k_tokens, COUNT_N)
        heads = tl.where(is_k, k_heads, q_heads)
        tokens = tl.where(is_k, k_tokens, q_tokens)
        padded = tl.where(is_k, k_padded, q_padded)
        first_token = block * COUNT_N + step % STEPS * BLOCK_N
        offs_n = first_token + in_tile
        is_token = offs_n < tokens
        x_row = tl.where(is_k, k_ptr, q_ptr) + tl.cast(row // heads, tl.int64) * tl.where(is_k, stride_k_b, stride_q_b)
        x_row += tl.cast(row % heads, tl.int64) * tl.where(is_k, stride_k_h, stride_q_h)
        x_rows = x_row + offs_n.to(tl.int64) * tl.where(is_k, stride_k_n, stride_q_n)
        x_pointers = x_rows[:, None] + offs_d[None, :]
        x = tl.load(x_pointers, mask=is_token[:, None] & (offs_d < DIM)[None, :], other=0.0)

        # A running maximum for every column of the tile, so that columns are compared only once, at the end.
        best = tl.full([BLOCK_N, BLOCK_C], float("-inf"), tl.float32)
        best_first = tl.zeros([BLOCK_N, BLOCK_C], tl.int32)
        operand_start = row_start(is_k, row, batch * q_heads, q_padded, k_padded)
        operand_pointers = operand_ptr + operand_start * BLOCK_D + offs_c[None, :] * BLOCK_D + offs_d[:, None]
        half_norm_pointers = half_norms_ptr + operand_start + offs_c
        for first in range(0, tl.where(first_token < tokens, padded, 0), BLOCK_C):
            operand = tl.load(operand_pointers + first * BLOCK_D)  # [BLOCK_D, BLOCK_C]
            half_norms = tl.load(half_norm_pointers + first)
            scores = tl.broadcast_to(-half_norms[None, :], [BLOCK_N, BLOCK_C])
            scores = tl.dot(x, operand, scores, input_precision="ieee")
            is_better = scores > best
            best = tl.where(is_better, scores, best)
            best_first = tl.where(is_better, first, best_first)
        cluster = tl.where(best == tl.max(best, 1)[:, None], best_first + offs_c[None, :], padded)
        labels_row = labels_ptr + row_start(is_k, row, batch * q_heads, q_tokens, k_tokens)
        tl.store(labels_row + offs_n, tl.min(cluster, 1), mask=is_token)

    # What this program labelled; in a loop of its own, which leaves the registers of the other one alone.
    tl.debug_barrier()
    q_columns = tl.cdiv(q_clusters, TABLE_COLUMNS) * TABLE_COLUMNS
    k_columns = tl.cdiv(k_clusters, TABLE_COLUMNS) * TABLE_COLUMNS
    q_table, k_table = tl.cdiv(q_tokens, COUNT_N) * q_columns, tl.cdiv(k_tokens, COUNT_N) * k_columns
    for tile in range(tl.program_id(0), q_tiles + k_tiles, tl.num_programs(0)):
        is_k, row, block = locate(tile, q_tiles, q_tokens, k_tokens, COUNT_N)
        columns = tl.where(is_k, k_columns, q_columns)
        labels_row = labels_ptr + row_start(is_k, row, batch * q_heads, q_tokens, k_tokens)
        counts_row = counts_ptr + row_start(is_k, row, batch * q_heads, q_table, k_table)
        counts_row += tl.cast(block, tl.int64) * columns
        tokens = tl.where(is_k, k_tokens, q_tokens)
        count_labels(labels_row, counts_row, block * COUNT_N, tokens, columns, COUNT_N, COUNT_C)


@triton.jit(do_not_specialize=[*SIZES, "iteration"])
def sum_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_order_ptr,
    k_order_ptr,
    starts_ptr,
    sums_ptr,
    k_clustered_ptr,
    v_clustered_ptr,
    needed_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_n,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    stride_v_b,
    stride_v_h,
    stride_v_n,
    batch,
    q_heads,
    k_heads,
    q_tokens,
    k_tokens,
    q_clusters,
    k_clusters,
    iteration,
    DIM: tl.constexpr,
    SUM_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add up the tokens of every cluster within every tile of the sorted tokens.

    The sum of cluster c in tile t goes to slot t + c. Along the sorted tokens one of the two grows at every step, so
    no slot is taken twice, and the slots of a cluster are neighbours.

    With pointers for them, the last needed iteration of the keys also writes keys and values in sorted order.
    """
    q_tiles = tiles_to_do(batch, q_heads, q_tokens, needed_ptr, iteration, SUM_N, 0)
    k_tiles = tiles_to_do(batch, k_heads, k_tokens, needed_ptr, iteration, SUM_N, 1)
    is_last = tl.load(needed_ptr + 1) == iteration + 1
    in_tile = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    is_dim = offs_d < DIM
    for tile in range(tl.program_id(0), q_tiles + k_tiles, tl.num_programs(0)):
        is_k, row, tile_of_row = locate(tile, q_tiles, q_tokens, k_tokens, SUM_N)
        heads = tl.where(is_k, k_heads, q_heads)
        tokens = tl.where(is_k, k_tokens, q_tokens)
        clusters = tl.where(is_k, k_clusters, q_clusters)
        stride_n = tl.where(is_k, stride_k_n, stride_q_n)
        batch_index, head = tl.cast(row // heads, tl.int64), tl.cast(row % heads, tl.int64)
        x_row = tl.where(is_k, k_ptr, q_ptr) + batch_index * tl.where(is_k, stride_k_b, stride_q_b)
        x_row += head * tl.where(is_k, stride_k_h, stride_q_h)
        order_row = tl.where(is_k, k_order_ptr, q_order_ptr) + tl.cast(row, tl.int64) * tokens
        v_row = v_ptr + batch_index * stride_v_b + head * stride_v_h
        copies_start = tl.cast(row, tl.int64) * tokens * DIM
        ends = starts_ptr + row_start(is_k, row, batch * q_heads, q_clusters + 1, k_clusters + 1) + 1
        q_slots = tl.cdiv(q_tokens, SUM_N) + q_clusters - 1
        k_slots = tl.cdiv(k_tokens, SUM_N) + k_clusters - 1
        slot_row = sums_ptr + (row_start(is_k, row, batch * q_heads, q_slots, k_slots) + tile_of_row) * DIM

        begin = tile_of_row * SUM_N
        stop = tl.minimum(begin + SUM_N, tokens)
        token = tl.load(order_row + begin + in_tile, mask=begin + in_tile < stop, other=0)
        is_before = tl.load(ends + offs_c, mask=offs_c < clusters, other=2147483647) <= begin
        cluster = tl.sum(is_before.to(tl.int32), 0)
        next_end = tl.load(ends + cluster)
        while begin < stop:
            end = tl.minimum(next_end, stop)
            next_end = tl.load(ends + cluster + 1, mask=cluster + 1 < clusters, other=0)
            totals = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for first in range(begin, end, BLOCK_N):
                offs_n = first + in_tile
                mask = (offs_n < end)[:, None] & is_dim[None, :]
                here = token.to(tl.int64)
                rows = tl.load(x_row + (here * stride_n)[:, None] + offs_d[None, :], mask=mask, other=0.0)
                # Which tokens are next, whatever their cluster, is read while their rows' predecessors are on the way.
                following = tl.minimum(first + BLOCK_N, end) + in_tile
                token = tl.load(order_row + following, mask=following < stop, other=0)
                if k_clustered_ptr is not None:  # noqa: SIM102  (one is known at compile time, one is not)
                    if is_k & is_last:
                        values = tl.load(v_row + (here * stride_v_n)[:, None] + offs_d[None, :], mask=mask)
                        target = copies_start + offs_n.to(tl.int64)[:, None] * DIM + offs_d[None, :]
                        tl.store(k_clustered_ptr + target, rows, mask=mask)
                        tl.store(v_clustered_ptr + target, values, mask=mask)
                totals += rows.to(tl.float32)
            tl.store(slot_row + tl.cast(cluster, tl.int64) * DIM + offs_d, tl.sum(totals, 0), mask=is_dim)
            begin = end
            cluster += 1


def kmeans_triton(x: Tensor, centroids: Tensor, calls: Tensor, iters_init: int, iters_step: int, seed: int) -> Tensor:
    """Compute ``kmeans_reference`` for rows of at most ``MAX_HEAD_DIM`` and at most ``MAX_CLUSTERS`` clusters.

    For fp16 and bf16 tokens the assignment rounds the centroids to the dtype of the tokens, products and norms alike:
    a label is the exact nearest of the rounded centroids; where ``assign_gluon`` runs, on Hopper, any of those whose
    scores x . c - ||c||^2 / 2 differ by less than a part in 2^18. The means, kept in fp32, are those of the returned
    labels.
    Rows whose elements are not neighbours are copied.
    """
    clustering = Clustering.prepare(Side.of(x, centroids, calls))
    clustering.launch(iters_init, iters_step, seed)
    return clustering.labels.view(x.shape[:3])


@dataclass(frozen=True, slots=True)
class Side:
    """Tokens and their state, as the kernels take them."""

    x: Tensor
    """[B, H, N, D], rows without gaps."""
    centroids: Tensor
    """fp32 [B, H, C, D], contiguous."""
    calls: Tensor
    """int32 [1]."""
    updated: Tensor
    """What the caller wants ``centroids`` in, often the same."""

    @classmethod
    def of(cls, x: Tensor, centroids: Tensor, calls: Tensor) -> "Side":
        """Return the side, with copies of what has gaps."""
        # Strided rows would be added up in another order, which shows in the last bits of the means.
        return cls(with_plain_rows(x), centroids.contiguous(), calls, centroids)

    @property
    def strides(self) -> tuple[int, ...]:
        """Elements between batch elements, heads and tokens."""
        return self.x.stride()[:3]


@dataclass(frozen=True, slots=True)
class Copies:
    """What the last sum of the keys writes beside it."""

    v: Tensor
    """[B, H, N, D], rows without gaps."""
    k_clustered: Tensor
    """[B, H, N, D], contiguous: the keys in sorted order."""
    v_clustered: Tensor
    """[B, H, N, D], contiguous: the values in the same order."""

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> "Copies":
        """Return room for the keys and values in sorted order."""
        return cls(with_plain_rows(v), k.new_empty(k.shape), v.new_empty(v.shape))


def with_plain_rows(x: Tensor) -> Tensor:
    """Return ``x``, or a copy where the elements of a row are not neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True, slots=True)
class Clustering:
    """The tensors of one call: arguments, results, workspace. Buffers of both sides hold the queries' rows first."""

    q: Side
    k: Side
    """The same as ``q`` where there is no second side."""
    sides: Sides
    copies: Copies | None
    """Of the second side."""
    labels: Tensor
    """int32, for every head [N]."""
    sort: SortedLabels
    operand: Tensor
    """Of the dtype of the tokens, for every head [padded C, padded D]: the centroids, rounded."""
    half_norms: Tensor
    """fp32, for every head [padded C]."""
    sums: Tensor
    """fp32, for every head [slots, D]. Shares its memory with the table of counts, and with labels nobody wants."""
    needed: Tensor
    """int32 [2], the iterations of this call for either side."""
    assigns_in_gluon: bool
    """Which of two kernels assigns."""
    operand_c: int
    """What the centroids of a head are padded to a multiple of."""

    @classmethod
    def prepare(cls, q: Side, k: Side | None = None, copies: Copies | None = None) -> "Clustering":
        """Allocate the workspace of a call."""
        (batch, heads, tokens, dim), clusters = q.x.shape, q.centroids.shape[2]
        if k is None:
            sides = Sides.one(batch, heads, tokens, clusters)
        else:
            sides = Sides(batch, heads, k.x.shape[1], tokens, k.x.shape[2], clusters, k.centroids.shape[2])
        block_d = padded_power_of_two(dim)
        assigns_in_gluon = all(_fits_gluon(side.x) for side in (q, k) if side is not None)
        operand_c = GLUON_ASSIGN_C if assigns_in_gluon else assign_tile(q.x.dtype, block_d).block_c
        operand_rows = sides.total(*(cdiv(c, operand_c) * operand_c for _, c in sides.tokens_and_clusters))
        slots = sides.total(*(cdiv(n, SUM_N) + c - 1 for n, c in sides.tokens_and_clusters))
        # Counts and labels are read until tokens are placed, sums are written after that; only kmeans_ returns labels.
        table, labels = sides.table_elements, sides.total(tokens, sides.k_tokens)
        shared = q.centroids.new_empty(max(slots * dim, table if k is None else table + labels))
        sorting = shared.view(torch.int32)
        return cls(
            q=q,
            k=q if k is None else k,
            sides=sides,
            copies=copies,
            labels=q.calls.new_empty(labels) if k is None else sorting[table : table + labels],
            sort=SortedLabels.empty(sides, sorting),
            operand=q.x.new_empty((operand_rows, block_d)),
            half_norms=q.centroids.new_empty(operand_rows),
            sums=shared,
            needed=q.calls.new_empty(2),
            assigns_in_gluon=assigns_in_gluon,
            operand_c=operand_c,
        )

    def launch(self, iters_init: int, iters_step: int, seed: int) -> None:
        """Run the iterations; how many of them do anything is decided on the device."""
        is_later = is_known_as_clustered(self.q.calls, self.k.calls)
        iterations = iters_step if is_later else max(iters_init, iters_step)
        with torch.cuda.device_of(self.q.x):
            self._start(iters_init, iters_step, _seed_hash(seed))
            launches: list[RepeatableLaunch] = []
            for iteration in range(iterations):
                if iteration == iters_init - 1 and not is_later:
                    self._order()
                for launch in launches:
                    launch.again("iteration", iteration)
                if iteration == 0:
                    launches.append(self._assign())
                    launches += launch_sort(self.labels, self.sort, self.sides, self.needed)
                    launches += (self._sum(), self._mean(iterations))
        for side in (self.q, self.k):
            if side.centroids is not side.updated:
                side.updated.copy_(side.centroids)

    @property
    def _shape(self) -> dict[str, int]:
        dim = self.q.x.shape[3]
        return {"DIM": dim, "BLOCK_D": padded_power_of_two(dim)}

    @property
    def _state(self) -> tuple[Tensor, ...]:
        return (self.q.centroids, self.k.centroids, self.q.calls, self.k.calls, self.operand, self.half_norms)

    def _grid(self, q_tiles: int, k_tiles: int, programs_per_processor: int = PROGRAMS_PER_PROCESSOR) -> tuple[int]:
        return persistent_grid(self.q.x.device, self.sides.total(q_tiles, k_tiles), programs_per_processor)

    def _start(self, iters_init: int, iters_step: int, seed_hash: int) -> None:
        operand_c = self.operand_c
        tiles = [cdiv(cdiv(c, operand_c) * operand_c, START_CLUSTERS) for _, c in self.sides.tokens_and_clusters]
        start_kernel[self._grid(*tiles)](
            self.q.x,
            self.k.x,
            *self._state,
            self.needed,
            *self.q.strides,
            *self.k.strides,
            *self.sides.arguments(),
            seed_hash,
            iters_init,
            iters_step,
            START_CLUSTERS=START_CLUSTERS,
            BLOCK_C=operand_c,
            **self._shape,
            num_warps=MEAN_WARPS,
        )

    def _order(self) -> None:
        sides = self.sides
        block_c = padded_power_of_two(max(sides.q_clusters, sides.k_clusters))
        order_kernel[(max(1, sides.total(1, 1)),)](
            *self._state,
            sides.batch,
            sides.q_heads,
            sides.k_heads,
            sides.q_clusters,
            sides.k_clusters,
            OPERAND_C=self.operand_c,
            BLOCK_C=block_c,
            **self._shape,
            WALK_COLUMNS=WALK_COLUMNS,
            MOVE_COLUMNS=MOVE_COLUMNS,
            num_warps=order_warps(block_c),
            maxnreg=order_registers(block_c),
            num_stages=1,
        )

    def _assign(self) -> RepeatableLaunch:
        buffers = self.half_norms, self.labels, self.sort.counts, self.needed
        q_tiles, k_tiles = (cdiv(n, COUNT_N) for n, _ in self.sides.tokens_and_clusters)
        if self.assigns_in_gluon:
            from svg2_compile.kernels.assign_gluon import launch_assign  # only where this Triton has what it needs

            grid = self._grid(q_tiles, k_tiles, programs_per_processor=1)
            return launch_assign(grid, self.q.x, self.k.x, self.operand, buffers, self.sides.arguments())
        tile = assign_tile(self.q.x.dtype, padded_power_of_two(self.q.x.shape[3]), capability_of(self.q.x.device))
        return RepeatableLaunch.first(
            assign_kernel,
            self._grid(q_tiles, k_tiles),
            self.q.x,
            self.k.x,
            self.operand,
            *buffers,
            *self.q.strides,
            *self.k.strides,
            *self.sides.arguments(),
            0,  # iteration
            COUNT_N=COUNT_N,
            TABLE_COLUMNS=TABLE_COLUMNS,
            COUNT_C=self.sides.block_c,
            BLOCK_N=tile.block_n,
            BLOCK_C=tile.block_c,
            **self._shape,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=tile.max_registers,
        )

    def _sum(self) -> RepeatableLaunch:
        tiles = cdiv(self.sides.q_tokens, SUM_N), cdiv(self.sides.k_tokens, SUM_N)
        v = self.k.x if self.copies is None else self.copies.v
        return RepeatableLaunch.first(
            sum_kernel,
            self._grid(*tiles, SUM_PROGRAMS_PER_PROCESSOR),
            self.q.x,
            self.k.x,
            v,
            self.sort.q_order,
            self.sort.k_order,
            self.sort.starts,
            self.sums,
            None if self.copies is None else self.copies.k_clustered,
            None if self.copies is None else self.copies.v_clustered,
            self.needed,
            *self.q.strides,
            *self.k.strides,
            *v.stride()[:3],
            *self.sides.arguments(),
            0,  # iteration
            SUM_N=SUM_N,
            BLOCK_N=sum_rows(self.q.x.dtype, self._shape["BLOCK_D"]),
            BLOCK_C=self.sides.block_c,
            **self._shape,
            num_warps=SUM_WARPS,
            num_stages=1,
            maxnreg=sum_registers(capability_of(self.q.x.device)),
        )

    def _mean(self, iterations: int) -> RepeatableLaunch:
        return RepeatableLaunch.first(
            mean_kernel,
            self._grid(self.sides.q_clusters, self.sides.k_clusters),
            self.sums,
            self.sort.starts,
            *self._state,
            self.needed,
            *self.sides.arguments(),
            0,  # iteration
            iterations,
            SUM_N=SUM_N,
            OPERAND_C=self.operand_c,
            BLOCK_S=SLOT_ELEMENTS // self._shape["BLOCK_D"],
            **self._shape,
            num_warps=MEAN_WARPS,
            num_stages=1,
        )


def _fits_gluon(x: Tensor) -> bool:
    return (why_not_gluon_assign(x.device, x.dtype, dim=x.shape[3]) or why_not_boxes(x)) is None


def sum_rows(dtype: torch.dtype, block_d: int) -> int:
    """Return how many rows of ``block_d`` are read together to be added up."""
    return SUM_BYTES // (block_d * dtype.itemsize)


def sum_registers(capability: int | None) -> int:
    """Return the most registers of a thread: four programs share a processor; on sm_120 they would spill."""
    return 168 if capability == 120 else 128


def _seed_hash(seed: int) -> int:
    """Return the seed's contribution to the hash of ``initial_tokens``, as a signed 32-bit number."""
    spread = seed * 0x9E3779B9 % 2**32
    return spread - 2**32 if spread >= 2**31 else spread


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the assignment and the sum for the usual rows, the sum of ``kmeans_`` alone."""
    variants = []
    for dtype, dim in ROWS:
        block_d = padded_power_of_two(dim)
        tile = assign_tile(dtype, block_d, capability)
        shape: dict[str, object] = {"DIM": dim, "BLOCK_D": block_d}
        assign = shape | {"COUNT_N": COUNT_N, "TABLE_COLUMNS": TABLE_COLUMNS, "COUNT_C": 512}
        assign |= {"BLOCK_N": tile.block_n, "BLOCK_C": tile.block_c}
        suffix = f"{NAMES[dtype]}_d{dim}"
        variants.append(
            token_variant(
                f"assign_kernel_{suffix}",
                assign_kernel,
                dtype,
                assign,
                tile.num_warps,
                tile.num_stages,
                tile.max_registers,
            )
        )
        absent: dict[str, object] = {"k_clustered_ptr": None, "v_clustered_ptr": None}
        variants.append(sum_variant(f"sum_kernel_{suffix}", dtype, dim, absent, capability))
    return variants


def sum_variant(name: str, dtype: torch.dtype, dim: int, absent: dict[str, object], capability: int) -> AotVariant:
    """Return the sum for rows of ``dim``, with or without what else it can write."""
    block_d = padded_power_of_two(dim)
    shape = {"DIM": dim, "SUM_N": SUM_N, "BLOCK_N": sum_rows(dtype, block_d), "BLOCK_C": 512, "BLOCK_D": block_d}
    return token_variant(name, sum_kernel, dtype, {**shape, **absent}, SUM_WARPS, 1, sum_registers(capability))
