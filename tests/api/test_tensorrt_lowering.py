"""``lowering="tensorrt"`` from torch.compile to the report, with PyTorch in the place of the engines."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from conformance.examine import output_of
from segments import CASE, OPTIONS, run_as_it_is, without_tensorrt
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import svg2_compile
from svg2_compile import svg2_backend
from svg2_compile.passes.split_segments import why_kept
from svg2_compile.tensorrt.engines import NoEngineError

WAN = "WanTransformer3DModel"
HAS_TENSORRT = importlib.util.find_spec("torch_tensorrt") is not None


@pytest.fixture(autouse=True)
def a_fresh_start_without_tensorrt(monkeypatch):
    torch._dynamo.reset()
    svg2_compile.reset()
    without_tensorrt(monkeypatch)
    with torch.no_grad():
        yield


def compiled(**options):
    return torch.compile(CASE[WAN].make(), backend=svg2_backend, options=OPTIONS | options, fullgraph=True)


def denoise(model, timesteps=(900, 800, 700)):
    """Return the output of a dense step and of two sparse ones."""
    outputs = []
    for timestep in timesteps:
        inputs = CASE[WAN].inputs()
        inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
        outputs.append(output_of(model, inputs))
    return outputs


def assert_close_to_rounding(got, wanted):
    """Two fp32 evaluations of a few layers, of which only the fusion differs."""
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).abs().max() <= 32 * torch.finfo(torch.float32).eps * other.abs().max()


def states():
    """Return the centroids and counters of everything that runs."""
    owners = svg2_compile.state.store.owners()
    regions = list(svg2_compile.region.Region.instances)
    found = [
        state.tensors
        for owner in owners
        for region in regions
        for site in region.plan.sites
        for each in svg2_compile.state.store.states_of(owner, site).values()
        for state in each
    ]
    return [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in found]


def test_outputs_and_state_are_those_of_the_uncut_graph():
    model = compiled()
    outputs = denoise(model)
    mine = states()
    assert mine and all(state["q_calls"].item() == 2 for state in mine)
    report = svg2_compile.report(model)
    assert {segment.graph for segment in report.segments} == {"dense", "sparse"}
    assert {(segment.compiler, segment.engine, segment.why_not) for segment in report.segments} == {
        ("tensorrt", "built", "")
    }
    count = len(report.segments)
    assert f"{count} of {count} dense segments are TensorRT engines" in str(report)
    svg2_compile.reset()
    torch._dynamo.reset()
    assert_close_to_rounding(outputs, denoise(compiled(lowering="eager")))


def test_centroids_change_from_call_to_call():
    model = compiled()
    denoise(model, timesteps=(900, 800))
    before = states()
    denoise(model, timesteps=(700,))
    after = states()
    for one, other in zip(before, after, strict=True):
        assert other["q_calls"].item() == one["q_calls"].item() + 1
        assert not torch.equal(one["q_centroids"], other["q_centroids"])


def test_layers_that_share_a_graph_have_engines_with_their_own_weights():
    model = CASE[WAN].make()
    model.compile_repeated_blocks(backend=svg2_backend, options=OPTIONS, fullgraph=True)
    outputs = denoise(model)
    report = svg2_compile.report(model)
    names = [segment.name for segment in report.segments if segment.graph == "sparse"]
    assert len(names) == 2 * len(set(names))
    svg2_compile.reset()
    torch._dynamo.reset()
    eager = CASE[WAN].make()
    eager.compile_repeated_blocks(backend=svg2_backend, options=OPTIONS | {"lowering": "eager"}, fullgraph=True)
    assert_close_to_rounding(outputs, denoise(eager))


def test_a_changed_weight_is_noticed(caplog):
    model = compiled()
    (before,) = denoise(model, timesteps=(900,))
    model.blocks[0].ffn.net[2].bias.add_(1)
    (after,) = denoise(model, timesteps=(900,))
    assert "weights changed since they were frozen" in caplog.text
    assert (before - after).abs().max() > 1e-3
    caplog.clear()
    (again,) = denoise(model, timesteps=(900,))
    assert torch.equal(after, again) and not caplog.text


class HandWritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = lambda q, k, v: ((q @ k.mT) * 0.3).softmax(-1) @ v
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in self.qkv(self.norm(x)).chunk(3, -1))
        return x + F.gelu(self.out(self.attend(q, k, v).transpose(1, 2).flatten(2)))


def test_a_segment_that_cannot_be_an_engine_is_compiled_by_inductor_and_named(monkeypatch, caplog):
    def fails_with_gelu(module, folder):
        if any(node.target is torch.ops.aten.gelu.default for node in module.graph.nodes):
            raise NoEngineError("torch_tensorrt does not convert aten.gelu.default (1)")
        return run_as_it_is(module, folder)

    without_tensorrt(monkeypatch, fails_with_gelu)
    torch.manual_seed(0)
    model, x = HandWritten(), torch.randn(1, 100, 16)
    compiled = torch.compile(model, backend=svg2_backend, options=OPTIONS | {"top_p": 1.0, "dense_steps": 0})
    torch.testing.assert_close(compiled(x), model(x))
    report = svg2_compile.report(compiled)
    taken, fallen = report.segments
    assert (taken.compiler, fallen.compiler, fallen.graph) == ("tensorrt", "inductor", "sparse")
    reason = "is compiled by Inductor: torch_tensorrt does not convert aten.gelu.default (1)"
    assert f"segment_1 of a sparse graph ({fallen.ops} ops) {reason}" in str(report)
    assert "1 of 2 dense segments are TensorRT engines" in str(report)
    assert f"segment_1 {reason}" in caplog.text


@pytest.fixture
def taken(monkeypatch):
    """The nodes of all engines."""
    nodes = []

    def remember(module, folder):
        nodes.extend(node for node in module.graph.nodes if node.op == "call_function")
        return run_as_it_is(module, folder)

    without_tensorrt(monkeypatch, remember)
    return nodes


@pytest.mark.parametrize("dense_steps", [0, 5])
def test_hand_written_attention_stays_out_of_engines_in_both_graphs(taken, dense_steps):
    torch.manual_seed(0)
    model, x = HandWritten(), torch.randn(1, 100, 16)
    options = OPTIONS | {"dense_steps": dense_steps, "top_p": 1.0}
    torch.testing.assert_close(torch.compile(model, backend=svg2_backend, options=options)(x), model(x))
    assert taken and not [node for node in taken if why_kept(node) or "softmax" in str(node.target)]


def test_attention_without_a_fused_kernel_stays_out_too(taken):
    """AOTAutograd would write its softmax out."""
    torch.manual_seed(0)
    model, x = HandWritten(), torch.randn(1, 100, 16)
    model.attend = F.scaled_dot_product_attention
    with sdpa_kernel(SDPBackend.MATH):
        compiled = torch.compile(model, backend=svg2_backend, options=OPTIONS | {"dense_steps": 5})
        torch.testing.assert_close(compiled(x), model(x))
    assert taken and not [node for node in taken if why_kept(node) or "softmax" in str(node.target)]


def test_a_graph_of_symbolic_sizes_goes_to_inductor_and_says_so(caplog):
    torch.manual_seed(0)
    model = HandWritten()
    options = OPTIONS | {"dense_steps": 5}
    dynamic = torch.compile(model, backend=svg2_backend, options=options, dynamic=True)
    for tokens in (100, 130):
        x = torch.randn(1, tokens, 16)
        torch.testing.assert_close(dynamic(x), model(x))
    (segment, *_) = svg2_compile.report(dynamic).segments
    assert (segment.name, segment.compiler) == ("whole graph", "inductor")
    assert "symbolic sizes" in segment.why_not and "dynamic=False" in segment.why_not
    assert "a dense graph is compiled by Inductor: it has symbolic sizes" in caplog.text


def test_a_graph_that_reads_memory_by_strides_goes_to_inductor_and_says_so():
    class Strided(HandWritten):
        def forward(self, x):
            return super().forward(x).as_strided((1, 50, 16), (1600, 32, 1))

    torch.manual_seed(0)
    model, x = Strided(), torch.randn(1, 100, 16)
    strided = torch.compile(model, backend=svg2_backend, options=OPTIONS | {"dense_steps": 5})
    torch.testing.assert_close(strided(x), model(x))
    (segment,) = svg2_compile.report(strided).segments
    assert "as_strided" in segment.why_not


def test_training_is_refused_with_what_to_do():
    model = torch.compile(HandWritten(), backend=svg2_backend, options=OPTIONS | {"dense_steps": 5})
    with torch.enable_grad(), pytest.raises(Exception, match=r"call the model under torch.no_grad\(\)"):
        model(torch.randn(1, 100, 16))


def test_inference_mode_is_fine():
    torch.manual_seed(0)
    model = HandWritten()
    with torch.inference_mode():
        x = torch.randn(1, 100, 16)
        wanted = model(x)
        for dense_steps in (0, 5):
            options = OPTIONS | {"dense_steps": dense_steps, "top_p": 1.0}
            torch.testing.assert_close(torch.compile(model, backend=svg2_backend, options=options)(x), wanted)


@pytest.mark.skipif(HAS_TENSORRT, reason="TensorRT is installed here")
def test_without_tensorrt_the_install_line_is_the_error():
    code = """
import sys, torch
from svg2_compile import svg2_backend
print(sorted(name for name in sys.modules if "tensorrt" in name.split(".")[0]))
torch.compile(torch.nn.Linear(2, 2), backend=svg2_backend, options={"lowering": "tensorrt"})(torch.ones(1, 2))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n"
    assert (
        'ConfigError: lowering="tensorrt" needs TensorRT: torch_tensorrt is not installed; pip install' in done.stderr
    )
