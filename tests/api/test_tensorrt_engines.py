"""What an engine is known by, and when it is built, read or refitted; TensorRT itself is stood in for."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.passes.freeze_weights import freeze_weights
from svg2_compile.passes.split_segments import split_segments
from svg2_compile.tensorrt import engines as tensorrt_engines
from svg2_compile.tensorrt.engines import (
    NoEngineError,
    canonical,
    device_of,
    engine_for,
    structure_key,
    weights_digest,
)

HERE = {"gpu": "some GPU"}


def two_layers(x, first, second):
    for weight in (first, second):
        x = torch.ops.svg2.dense_attention(x, x, x, None, 0.0, False, None, False)
        x = (x @ weight).relu()
    return (x,)


def layers(dtype=torch.float32):
    """Return the segments of two equal layers with weights of their own."""
    weights = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = make_fx(two_layers, tracing_mode="fake")(torch.randn(1, 2, 4, 8).to(dtype), *weights)
    split = split_segments(freeze_weights(whole, {1: weights[0], 2: weights[1]}))
    return [split.gm.get_submodule(each.name) for each in split.segments]


def key_of(module, where=HERE):
    return structure_key(canonical(module), where)


def test_equal_layers_are_known_by_one_structure_and_weights_of_their_own():
    first, second = layers()
    assert str(first.graph) != str(second.graph)
    assert str(canonical(first).graph) == str(canonical(second).graph)
    assert key_of(first) == key_of(second)
    assert weights_digest(canonical(first)) != weights_digest(canonical(second))
    x = torch.randn(1, 2, 4, 8)
    assert torch.equal(canonical(second)(x)[0], second(x)[0])


def test_another_gpu_dtype_or_version_of_ours_is_another_engine(monkeypatch):
    first, _ = layers()
    keys = {key_of(first), key_of(first, {"gpu": "another"}), key_of(layers(torch.bfloat16)[0])}
    monkeypatch.setitem(tensorrt_engines.FORCED, "truncate_double", True)
    assert len(keys | {key_of(first)}) == 4


def test_an_index_inside_a_segment_is_part_of_its_structure_and_a_weight_is_not():
    def key(places, scale):
        index, weight = torch.tensor(places), torch.full((4,), scale)
        gm = make_fx(lambda x, index, weight: (x[index] * weight,))(torch.randn(4, 4), index, weight)
        return key_of(freeze_weights(gm, {1: index, 2: weight}))

    assert key([0, 1], 1.0) == key([0, 1], 2.0) != key([1, 2], 1.0)


def test_a_scalar_inside_a_segment_is_part_of_its_structure():
    def key(value):
        gm = make_fx(lambda x, scale: (x * scale + 1,))(torch.randn(4), torch.tensor(value))
        return key_of(freeze_weights(gm, {1: torch.tensor(value)}))

    assert key(1.0) != key(2.0)


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (torch.float64, "is torch.float64, which TensorRT does not compute"),
        (torch.complex64, "is torch.complex64, which TensorRT does not compute"),
        (torch.float32, "is on the cpu; TensorRT runs on NVIDIA GPUs"),
    ],
)
def test_what_tensorrt_cannot_hold_is_refused_by_name(dtype, reason):
    gm = make_fx(lambda x: ((x + 1) * 2,))(torch.ones(4, dtype=dtype))
    with pytest.raises(NoEngineError, match=reason):
        device_of(gm)


@pytest.fixture
def builds(monkeypatch):
    """Stand in for TensorRT; return the list of what it was asked to do."""
    asked = []

    def build_plan(lowered):
        asked.append("build")
        return {"plan": b"plan", "inputs": ("input_0",), "outputs": ("output0",), "needs_output_allocator": False}

    def refit(found, lowered):
        asked.append("refit")
        return dataclasses.replace(found, weights="", plan=b"refitted")

    stand_ins = {
        "device_of": lambda module: torch.device("cpu"),
        "environment": lambda: HERE,
        "lower": lambda segment: segment,
        "build_plan": build_plan,
        "refit": refit,
        "load": lambda file: asked.append(file.plan) or (lambda *inputs: file.plan),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(tensorrt_engines, name, stand_in)
    return asked


def sources(folder):
    return [engine_for(module, folder).source for module in layers()]


def test_the_first_of_equal_layers_is_built_and_the_others_refitted(builds, tmp_path):
    assert sources(tmp_path) == ["built", "refitted"]
    assert builds == ["build", b"plan", "refit", b"refitted"]
    assert len(list(tmp_path.iterdir())) == 1


def test_an_engine_in_use_is_shared_with_another_graph_that_has_its_weights(builds, tmp_path):
    first, second = layers()
    engine = engine_for(first, tmp_path)
    again = engine_for(first, tmp_path)
    assert (again.source, again.run is engine.run) == ("shared", True)
    assert engine_for(second, tmp_path).source == "refitted"
    del engine, again
    assert engine_for(first, tmp_path).source == "from disk"


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        (("cuda:1", "cuda:1", "cpu"), None),
        (("cuda:0", "cuda:1", "cpu"), "its values are on 2 devices; an engine runs on one"),
        (("cuda:0", "cpu", "cpu"), "y is on the cpu"),
    ],
    ids=["one GPU and a number of the host", "two GPUs", "a GPU and the CPU"],
)
def test_the_device_of_a_segment_is_that_of_its_tensors(devices, reason):
    graph = torch.fx.Graph()
    nodes = [graph.placeholder("x"), graph.placeholder("y"), graph.get_attr("number")]
    for node, device, shape in zip(nodes, devices, [(4,), (4,), ()]):
        node.meta["val"] = FakeTensor(FakeTensorMode(), torch.empty(shape, device="meta"), torch.device(device))
    graph.output(())
    gm = torch.fx.GraphModule({"number": torch.tensor(2.0)}, graph)
    if reason is None:
        assert device_of(gm) == torch.device("cuda:1")
    else:
        with pytest.raises(NoEngineError, match=reason):
            device_of(gm)


def test_another_process_reads_what_is_there(builds, tmp_path):
    sources(tmp_path)
    builds.clear()
    assert sources(tmp_path) == ["from disk", "refitted"]
    assert "build" not in builds


def test_a_damaged_engine_is_built_anew(builds, tmp_path):
    sources(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert sources(tmp_path) == ["built", "refitted"]
    assert sources(tmp_path) == ["from disk", "refitted"]


def test_an_engine_that_cannot_be_refitted_or_loaded_is_built(builds, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise NoEngineError("its refit failed (RuntimeError: no)")

    monkeypatch.setattr(tensorrt_engines, "refit", fail)
    assert sources(tmp_path) == ["built", "built"]
    assert "cannot be used: its refit failed (RuntimeError: no); it is built anew" in caplog.text


def test_an_engine_that_cannot_be_kept_is_used_all_the_same(builds, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tensorrt_engines, "write_engine", fail)
    assert sources(tmp_path) == ["built", "built"]
    assert "the engine is not kept in" in caplog.text and "disk full" in caplog.text


def test_a_build_that_fails_leaves_no_file(builds, tmp_path, monkeypatch):
    def fail(lowered):
        raise NoEngineError("TensorRT's builder failed; its log says why")

    monkeypatch.setattr(tensorrt_engines, "build_plan", fail)
    with pytest.raises(NoEngineError, match="builder failed"):
        engine_for(layers()[0], tmp_path)
    assert not list(tmp_path.iterdir())
