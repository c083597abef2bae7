"""Cluster queries and keys by k-means, and bring keys and values into the order of their clusters (section 4.1).

    q_order, q_sizes, k_sizes, k', v' = cluster_tokens_(q, k, v, q_centroids, k_centroids, q_calls, k_calls, ...)

Where a mask hides video keys, or keys are clustered as the queries see them, each side is clustered by itself; hidden
keys are sorted behind the last cluster, as if there were one more:

    q_labels = kmeans_(q, q_centroids, q_calls, ...);    q_order, q_sizes = sort_labels(q_labels, C_q)
    k_labels = kmeans_(k, k_centroids, k_calls, ..., gram(q_centroids, G) or None)
    k_order, k_sizes = sort_labels(k_labels or C_k, C_k + 1)
    k', v' = permute_tokens(k, k_order), permute_tokens(v, k_order)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from svg2_compile.passes.records import StateSpec
from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.stage import Stage, Work

if TYPE_CHECKING:
    from svg2_compile.passes.plan import SitePlan

aten = torch.ops.aten
PRODUCT_RATE_RATIO = 0.7


@dataclass(frozen=True, slots=True)
class Cluster(Stage):
    """Centroids are the state; a counter of calls, which starts at 0 in each generation, says whether they are used."""

    metric: str = field(default="tokens", kw_only=True)
    """In what keys are alike, as ``SparseConfig.cluster_metric``."""

    def state(self, site: SitePlan) -> tuple[StateSpec, ...]:
        """Return centroids and counters of both sides."""
        sides = ("q", site.q_heads, site.q_clusters), ("k", site.k_heads, site.k_clusters)
        specs: list[StateSpec] = []
        for side, heads, clusters in sides:
            shape = (site.batch, heads, clusters, site.head_dim)
            specs.append(StateSpec(site.index, f"{side}_centroids", shape, torch.float32))
            counter = StateSpec(site.index, f"{side}_calls", (1,), torch.int32, "generation", counts_clusterings=True)
            specs.append(counter)
        return tuple(specs)

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the clustering."""
        if self.metric == "tokens" and flow.key_mask is None:
            return _together(writer, flow)
        return self._apart(writer, flow)

    def work(self, site: SitePlan) -> Work:
        """Count products with the centroids and passes over the tokens; the two do not overlap."""
        tokens = site.batch * site.token_hint * site.head_dim
        q_size, k_size = site.q_heads * tokens, site.k_heads * tokens
        iterations = site.kmeans_iters_step
        products = 2.0 * iterations * (q_size * site.q_clusters + k_size * site.k_clusters)
        if self.metric == "queries":
            in_metric = site.q_heads * site.q_clusters + iterations * site.k_heads * site.k_clusters
            products += 2.0 * site.batch * in_metric * site.head_dim**2
        # an iteration reads the tokens for labels and for sums; at the end keys and values are written, values read
        return Work(products, PRODUCT_RATE_RATIO, 2 * iterations * (q_size + k_size) + 3 * k_size)

    def _apart(self, writer: SiteWriter, flow: Flow) -> Flow:
        sort, permute = torch.ops.svg2.sort_labels.default, torch.ops.svg2.permute_tokens.default
        q_order, q_sizes = writer.parts(sort, _labels(writer, flow.q, "q"), writer.site.q_clusters, count=2)
        metric: list[Node] = []
        if self.metric == "queries":
            gram = torch.ops.svg2.gram.default
            metric.append(writer.emit(gram, writer.state["q_centroids"], writer.site.k_heads))
        k_order, k_sizes = _sorted_keys(writer, _labels(writer, flow.k, "k", *metric), flow.key_mask)
        return replace(
            flow,
            q_order=q_order,
            q_sizes=q_sizes,
            k_sizes=k_sizes,
            k_clustered=writer.emit(permute, flow.k, k_order),
            v_clustered=writer.emit(permute, flow.v, k_order),
        )


def _together(writer: SiteWriter, flow: Flow) -> Flow:
    state = [writer.state[name] for name in ("q_centroids", "k_centroids", "q_calls", "k_calls")]
    site = writer.site
    numbers = site.kmeans_iters_init, site.kmeans_iters_step, site.seed
    q_order, q_sizes, k_sizes, k, v = writer.parts(
        torch.ops.svg2.cluster_tokens_.default, flow.q, flow.k, flow.v, *state, *numbers, count=5
    )
    return replace(flow, q_order=q_order, q_sizes=q_sizes, k_sizes=k_sizes, k_clustered=k, v_clustered=v)


def _sorted_keys(writer: SiteWriter, labels: Node, key_mask: Node | None) -> list[Node]:
    """Return the order of the keys, and the sizes of their clusters."""
    sort, clusters = torch.ops.svg2.sort_labels.default, writer.site.k_clusters
    if key_mask is None:
        return writer.parts(sort, labels, clusters, count=2)
    hidden = writer.emit(aten.logical_not.default, writer.emit(aten.squeeze.dim, key_mask, 2))  # [B or 1, 1, N_k]
    labels = writer.emit(aten.masked_fill.Scalar, labels, hidden, clusters)
    k_order, k_sizes = writer.parts(sort, labels, clusters + 1, count=2)
    return [k_order, writer.emit(aten.contiguous.default, writer.cut(k_sizes, 2, 0, clusters))]


def _labels(writer: SiteWriter, x: Node, side: str, *metric: Node) -> Node:
    site, state = writer.site, writer.state
    numbers = site.kmeans_iters_init, site.kmeans_iters_step, site.seed
    kmeans = torch.ops.svg2.kmeans_.default
    return writer.emit(kmeans, x, state[f"{side}_centroids"], state[f"{side}_calls"], *numbers, *metric)
