"""What kernels share in which a program walks the keys of a few neighbouring clusters for a tile of mean queries."""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.launch import cdiv, padded_power_of_two

# Key clusters of a program, and sizes that it adds at a time to find the first of its keys.
CLUSTERS = 8
BLOCK_SIZES = 128


@triton.jit
def place_of_program(q_clusters, repeats, BLOCK_M: tl.constexpr, CLUSTERS: tl.constexpr):
    """Return the mean queries of a program, the first of its key clusters, its query head and its key head."""
    # Tiles of mean queries side by side: they read the same keys.
    tiles = tl.cdiv(q_clusters, BLOCK_M)
    offs_m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first_cluster = tl.program_id(0) // tiles * CLUSTERS
    head = tl.program_id(1).to(tl.int64)
    return offs_m, first_cluster, head, head // repeats


def grid_of(q_centroids: Tensor, k_sizes: Tensor, tile: Mapping[str, int]) -> tuple[int, int]:
    """Return how many programs there are in either direction: tiles times shares of the key clusters, and heads."""
    batch, heads, q_clusters, _ = q_centroids.shape
    return cdiv(q_clusters, tile["BLOCK_M"]) * cdiv(k_sizes.shape[2], CLUSTERS), batch * heads


def tile_beside_means(dtype: torch.dtype, dim: int, q_clusters: int) -> dict[str, int]:
    """Return mean queries and keys of a tile, warps and stages, where the means of the keys are read as well.

    Products in fp32 keep both operands in registers.
    """
    if dtype == torch.float32:
        queries, keys, warps, stages = 32, 16, 8, 2
    else:
        queries, keys, warps, stages = (128, 64, 8, 2) if dim <= 128 else (64, 32, 8, 2)
    queries = min(queries, padded_power_of_two(q_clusters))
    return {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


def constexprs_of(dim: int) -> dict[str, int]:
    """Return the compile-time arguments besides those of the tile."""
    return {"DIM": dim, "BLOCK_D": padded_power_of_two(dim), "BLOCK_SIZES": BLOCK_SIZES, "CLUSTERS": CLUSTERS}


def usual_variants(
    kernel: Any, tile_of: Callable[[torch.dtype, int, int], dict[str, int]], pointers: Mapping[str, str]
) -> list[AotVariant]:
    """Return a kernel for the usual dtypes and head dims, few and many clusters.

    Args:
        kernel: the ``triton.jit`` function.
        tile_of: takes the dtype of the keys, the head dim and the query clusters; returns tile, warps and stages.
        pointers: types of the pointers to something else than tokens, centroids and means in the dtype of the keys.
    """
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    variants = []
    for kind, dim, clusters in (
        ("bf16", 128, 128),
        ("bf16", 64, 128),
        ("bf16", 128, 16),
        ("bf16", 256, 64),
        ("fp16", 80, 100),
        ("fp32", 128, 128),
        ("fp32", 256, 64),
    ):
        tile = tile_of(dtypes[kind], dim, clusters)
        warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
        constexprs = constexprs_of(dim) | tile
        types = {name: f"*{kind}" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
        types |= {"scale_log2": "fp32", **pointers}
        signature = {name: types[name] for name in kernel.arg_names if name not in constexprs}
        variants.append(
            AotVariant(
                name=f"{kernel.__name__}_{kind}_d{dim}_c{clusters}",
                fn=kernel,
                signature=signature,
                constexprs=constexprs,
                num_warps=warps,
                num_stages=stages,
                divisible_by_16=tuple(name for name in signature if name.startswith("stride") or name.endswith("_ptr")),
            )
        )
    return variants
