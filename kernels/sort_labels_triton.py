"""``svg2::sort_labels`` in Triton: count the labels of every block of tokens, then sort by the counts."""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.counting_sort import (
    COUNT_N,
    PLACE_N,
    PLACE_WARPS,
    PROGRAMS_PER_PROCESSOR,
    SCAN_REGISTERS,
    SCAN_WARPS,
    TABLE_COLUMNS,
    SortedLabels,
    count_labels,
    launch_sort,
    place_kernel,
    scan_blocks,
    scan_kernel,
    table_elements,
)
from svg2_compile.kernels.launch import cdiv, padded_power_of_two, persistent_grid
from svg2_compile.kernels.sides import MIN_BLOCK_C, Sides

COUNT_WARPS = 4


@triton.jit(do_not_specialize=["heads", "tokens", "clusters"])
def count_kernel(
    labels_ptr,
    counts_ptr,
    heads,
    tokens,
    clusters,
    COUNT_N: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Count the labels of every block: labels [heads, tokens] to counts [heads, blocks, columns]."""
    blocks = tl.cdiv(tokens, COUNT_N)
    columns = tl.cdiv(clusters, TABLE_COLUMNS) * TABLE_COLUMNS
    for block in range(tl.program_id(0), heads * blocks, tl.num_programs(0)):
        labels_row = labels_ptr + tl.cast(block // blocks, tl.int64) * tokens
        counts_row = counts_ptr + tl.cast(block, tl.int64) * columns
        count_labels(labels_row, counts_row, block % blocks * COUNT_N, tokens, columns, COUNT_N, BLOCK_C)


def sort_labels_triton(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Compute ``sort_labels_reference``, with the same result, for at most ``MAX_CLUSTERS`` clusters."""
    result = count_and_sort(labels, clusters)
    return result.q_order, result.q_sizes


def count_and_sort(labels: Tensor, clusters: int) -> SortedLabels:
    """Sort ``labels``, int32 [B, H, N], as the first side."""
    labels = labels.contiguous()
    batch, heads, tokens = labels.shape
    sides = Sides.one(batch, heads, tokens, clusters)
    result = SortedLabels.empty(sides, labels.new_empty(table_elements(sides)))
    grid = persistent_grid(labels.device, batch * heads * cdiv(tokens, COUNT_N), PROGRAMS_PER_PROCESSOR)
    with torch.cuda.device_of(labels):
        count_kernel[grid](
            labels,
            result.counts,
            batch * heads,
            tokens,
            clusters,
            COUNT_N=COUNT_N,
            TABLE_COLUMNS=TABLE_COLUMNS,
            BLOCK_C=sides.block_c,
            num_warps=COUNT_WARPS,
        )
    launch_sort(labels, result, sides)
    return result


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the kernels as they are launched for few and for many clusters, alone and inside k-means."""
    variants = []
    columns = {"COUNT_N": COUNT_N, "TABLE_COLUMNS": TABLE_COLUMNS}
    for clusters, gated in ((100, False), (1000, True)):
        block_c = padded_power_of_two(clusters, MIN_BLOCK_C)
        scan = columns | {"BLOCK_B": scan_blocks(block_c), "BLOCK_C": block_c}
        for fn, constexprs, warps in (
            (count_kernel, columns | {"BLOCK_C": block_c}, COUNT_WARPS),
            (scan_kernel, scan, SCAN_WARPS),
            (place_kernel, columns | {"PLACE_N": PLACE_N}, PLACE_WARPS),
        ):
            known: dict[str, object] = {**constexprs}
            if fn is not count_kernel and not gated:
                known["needed_ptr"] = None
            runtime = [name for name in fn.arg_names if name not in known]
            pointers = [name for name in runtime if name.endswith("_ptr")]
            variants.append(
                AotVariant(
                    name=f"{fn.__name__}_c{block_c}" + ("_gated" if gated and fn is not count_kernel else ""),
                    fn=fn,
                    signature=dict.fromkeys(runtime, "i32") | dict.fromkeys(pointers, "*i32"),
                    constexprs=known,
                    num_warps=warps,
                    num_stages=1,
                    divisible_by_16=tuple(pointers),
                    max_registers=SCAN_REGISTERS if fn is scan_kernel else None,
                )
            )
    return variants
