"""Lloyd iterations without a device synchronisation: what ``kmeans_`` and ``cluster_tokens_`` launch.

An iteration assigns every token to a centroid and counts the labels, sorts them, and averages the tokens of every
cluster. As many iterations are launched as either kind of call may need; ``calls`` is read on the device, and the
kernels of an iteration that is not needed return at once. So does the kernel that orders the centroids, unless it is
the first call. Where the host knows that it is not (``known_state``), it launches what a later call needs.

Queries and keys share the launches: tiles of queries come first, then tiles of keys, and a tile chooses its pointers
and sizes. ``kmeans_`` alone has no second side; given a metric, a kernel before each assignment writes what that reads
of the centroids. The last needed sum of the keys can also write them, and the values, in
the order of the clusters: it reads those rows anyway.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

from dataclasses import dataclass

import torch
from torch import Tensor

from svg2_compile.kernels.assign_tile import GLUON_ASSIGN_C, assign_tile
from svg2_compile.kernels.assign_triton import launch_assign
from svg2_compile.kernels.centroids_triton import (
    MEAN_WARPS,
    MOVE_COLUMNS,
    SLOT_ELEMENTS,
    START_CLUSTERS,
    WALK_COLUMNS,
    mean_kernel,
    measure_kernel,
    metric_columns,
    order_kernel,
    order_registers,
    order_warps,
    start_kernel,
)
from svg2_compile.kernels.cluster_sums import SUM_N, SUM_WARPS, sum_kernel, sum_registers, sum_rows
from svg2_compile.kernels.counting_sort import COUNT_N, SortedLabels, launch_sort, table_elements
from svg2_compile.kernels.known_state import is_known_as_clustered
from svg2_compile.kernels.launch import (
    RepeatableLaunch,
    cdiv,
    padded_power_of_two,
    persistent_grid,
    rows_of_unit_stride,
)
from svg2_compile.kernels.sides import Sides
from svg2_compile.kernels.why_not import capability_of, why_not_boxes, why_not_gluon_assign

PROGRAMS_PER_PROCESSOR = 8
SUM_PROGRAMS_PER_PROCESSOR = 16  # rows are gathered in short chains of loads; many chains hide their latency


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
        return cls(rows_of_unit_stride(x), centroids.contiguous(), calls, centroids)

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
        return cls(rows_of_unit_stride(v), k.new_empty(k.shape), v.new_empty(v.shape))


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
    metric: Tensor | None
    """fp32 [B, H, D, D], contiguous, in which cosines are taken; there is no second side then."""

    @classmethod
    def prepare(
        cls, q: Side, k: Side | None = None, copies: Copies | None = None, metric: Tensor | None = None
    ) -> "Clustering":
        """Allocate the workspace of a call; a ``metric`` is that of one side alone."""
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
        table, labels = table_elements(sides), sides.total(tokens, sides.k_tokens)
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
            metric=None if metric is None else metric.contiguous(),
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
                self._measure()
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

    def _measure(self) -> None:
        if self.metric is None:
            return
        sides = self.sides
        tiles = cdiv(sides.q_clusters, START_CLUSTERS)
        measure_kernel[self._grid(tiles, 0)](
            self.q.centroids,
            self.metric,
            self.operand,
            self.half_norms,
            sides.batch * sides.q_heads,
            sides.q_clusters,
            START_CLUSTERS=START_CLUSTERS,
            OPERAND_C=self.operand_c,
            METRIC_COLUMNS=metric_columns(self._shape["BLOCK_D"]),
            **self._shape,
            num_warps=MEAN_WARPS,
            num_stages=1,
        )

    def _assign(self) -> RepeatableLaunch:
        buffers = self.half_norms, self.labels, self.sort.counts, self.needed
        q_tiles, k_tiles = (cdiv(n, COUNT_N) for n, _ in self.sides.tokens_and_clusters)
        if self.assigns_in_gluon:
            from svg2_compile.kernels import assign_gluon  # only where this Triton has what it needs

            grid = self._grid(q_tiles, k_tiles, programs_per_processor=1)
            return assign_gluon.launch_assign(grid, self.q.x, self.k.x, self.operand, buffers, self.sides.arguments())
        tile = assign_tile(self.q.x.dtype, padded_power_of_two(self.q.x.shape[3]), capability_of(self.q.x.device))
        return launch_assign(self._grid(q_tiles, k_tiles), self.q.x, self.k.x, self.operand, buffers, self.sides, tile)

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


def _seed_hash(seed: int) -> int:
    """Return the seed's contribution to the hash of ``initial_tokens``, as a signed 32-bit number."""
    spread = seed * 0x9E3779B9 % 2**32
    return spread - 2**32 if spread >= 2**31 else spread
