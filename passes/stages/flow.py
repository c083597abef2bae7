"""The nodes of one site on their way through its stages, and what writes them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from svg2_compile.passes.nodes import emit, tensor_of

if TYPE_CHECKING:
    from svg2_compile.passes.plan import SitePlan

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Dense:
    """What the dense attention of the video queries takes, where a mask may call for it."""

    is_key_mask: Node
    """Bool on the CPU, whether the mask does no more than to hide keys."""
    k: Node
    """All keys [B, G, N_k + M, D], in token order."""
    v: Node
    mask: Node
    """As the model gives it, broadcastable to [B, H, N, N_k + M]."""


@dataclass(frozen=True, slots=True)
class Flow:
    """What the stages of a site hand on; a field is None until a stage has filled it, or where there is no such thing.

    Axes: B batch, H query heads, G key heads, N video queries, N_k video keys, M context keys, C clusters, D head dim.
    """

    q: Node
    """Queries [B, H, N, D], in token order."""
    k: Node
    """Video keys [B, G, N_k, D], in token order."""
    v: Node
    """Video values, likewise."""
    key_mask: Node | None = None
    """Bool [B or 1, 1, 1, N_k], False for a video key that is hidden; None where all are known to be visible."""
    context_k: Node | None = None
    """Keys [B, G, M, D] that every query sees."""
    context_v: Node | None = None
    context_mask: Node | None = None
    """Bool [B, 1, 1, M], False for a context key that is hidden."""
    dense: Dense | None = None
    """Given where the mask is checked."""
    q_order: Node | None = None
    """Int32 [B, H, N], the query found at each place of the cluster order."""
    q_sizes: Node | None = None
    """Int32 [B, H, C_q], queries per cluster."""
    k_sizes: Node | None = None
    """Int32 [B, G, C_k], visible keys per cluster."""
    k_clustered: Node | None = None
    """Keys in cluster order; hidden ones come last."""
    v_clustered: Node | None = None
    masses: Node | None = None
    """Fp32 [B, H, C_q, C_k], the estimated attention mass of every block; None: by the centroids."""
    k_means: Node | None = None
    """[B, G, C_k, D], the mean of the visible keys of every cluster."""
    v_means: Node | None = None
    """[B, G, C_k, D], the mean of their values."""
    errors: Node | None = None
    """Fp32 [B, H, C_q, C_k], ln of what the mean of a cluster would do wrong in its place; None: masses choose."""
    least_keys: Node | None = None
    """Int32 [B, H], how many keys each query cluster keeps at least; None: as many as its masses say."""
    statistics: Node | None = None
    """Where the selection has added its statistics to."""
    runs: Node | None = None
    """Int32 [B, H, C_q, R, 2], the ranges of keys that each query cluster attends to."""
    counts: Node | None = None
    """Int32 [B, H, C_q, 4], how many there are."""
    pseudo_bias: Node | None = None
    """Fp32 [B, H, C_q, C_k], ln of how many keys the mean of a cluster stands for; -inf for none, None: no means."""
    probes: Node | None = None
    """Int32 [B, H, R], which queries are computed densely too."""
    exact: Node | None = None
    """Fp32 [B, H, R, D], their dense attention."""
    recall: Node | None = None
    """Fp32 [B, H, 2], the recall of every head that this call has measured."""
    out: Node | None = None
    """[B, H, N, D], in token order."""
    lse: Node | None = None
    """Log-sum-exp [B, H, N], in token order."""


class SiteWriter:
    """Writes nodes in front of the attention that they replace; call it inside the fake mode of the graph."""

    def __init__(self, gm: GraphModule, site: SitePlan, node: Node, state: dict[str, Node]) -> None:
        """Args: ``node`` is the attention; ``state`` has the site's state tensors by name."""
        self.gm, self.site, self.node, self.state = gm, site, node, state

    def emit(self, target: Any, *args: Any) -> Node:
        """Write one call, with the provenance of the attention."""
        return emit(self.gm.graph, target, *args, like=self.node)

    def parts(self, target: Any, *args: Any, count: int) -> list[Node]:
        """Write one call and take its first ``count`` results apart."""
        results = self.emit(target, *args)
        return [self.emit(operator.getitem, results, index) for index in range(count)]

    def in_dtype(self, x: Node) -> Node:
        """Return ``x`` in the dtype of the attention: autocast converts its operands, the ops take them as they are."""
        tensor = tensor_of(x)
        if tensor is None or tensor.dtype is self.site.dtype:
            return x
        return self.emit(aten.to.dtype, x, self.site.dtype)

    def cut(self, x: Node, dim: int, start: Any, end: Any) -> Node:
        """Return a range of rows."""
        return self.emit(aten.slice.Tensor, x, dim, start, end)

    def take(self, x: Node, dim: int, ranges: list[tuple[Any, Any]]) -> Node:
        """Return several ranges of rows, behind each other."""
        return self.join([self.cut(x, dim, *each) for each in ranges], dim)

    def join(self, parts: list[Node], dim: int) -> Node:
        """Return rows behind each other."""
        return parts[0] if len(parts) == 1 else self.emit(aten.cat.default, parts, dim)
