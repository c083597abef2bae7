"""Replace the attention of each accepted site by the svg2 ops.

    o = scaled_dot_product_attention(q, k, v)

becomes, for a sequence of video rows only,

    q_labels = kmeans_(q, q_centroids, q_calls);         k_labels = kmeans_(k, k_centroids, k_calls)
    q_order, q_sizes = sort_labels(q_labels);            k_order, k_sizes = sort_labels(k_labels)
    runs, counts = select_blocks(q_centroids, k_centroids, q_sizes, k_sizes, statistics)
    o, _ = block_sparse_attention(permute_tokens(q, q_order), permute_tokens(k, k_order), permute_tokens(v, k_order),
                                  q_sizes, runs, counts)
    o = unpermute_tokens(o, q_order)

With context rows, q, k and v are cut first; the context keys go to ``block_sparse_attention``, which always keeps them,
the context queries attend to everything (``context_attention``), and the outputs are joined in the original order;
where context rows are keys only, q stays whole and nothing is joined. The video keys that a mask may hide are moved
behind the last cluster, where no run reaches; a mask known to show them all leaves them alone.
With ``estimate_by="queries"``, ``select_blocks`` gets masses from ``block_masses(q, q_order, k_centroids, q_sizes,
k_sizes)``, which asks every query.
With ``recall_rows``, ``measure_recall_`` looks at the queries in token order, the permuted keys and the selection, and
adds to a state tensor; with ``min_recall``, ``keep_dense_heads_`` then replaces the selection of the heads that kept
too little by all keys.
What a ``KernelConfig`` asks for comes last in ``block_sparse_attention``; left to the defaults, nothing is added.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from svg2_compile.kernels import ops as _registers_the_ops  # noqa: F401
from svg2_compile.kernels.launch import padded_power_of_two
from svg2_compile.kernels.tuning import attention_tiles
from svg2_compile.kernels.why_not import capability_of
from svg2_compile.passes.attach_state import StateNodes
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.kernel_config import TILES, KernelConfig
from svg2_compile.passes.nodes import emit, is_sdpa, sdpa_arguments, tensor_of
from svg2_compile.passes.read_mask import key_mask_of
from svg2_compile.passes.records import AttentionSite

aten = torch.ops.aten


def rewrite(
    gm: GraphModule,
    sites: Sequence[AttentionSite],
    config: SparseConfig,
    kernel_config: KernelConfig,
    state: StateNodes,
) -> None:
    """Rewrite ``gm`` in place. The caller runs it inside the fake mode of the graph's example values."""
    attentions = [node for node in gm.graph.nodes if is_sdpa(node)]
    by_name = {node.name: node for node in gm.graph.nodes}
    for site in sites:
        node = attentions[site.index]
        with gm.graph.inserting_before(node):
            replacement = _SiteRewriter(gm, site, config, kernel_config, state, node, by_name).sparse_attention()
        node.replace_all_uses_with(replacement)
        gm.graph.erase_node(node)
        by_name[site.node] = replacement
    gm.graph.lint()
    gm.recompile()


class _SiteRewriter:
    """Builds the subgraph of one site; node insertion happens at the caller's insertion point."""

    def __init__(
        self,
        gm: GraphModule,
        site: AttentionSite,
        config: SparseConfig,
        kernel_config: KernelConfig,
        state: StateNodes,
        node: Node,
        by_name: dict[str, Node],
    ) -> None:
        self.gm, self.site, self.node, self.by_name = gm, site, node, by_name
        self.config, self.kernel_config = config, kernel_config
        self.state = {name: tensor for (index, name), tensor in state.items() if index == site.index}
        self.call = sdpa_arguments(node)
        self.mask = key_mask_of(self.call.attn_mask) if site.has_mask else None

    def emit(self, target: Any, *args: Any) -> Any:
        return emit(self.gm.graph, target, *args, like=self.node)

    def sparse_attention(self) -> Node:
        query, key, value = (self.in_dtype(each) for each in (self.call.query, self.call.key, self.call.value))
        if len(self.site.segments) == 1:
            whole: Node = self.video_attention(query, key, value, self.mask)
            return whole
        rows = self.row_ranges()
        is_video = [segment.is_video for segment in self.site.segments]
        video = rows[is_video.index(True)]
        context = [each for each, here in zip(rows, is_video) if not here]
        video_mask = context_mask = None
        if self.mask is not None:
            self.mask = self.emit(aten.expand.default, self.mask, [self.site.batch, 1, 1, -1])
            context_mask = self.join([self.cut(self.mask, 3, *each) for each in context], 3)
            video_mask = self.cut(self.mask, 3, *video) if self.site.may_hide_video else None
        has_all_queries = self.site.has_context_queries
        output: Node = self.video_attention(
            self.cut(query, 2, *video) if has_all_queries else query,
            self.cut(key, 2, *video),
            self.cut(value, 2, *video),
            video_mask,
            self.join([self.cut(key, 2, *each) for each in context], 2),
            self.join([self.cut(value, 2, *each) for each in context], 2),
            context_mask,
        )
        if not has_all_queries:
            return output
        pieces = [
            output if here else self.context_attention(self.cut(query, 2, *each), key, value)
            for each, here in zip(rows, is_video)
        ]
        # joined along the token axis of (batch, tokens, heads, head dim), the layout that the caller flattens for free
        token_major = [self.emit(aten.transpose.int, piece, 1, 2) for piece in pieces]
        joined: Node = self.emit(aten.transpose.int, self.join(token_major, 1), 1, 2)
        return joined

    def in_dtype(self, x: Node) -> Any:
        """Autocast converts the operands of an attention; the ops here take them as they are."""
        tensor = tensor_of(x)
        if tensor is None or tensor.dtype is self.site.dtype:
            return x
        return self.emit(aten.to.dtype, x, self.site.dtype)

    @property
    def scale(self) -> float:
        return self.site.scale

    def video_attention(
        self, q: Any, k: Any, v: Any, mask: Any, context_k: Any = None, context_v: Any = None, context_mask: Any = None
    ) -> Any:
        q_order, q_sizes = self.cluster(q, "q", self.site.q_clusters)
        k_order, k_sizes = self.cluster(k, "k", self.site.k_clusters, mask)
        # of a guarded site, the state holds what is true after the guard; the selection adds to zeros
        statistics = self.state["statistics"]
        guarded = self.site.is_guarded
        selected = self.emit(aten.zeros_like.default, statistics) if guarded else statistics
        selection = self.emit(
            torch.ops.svg2.select_blocks.default,
            self.state["q_centroids"],
            self.state["k_centroids"],
            q_sizes,
            k_sizes,
            self.scale,
            float(self.config.top_p),
            float(self.config.min_keep_ratio),
            selected,
            *self.masses(q, q_order, q_sizes, k_sizes),
        )
        permute = torch.ops.svg2.permute_tokens.default
        q_clustered = self.emit(permute, q, q_order)
        k_clustered = self.emit(permute, k, k_order)
        v_clustered = self.emit(permute, v, k_order)
        runs, counts = (self.emit(operator.getitem, selection, index) for index in range(2))
        # not before the permutations: to ``fuse``, an op that writes stands in the way of what it may alias
        if self.site.measures_recall:
            self.measure_recall(q, k_clustered, q_order, q_sizes, k_sizes, runs, counts, context_k, context_mask)
        if guarded:
            guard = torch.ops.svg2.keep_dense_heads_.default
            dense = (self.state["dense_heads"], selected, statistics)
            selection = self.emit(guard, runs, counts, q_sizes, k_sizes, *dense)
            runs, counts = (self.emit(operator.getitem, selection, index) for index in range(2))
        attention = self.emit(
            torch.ops.svg2.block_sparse_attention.default,
            q_clustered,
            k_clustered,
            v_clustered,
            q_sizes,
            runs,
            counts,
            context_k,
            context_v,
            context_mask,
            None,
            self.scale,
            *self.kernel_arguments(),
        )
        return self.emit(torch.ops.svg2.unpermute_tokens.default, self.emit(operator.getitem, attention, 0), q_order)

    def masses(self, q: Any, q_order: Any, q_sizes: Any, k_sizes: Any) -> list[Any]:
        """Return the last argument of the selection, if it is not the default."""
        if self.config.estimate_by == "centroids":
            return []
        estimate = torch.ops.svg2.block_masses.default
        return [self.emit(estimate, q, q_order, self.state["k_centroids"], q_sizes, k_sizes, self.scale)]

    def measure_recall(self, *tokens_and_selection: Any) -> None:
        config = self.config
        self.emit(
            torch.ops.svg2.measure_recall_.default,
            *tokens_and_selection,
            *(self.state.get(name) for name in ("k_calls", "recall", "dense_heads")),
            self.scale,
            config.measured_rows,
            config.recall_interval,
            config.seed,
            float(config.min_recall),
        )

    def context_attention(self, q: Any, key: Any, value: Any) -> Any:
        return self.emit(torch.ops.svg2.context_attention.default, q, key, value, self.mask, self.scale)

    def kernel_arguments(self) -> list[Any]:
        """Return the last arguments of the attention, up to the last one that is not the default."""
        arguments = [self.kernel_config.attention, self.tiles(), self.kernel_config.autotune]
        defaults = ["auto", None, False]
        while arguments and arguments[-1] == defaults[len(arguments) - 1]:
            arguments.pop()
        return arguments

    def tiles(self) -> list[int] | None:
        """Return the tiles asked for, the tuned ones where only some numbers are, or None."""
        given = self.kernel_config.given_tiles
        if not given:
            return None
        tuned = attention_tiles(
            capability_of(self.site.device),
            padded_power_of_two(self.site.head_dim),
            self.site.dtype,
            self.kernel_config.attention,
        )
        return [given.get(name, getattr(tuned, name)) for name in TILES]

    def cluster(self, x: Any, side: str, clusters: int, mask: Node | None = None) -> tuple[Any, Any]:
        """Return the order and sizes of the clusters; rows that ``mask`` hides come last and belong to none."""
        labels = self.emit(
            torch.ops.svg2.kmeans_.default,
            x,
            self.state[f"{side}_centroids"],
            self.state[f"{side}_calls"],
            self.config.kmeans_iters_init,
            self.config.kmeans_iters_step,
            self.config.seed,
        )
        sorts = torch.ops.svg2.sort_labels.default
        if mask is None:
            order_and_sizes = self.emit(sorts, labels, clusters)
            return self.emit(operator.getitem, order_and_sizes, 0), self.emit(operator.getitem, order_and_sizes, 1)
        hidden = self.emit(aten.logical_not.default, self.emit(aten.squeeze.dim, mask, 2))  # [B or 1, 1, N]
        order_and_sizes = self.emit(sorts, self.emit(aten.masked_fill.Scalar, labels, hidden, clusters), clusters + 1)
        visible = self.cut(self.emit(operator.getitem, order_and_sizes, 1), 2, 0, clusters)
        return self.emit(operator.getitem, order_and_sizes, 0), self.emit(aten.contiguous.default, visible)

    def row_ranges(self) -> list[tuple[Any, Any]]:
        """Return (start, end) of each segment; symbolic lengths are read off the operand of the joining cat."""
        ranges, start = [], 0
        for segment in self.site.segments:
            length: Any = segment.length
            if not isinstance(length, int):
                length = self.emit(aten.sym_size.int, self.by_name[segment.source], segment.source_axis)
            both_known = isinstance(start, int) and isinstance(length, int)
            end = start + length if both_known else self.emit(operator.add, start, length)
            ranges.append((start, end))
            start = end
        return ranges

    def cut(self, x: Any, dim: int, start: Any, end: Any) -> Any:
        return self.emit(aten.slice.Tensor, x, dim, start, end)

    def join(self, parts: list[Any], dim: int) -> Any:
        return parts[0] if len(parts) == 1 else self.emit(aten.cat.default, parts, dim)
