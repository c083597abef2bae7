"""Stages that cluster and select, take their time for it, and then pretend to have found what a benchmark gives them.

The weights of the benchmarked models are random: what their attention selects says nothing, what it costs does. Its ops
can be registered once in a process, therefore this is a module of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

sys.path.append(str(Path(__file__).resolve().parents[1]))

from random_blocks import lognormal_sizes, random_blocks, shuffled_labels

import svg2_compile
from svg2_compile.kernels.work_list import kept_runs_reference
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.plan import stages_of
from svg2_compile.passes.records import AttentionSite
from svg2_compile.passes.stages.cluster import Cluster
from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.keep_top_p import KeepTopP
from svg2_compile.passes.stages.stage import Stage

torch.library.define("svg2_benchmarks::forced_clusters", "(Tensor order, Tensor q_sizes, Tensor k_sizes) -> Tensor[]")
torch.library.define("svg2_benchmarks::forced_selection", "(Tensor runs, Tensor counts) -> Tensor[]")


@torch.library.register_fake("svg2_benchmarks::forced_clusters")
@torch.library.register_fake("svg2_benchmarks::forced_selection")
def _alike(*found: Tensor) -> list[Tensor]:
    return [torch.empty_like(each) for each in found]


@torch.library.impl("svg2_benchmarks::forced_clusters", ("cpu", "cuda"))
def _forced_clusters(*found: Tensor) -> list[Tensor]:
    return [each.clone() for each in Forced.entered.clusters]


@torch.library.impl("svg2_benchmarks::forced_selection", ("cpu", "cuda"))
def _forced_selection(*found: Tensor) -> list[Tensor]:
    return [each.clone() for each in Forced.entered.selection]


@dataclass(frozen=True, slots=True)
class ForcedCluster(Cluster):
    """Clusters, and then pretends to have found the clusters of ``Forced``."""

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        flow = Cluster.emit(self, writer, flow)
        found = flow.q_order, flow.q_sizes, flow.k_sizes
        forced = torch.ops.svg2_benchmarks.forced_clusters.default
        q_order, q_sizes, k_sizes = writer.parts(forced, *found, count=3)
        return replace(flow, q_order=q_order, q_sizes=q_sizes, k_sizes=k_sizes)


@dataclass(frozen=True, slots=True)
class ForcedSelection(KeepTopP):
    """Selects, and then pretends to have selected what ``Forced`` has."""

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        flow = KeepTopP.emit(self, writer, flow)
        forced = torch.ops.svg2_benchmarks.forced_selection.default
        runs, counts = writer.parts(forced, flow.runs, flow.counts, count=2)
        return replace(flow, runs=runs, counts=counts)


def forced_stages(config: SparseConfig, site: AttentionSite) -> tuple[Stage, ...]:
    """Return the usual stages, whose clusters and selection are replaced after they have been found."""
    forced = {Cluster: ForcedCluster(), KeepTopP: ForcedSelection()}
    return tuple(forced.get(type(stage), stage) for stage in stages_of(config, site))


class Forced:
    """While entered, what ``forced_stages`` pretend to have found.

    It stays at its place in memory, so that CUDA graphs see another density without being recorded again. Copying it
    takes some microseconds a layer, which count as sparse.
    """

    entered: ClassVar[Forced]

    def __init__(self, heads: int, tokens: int, q_clusters: int, k_clusters: int, device: str = "cuda") -> None:
        self._device = device
        generator = self._generator()
        q_sizes, self.k_sizes = (
            lognormal_sizes(generator, 1, heads, count, tokens) for count in (q_clusters, k_clusters)
        )
        q_order, _ = torch.ops.svg2.sort_labels(shuffled_labels(generator, q_sizes), q_clusters)
        self.clusters = (q_order, q_sizes, self.k_sizes)
        everything = torch.ones((1, heads, q_clusters, k_clusters), dtype=torch.bool, device=device)
        self.selection = tuple(x.contiguous() for x in self._kept(everything))

    def _generator(self) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(0)

    def _kept(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        kept = kept_runs_reference(keep, self.k_sizes)
        return kept.runs, kept.counts

    def keep(self, density: float) -> None:
        """Keep random key clusters that hold about this share of the keys."""
        keep = random_blocks(self._generator(), density, self.k_sizes, self.clusters[1].shape[2])
        for mine, kept in zip(self.selection, self._kept(keep)):
            mine.copy_(kept)

    def __enter__(self) -> Forced:
        Forced.entered = self
        return self

    def __exit__(self, *error: object) -> None:
        del Forced.entered


def forced_backend(gm: GraphModule, inputs: list[Any], **given: Any) -> Callable[..., Any]:
    """Compile as usual, with ``forced_stages``."""
    return svg2_compile.svg2_backend(gm, inputs, stages=forced_stages, **given)
