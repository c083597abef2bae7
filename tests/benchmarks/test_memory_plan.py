"""The device memory of a sparse layer at full size, counted from the launchers' own allocations."""

import importlib
import os
from pathlib import Path

import pytest
import torch

from svg2_compile.kernels.work_list import max_tiles

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="launches are replaced, not run")

MEGABYTE = 10**6
WAN, HUNYUAN = (40, 75_600, 128), (24, 118_800, 128)


@pytest.fixture
def plan(monkeypatch):
    for folder in ("", "kernels"):
        monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks" / folder))
    return importlib.import_module("memory_plan")


@pytest.mark.parametrize("clusters", [(100, 500), (300, 1000)])
@pytest.mark.parametrize("layer", [WAN, HUNYUAN])
def test_a_layer_needs_at_most_100_mb_beside_its_output_and_the_copies(plan, layer, clusters):
    memory = plan.measure(*layer, *clusters)
    heads, tokens, dim = layer
    assert memory.copies == 2 * heads * tokens * dim * 2
    assert memory.peak - memory.copies <= 100 * MEGABYTE


def test_the_workspace_of_attention_is_its_list_of_query_tiles(plan):
    heads, tokens, _ = WAN
    assert plan.measure(*WAN, 100, 500).workspace["attention"] == 12 * heads * max_tiles(tokens, 100, 128)


def test_the_ledger_counts_what_is_held_and_forgets_what_is_released(plan):
    outside = torch.empty(100, device="meta")
    with plan.Ledger() as ledger:
        first = torch.empty(10, device="meta")
        view = first.view(2, 5)
        outside.view(10, 10)
        assert ledger.held == 40
        del first
        assert ledger.held == 40
        del view
        assert ledger.held == 0
        torch.empty(5, device="meta")
    assert ledger.peak == 40
