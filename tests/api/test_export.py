"""Ahead-of-time packages: exported, made sparse, compiled, loaded and run in another process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.records import AttentionSite, Rejection
from svg2_compile.passes.sparsify import sparsify

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "export_package.py"
TOKENS = 301
CONFIG = SparseConfig(top_p=0.6, min_tokens=256, q_clusters=5, k_clusters=11, dense_layers=0)

LOADS = """
import sys, torch
import svg2_compile.kernels.ops
folder = sys.argv[1]
asked = torch.load(f"{folder}/inputs.pt", weights_only=True)
zeros = asked["state"]

def load():
    return torch._inductor.aoti_load_package(f"{folder}/model.pt2")

first, other = load(), load()
answers = {"names": [name for name in first.get_constant_fqns() if "svg2" in name]}
answers["calls in a row"] = [first(x).clone() for x in asked["steps"]]
answers["another load"] = other(asked["steps"][0]).clone()
first.load_constants({name: x for name, x in zeros.items() if name.endswith("_calls")}, check_full_update=False)
answers["counters zeroed"] = [first(x).clone() for x in asked["steps"]]
streams = [{name: x.clone() for name, x in zeros.items()} for _ in range(2)]
answers["streams in turns"] = [[], []]
for x in asked["steps"]:
    for state, outputs in zip(streams, answers["streams in turns"]):
        other.load_constants(state, check_full_update=False, user_managed=True)
        outputs.append(other(x).clone())
answers["states"] = streams
torch.save(answers, f"{folder}/answers.pt")
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def exported(batch: int = 1, **options) -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    with torch.no_grad():
        return torch.export.export(Block().eval(), (torch.randn(batch, TOKENS, 24),), **options)


def run(*command: str) -> str:
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A folder with a package and what to ask it."""
    folder = tmp_path_factory.mktemp("package")
    torch.manual_seed(1)
    x = torch.randn(1, TOKENS, 24)
    steps = [x + 0.1 * torch.randn_like(x) for _ in range(3)]
    plan = sparsify(exported().module(), CONFIG, state="buffers")
    state = {name: buffer.clone() for name, buffer in plan.gm.named_buffers() if name.startswith("svg2_")}
    with torch.no_grad():
        program = torch.export.export(plan.gm, (x,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    torch.save({"steps": steps, "state": state}, folder / "inputs.pt")
    return folder


@pytest.fixture(scope="module")
def expected(package) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and state of the sparse graph run step by step in this process."""
    plan = sparsify(exported().module(), CONFIG, state="buffers")
    with torch.no_grad():
        outputs = [plan.gm(x) for x in torch.load(package / "inputs.pt", weights_only=True)["steps"]]
    return outputs, {name: buffer for name, buffer in plan.gm.named_buffers() if name.startswith("svg2_")}


@pytest.fixture(scope="module")
def answers(package) -> dict:
    """What another process, which has no model code, got out of the package."""
    run("-c", LOADS, str(package))
    return torch.load(package / "answers.pt", weights_only=True)


def assert_same(outputs, wanted):
    """Equal to the rounding of Inductor's own linear layers."""
    for output, want in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-5)


def test_a_package_gives_in_another_process_what_the_graph_gives_here(answers, expected):
    assert_same(answers["calls in a row"], expected[0])


def test_a_later_call_depends_on_the_calls_before(package, answers):
    plan = sparsify(exported().module(), CONFIG, state="buffers")
    with torch.no_grad():
        fresh = plan.gm(torch.load(package / "inputs.pt", weights_only=True)["steps"][2])
    assert (answers["calls in a row"][2] - fresh).abs().max() > 1e-3


def test_the_state_of_a_package_goes_by_the_names_of_the_buffers(package, answers):
    assert set(answers["names"]) == set(torch.load(package / "inputs.pt", weights_only=True)["state"])


def test_zeroed_counters_begin_a_new_generation(answers):
    assert all(map(torch.equal, answers["calls in a row"], answers["counters zeroed"]))


def test_two_loads_of_a_package_have_states_of_their_own(answers):
    assert torch.equal(answers["another load"], answers["calls in a row"][0])


def test_streams_take_turns_in_one_package_with_tensors_of_the_caller(answers, expected):
    for outputs, state in zip(answers["streams in turns"], answers["states"], strict=True):
        assert all(map(torch.equal, outputs, answers["calls in a row"]))
        assert state["svg2_0_q_calls"].item() == state["svg2_0_k_calls"].item() == 3
        torch.testing.assert_close(state["svg2_0_q_centroids"], expected[1]["svg2_0_q_centroids"])


@pytest.mark.slow
def test_the_example_generates_in_a_process_of_its_own(tmp_path):
    written = run("-P", str(EXAMPLE), "write", str(tmp_path))
    assert "blocks.1.attn1: sparse" in written and "blocks.0.attn1: among the first dense_layers=1 layers" in written
    assert "clustered [6, 6, 6, 6] times" in run("-P", str(EXAMPLE), "generate", str(tmp_path))
    first = load_file(tmp_path / "result.safetensors")["latent"]
    run("-P", str(EXAMPLE), "generate", str(tmp_path))
    assert torch.equal(first, load_file(tmp_path / "result.safetensors")["latent"]) and first.isfinite().all()


def test_state_of_calls_before_the_export_is_part_of_the_program():
    plan = sparsify(exported().module(), CONFIG, state="buffers")
    x = torch.randn(1, TOKENS, 24)
    with torch.no_grad():
        plan.gm(x)
        state = torch.export.export(plan.gm, (x,)).state_dict
    assert state["svg2_0_q_calls"].item() == 1 and state["svg2_0_q_centroids"].any()


def test_without_the_ops_a_package_is_refused_by_name(package):
    load = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", load, str(package / "model.pt2")], capture_output=True, text=True)
    assert done.returncode != 0 and "Could not find schema for svg2::" in done.stderr


def test_a_dynamic_length_stays_dynamic():
    tokens = {"x": {1: torch.export.Dim("tokens", min=256, max=4096)}}
    gm = exported(dynamic_shapes=tokens).module()
    outputs = []
    for again in (False, True):
        plan = sparsify(gm, CONFIG, state="buffers")
        with torch.no_grad():
            module = torch.export.export(plan.gm, (torch.randn(1, TOKENS, 24),), dynamic_shapes=tokens).module()
            random = torch.Generator().manual_seed(2)
            inputs = [torch.randn(1, length, 24, generator=random) for length in (TOKENS, 517, 260)]
            outputs.append([(module if again else plan.gm)(x) for x in inputs])
    assert_same(*outputs)


def test_a_dynamic_batch_stays_dense_with_its_reason():
    gm = exported(batch=2, dynamic_shapes={"x": {0: torch.export.Dim("batch", max=8)}}).module()
    (decision,) = sparsify(gm, CONFIG, state="buffers").decisions
    assert isinstance(decision, Rejection) and not decision.by_design
    assert decision.reason == "its batch size is dynamic, and state has a row per batch element"
    assert decision.hint == "export a fixed batch size"


def decisions_after(decompositions: dict | None, min_tokens: int = 256) -> tuple:
    config = SparseConfig(min_tokens=min_tokens, dense_layers=0)
    return sparsify(exported().run_decompositions(decompositions).module(), config, state="buffers").decisions


def test_a_decomposed_program_says_that_it_came_too_late():
    (decision,) = decisions_after(None)
    assert isinstance(decision, Rejection) and not decision.by_design
    assert decision.reason == "decomposed already, into aten::_softmax"
    assert "before run_decompositions()" in decision.hint


def test_what_is_left_of_a_short_attention_is_no_concern():
    assert decisions_after(None, min_tokens=TOKENS + 1) == ()


def test_a_program_decomposed_into_kernels_of_torch_says_so():
    def attend(q, k, v):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    gm = torch.fx.experimental.proxy_tensor.make_fx(attend)(*torch.randn(3, 1, 2, TOKENS, 8))
    (decision,) = sparsify(gm, CONFIG).decisions
    assert decision.reason == "runs aten::_scaled_dot_product_flash_attention_for_cpu, not SDPA"
    assert "before run_decompositions()" in decision.hint


def test_a_program_whose_attention_was_kept_is_sparse_all_the_same():
    (decision,) = decisions_after({})
    assert isinstance(decision, AttentionSite)


@pytest.mark.parametrize(
    ("given", "advice"),
    [(exported, r"got ExportedProgram; give its module\(\)"), (Block, r"got Block; give torch\.export\.export")],
    ids=["program", "model"],
)
def test_something_else_than_a_graph_is_refused_with_what_to_give(given, advice):
    with pytest.raises(TypeError, match=advice):
        sparsify(given(), CONFIG)
