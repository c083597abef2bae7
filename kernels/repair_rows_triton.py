"""``svg2::repair_rows_`` in Triton: one launch fits, a program for each head; one reads and writes every row once.

The fit needs the matrix of the rows' products, its inverse by sweeps, and the largest directions of the residuals by a
few products of their Gram matrix: fixed loops over what lies in registers. Rows are read again for each of the three.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.attention_steps import load_rows
from svg2_compile.kernels.launch import cdiv, padded_power_of_two, rows_of_unit_stride
from svg2_compile.kernels.repair_rows import LAST_SHIFT, LEAST_SHARE, LEAST_SPREAD, MIXES, POWERS, RANK, REPAIRS, RIDGE

CHUNK = 16  # channels that the fit takes at a time
TILE_ELEMENTS = 4096  # of rows that are repaired together
TILES = 8  # that a program repairs with the same map
NUM_WARPS, NUM_STAGES = 4, 2
REPAIRS_COLUMNS, RANKS, STEPS = tl.constexpr(len(REPAIRS)), tl.constexpr(RANK), tl.constexpr(POWERS)
LAMBDA, SPREAD, SHARE = (tl.constexpr(each) for each in (RIDGE, LEAST_SPREAD, LEAST_SHARE))
(SHIFT_1, FACTOR_1), (SHIFT_2, FACTOR_2) = ((tl.constexpr(s), tl.constexpr(f)) for s, f in MIXES)
SHIFT_3 = tl.constexpr(LAST_SHIFT)
# The smallest normal number of fp32.
TINY = tl.constexpr(2.0**-126)
# Rows of what the fit writes for a head: mean, spread and mean residual; features and directions come after them.
VECTORS = tl.constexpr(3)
FIT_ROWS = 3 + 2 * RANK


@triton.jit
def _probes(out_ptr, exact_ptr, places, stride_n, offs_r, is_row, offs_d, rows, DIM: tl.constexpr):
    """Return x and y of some channels [BLOCK_R, CHUNK], what they lack, what is exact, and what was taken off."""
    mask = is_row[:, None] & (offs_d < DIM)[None, :]
    sparse = tl.load(out_ptr + places[:, None] * stride_n + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    exact = tl.load(exact_ptr + offs_r[:, None] * DIM + offs_d[None, :], mask=mask, other=0.0)
    residual = exact - sparse
    count = rows.to(tl.float32)
    mean, mean_residual = tl.sum(sparse, 0) / count, tl.sum(residual, 0) / count
    centred = tl.where(mask, sparse - mean[None, :], 0.0)
    spread = tl.maximum(tl.sqrt(tl.sum(centred * centred, 0) / count), SPREAD)
    y = tl.where(mask, residual - mean_residual[None, :], 0.0)
    return centred / spread[None, :], y, residual, exact, mean, spread, mean_residual


@triton.jit
def _inverse(matrix, rows, BLOCK_R: tl.constexpr):
    """Return the inverse of a symmetric positive definite matrix; of what lies past the rows, nothing is wanted."""
    across, down = tl.arange(0, BLOCK_R)[None, :], tl.arange(0, BLOCK_R)[:, None]
    for place in range(rows):
        column = tl.sum(tl.where(across == place, matrix, 0.0), 1)
        row = tl.sum(tl.where(down == place, matrix, 0.0), 0)
        pivot = tl.sum(tl.where(tl.arange(0, BLOCK_R) == place, row, 0.0), 0)
        scaled_column, scaled_row = column / pivot, row / pivot
        swept = matrix - scaled_column[:, None] * row[None, :]
        swept = tl.where(across == place, scaled_column[:, None], swept)
        swept = tl.where(down == place, scaled_row[None, :], swept)
        matrix = tl.where((across == place) & (down == place), -1.0 / pivot, swept)
    return -matrix


@triton.jit
def _start(offs_r, is_row):
    """Return the signs of ``start_of`` [BLOCK_R, RANKS]; 0 past the rows."""
    bits = (offs_r[:, None] * RANKS + tl.arange(0, RANKS)[None, :] + 1).to(tl.uint32)
    bits = (bits ^ (bits >> SHIFT_1)) * tl.full((), FACTOR_1, tl.uint32)
    bits = (bits ^ (bits >> SHIFT_2)) * tl.full((), FACTOR_2, tl.uint32)
    bits = bits ^ (bits >> SHIFT_3)
    return tl.where(is_row[:, None], 1.0 - 2.0 * (bits & 1).to(tl.float32), 0.0)


@triton.jit
def _orthonormal(columns):
    """Return columns made orthonormal from the first to the last; 0 where little of one is new."""
    place_of = tl.arange(0, RANKS)[None, :]
    least = tl.sqrt(tl.sum(columns * columns, 0)) * SHARE
    for place in range(RANKS):
        column = tl.sum(tl.where(place_of == place, columns, 0.0), 1)
        norm = tl.sqrt(tl.sum(column * column, 0))
        column = tl.where(norm > tl.sum(tl.where(tl.arange(0, RANKS) == place, least, 0.0), 0), column / norm, 0.0)
        shares = tl.sum(columns * column[:, None], 0)
        further = columns - column[:, None] * shares[None, :]
        columns = tl.where(place_of > place, further, tl.where(place_of == place, column[:, None], columns))
    return columns


@triton.jit(do_not_specialize=["heads", "rows"])
def fit_kernel(
    out_ptr,
    places_ptr,
    exact_ptr,
    fits_ptr,
    found_ptr,
    stride_b,
    stride_h,
    stride_n,
    heads,
    rows,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the fit of a head, and what ``REPAIRS`` names of it."""
    head = tl.program_id(0).to(tl.int64)
    out_ptr += head // heads * stride_b + head % heads * stride_h
    exact_ptr += head * rows * DIM
    fits_ptr += head * (VECTORS + 2 * RANKS) * DIM
    offs_r = tl.arange(0, BLOCK_R)
    is_row = offs_r < rows
    places = tl.load(places_ptr + head * rows + offs_r, mask=is_row, other=0).to(tl.int64)
    count = rows.to(tl.float32)

    matrix = tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
    error, norm = 0.0, 0.0
    for first in range(0, DIM, CHUNK):
        offs_d = first + tl.arange(0, CHUNK)
        x, _, residual, exact, mean, spread, mean_residual = _probes(
            out_ptr, exact_ptr, places, stride_n, offs_r, is_row, offs_d, rows, DIM
        )
        matrix = tl.dot(x, tl.trans(x), matrix, input_precision="ieee")
        error += tl.sum(tl.sum(residual * residual, 1), 0)
        norm += tl.sum(tl.sum(exact * exact, 1), 0)
        is_dim = offs_d < DIM
        tl.store(fits_ptr + offs_d, mean, mask=is_dim)
        tl.store(fits_ptr + DIM + offs_d, spread, mask=is_dim)
        tl.store(fits_ptr + 2 * DIM + offs_d, mean_residual, mask=is_dim)
    is_diagonal = offs_r[:, None] == offs_r[None, :]
    matrix += tl.where(is_row[:, None] & is_row[None, :], DIM / count, 0.0) + tl.where(is_diagonal, LAMBDA, 0.0)
    inverse = _inverse(matrix, rows, BLOCK_R)
    diagonal = LAMBDA * (tl.sum(tl.where(is_diagonal, inverse, 0.0), 1) - 1.0 / (LAMBDA + DIM) / count)

    gram = tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
    for first in range(0, DIM, CHUNK):
        offs_d = first + tl.arange(0, CHUNK)
        _, y, _, _, _, _, _ = _probes(out_ptr, exact_ptr, places, stride_n, offs_r, is_row, offs_d, rows, DIM)
        gram = tl.dot(y, tl.trans(y), gram, input_precision="ieee")
    trace = tl.sum(tl.sum(tl.where(is_diagonal, gram, 0.0), 1), 0)
    gram = gram / tl.maximum(trace, TINY)
    basis = _start(offs_r, is_row)
    for _step in range(STEPS):
        basis = _orthonormal(tl.dot(gram, basis, input_precision="ieee"))
    basis = _orthonormal(basis)
    coefficients = tl.dot(inverse, basis, input_precision="ieee")

    left = 0.0
    offs_rank = tl.arange(0, RANKS)
    for first in range(0, DIM, CHUNK):
        offs_d = first + tl.arange(0, CHUNK)
        x, y, _, _, _, _, _ = _probes(out_ptr, exact_ptr, places, stride_n, offs_r, is_row, offs_d, rows, DIM)
        features = tl.dot(tl.trans(coefficients), x, input_precision="ieee")
        directions = tl.dot(tl.trans(basis), y, input_precision="ieee")
        foretold = LAMBDA * tl.dot(coefficients, directions, input_precision="ieee") / diagonal[:, None]
        rest = (y - tl.dot(basis, directions, input_precision="ieee")) / (1.0 - 1.0 / count)
        missed = tl.where(is_row[:, None], foretold + rest, 0.0)
        left += tl.sum(tl.sum(missed * missed, 1), 0)
        at = fits_ptr + (VECTORS + offs_rank[:, None]) * DIM + offs_d[None, :]
        mask = (offs_d < DIM)[None, :]
        tl.store(at, features, mask=mask)
        tl.store(at + RANKS * DIM, directions, mask=mask)
    is_better = left < error
    norm = tl.maximum(norm, TINY)
    found_ptr += head * REPAIRS_COLUMNS
    tl.store(found_ptr, 1.0)
    tl.store(found_ptr + 1, tl.where(is_better, 1.0, 0.0))
    tl.store(found_ptr + 2, tl.sqrt(error / norm))
    tl.store(found_ptr + 3, tl.sqrt(tl.where(is_better, left, error) / norm))


@triton.jit
def _repair_tile(
    out_ptr,
    first,
    tokens,
    stride_n,
    offs_d,
    vectors,
    features,
    directions,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add its correction to every row of one tile."""
    mean, spread, mean_residual = vectors
    offs_n = first + tl.arange(0, BLOCK_N)
    is_token = offs_n < tokens
    out = load_rows(out_ptr, offs_n, stride_n, is_token, offs_d, DIM, True).to(tl.float32)
    coordinates = tl.dot((out - mean) / spread, features, input_precision=PRECISION)
    correction = tl.dot(coordinates, directions, input_precision=PRECISION) + mean_residual
    pointers = out_ptr + offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :]
    mask = is_token[:, None] & (offs_d < DIM)[None, :]
    tl.store(pointers, (out + correction).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["heads", "tokens"])
def repair_kernel(
    out_ptr,
    fits_ptr,
    found_ptr,
    stride_b,
    stride_h,
    stride_n,
    heads,
    tokens,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add its correction to every row of ``TILES`` tiles, where the head is repaired."""
    head = tl.program_id(1).to(tl.int64)
    if tl.load(found_ptr + head * REPAIRS_COLUMNS + 1) > 0.0:
        out_ptr += head // heads * stride_b + head % heads * stride_h
        fits_ptr += head * (VECTORS + 2 * RANKS) * DIM
        offs_d = tl.arange(0, BLOCK_D)
        offs_rank = tl.arange(0, RANKS)
        is_dim = offs_d < DIM
        mean = tl.load(fits_ptr + offs_d, mask=is_dim, other=0.0)
        spread = tl.load(fits_ptr + DIM + offs_d, mask=is_dim, other=1.0)
        mean_residual = tl.load(fits_ptr + 2 * DIM + offs_d, mask=is_dim, other=0.0)
        features = tl.load(
            fits_ptr + (VECTORS + offs_rank[None, :]) * DIM + offs_d[:, None], mask=is_dim[:, None], other=0.0
        )
        directions = tl.load(
            fits_ptr + (VECTORS + RANKS + offs_rank[:, None]) * DIM + offs_d[None, :], mask=is_dim[None, :], other=0.0
        )
        first_token = tl.program_id(0) * (TILES * BLOCK_N)
        vectors = mean[None, :], spread[None, :], mean_residual[None, :]
        # A loop would hold both maps of wide rows in registers.
        if TILES == 1:
            _repair_tile(
                out_ptr, first_token, tokens, stride_n, offs_d, vectors, features, directions, DIM, BLOCK_N, PRECISION
            )
        else:
            for first in range(first_token, tl.minimum(first_token + TILES * BLOCK_N, tokens), BLOCK_N):
                _repair_tile(
                    out_ptr, first, tokens, stride_n, offs_d, vectors, features, directions, DIM, BLOCK_N, PRECISION
                )


def repair_rows_triton(out: Tensor, places: Tensor, exact: Tensor) -> Tensor:
    """Compute ``repair_rows_reference``.

    Sums round in another order; of 16-bit results, the factors of the correction are rounded to 11 bits.
    """
    batch, heads, tokens, dim = out.shape
    rows = places.shape[2]
    repaired = rows_of_unit_stride(out)
    places = places.contiguous()
    fits = torch.empty((batch, heads, FIT_ROWS, dim), dtype=torch.float32, device=out.device)
    found = torch.empty((batch, heads, len(REPAIRS)), dtype=torch.float32, device=out.device)
    if found.numel() == 0 or tokens == 0:
        return found
    shape, repair = _fit_constexprs(dim, rows), _repair_constexprs(out.dtype, dim)
    with torch.cuda.device_of(out):
        fit_kernel[(batch * heads,)](
            repaired, places, exact.contiguous(), fits, found, *repaired.stride()[:3], heads, rows,
            num_warps=_fit_warps(rows), num_stages=1, **shape,
        )  # fmt: skip
        repair_kernel[(cdiv(tokens, repair["TILES"] * repair["BLOCK_N"]), batch * heads)](
            repaired, fits, found, *repaired.stride()[:3], heads, tokens,
            num_warps=NUM_WARPS, num_stages=NUM_STAGES, **repair,
        )  # fmt: skip
    if repaired is not out:
        out.copy_(repaired)
    out.scatter_(2, places.long().unsqueeze(-1).expand(exact.shape), exact.to(out.dtype))
    return found


def _fit_constexprs(dim: int, rows: int) -> dict[str, object]:
    """Return the compile-time arguments."""
    return {"DIM": dim, "BLOCK_R": padded_power_of_two(rows), "CHUNK": CHUNK}


def _fit_warps(rows: int) -> int:
    """Return the warps of a program: two square matrices lie in its registers."""
    return NUM_WARPS if rows <= 32 else 2 * NUM_WARPS


def _repair_constexprs(dtype: torch.dtype, dim: int) -> dict[str, Any]:
    """Return the compile-time arguments; fp32 products keep both operands in registers."""
    block_d = padded_power_of_two(dim)
    in_full = dtype == torch.float32
    block_n = max(16, TILE_ELEMENTS // block_d // (2 if in_full else 1))
    precision = "ieee" if in_full else "tf32"
    return {
        "DIM": dim,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "TILES": TILES if dim <= 128 else 1,
        "PRECISION": precision,
    }


def aot_variants(capability: int) -> list[AotVariant]:
    """Return both kernels for the usual rows."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    variants = []
    for kind, dim, rows in (
        ("bf16", 128, 64),
        ("bf16", 64, 64),
        ("bf16", 256, 64),
        ("fp16", 80, 16),
        ("fp32", 128, 64),
    ):
        fit, repair = _fit_constexprs(dim, rows), _repair_constexprs(dtypes[kind], dim)
        for name, fn, constexprs, warps, stages in (
            (f"fit_kernel_{kind}_d{dim}_r{rows}", fit_kernel, fit, _fit_warps(rows), 1),
            (f"repair_kernel_{kind}_d{dim}", repair_kernel, repair, NUM_WARPS, NUM_STAGES),
        ):
            types = dict.fromkeys(fn.arg_names, "i32") | {"out_ptr": f"*{kind}", "places_ptr": "*i32"}
            types |= dict.fromkeys(("exact_ptr", "fits_ptr", "found_ptr"), "*fp32")
            signature = {each: types[each] for each in fn.arg_names if each not in constexprs}
            variants.append(
                AotVariant(
                    name=name,
                    fn=fn,
                    signature=signature,
                    constexprs=constexprs,
                    num_warps=warps,
                    num_stages=stages,
                    divisible_by_16=tuple(
                        each for each in signature if each.startswith("stride") or each.endswith("_ptr")
                    ),
                )
            )
    return variants
