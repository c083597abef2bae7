"""Models sharded by FSDP2: parameters that are others while a layer runs than between."""

import pytest
import torch
import torch.distributed
from loop_cases import CHANNELS, LEVELS, OPTIONS, TOKENS, Dit

import svg2_compile
from svg2_compile.clock import current_clock


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["blocks", "whole"])
@pytest.mark.usefixtures("no_grad_and_a_fresh_start")
def test_a_sharded_model_has_its_schedule_and_its_report(mesh, way):
    from torch.distributed.fsdp import fully_shard

    model = Dit().eval()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for each in (model,) if way == "whole" else model.blocks:
        each.compile(backend="svg2", options=OPTIONS | {"dense_layers": 1})
    steps = []
    for _ in range(2):
        text = torch.randn(1, 1, CHANNELS)
        for level in LEVELS:
            model(torch.randn(1, TOKENS, CHANNELS), torch.tensor([level]), text)
            steps.append(current_clock().now.step)
    assert steps == [0, 1, 2, 0, 1, 2]
    calls = [
        (site.path.split(".scaled")[0], site.sparse_calls, site.dense_calls)
        for site in svg2_compile.report(model).sites
    ]
    assert calls == [("blocks.0", 0, 6), ("blocks.1", 6, 0)]
