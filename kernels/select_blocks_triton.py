"""``svg2::select_blocks`` in Triton, from centroids to runs in one launch.

A program writes the logits of its query clusters to its own part of a scratch tensor (``selection_scratch``), finds a
threshold for each of them (``selection_threshold``), and writes the runs of what is above it (``selection_runs``).
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.cluster_sizes import sum_of
from svg2_compile.kernels.launch import cdiv, padded_power_of_two
from svg2_compile.kernels.select_blocks import BUDGETS
from svg2_compile.kernels.selection_runs import write_runs
from svg2_compile.kernels.selection_scratch import (
    LANES,
    LARGEST,
    per_row,
    write_edges,
    write_errors,
    write_logits,
    write_logs,
)
from svg2_compile.kernels.selection_statistics import STATISTICS, TILE_KEYS
from svg2_compile.kernels.selection_threshold import threshold, threshold_of_errors, threshold_of_keys
from svg2_compile.kernels.work_list import COUNTS, PIECES, max_runs

BLOCK_Q = 16  # query clusters of a program
BLOCK_N = 128  # key clusters of a tile of scores
BLOCK_D = 16
NUM_WARPS = 4  # and rows of a tile
NUM_STAGES = 3
# Most registers of a thread, by the padded number of key clusters. Told none, the assembler stores some on the stack.
MAX_REGISTERS = {64: 64, 128: 96, 256: 128}
MAX_REGISTERS_BY_ERRORS = {64: 64, 128: 128, 256: 128, 512: 168}
OPTIONAL = ("masses", "errors", "least", "budgets")
UNALIGNED = ["logits_ptr", "edges_ptr", "runs_ptr"]
TILE, PIECES_PER_TILE = tl.constexpr(TILE_KEYS), tl.constexpr(TILE_KEYS // PIECES[0])
COUNT_COLUMNS, STATISTIC_COLUMNS = tl.constexpr(len(COUNTS)), tl.constexpr(len(STATISTICS))
BUDGET_COLUMNS = tl.constexpr(len(BUDGETS))


@triton.jit
def _add(pointers, update, mask):
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + update, mask=mask)


@triton.jit
def _add_statistics(pointers, is_row, q_sizes, q_tokens, k_tokens, kept_keys, mass, runs, full_pieces):
    """Add what one call adds to the rows of ``statistics``, columns named by ``STATISTICS``."""
    q_share = q_sizes.to(tl.float32) / q_tokens.to(tl.float32)
    full_tiles = full_pieces // PIECES_PER_TILE
    last_tiles = (full_pieces - full_tiles * PIECES_PER_TILE + runs + PIECES_PER_TILE - 1) // PIECES_PER_TILE
    issued_keys = (full_tiles + last_tiles).to(tl.float32) * TILE
    keys = k_tokens.to(tl.float32)
    _add(pointers, 1.0, is_row)
    _add(pointers + 1, q_share * kept_keys.to(tl.float32) / keys, is_row)
    _add(pointers + 2, q_share * mass, is_row)
    _add(pointers + 3, tl.where(q_sizes == 0, 1.0, mass), is_row)
    _add(pointers + 4, q_share * issued_keys / keys, is_row)


# A tile lies in the threads as its accesses to memory want it. Here a warp is to have a row, and a lane one of every 32
# neighbours. Pointers known to be aligned would give a lane four of them. `max_contiguous` tells in which order to take
# the axes, where versions of Triton differ; nothing else follows from it, as the pointers are not aligned.
@triton.jit(
    do_not_specialize=["min_keep", "guaranteed", "repeats", "q_clusters", "k_clusters", "run_slots", "stride_edges_r"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def select_kernel(
    q_ptr,
    k_ptr,
    q_sizes_ptr,
    k_sizes_ptr,
    logits_ptr,
    edges_ptr,
    runs_ptr,
    counts_ptr,
    statistics_ptr,
    masses_ptr,
    errors_ptr,
    least_ptr,
    budgets_ptr,
    scale,
    top_p,
    min_keep,
    guaranteed,
    repeats,
    q_clusters,
    k_clusters,
    run_slots,
    stride_edges_r,
    DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
):
    """Select for ``BLOCK_Q`` query clusters of a head."""
    TURNS: tl.constexpr = BLOCK_K // LANES
    program = tl.program_id(0).to(tl.int64)
    blocks = (q_clusters + BLOCK_Q - 1) // BLOCK_Q
    head = program // blocks
    group = head // repeats
    first_row = (program % blocks).to(tl.int32) * BLOCK_Q
    # With errors, these have a part of their own behind that of the logits.
    PARTS: tl.constexpr = 1 if errors_ptr is None else 2
    logits_ptr += program * (PARTS * BLOCK_Q * BLOCK_K)
    edges_ptr += program * BLOCK_K
    k_sizes_ptr += group * k_clusters
    q_sizes_ptr += head * q_clusters
    if least_ptr is not None:
        least_ptr += head
    max_keep = None
    if budgets_ptr is not None:
        budgets_ptr += head * BUDGET_COLUMNS
        top_p = tl.load(budgets_ptr)
        least = tl.load(budgets_ptr + 1).to(tl.int32)
        min_keep = tl.where(top_p >= 1.0, k_clusters, least)
        guaranteed = tl.maximum(least // 2, 1)
        max_keep = tl.maximum(tl.load(budgets_ptr + 2), 1.0)

    k_tokens, filled = write_edges(k_sizes_ptr, edges_ptr, k_clusters, BLOCK_K)
    if masses_ptr is not None:
        masses_ptr += (head * q_clusters + first_row) * k_clusters
        q_rows = q_clusters - first_row
        write_logs(masses_ptr, k_sizes_ptr, logits_ptr, q_rows, k_clusters, BLOCK_Q, BLOCK_K, BLOCK_N)
    else:
        write_logits(
            q_ptr + (head * q_clusters + first_row) * DIM,
            k_ptr + group * k_clusters * DIM,
            k_sizes_ptr,
            logits_ptr,
            scale,
            q_clusters - first_row,
            k_clusters,
            DIM,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_N,
            BLOCK_D,
        )
    if errors_ptr is not None:
        errors_ptr += (head * q_clusters + first_row) * k_clusters
        write_errors(
            errors_ptr,
            k_sizes_ptr,
            logits_ptr + BLOCK_Q * BLOCK_K,
            q_clusters - first_row,
            k_clusters,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_N,
        )
    q_tokens = sum_of(q_sizes_ptr, q_clusters, 128)
    # What a thread reads now, others have written.
    tl.debug_barrier()

    offs_t = tl.arange(0, TURNS)[:, None, None]
    lane = tl.arange(0, LANES)[None, None, :]
    cluster = lane * TURNS + offs_t
    for block_row in range(0, min(BLOCK_Q, q_clusters - first_row), ROWS):
        offs_r = block_row + tl.arange(0, ROWS)
        is_row = first_row + offs_r < q_clusters
        row = head * q_clusters + first_row + offs_r
        logits_ptrs = logits_ptr + (offs_r * BLOCK_K)[None, :, None] + lane
        logits = tl.load(tl.max_contiguous(logits_ptrs + offs_t * LANES, [1, 2, LANES]))
        largest = tl.max(tl.max(logits, 0), 1)
        smallest = tl.min(tl.min(tl.where(logits > float("-inf"), logits, LARGEST), 0), 1)
        weights = tl.exp2(logits - largest[None, :, None])
        total = per_row(weights)
        low, mass, logits = threshold(
            logits, weights, cluster, smallest, largest, total, filled, top_p, min_keep, max_keep, BLOCK_K, INDEX_BITS
        )
        edges_ptrs = edges_ptr + (offs_r * stride_edges_r)[None, :, None] + lane
        if errors_ptr is not None:
            low, mass, logits = threshold_of_errors(
                logits,
                low,
                tl.max_contiguous(logits_ptrs + offs_t * LANES, [1, 2, LANES]),
                tl.max_contiguous(logits_ptrs + BLOCK_Q * BLOCK_K + offs_t * LANES, [1, 2, LANES]),
                tl.max_contiguous(edges_ptrs + offs_t * LANES, [1, 2, LANES]),
                cluster,
                smallest,
                largest,
                total,
                filled,
                guaranteed,
                least_ptr,
                BLOCK_K,
                INDEX_BITS,
            )
        elif least_ptr is not None:
            low, mass, logits = threshold_of_keys(
                logits,
                low,
                tl.max_contiguous(logits_ptrs + offs_t * LANES, [1, 2, LANES]),
                tl.max_contiguous(edges_ptrs + offs_t * LANES, [1, 2, LANES]),
                cluster,
                smallest,
                largest,
                filled,
                least_ptr,
                BLOCK_K,
                INDEX_BITS,
            )
        edges = tl.load(tl.max_contiguous(edges_ptrs + offs_t * LANES, [1, 2, LANES]))
        kept_keys, runs, full_pieces = write_runs(
            logits > low[None, :, None],
            edges,
            k_tokens,
            offs_t,
            runs_ptr + row * run_slots,
            counts_ptr + row * COUNT_COLUMNS,
            is_row,
        )
        q_sizes = tl.load(q_sizes_ptr + first_row + offs_r, mask=is_row, other=0)
        _add_statistics(
            statistics_ptr + row * STATISTIC_COLUMNS,
            is_row,
            q_sizes,
            q_tokens,
            k_tokens,
            kept_keys,
            mass / total,
            runs,
            full_pieces,
        )


def select_blocks_triton(
    q_centroids: Tensor,
    k_centroids: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    scale: float,
    top_p: float,
    min_keep_ratio: float,
    statistics: Tensor,
    masses: Tensor | None = None,
    errors: Tensor | None = None,
    least_keys: Tensor | None = None,
    budgets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``select_blocks_reference`` for at most ``MAX_CLUSTERS`` clusters on either side.

    Scores, sums and logarithms round differently: a cluster may differ from the reference's where the mass before it is
    within rounding of ``top_p``, or where two probabilities, or two errors per key, are within rounding of each other.
    """
    if top_p >= 1 and budgets is None:
        errors = least_keys = None  # everything is kept
    batch, heads, q_clusters, dim = q_centroids.shape
    k_clusters = k_centroids.shape[2]
    run_slots = max_runs(k_clusters)
    runs = q_sizes.new_empty((batch, heads, q_clusters, run_slots, 2))
    counts = q_sizes.new_empty((batch, heads, q_clusters, len(COUNTS)))
    shape = _constexprs(dim, k_clusters)
    programs = batch * heads * cdiv(q_clusters, BLOCK_Q)
    parts = 1 if errors is None else 2
    logits = q_sizes.new_empty((programs, parts * BLOCK_Q, shape["BLOCK_K"]), dtype=torch.float32)
    edges = q_sizes.new_empty((programs, shape["BLOCK_K"]), dtype=torch.int64)
    sums = statistics.contiguous()
    with torch.cuda.device_of(q_centroids):
        select_kernel[(programs,)](
            q_centroids.contiguous(),
            k_centroids.contiguous(),
            q_sizes.contiguous(),
            k_sizes.contiguous(),
            logits,
            edges,
            runs.view(torch.int64),
            counts,
            sums,
            None if masses is None else masses.contiguous(),
            None if errors is None else errors.contiguous(),
            None if least_keys is None else least_keys.contiguous(),
            None if budgets is None else budgets.expand(batch, heads, len(BUDGETS)).contiguous(),
            scale,
            top_p,
            k_clusters if top_p >= 1 else math.floor(min_keep_ratio * k_clusters),
            max(1, math.floor(min_keep_ratio * k_clusters / 2)),
            heads // k_centroids.shape[1],
            q_clusters,
            k_clusters,
            run_slots,
            # All rows have the same edges. The compiler is not to know, or it would load them for another layout.
            0,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            maxnreg=_max_registers(shape["BLOCK_K"], is_simple=errors is None and least_keys is None),
            **shape,
        )
    if sums is not statistics:
        statistics.copy_(sums)
    return runs, counts


def _max_registers(block_k: int, is_simple: bool) -> int | None:
    """Return the most registers of a thread; ``is_simple`` where only masses are bisected, once."""
    return (MAX_REGISTERS if is_simple else MAX_REGISTERS_BY_ERRORS).get(block_k)


def _constexprs(dim: int, k_clusters: int) -> dict[str, int]:
    """Return the compile-time arguments."""
    block_k = padded_power_of_two(k_clusters, 64)
    return {
        "DIM": dim,
        "BLOCK_Q": BLOCK_Q,
        "BLOCK_K": block_k,
        "BLOCK_N": min(BLOCK_N, block_k),
        "BLOCK_D": BLOCK_D,
        "ROWS": NUM_WARPS,
        "INDEX_BITS": block_k.bit_length() - 1,
    }


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernel for the usual head dims, few and many clusters, and for what else may be given."""
    signature = {"q_ptr": "*fp32", "k_ptr": "*fp32"}
    signature |= dict.fromkeys(("q_sizes_ptr", "k_sizes_ptr"), "*i32")
    signature |= {"logits_ptr": "*fp32", "edges_ptr": "*i64", "runs_ptr": "*i64", "counts_ptr": "*i32"}
    signature |= {"statistics_ptr": "*fp32", "masses_ptr": "*fp32", "errors_ptr": "*fp32", "least_ptr": "*i32"}
    signature |= {"budgets_ptr": "*fp32"}
    signature |= {"scale": "fp32", "top_p": "fp32"}
    signature |= dict.fromkeys(
        ("min_keep", "guaranteed", "repeats", "q_clusters", "k_clusters", "run_slots", "stride_edges_r"), "i32"
    )
    variants = []
    counts = (32, 100, 200, 512, 1024)
    for dim, clusters, given in (
        *((dim, clusters, ()) for dim in (64, 80, 128, 256) for clusters in counts),
        *((128, clusters, ("masses",)) for clusters in counts),
        *((128, clusters, ("masses", "errors")) for clusters in counts),
        *((128, clusters, ("least",)) for clusters in (100, 512, 1024)),
        (128, 512, ("masses", "errors", "least")),
        *((128, clusters, ("budgets",)) for clusters in counts),
        (128, 512, ("masses", "errors", "budgets")),
    ):
        absent: dict[str, object] = {f"{name}_ptr": None for name in OPTIONAL if name not in given}
        types = {name: kind for name, kind in signature.items() if name not in absent}
        variants.append(
            AotVariant(
                name="_".join((f"select_kernel_d{dim}_c{clusters}", *(f"given_{name}" for name in given))),
                fn=select_kernel,
                signature=types,
                constexprs={**_constexprs(dim, clusters), **absent},
                num_warps=NUM_WARPS,
                num_stages=NUM_STAGES,
                divisible_by_16=tuple(name for name, kind in types.items() if kind[0] == "*" and name not in UNALIGNED),
                max_registers=_max_registers(
                    _constexprs(dim, clusters)["BLOCK_K"], is_simple="errors" not in given and "least" not in given
                ),
            )
        )
    return variants
