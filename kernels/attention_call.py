"""The host side of the three block-sparse attentions: from the arguments of the op to one launch of a kernel.

What differs stays beside each kernel: its tiles, how it reads keys and values, its compile-time arguments.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.attention_steps import LOG2_E
from svg2_compile.kernels.launch import padded_power_of_two, rows_of_unit_stride
from svg2_compile.kernels.permute import empty_token_major
from svg2_compile.kernels.tiles import AttentionTiles
from svg2_compile.kernels.work_list import COUNTS
from svg2_compile.kernels.work_list_triton import query_tiles_triton

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What is compiled ahead of time."""
Cut = tuple[AttentionTiles, Mapping[str, Any], Mapping[str, str]]
"""How a kernel is compiled: its tiles, its compile-time arguments, and the types of arguments that only it has."""


# Frozen, it would take 4 microseconds more to make, at every call.
@dataclass(slots=True)
class AttentionCall:
    """One call of the op as every kernel wants it. Without a context, ``k`` and ``v`` stand in for its keys."""

    q: Tensor
    """[B, H, N, D], rows of unit stride; its sign is such that the scale is positive."""
    k: Tensor
    """[B, G, N_k, D], rows of unit stride."""
    v: Tensor
    """The same."""
    q_sizes: Tensor
    """int32 [B, H, C_q]."""
    runs: Tensor
    """int32 [B, H, C_q, R, 2], contiguous."""
    counts: Tensor
    """int32 [B, H, C_q, 4], contiguous."""
    context_k: Tensor
    """[B, G, M, D], rows of unit stride."""
    context_v: Tensor
    """The same."""
    context_mask: Tensor | None
    """uint8 [B or 1, 1, 1, M] of unit stride; None admits all."""
    context: int
    """M, 0 where there is none."""
    q_order: Tensor | None
    """int32 [B, H, N], contiguous."""
    scale: float
    """Above 0."""
    tiles: AttentionTiles
    """How the kernel is cut up."""
    out: Tensor
    """Room for the result, laid out as the op promises."""
    lse: Tensor
    """fp32 [B, H, N], room for the log-sum-exp."""

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_sizes: Tensor,
        runs: Tensor,
        counts: Tensor,
        context_k: Tensor | None,
        context_v: Tensor | None,
        context_mask: Tensor | None,
        q_order: Tensor | None,
        scale: float,
        tiles: AttentionTiles,
    ) -> "AttentionCall":
        """Return the call, with copies of what no kernel can read; the arguments are those of the op, and tiles."""
        # Kernels take the maximum of a row, and mask, before they scale.
        if scale < 0:
            q, scale = -q, -scale
        elif scale == 0:
            q, scale = torch.zeros_like(q), 1.0
        k, v, counts = rows_of_unit_stride(k), rows_of_unit_stride(v), counts.contiguous()
        context = 0 if context_k is None else context_k.shape[2]
        context_keys, context_values, mask = k, v, None
        if context > 0 and context_k is not None and context_v is not None:
            context_keys, context_values = rows_of_unit_stride(context_k), rows_of_unit_stride(context_v)
            mask = None if context_mask is None else rows_of_unit_stride(context_mask).view(torch.uint8)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if q_order is None else empty_token_major(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        q, q_order, runs = rows_of_unit_stride(q), None if q_order is None else q_order.contiguous(), runs.contiguous()
        # By place, which takes half the time of names.
        return cls(
            q, k, v, q_sizes, runs, counts, context_keys, context_values, mask, context, q_order, scale, tiles, out, lse
        )

    @property
    def results(self) -> tuple[Tensor, Tensor]:
        """What the op returns."""
        return self.out, self.lse

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return self.out.numel() == 0

    @property
    def packed_runs(self) -> Tensor:
        """Both ends of every run as one number, int64 [B, H, C_q, R, 1], which a kernel loads at once."""
        return self.runs.view(torch.int64)

    @property
    def mask_or_stand_in(self) -> Tensor:
        """The mask, or what stands in for it: a kernel that is told of none never reads it."""
        return self.counts if self.context_mask is None else self.context_mask

    def launch(
        self,
        kernel: Any,
        keys: tuple[Any, ...],
        mask: Tensor | None,
        runs: Tensor,
        strides: tuple[int, ...],
        lengths: tuple[int, ...],
        constexprs: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Cut the queries into tiles, run the kernel on them and return the results.

        Args:
            kernel: one of the three, whose arguments come in this order.
            keys: what it reads keys, values and those of the context by.
            mask: of the context, as it takes it.
            runs: as it takes them.
            strides: of ``keys``, those that it takes.
            lengths: of keys and context, those that it takes.
            constexprs: its compile-time arguments.
        """
        q, out = self.q, self.out
        batch, heads, tokens, _ = q.shape
        query_tiles = query_tiles_triton(self.q_sizes, tokens, self.tiles.block_m)
        with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
            kernel[(batch * heads * query_tiles.shape[2],)](
                q,
                *keys,
                mask,
                self.q_order,
                out,
                self.lse,
                query_tiles,
                runs,
                self.counts,
                *q.stride()[:3],
                *strides,
                *out.stride()[:3],
                0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
                self.scale * LOG2_E,
                heads,
                heads // self.k.shape[1],
                tokens,
                *lengths,
                runs.shape[2],
                query_tiles.shape[2],
                runs.shape[3],
                **constexprs,
                num_warps=self.tiles.num_warps,
                num_stages=self.tiles.num_stages,
            )
        return out, self.lse


def triton_constexprs(
    dim: int, tiles: AttentionTiles, has_context: bool, has_context_mask: bool
) -> dict[str, int | bool]:
    """Return the compile-time arguments that the kernels written in Triton share."""
    return {
        "DIM": dim,
        "BLOCK_D": padded_power_of_two(dim),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PIECE": tiles.piece,
        "COUNTS": len(COUNTS),
        "HAS_CONTEXT": has_context,
        "HAS_CONTEXT_MASK": has_context_mask,
    }


def attention_variants(kernel: Any, most: str, cut: Callable[[str, int, bool], Cut]) -> list[AotVariant]:
    """Return a kernel as it is launched for the usual queries, with everything in it and with the least.

    Args:
        kernel: one of the three.
        most: what the names of those with everything in them end on.
        cut: from the name of a dtype, the head dimension and whether everything is in it to the rest.
    """
    variants = []
    for kind in DTYPES:
        for dim, has_everything in ((64, True), (64, False), (128, True), (128, False)):
            tiles, constexprs, types = cut(kind, dim, has_everything)
            types = {**_types(kind), **types}
            names = [name for name in kernel.arg_names if name not in constexprs]
            aligned = (x for x in names if x.endswith(("_ptr", "_b", "_h", "_n")) and "mask" not in x)
            variants.append(
                AotVariant(
                    name=f"attention_{kind}_{dim}{most if has_everything else ''}",
                    fn=kernel,
                    signature={name: types.get(name, "i32") for name in names},
                    constexprs=constexprs,
                    num_warps=tiles.num_warps,
                    num_stages=tiles.num_stages,
                    divisible_by_16=tuple(aligned),
                )
            )
    return variants


def _types(kind: str) -> dict[str, str]:
    """Return the types of arguments that are no 32-bit integers, as most kernels have them."""
    rows = ("q_ptr", "k_ptr", "v_ptr", "context_k_ptr", "context_v_ptr", "out_ptr")
    types = dict.fromkeys(rows, f"*{kind}") | dict.fromkeys(("order_ptr", "tiles_ptr", "counts_ptr"), "*i32")
    return types | {"scale_log2": "fp32", "lse_ptr": "*fp32", "runs_ptr": "*i64", "context_mask_ptr": "*u8"}
