"""Attend exactly to the kept key clusters and the context (sections 4.2 and 4.3).

    out, lse = block_sparse_attention(q, k', v', q_sizes, runs, counts, context_k, context_v, context_mask, q_order)

Where a stage before it compensates for what is dropped, ``k_means, v_means, pseudo_bias`` come last. The op gathers its
queries and scatters its results itself: that saves writing and reading either once. Keys and values stay permuted,
because an attention reads them many times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from svg2_compile.kernels.launch import padded_power_of_two
from svg2_compile.kernels.tuning import attention_tiles
from svg2_compile.kernels.why_not import capability_of
from svg2_compile.passes.kernel_config import TILES
from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.stage import Stage, Work

if TYPE_CHECKING:
    from svg2_compile.passes.plan import SitePlan


@dataclass(frozen=True, slots=True)
class Attend(Stage):
    """What a ``KernelConfig`` asks for comes last among the arguments; left to the defaults, nothing is added."""

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the attention; what nobody reads of it leaves the graph again."""
        out, lse = writer.parts(
            torch.ops.svg2.block_sparse_attention.default,
            flow.q,
            flow.k_clustered,
            flow.v_clustered,
            flow.q_sizes,
            flow.runs,
            flow.counts,
            flow.context_k,
            flow.context_v,
            flow.context_mask,
            flow.q_order,
            writer.site.scale,
            *_last_arguments(writer.site, flow),
            count=2,
        )
        return replace(flow, out=out, lse=lse)

    def work(self, site: SitePlan) -> Work:
        """Count the attention between all video tokens."""
        return Work(pair_flops=4.0 * site.batch * site.q_heads * site.token_hint**2 * site.head_dim)


def _last_arguments(site: SitePlan, flow: Flow) -> list[Any]:
    """Return the last arguments of the attention, up to the last one that is not the default."""
    pseudo = [None] * 3 if flow.pseudo_bias is None else [flow.k_means, flow.v_means, flow.pseudo_bias]
    arguments: list[Any] = [site.kernel.attention, _tiles(site), site.kernel.autotune, *pseudo]
    defaults = ["auto", None, False, None, None, None]
    while arguments and arguments[-1] == defaults[len(arguments) - 1]:
        arguments.pop()
    return arguments


def _tiles(site: SitePlan) -> list[int] | None:
    """Return the tiles asked for, the tuned ones where only some numbers are, or None."""
    given = site.kernel.given_tiles
    if not given:
        return None
    block_d = padded_power_of_two(site.head_dim)
    tuned = attention_tiles(capability_of(site.device), block_d, site.dtype, site.kernel.attention)
    return [given.get(name, getattr(tuned, name)) for name in TILES]
