"""A second process compiles nothing again: AOTAutograd's and Inductor's caches hit, for both variants.

Unless our ops have changed meanwhile: then nothing that was compiled before is taken.
"""

import json
import os
import subprocess
import sys

PROGRAM = """
import json, torch
from torch._dynamo.utils import counters
import svg2_compile

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x, timestep):
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x + timestep).chunk(3, -1))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

torch.manual_seed(0)
options = {"min_tokens": 64, "dense_steps": 1, "dense_layers": 0, "top_p": 0.5}
model = torch.compile(Block().eval(), backend="svg2", options=options)
x = torch.randn(1, 256, 32)
with torch.no_grad():
    for timestep in (3.0, 2.0, 1.0):
        out = model(x, torch.tensor([timestep]))
site = svg2_compile.report(model).sparse_sites[0]
print(json.dumps({
    "aot": dict(counters["aot_autograd"]), "fx": dict(counters["inductor"]), "sum": out.double().sum().item(),
    "calls": [site.dense_calls, site.sparse_calls],
}))
"""


OTHER_OPS = """
import shutil, sys
from pathlib import Path
from svg2_compile import cache_identity, kernels

changed = Path(sys.argv[1])
shutil.copytree(kernels.__path__[0], changed, ignore=shutil.ignore_patterns("__pycache__"))
with (changed / "permute.py").open("a") as file:
    file.write("#")
kernels.__path__[:] = [str(changed)]
"""
"""Before anything is imported from there: the same ops, one byte longer."""


def run_in_a_process(cache: str, before: str = "", *arguments: str) -> dict:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    command = [sys.executable, "-P", "-c", before + PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_both_variants_come_from_the_caches_in_a_second_process(tmp_path):
    first, second = (run_in_a_process(str(tmp_path)) for _ in range(2))
    assert first["calls"] == second["calls"] == [1, 2]
    assert first["sum"] == second["sum"]
    assert first["aot"].get("autograd_cache_miss") == 2 and "autograd_cache_hit" not in first["aot"]
    assert second["aot"].get("autograd_cache_hit") == 2 and "autograd_cache_miss" not in second["aot"]
    assert second["fx"].get("fxgraph_cache_miss", 0) == 0


def test_nothing_comes_from_the_caches_when_a_file_of_an_op_has_changed(tmp_path):
    first = run_in_a_process(str(tmp_path / "cache"))
    second = run_in_a_process(str(tmp_path / "cache"), OTHER_OPS, str(tmp_path / "kernels"))
    assert first["calls"] == second["calls"] == [1, 2]
    assert first["sum"] == second["sum"]
    assert second["aot"].get("autograd_cache_miss") == 2 and "autograd_cache_hit" not in second["aot"]
    assert second["fx"].get("fxgraph_cache_miss") == 2 and "fxgraph_cache_hit" not in second["fx"]
