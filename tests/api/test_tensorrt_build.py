"""Every dense segment of three tiny models becomes a TensorRT-RTX plan, or says which op has no converter.

``make tensorrt`` runs this in an environment of its own. No GPU is needed, and none is used: plans are built for GPUs
of compute capability 8.0, 8.6, 8.9 and 12.0, and not run. A plan that takes other weights later (refit) cannot be built
without a device, so the tests build plans that do not.
"""

import dataclasses
import importlib.util
import subprocess
import sys

import pytest
import torch

if importlib.util.find_spec("torch_tensorrt") is None:
    pytest.skip("torch_tensorrt is not installed here; `make tensorrt` runs this", allow_module_level=True)

from tensorrt_stand_ins import import_without_device

import_without_device()

import tensorrt
from conformance.examine import output_of
from segments import CASE, MODELS, OPTIONS, cut, without_tensorrt
from torch.fx.experimental.proxy_tensor import make_fx

import svg2_compile
from svg2_compile import svg2_backend
from svg2_compile.passes.freeze_weights import freeze_weights
from svg2_compile.passes.split_segments import why_kept
from svg2_compile.tensorrt import engines as tensorrt_engines
from svg2_compile.tensorrt.engine_files import read_engine
from svg2_compile.tensorrt.engines import NoEngineError, build_plan, canonical, lower

TARGETS = ("SM80", "SM86", "SM89", "SM120")
NO_AND = "torch_tensorrt does not convert aten.bitwise_and.Tensor (1)"
WITHOUT_CONVERTER = {
    (
        "HunyuanVideoTransformer3DModel",
        "dense",
        "segment_0",
    ): NO_AND,
    (
        "HunyuanVideoTransformer3DModel",
        "sparse",
        "segment_0",
    ): NO_AND,
}
"""Segments that go to Inductor: HunyuanVideo joins the masks of its text refiner by a bitwise and."""


def for_targets(config):
    config.clear_flag(tensorrt.BuilderFlag.REFIT)
    config.num_compute_capabilities = len(TARGETS)
    for place, name in enumerate(TARGETS):
        config.set_compute_capability(getattr(tensorrt.ComputeCapability, name), place)


@pytest.fixture(scope="module", params=[(name, dtype) for name in MODELS for dtype in (torch.float32, torch.bfloat16)])
def segments(request):
    """The segments of a model, by graph and name."""
    name, dtype = request.param
    cuts = cut(name, dtype, decompose=True)
    return name, {(each.graph, name): module for each in cuts for name, module in each.modules.items()}


def test_every_segment_is_built_or_says_why_not(segments):
    model, modules = segments
    reasons, sizes = {}, {}
    for (graph, name), module in modules.items():
        weights = sum(each.nbytes for each in module.buffers())
        try:
            file = build_plan(lower(canonical(module)), for_targets)
        except NoEngineError as error:
            reasons[model, graph, name] = str(error)
            continue
        sizes[graph, name] = len(file["plan"])
        inputs = module.graph.find_nodes(op="placeholder")
        (output,) = module.graph.find_nodes(op="output")
        assert (len(file["inputs"]), len(file["outputs"])) == (len(inputs), len(output.args[0]))
        assert len(file["plan"]) > weights, "the weights are not inside"
    assert reasons == {key: why for key, why in WITHOUT_CONVERTER.items() if key[0] == model}
    print(f"{model}: {len(sizes)} of {len(modules)} segments built, {sum(sizes.values()) / 2**20:.1f} MiB of plans")


def test_no_attention_and_no_effect_is_converted(segments):
    _, modules = segments
    for module in modules.values():
        calls = [node for node in module.graph.nodes if node.op == "call_function"]
        assert not [node for node in calls if why_kept(node) or "softmax" in str(node.target)]


def test_masks_never_become_causal_and_the_other_options_are_as_they_must_be():
    settings = tensorrt_engines.settings()
    assert settings.attn_bias_is_causal is False
    assert settings.pass_through_build_failures is True
    assert (settings.min_block_size, settings.truncate_double, settings.immutable_weights) == (1, False, False)
    assert settings.disable_tf32 is not torch.backends.cuda.matmul.allow_tf32


def test_rotations_need_no_scatter_and_no_index(segments):
    _, modules = segments
    for module in modules.values():
        assert not [node for node in module.graph.nodes if "scatter" in str(node.target)]


@pytest.fixture
def engines_up_to_the_plan(monkeypatch, tmp_path):
    """Let the whole way run but for the GPU: plans are built and kept, and PyTorch runs the segment."""
    real_engine_for, made = tensorrt_engines.engine_for, []

    def engine_for(module, folder):
        monkeypatch.setattr(tensorrt_engines, "load", lambda file: made.append(file) or module)
        return real_engine_for(module, folder)

    def refitted(file, lowered):
        return dataclasses.replace(file, weights="")

    real_build = tensorrt_engines.build_plan
    without_tensorrt(monkeypatch, engine_for, decompose=True)
    monkeypatch.setattr(tensorrt_engines, "device_of", lambda module: torch.device("cpu"))
    monkeypatch.setattr(tensorrt_engines, "build_plan", lambda lowered: real_build(lowered, for_targets))
    monkeypatch.setattr(tensorrt_engines, "refit", refitted)
    torch._dynamo.reset()
    svg2_compile.reset()
    return made, tmp_path


def generate(folder):
    """Return the report of one sparse forward, and its output."""
    torch._dynamo.reset()
    svg2_compile.reset()
    tensorrt_engines._loaded.clear()  # as in another process
    case = CASE[MODELS[0]]
    options = OPTIONS | {"dense_steps": 0, "engine_folder": str(folder)}
    model = torch.compile(case.make(), backend=svg2_backend, options=options, fullgraph=True)
    with torch.no_grad():
        output = output_of(model, case.inputs())
    return svg2_compile.report(model), output


def test_engines_are_built_once_kept_and_shared(engines_up_to_the_plan):
    made, folder = engines_up_to_the_plan
    report, output = generate(folder)
    assert [segment.engine for segment in report.segments] == ["built", "built", "built", "refitted", "built"]
    files = sorted(folder.iterdir())
    assert len(files) == 4 and all(file.suffix == ".engine" for file in files)
    assert {len(file.plan) for file in made} >= {len(read_engine(f, f.stem, made[0].environment).plan) for f in files}
    again, output_again = generate(folder)
    assert [segment.engine for segment in again.segments] == ["from disk"] * 3 + ["refitted", "from disk"]
    assert torch.equal(output, output_again)
    damaged = files[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    third, _ = generate(folder)
    assert sorted(segment.engine for segment in third.segments).count("built") == 1
    assert read_engine(damaged, damaged.stem, made[0].environment) is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a device, plans that take other weights can be built")
def test_a_build_that_fails_is_a_reason():
    """Without a device, TensorRT-RTX cannot build a plan that takes other weights."""
    weight = torch.randn(64, 64)
    gm = make_fx(lambda x, w: ((x @ w).relu(),))(torch.randn(4, 64), weight)
    with pytest.raises(NoEngineError, match="TensorRT's builder failed"):
        build_plan(lower(canonical(freeze_weights(gm, {1: weight}))))


def test_missing_converters_are_named_with_their_number():
    gm = make_fx(lambda x: (torch.special.erfcx(x) + torch.special.erfcx(x + 1),))(torch.randn(4))
    with pytest.raises(NoEngineError, match=r"does not convert aten.special_erfcx.default \(2\)"):
        lower(canonical(gm))


def test_with_inductor_nothing_of_tensorrt_is_imported():
    code = """
import sys, torch
from svg2_compile import svg2_backend
with torch.no_grad():
    torch.compile(torch.nn.Linear(2, 2), backend=svg2_backend, options={"lowering": "eager"})(torch.ones(1, 2))
print(sorted(name for name in sys.modules if "tensorrt" in name.split(".")[0]))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr[-2000:]
