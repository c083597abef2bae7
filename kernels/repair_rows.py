"""``svg2::repair_rows_``: what a few dense rows of a head tell of the error of all its rows, taken off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svg2_compile.kernels.card import FAST_DTYPES, MAX_HEAD_DIM, MAX_PROBES, Kernels, Limits, same_dtype
from svg2_compile.kernels.checks import (
    FLOATING,
    accumulation_dtype,
    check_dtype,
    check_rank,
    check_shape,
    check_value,
)
from svg2_compile.kernels.op import define

if TYPE_CHECKING:
    from svg2_compile.kernels.self_check import Kind

REPAIRS = ("calls", "repaired", "error_sum", "error_left_sum")
"""The last axis of what is found, per head and to be summed over calls: 1; 1 if the head was repaired; the error of its
sparse results over the norm of the exact ones, on its rows; and what of it is left, as each row is foretold by the
others."""
RANK = 16
RIDGE = 0.1
LEAST_SPREAD = 1e-5
"""Least standard deviation of a channel: those that do not vary foretell nothing."""
POWERS = 4
"""How often the residuals' Gram matrix is applied to find their largest directions."""
LEAST_SHARE = 2.0**-19
"""Of a column's norm, what the columns before it must leave: less may be rounding."""
# A hash that mixes 32 bits, for the signs of the start: (bits to the right, factor), and once more bits.
MIXES, LAST_SHIFT = ((16, 0x7FEB352D), (15, 0x846CA68B)), 16
# The self-check: rows, tokens behind a tile, and what fp32 and products of 11 bits in the correction may be off.
ROWS, MORE_TOKENS, ROUNDINGS, TOLERANCE = 40, 37, 8, 1e-3


def _check(out: Tensor, places: Tensor, exact: Tensor) -> None:
    """Check the arguments of ``svg2::repair_rows_``."""
    check_rank("out", out, 4)
    check_rank("places", places, 3)
    batch, heads, _, dim = out.shape
    rows = places.shape[2]
    check_shape("places", places, (batch, heads, rows))
    check_shape("exact", exact, (batch, heads, rows, dim))
    check_dtype("out", out, *FLOATING)
    check_dtype("places", places, torch.int32)
    check_dtype("exact", exact, accumulation_dtype(out))
    check_value(rows <= MAX_PROBES, lambda: f"there must be at most {MAX_PROBES} rows, got {rows}")


@dataclass(frozen=True, slots=True)
class Fit:
    """An affine map of rank 16 from a sparse result to its error, of heads [X]."""

    mean: Tensor
    """[X, 1, D], of the sparse results."""
    spread: Tensor
    """[X, 1, D], their standard deviation."""
    features: Tensor
    """[X, D, 16]."""
    directions: Tensor
    """[X, 16, D]."""
    mean_residual: Tensor
    """[X, 1, D]."""
    error: Tensor
    """[X], the sum of the squared residuals."""
    error_left: Tensor
    """[X], the same of what the map leaves, each row foretold by the others."""

    def correction(self, out: Tensor) -> Tensor:
        """Return what to add to sparse results [X, N, D]."""
        return (out - self.mean) / self.spread @ self.features @ self.directions + self.mean_residual


def repair_rows_reference(out: Tensor, places: Tensor, exact: Tensor) -> Tensor:
    """Add to every row the error that a map fitted to some rows foretells for it, and set those rows to what is exact.

    SparsePR (arXiv 2608.18484). Of the R rows of a head, o_r is the sparse result and e_r = exact_r - o_r what it
    lacks. With x_r = (o_r - mean) / standard deviation, channel by channel, and y_r = e_r - mean residual, X and Y of
    one row each,

        Z = (X X^T + 0.1 I)^-1 V,   L = X^T Z,   B = V^T Y,

    where the 16 columns of V span the largest left singular directions of Y: of what y = x A, a ridge regression, would
    be, x L B is the part in those directions. Every row becomes o + (o - mean) / deviation L B + mean residual.

    V is the orthonormal basis that ``POWERS`` products of Y Y^T with random signs have, made orthonormal after each.

    Not the paper's: a head is repaired only if that makes its rows better, each row foretold by a fit to the others.
    As a ridge regression's is known without refitting, that is one sum: of |0.1 (Z B)_r / h_r + (Y - V B)_r / g|^2 with
    h_r the diagonal of 0.1 (X X^T + 0.1 I)^-1 - 1/R and g = 1 - 1/R, B taken as given.

    Args:
        out: fp16, bf16, fp32 (fp64 for judging) [B, H, N, D], any strides; updated.
        places: int32 [B, H, R], rows of each head, all different, at most ``MAX_PROBES``.
        exact: fp32 (fp64 for fp64) [B, H, R, D], what dense attention gives for them.

    Returns:
        fp32 (fp64 for fp64) [B, H, 4], columns named by ``REPAIRS``.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes disagree, or there are more rows.

    Promises:
        Deterministic, no device synchronisation, no library of linear algebra. A head whose fit is not finite, or no
        better, keeps all its bits but for the given rows. Heads do not influence each other.
    """
    _check(out, places, exact)
    dtype = exact.dtype
    batch, heads = out.shape[:2]
    index = places.long().unsqueeze(-1).expand(exact.shape)
    sparse = out.gather(2, index).to(dtype)
    # a model under autocast would have the products rounded
    with torch.autocast(out.device.type, enabled=False):
        fit = fit_of(sparse.flatten(0, 1), exact.flatten(0, 1))
        is_repaired = fit.error_left < fit.error
        for b in range(batch):
            for h in range(heads):
                head = slice(b * heads + h, b * heads + h + 1)
                of_head = Fit(**{name: getattr(fit, name)[head] for name in Fit.__slots__})
                x = out[b, h].to(dtype)
                repaired = (x + of_head.correction(x.unsqueeze(0))[0]).to(out.dtype)
                out[b, h] = repaired.where(is_repaired[head], out[b, h])
    out.scatter_(2, index, exact.to(out.dtype))
    return found_of(fit, exact, is_repaired)


def found_of(fit: Fit, exact: Tensor, is_repaired: Tensor) -> Tensor:
    """Return what ``REPAIRS`` names of heads [B, H]."""
    norm = exact.flatten(0, 1).square().sum((1, 2)).clamp(min=torch.finfo(exact.dtype).tiny)
    left = fit.error_left.where(is_repaired, fit.error)
    errors = [(each / norm).sqrt() for each in (fit.error, left)]
    columns = (torch.ones_like(norm), is_repaired.to(norm.dtype), *errors)
    return torch.stack(columns, dim=-1).view(*exact.shape[:2], len(REPAIRS))


def fit_of(sparse: Tensor, exact: Tensor) -> Fit:
    """Return the fit to rows [X, R, D] of heads, in their dtype."""
    rows, dim = sparse.shape[1:]
    mean, residual = sparse.mean(1, keepdim=True), exact - sparse
    spread = (sparse - mean).square().mean(1, keepdim=True).sqrt().clamp(min=LEAST_SPREAD)
    mean_residual = residual.mean(1, keepdim=True)
    x, y = (sparse - mean) / spread, residual - mean_residual
    # What is constant over the rows is in neither: there the inverse may be anything, and small is well rounded.
    inverse = inverse_of(x @ x.mT + RIDGE * _identity(x) + dim / rows)
    basis = largest_directions(y @ y.mT)
    coefficients, directions = inverse @ basis, basis.mT @ y
    diagonal = RIDGE * (inverse.diagonal(dim1=1, dim2=2).unsqueeze(-1) - 1 / (RIDGE + dim) / rows)
    left = RIDGE * coefficients @ directions / diagonal + (y - basis @ directions) / (1 - 1 / rows)
    return Fit(
        mean,
        spread,
        x.mT @ coefficients,
        directions,
        mean_residual,
        residual.square().sum((1, 2)),
        left.square().sum((1, 2)),
    )


def inverse_of(matrix: Tensor) -> Tensor:
    """Return the inverses of symmetric positive definite matrices [X, R, R], by sweeps without pivoting."""
    swept = matrix.clone()
    for place in range(matrix.shape[1]):
        column = swept[:, :, place].clone()
        pivot = column[:, place].clone()
        scaled = column / pivot[:, None]
        swept -= scaled[:, :, None] * column[:, None, :]
        swept[:, :, place], swept[:, place, :], swept[:, place, place] = scaled, scaled, -1 / pivot
    return -swept


def largest_directions(gram: Tensor) -> Tensor:
    """Return orthonormal columns [X, R, 16] that nearly span the largest eigenvectors of Gram matrices [X, R, R].

    Where there are fewer, or the others are smaller by far, some columns are 0.
    """
    trace = gram.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
    gram = gram / trace.clamp(min=torch.finfo(gram.dtype).tiny)
    basis = start_of(gram.shape[1], gram).expand(gram.shape[0], -1, -1)
    for _ in range(POWERS):
        basis = orthonormal(gram @ basis)
    # once more: what is left of a column that was nearly the others' is not quite orthogonal to them
    return orthonormal(basis)


def start_of(rows: int, like: Tensor) -> Tensor:
    """Return signs [R, 16] that look random; the hash of each place tells its own."""
    bits = torch.arange(1, rows * RANK + 1, dtype=torch.int64, device=like.device)
    for shift, factor in MIXES:
        bits = (bits ^ (bits >> shift)) * factor % 2**32
    bits = bits ^ (bits >> LAST_SHIFT)
    return (1 - 2 * (bits & 1)).to(like.dtype).view(rows, RANK)


def orthonormal(columns: Tensor) -> Tensor:
    """Return columns [X, R, 16] made orthonormal from the first to the last (modified Gram-Schmidt).

    A column of which those before it leave less than ``LEAST_SHARE`` becomes 0.
    """
    columns = columns.clone()
    least = columns.square().sum(1).sqrt() * LEAST_SHARE
    for place in range(columns.shape[2]):
        norm = columns[:, :, place].square().sum(1, keepdim=True).sqrt()
        is_new = norm > least[:, place : place + 1]
        column = torch.where(is_new, columns[:, :, place] / norm, 0)
        columns[:, :, place] = column
        further = columns[:, :, place + 1 :]
        further -= column.unsqueeze(-1) * (column.unsqueeze(1) @ further)
    return columns


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[1], dtype=like.dtype, device=like.device)


def check_repair_rows(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how a repair is wrong: of a head with an error that its results tell, and of one with none to tell."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    tokens = kind.tokens + MORE_TOKENS
    # few directions, so that some rows tell all
    out = (random(1, 2, tokens, 4) @ random(1, 2, 4, kind.dim)).to(kind.dtype)
    places = torch.arange(ROWS, dtype=torch.int64, device="cpu") * tokens // ROWS
    sparse = out[:, :, places].float()
    exact = sparse + 0.1 * sparse.roll(1, -1) + 0.2
    exact[:, 1] = sparse[:, 1] + 0.01 * random(ROWS, kind.dim)
    places = places.int().expand(1, 2, -1).contiguous()
    wanted, result = out.double(), out.to(kind.device)
    found = call(result, places.to(kind.device), exact.to(kind.device)).cpu().double()
    expected = repair_rows_reference(wanted, places, exact.double())
    if not torch.equal(found[..., :2], expected[..., :2]):
        return "other heads are repaired"
    allowed = ROUNDINGS * (torch.finfo(kind.dtype).eps + TOLERANCE) * float(wanted.abs().max())
    error = float((result.cpu().double() - wanted).abs().max())
    if not error <= allowed:
        return f"off by {error:.3g}, at most {allowed:.3g} is rounding"
    told = float((found - expected).abs().max())
    return None if told <= TOLERANCE else f"told errors off by {told:.3g}, at most {TOLERANCE:.3g} is rounding"


define(
    repair_rows_reference,
    name="repair_rows_",
    part="attention",
    mutates=("out",),
    check=_check,
    fake=lambda exact: exact.new_empty((*exact.shape[:2], len(REPAIRS))),
    kernels=Kernels(
        limits=Limits(FAST_DTYPES, MAX_HEAD_DIM),
        seen=lambda out: (out, out.shape[3], 0, 0),
        seen_dtype=same_dtype,
        launch="repair_rows_triton:repair_rows_triton",
        self_check="repair_rows:check_repair_rows",
        modules=("repair_rows_triton",),
    ),
)
