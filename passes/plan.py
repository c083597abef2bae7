"""Decide everything about an attention that will be sparse: its numbers, and its stages in their order.

    AttentionSite, SparseConfig, KernelConfig   →   SitePlan(top_p=0.9, ..., stages=(Cluster(), KeepTopP(), Attend()))

A plan belongs to one site, so two sites of a graph may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from svg2_compile.passes.budgets import HeadRow, rows_of
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.kernel_config import KernelConfig
from svg2_compile.passes.records import AttentionSite, StateSpec
from svg2_compile.passes.stages.attend import Attend
from svg2_compile.passes.stages.average_clusters import AverageClusters
from svg2_compile.passes.stages.cluster import Cluster
from svg2_compile.passes.stages.compensate import Compensate
from svg2_compile.passes.stages.estimate_by_keys import EstimateByKeys
from svg2_compile.passes.stages.estimate_by_queries import EstimateByQueries
from svg2_compile.passes.stages.estimate_errors import EstimateErrors
from svg2_compile.passes.stages.floor_heads import FloorHeads
from svg2_compile.passes.stages.guard_heads import GuardHeads
from svg2_compile.passes.stages.keep_top_p import KeepTopP
from svg2_compile.passes.stages.measure_recall import MeasureRecall
from svg2_compile.passes.stages.probe_rows import ProbeRows
from svg2_compile.passes.stages.redo_densely import RedoDensely
from svg2_compile.passes.stages.repair_rows import RepairRows
from svg2_compile.passes.stages.stage import Stage

StagesOf = Callable[[SparseConfig, AttentionSite], tuple[Stage, ...]]
"""Chooses the stages of a site: ``stages_of``, or a list of an experiment's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePlan(AttentionSite):
    """An attention, and all that was decided about it; the numbers mean what ``SparseConfig`` says of them."""

    top_p: float
    min_keep_ratio: float
    budgets: tuple[HeadRow, ...] | None
    """Of every query head, as far as the path of the attention inside the compiled root tells; None without a file."""
    kmeans_iters_init: int
    kmeans_iters_step: int
    seed: int
    recall_rows: int
    recall_interval: int
    min_recall: float
    repair_rows: int
    kernel: KernelConfig
    stages: tuple[Stage, ...]
    state_specs: tuple[StateSpec, ...] = ()
    """The tensors that the stages carry from one denoising step to the next, in the order of the graph's inputs."""


def stages_of(config: SparseConfig, site: AttentionSite) -> tuple[Stage, ...]:
    """Return the stages of a site: the one place that says what a sparse attention does."""
    stages: list[Stage] = [Cluster(metric=config.cluster_metric)]
    if config.estimate_by == "queries":
        stages.append(EstimateByQueries())
    if config.estimate_by == "keys":
        stages.append(EstimateByKeys())
    if config.compensate != "none":
        stages.append(AverageClusters())
    if config.route == "error":
        stages.append(EstimateErrors())
    if config.head_floor == "online":
        stages.append(FloorHeads())
    is_guarded = config.min_recall > 0
    stages.append(KeepTopP(is_final=not is_guarded, by_head=config.budgets is not None))
    if config.repair_rows:
        stages.append(ProbeRows(measures=config.measured_rows > 0))
    if config.measured_rows:
        stages.append(MeasureRecall(is_final=not is_guarded))
    if is_guarded:
        stages.append(GuardHeads())
    if config.compensate != "none":
        stages.append(Compensate(asks_keys=config.compensate == "keys"))
    stages.append(Attend())
    if config.repair_rows:
        stages.append(RepairRows())
    if site.is_mask_checked:
        stages.append(RedoDensely(refuses=config.on_unsupported == "error"))
    return tuple(stages)


def plan_site(
    site: AttentionSite, config: SparseConfig, kernel_config: KernelConfig, stages: StagesOf = stages_of
) -> SitePlan:
    """Decide about one site.

    Raises:
        ConfigError: its budgets are those of another number of heads.
    """
    top_p, floor, budgets = float(config.top_p), float(config.min_keep_ratio), config.head_budgets
    plan = SitePlan(
        **{field.name: getattr(site, field.name) for field in fields(AttentionSite)},
        top_p=top_p,
        min_keep_ratio=floor,
        budgets=None
        if budgets is None
        else rows_of(budgets.of(site.path), site.q_heads, site.k_clusters, top_p, floor),
        kmeans_iters_init=config.kmeans_iters_init,
        kmeans_iters_step=config.kmeans_iters_step,
        seed=config.seed,
        recall_rows=config.measured_rows,
        recall_interval=config.recall_interval,
        min_recall=float(config.min_recall),
        repair_rows=config.repair_rows,
        kernel=kernel_config,
        stages=stages(config, site),
    )
    return replace(plan, state_specs=tuple(spec for stage in plan.stages for spec in stage.state(plan)))
