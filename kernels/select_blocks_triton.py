"""``svg2::select_blocks`` in Triton: scores, selection and statistics in three launches.

The selection needs no sort. Whether a cluster is kept depends on the mass and on the number of the likelier ones, and
both fall as the cluster gets likelier: the kept clusters are those above a threshold, which is found by bisection.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.launch import AotVariant, cdiv, padded_power_of_two, persistent_grid

SCORE_BLOCK = 32  # query and key clusters of a tile of scores
SCORE_BLOCK_D = 32
SCORE_WARPS = 4
# One warp holds a whole row of up to 1024 probabilities, so that its sums need no shared memory.
SELECT_WARPS = 1
SELECT_PROGRAMS_PER_PROCESSOR = 32
STATISTICS_WARPS = 4


@triton.jit(do_not_specialize=["repeats"])
def score_kernel(
    q_ptr,
    k_ptr,
    scores_ptr,
    scale,
    repeats,
    q_clusters,
    k_clusters,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write scale * q k^T of every head, fp32 [B * H, C_q, C_k]."""
    batch_head = tl.program_id(2).to(tl.int64)
    group = batch_head // repeats
    offs_q = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_k = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_q, is_k = offs_q < q_clusters, offs_k < k_clusters
    scores = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in tl.static_range(0, DIM, BLOCK_D):
        offs_d = first + tl.arange(0, BLOCK_D)
        is_dim = offs_d < DIM
        q_pointers = q_ptr + (batch_head * q_clusters + offs_q)[:, None] * DIM + offs_d[None, :]
        k_pointers = k_ptr + (group * k_clusters + offs_k)[None, :] * DIM + offs_d[:, None]
        q = tl.load(q_pointers, mask=is_q[:, None] & is_dim[None, :], other=0.0).to(tl.float32)
        k = tl.load(k_pointers, mask=is_k[None, :] & is_dim[:, None], other=0.0).to(tl.float32)
        scores = tl.dot(q, k, scores, input_precision="ieee")
    pointers = scores_ptr + (batch_head * q_clusters + offs_q)[:, None] * k_clusters + offs_k[None, :]
    tl.store(pointers, scores * scale, mask=is_q[:, None] & is_k[None, :])


@triton.jit(do_not_specialize=["batch_heads", "repeats", "min_keep"])
def select_kernel(
    scores_ptr,
    k_sizes_ptr,
    keep_ptr,
    densities_ptr,
    masses_ptr,
    top_p,
    min_keep,
    batch_heads,
    repeats,
    q_clusters,
    k_clusters,
    BLOCK_K: tl.constexpr,
    INDEX_BITS: tl.constexpr,
):
    """Write which key clusters a query cluster keeps, their share of the key tokens, and their probability mass."""
    offs_k = tl.arange(0, BLOCK_K)
    is_k = offs_k < k_clusters
    for item in range(tl.program_id(0), batch_heads * q_clusters, tl.num_programs(0)):
        row = tl.cast(item, tl.int64)
        group = row // q_clusters // repeats
        sizes = tl.load(k_sizes_ptr + group * k_clusters + offs_k, mask=is_k, other=0).to(tl.float32)
        scores = tl.load(scores_ptr + row * k_clusters + offs_k, mask=is_k, other=0.0)
        # The centroid of an empty cluster may hold anything, so its score is overwritten, not added to.
        logits = tl.where(sizes > 0.0, scores + tl.log(sizes), float("-inf"))
        weights = tl.exp(logits - tl.max(logits, 0))
        probability = weights / tl.sum(weights, 0)

        # One integer in the order of (logit, lowest index first). Minus zero must tie with zero.
        bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        key = (ordered << INDEX_BITS) + (BLOCK_K - 1 - offs_k)
        key = tl.where(is_k, key, -(1 << 62))

        # The threshold is in (low, high]: a cluster above `high` is kept, one at `low` is not.
        low = tl.full((), -(1 << (31 + INDEX_BITS)) - 1, tl.int64)
        high = tl.full((), (1 << (31 + INDEX_BITS)) - 1, tl.int64)
        for _ in range(32 + INDEX_BITS):
            middle = low + ((high - low) >> 1)
            is_likelier = key > middle
            mass = tl.sum(tl.where(is_likelier, probability, 0.0), 0)
            count = tl.sum(is_likelier.to(tl.int32), 0)
            is_enough = (mass > top_p) & (count >= min_keep)
            low = tl.where(is_enough, middle, low)
            high = tl.where(is_enough, high, middle)
        keep = key >= high

        tl.store(keep_ptr + row * k_clusters + offs_k, keep.to(tl.uint8), mask=is_k)
        tl.store(densities_ptr + row, tl.sum(tl.where(keep, sizes, 0.0), 0) / tl.sum(sizes, 0))
        tl.store(masses_ptr + row, tl.sum(tl.where(keep, probability, 0.0), 0))


@triton.jit
def statistics_kernel(
    densities_ptr,
    masses_ptr,
    q_sizes_ptr,
    update_ptr,
    q_clusters,
    BLOCK_Q: tl.constexpr,
):
    """Write what one call adds to a head's statistics, columns named by ``STATISTICS``."""
    batch_head = tl.program_id(0).to(tl.int64)
    offs_q = tl.arange(0, BLOCK_Q)
    is_q = offs_q < q_clusters
    row = batch_head * q_clusters + offs_q
    sizes = tl.load(q_sizes_ptr + row, mask=is_q, other=0).to(tl.float32)
    share = sizes / tl.sum(sizes, 0)
    density = tl.load(densities_ptr + row, mask=is_q, other=0.0)
    mass = tl.load(masses_ptr + row, mask=is_q, other=0.0)
    update = update_ptr + batch_head * 4
    tl.store(update, 1.0)
    tl.store(update + 1, tl.sum(share * density, 0))
    tl.store(update + 2, tl.sum(share * mass, 0))
    tl.store(update + 3, tl.min(tl.where(sizes > 0.0, mass, float("inf")), 0))


def select_blocks_triton(
    q_centroids: Tensor,
    k_centroids: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    scale: float,
    top_p: float,
    min_keep_ratio: float,
    statistics: Tensor,
) -> Tensor:
    """Compute ``select_blocks_reference`` for at most ``MAX_CLUSTERS`` clusters on either side.

    Scores, sums and logarithms round differently: a cluster may differ from the reference's where the mass before it is
    within rounding of ``top_p``, or where two probabilities are within rounding of each other.
    """
    batch, heads, q_clusters, dim = q_centroids.shape
    k_clusters = k_centroids.shape[2]
    batch_heads, repeats = batch * heads, heads // k_centroids.shape[1]
    rows = batch_heads * q_clusters
    block_k = padded_power_of_two(k_clusters, 32)
    keep = torch.empty((batch, heads, q_clusters, k_clusters), dtype=torch.bool, device=q_centroids.device)
    scores = statistics.new_empty(keep.shape)
    densities, masses = statistics.new_empty((2, rows))
    update = statistics.new_empty(statistics.shape)
    q_sizes, k_sizes = q_sizes.contiguous(), k_sizes.contiguous()
    with torch.cuda.device_of(q_centroids):
        score_kernel[(cdiv(q_clusters, SCORE_BLOCK), cdiv(k_clusters, SCORE_BLOCK), batch_heads)](
            q_centroids.contiguous(),
            k_centroids.contiguous(),
            scores,
            scale,
            repeats,
            q_clusters,
            k_clusters,
            DIM=dim,
            BLOCK=SCORE_BLOCK,
            BLOCK_D=SCORE_BLOCK_D,
            num_warps=SCORE_WARPS,
        )
        select_kernel[persistent_grid(q_centroids.device, rows, SELECT_PROGRAMS_PER_PROCESSOR)](
            scores,
            k_sizes,
            keep.view(torch.uint8),
            densities,
            masses,
            top_p,
            k_clusters if top_p >= 1 else math.floor(min_keep_ratio * k_clusters),
            batch_heads,
            repeats,
            q_clusters,
            k_clusters,
            BLOCK_K=block_k,
            INDEX_BITS=block_k.bit_length() - 1,
            num_warps=SELECT_WARPS,
        )
        statistics_kernel[(batch_heads,)](
            densities,
            masses,
            q_sizes,
            update,
            q_clusters,
            BLOCK_Q=padded_power_of_two(q_clusters),
            num_warps=STATISTICS_WARPS,
        )
    statistics += update
    return keep


def aot_variants() -> list[AotVariant]:
    """Return the kernels for both usual head dims, few and many clusters."""
    clusters = {"repeats": "i32", "q_clusters": "i32", "k_clusters": "i32"}
    variants = []
    for dim in (64, 80, 128, 256):
        signature = {"q_ptr": "*fp32", "k_ptr": "*fp32", "scores_ptr": "*fp32", "scale": "fp32"} | clusters
        variants.append(
            AotVariant(
                name=f"score_kernel_d{dim}",
                fn=score_kernel,
                signature=signature,
                constexprs={"DIM": dim, "BLOCK": SCORE_BLOCK, "BLOCK_D": SCORE_BLOCK_D},
                num_warps=SCORE_WARPS,
                num_stages=3,
                divisible_by_16=("q_ptr", "k_ptr", "scores_ptr"),
            )
        )
    for block in (32, 512, 1024):
        select = {"scores_ptr": "*fp32", "k_sizes_ptr": "*i32", "keep_ptr": "*u8"}
        select |= {"densities_ptr": "*fp32", "masses_ptr": "*fp32", "top_p": "fp32"}
        select |= {"min_keep": "i32", "batch_heads": "i32"} | clusters
        statistics = {"densities_ptr": "*fp32", "masses_ptr": "*fp32", "q_sizes_ptr": "*i32", "update_ptr": "*fp32"}
        for fn, signature, constexprs, warps in (
            (select_kernel, select, {"BLOCK_K": block, "INDEX_BITS": block.bit_length() - 1}, SELECT_WARPS),
            (statistics_kernel, statistics | {"q_clusters": "i32"}, {"BLOCK_Q": block}, STATISTICS_WARPS),
        ):
            variants.append(
                AotVariant(
                    name=f"{fn.__name__}_c{block}",
                    fn=fn,
                    signature=signature,
                    constexprs=constexprs,
                    num_warps=warps,
                    num_stages=3,
                    # `masses` begins where `densities` ends, anywhere.
                    divisible_by_16=tuple(
                        name for name, kind in signature.items() if kind[0] == "*" and name != "masses_ptr"
                    ),
                )
            )
    return variants
