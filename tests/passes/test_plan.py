"""A plan says everything about one site, and another one of the same graph may differ."""

import dataclasses

import pytest
import torch

from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.kernel_config import KernelConfig
from svg2_compile.passes.plan import plan_site, stages_of
from svg2_compile.passes.records import AttentionSite, StateSpec

SITE = AttentionSite(
    index=3,
    node="attention",
    path="blocks.3.attn1",
    batch=2,
    q_heads=4,
    k_heads=2,
    head_dim=16,
    tokens=100,
    token_hint=100,
    dtype=torch.float32,
    device=torch.device("cpu"),
    segments=(),
    scale=0.25,
    q_clusters=3,
    k_clusters=5,
    has_mask=False,
)


def plan(**options):
    return plan_site(SITE, SparseConfig(**options), KernelConfig())


def test_a_plan_is_its_site_and_what_the_config_says():
    found = plan(
        top_p=1, min_keep_ratio=0, kmeans_iters_init=7, kmeans_iters_step=3, seed=9, recall_rows=5, repair_rows=7
    )
    for field in dataclasses.fields(SITE):
        assert getattr(found, field.name) == getattr(SITE, field.name)
    assert (found.top_p, found.min_keep_ratio) == (1.0, 0.0)
    assert isinstance(found.top_p, float) and isinstance(found.min_keep_ratio, float)
    assert (found.kmeans_iters_init, found.kmeans_iters_step, found.seed, found.recall_rows) == (7, 3, 9, 5)
    assert found.repair_rows == 7


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "Cluster KeepTopP Attend"),
        ({"estimate_by": "queries"}, "Cluster EstimateByQueries KeepTopP Attend"),
        ({"estimate_by": "keys"}, "Cluster EstimateByKeys KeepTopP Attend"),
        ({"recall_rows": 4}, "Cluster KeepTopP MeasureRecall Attend"),
        ({"head_floor": "online"}, "Cluster FloorHeads KeepTopP Attend"),
        (
            {"head_floor": "online", "estimate_by": "queries", "min_recall": 0.8},
            "Cluster EstimateByQueries FloorHeads KeepTopP MeasureRecall GuardHeads Attend",
        ),
        ({"repair_rows": 64}, "Cluster KeepTopP ProbeRows Attend RepairRows"),
        (
            {"repair_rows": 64, "min_recall": 0.8, "compensate": "centroids"},
            "Cluster AverageClusters KeepTopP ProbeRows MeasureRecall GuardHeads Compensate Attend RepairRows",
        ),
        ({"compensate": "centroids"}, "Cluster AverageClusters KeepTopP Compensate Attend"),
        (
            {"compensate": "centroids", "min_recall": 0.8},
            "Cluster AverageClusters KeepTopP MeasureRecall GuardHeads Compensate Attend",
        ),
        (
            {"compensate": "centroids", "route": "error", "estimate_by": "queries"},
            "Cluster EstimateByQueries AverageClusters EstimateErrors KeepTopP Compensate Attend",
        ),
        ({"min_recall": 0.8}, "Cluster KeepTopP MeasureRecall GuardHeads Attend"),
        (
            {"min_recall": 0.8, "recall_rows": 4, "estimate_by": "queries"},
            "Cluster EstimateByQueries KeepTopP MeasureRecall GuardHeads Attend",
        ),
    ],
    ids=str,
)
def test_the_list_of_stages(options, expected):
    assert " ".join(type(stage).__name__ for stage in plan(**options).stages) == expected


def test_the_state_of_a_site_is_that_of_its_stages_in_their_order():
    found = [(spec.site, spec.name, spec.shape, spec.dtype, spec.lifetime) for spec in plan(min_recall=0.8).state_specs]
    assert found == [
        (3, "q_centroids", (2, 4, 3, 16), torch.float32, "forever"),
        (3, "q_calls", (1,), torch.int32, "generation"),
        (3, "k_centroids", (2, 2, 5, 16), torch.float32, "forever"),
        (3, "k_calls", (1,), torch.int32, "generation"),
        (3, "statistics", (2, 4, 3, len(STATISTICS)), torch.float32, "forever"),
        (3, "recall", (2, 4, 2), torch.float32, "forever"),
        (3, "dense_heads", (2, 4, 2), torch.float32, "generation"),
    ]
    counters = [spec.name for spec in plan().state_specs if spec.counts_clusterings]
    assert counters == ["q_calls", "k_calls"]


def test_without_stages_of_its_own_a_plan_takes_the_list():
    config = SparseConfig(recall_rows=4)
    assert plan_site(SITE, config, KernelConfig()).stages == stages_of(config, SITE)
    assert plan_site(SITE, config, KernelConfig(), lambda *_: ()).stages == ()


def test_state_starts_as_it_should_and_does_so_again():
    spec = StateSpec(0, "budgets", (2, 3), torch.float32, "generation", (0.5, 0.0, 2.0))
    tensor = spec.create("cpu")
    assert torch.equal(tensor, torch.tensor([[0.5, 0.0, 2.0]] * 2)) and tensor.is_contiguous()
    tensor.zero_()
    spec.restart(tensor)
    assert torch.equal(tensor, spec.create("cpu"))
    number = dataclasses.replace(spec, initial=0.25)
    assert torch.equal(number.create("cpu"), torch.full((2, 3), 0.25))
    zeros = dataclasses.replace(spec, initial=0.0)
    zeros.restart(tensor)
    assert torch.equal(tensor, zeros.create("cpu")) and not tensor.any()
