"""From a dense segment to a TensorRT engine, through torch_tensorrt's converters.

Nothing of TensorRT is imported before an engine is wanted. A plan is the serialized form of an engine; building one
needs no more of the GPU than TensorRT's builder does, running it is torch_tensorrt's runtime module's business.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from svg2_compile.passes.errors import ConfigError
from svg2_compile.passes.nodes import value_of
from svg2_compile.tensorrt.engine_files import EngineFile, read_engine, write_engine
from svg2_compile.tensorrt.private_names import (
    Interpreter,
    compilation_settings,
    converters,
    package_of,
    refit_engine,
    rename,
)

log = logging.getLogger(__name__)

INSTALL = 'pip install "svg2-compile[tensorrt]"'
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
"""What TensorRT computes with."""

FORCED = {
    # the cuts are ours
    "min_block_size": 1,
    # the default would throw masks away
    "attn_bias_is_causal": False,
    # a build that fails must be seen
    "pass_through_build_failures": True,
    "truncate_double": False,
    # refit: equal segments share an engine
    "immutable_weights": False,
}


class NoEngineError(RuntimeError):
    """Why a segment cannot be an engine."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A runnable segment and where its plan came from."""

    run: Callable[..., Any]
    source: str
    """``built``, ``from disk``, ``refitted`` with weights of its own, or ``shared`` with a graph that has the same."""


_loaded: weakref.WeakValueDictionary[tuple[str, str, torch.device], Callable[..., Any]] = weakref.WeakValueDictionary()
"""The engines in use, by structure, weights and device."""


def require_tensorrt() -> None:
    """Raise unless TensorRT and torch_tensorrt can be used.

    Raises:
        ConfigError: with the line that installs them.
    """
    missing = importlib.util.find_spec("torch_tensorrt") is None
    reason = "torch_tensorrt is not installed"
    if not missing:
        try:
            import torch_tensorrt  # noqa: F401
        except Exception as error:  # without a GPU or a library, any of a dozen
            missing, reason = True, f"torch_tensorrt cannot be imported ({type(error).__name__}: {error})"
    if missing:
        raise ConfigError(f'lowering="tensorrt" needs TensorRT: {reason}; {INSTALL}, or use lowering="inductor"')


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return how AOTAutograd takes ops apart for torch_tensorrt's converters."""
    from torch_tensorrt.dynamo.lowering import get_decompositions

    table: dict[Any, Callable[..., Any]] = get_decompositions(False)
    # as a scatter, its index would be as large as the data; join_slices makes it a cat
    return {op: decomposition for op, decomposition in table.items() if op is not torch.ops.aten.slice_scatter.default}


def settings() -> Any:
    """Return torch_tensorrt's settings; those that this version does not know are left out."""
    wanted = {
        **FORCED,
        "use_explicit_typing": True,  # torch_tensorrt 2.11; always so in 2.13
        "disable_tf32": not torch.backends.cuda.matmul.allow_tf32,
    }
    known = compilation_settings().__dataclass_fields__
    return compilation_settings()(**{name: value for name, value in wanted.items() if name in known})


def environment() -> dict[str, str]:
    """Return what an engine depends on besides its graph: versions, and the GPU."""
    import tensorrt
    import torch_tensorrt

    gpu = "none"
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_capability()}"
    return {
        "torch": torch.__version__,
        "torch_tensorrt": torch_tensorrt.__version__,
        "tensorrt": f"{package_of(tensorrt)} {tensorrt.__version__}",
        "gpu": gpu,
        "tf32": str(torch.backends.cuda.matmul.allow_tf32),
    }


def engine_for(module: GraphModule, folder: Path) -> Engine:
    """Return the engine of a dense segment: from ``folder``, refitted from an equal segment's, or built and kept there.

    Args:
        module: a segment with its weights, as ``split_segments`` cuts it.
        folder: where plans are kept.

    Raises:
        NoEngineError: saying why there is none.
    """
    device = device_of(module)
    # torch_tensorrt builds and runs on the current device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        segment = canonical(module)
        where = environment()
        key, weights = structure_key(segment, where), weights_digest(segment)
        shared = _loaded.get((key, weights, device))
        if shared is not None:
            return Engine(shared, "shared")
        engine = _engine_in(folder / f"{key}.engine", key, where, weights, segment)
        _loaded[key, weights, device] = engine.run
    return engine


def _engine_in(path: Path, key: str, where: dict[str, str], weights: str, segment: GraphModule) -> Engine:
    """Return the engine of a file, of another one refitted, or a new one, which is written there."""
    found = read_engine(path, key, where)
    lowered = lower(segment)
    if found is not None:
        try:
            if found.weights == weights:
                return Engine(load(found), "from disk")
            return Engine(load(refit(found, lowered)), "refitted")
        except NoEngineError as error:
            log.warning("the engine in %s cannot be used: %s; it is built anew", path, error)
    built = EngineFile(key=key, environment=where, weights=weights, **build_plan(lowered))
    try:
        write_engine(path, built)
    except OSError as error:
        log.warning("the engine is not kept in %s: %s", path, error)
    return Engine(load(built), "built")


def device_of(module: GraphModule) -> torch.device:
    """Return the GPU of a segment whose values TensorRT can hold.

    Raises:
        NoEngineError: naming the first value that it cannot.
    """
    devices: dict[torch.device, str] = {}
    for node in module.graph.nodes:
        for value in tensors_of(node):
            if value.dtype not in DTYPES:
                raise NoEngineError(f"{node.name} is {value.dtype}, which TensorRT does not compute")
            # a number of the host may take part in anything
            if value.dim() > 0 or node.op == "placeholder":
                devices.setdefault(value.device, node.name)
    for device, name in devices.items():
        if device.type != "cuda":
            raise NoEngineError(f"{name} is on the {device.type}; TensorRT runs on NVIDIA GPUs")
    if len(devices) != 1:
        raise NoEngineError(f"its values are on {len(devices)} devices; an engine runs on one")
    return next(iter(devices))


def tensors_of(node: Node) -> list[Tensor]:
    """Return the example values of a node."""
    value = value_of(node)
    return [each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, Tensor)]


def canonical(module: GraphModule) -> GraphModule:
    """Return the segment with names that count, so that equal segments of different layers read the same.

    TensorRT names weights after nodes, so a refit also needs this. Meta but for the values is left behind.
    """
    graph, copies = Graph(), dict[Node, Node]()
    attributes: dict[str, Any] = {}
    for number, node in enumerate(module.graph.nodes):
        if node.op == "placeholder":
            copied = graph.placeholder(f"input_{number}")
        elif node.op == "get_attr":
            name = f"weight_{number}"
            attributes[name] = getattr(module, str(node.target))
            copied = graph.get_attr(name)
        else:
            copied = graph.node_copy(node, copies.__getitem__)
            rename(copied, f"node_{number}")
        copied.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
        copies[node] = copied
    return GraphModule(attributes, graph)


def structure_key(segment: GraphModule, where: dict[str, str]) -> str:
    """Return the digest of everything that shapes an engine but the values of its weights.

    Constants that are no weights (indices, single numbers) may shape it too: their values count.
    """
    lines = [json.dumps(where, sort_keys=True), json.dumps(FORCED, sort_keys=True)]
    for node in segment.graph.nodes:
        values = [f"{value.dtype}{tuple(value.shape)}{value.stride()}" for value in tensors_of(node)]
        lines.append(f"{node.op} {node.name} {node.target} {node.args} {node.kwargs} {values}")
        if node.op == "get_attr":
            constant = getattr(segment, str(node.target))
            if constant.numel() == 1 or not constant.is_floating_point():
                lines.append(str(constant.tolist()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def weights_digest(segment: GraphModule) -> str:
    """Return the digest of the weights' bits."""
    digest = hashlib.sha256()
    for node in segment.graph.find_nodes(op="get_attr"):
        constant = getattr(segment, str(node.target)).detach().cpu().contiguous()
        digest.update(constant.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def lower(segment: GraphModule) -> GraphModule:
    """Put the segment through torch_tensorrt's own passes, and return it, every node of it convertible.

    Raises:
        NoEngineError: naming the ops without a converter, or with what the passes said.
    """
    from torch_tensorrt.dynamo.lowering import post_lowering

    try:
        lowered: GraphModule = post_lowering(segment, settings())
    except Exception as error:  # whatever they raise, the segment can run elsewhere
        raise NoEngineError(f"torch_tensorrt's passes failed ({type(error).__name__}: {error})") from error
    table = converters()
    table.set_compilation_settings(settings())
    calls = [node for node in lowered.graph.nodes if node.op == "call_function"]
    missing = Counter(str(node.target) for node in calls if table.get(node) is None)
    if missing:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(missing.items()))
        raise NoEngineError(f"torch_tensorrt does not convert {names}")
    return lowered


def build_plan(lowered: GraphModule, configure: Callable[[Any], None] = lambda config: None) -> dict[str, Any]:
    """Return the plan of a lowered segment and the names of its inputs and outputs.

    Args:
        lowered: what ``lower`` returned.
        configure: may change the builder's config, for example to name GPUs other than this one.

    Raises:
        NoEngineError: with what the converter or the builder said.
    """
    from torch_tensorrt.dynamo.partitioning import construct_submodule_inputs

    outputs = lowered.graph.find_nodes(op="output")[0].args[0]
    try:
        interpreter = Interpreter(
            lowered,
            construct_submodule_inputs(lowered),
            output_dtypes=[value_of(node).dtype for node in outputs],
            compilation_settings=settings(),
        )
        plan = interpreter.build(configure)
    except Exception as error:  # whatever a converter or the builder raises, the segment can run elsewhere
        raise NoEngineError(f"its conversion failed ({type(error).__name__}: {error})") from error
    if plan is None:
        raise NoEngineError("TensorRT's builder failed; its log says why")
    if len(interpreter.outputs) != len(outputs):
        raise NoEngineError(f"the engine would have {len(interpreter.outputs)} of {len(outputs)} results")
    return {
        "plan": bytes(plan),
        "inputs": interpreter.inputs,
        "outputs": interpreter.outputs,
        "needs_output_allocator": interpreter.needs_output_allocator,
    }


def refit(found: EngineFile, lowered: GraphModule) -> EngineFile:
    """Return the engine of an equal segment with the weights of this one.

    Raises:
        NoEngineError: with what TensorRT said.
    """
    import tensorrt
    from torch_tensorrt.dynamo.partitioning import construct_submodule_inputs
    from torch_tensorrt.logging import TRT_LOGGER

    try:
        engine = tensorrt.Runtime(TRT_LOGGER).deserialize_cuda_engine(found.plan)
        refit_engine(lowered, engine, construct_submodule_inputs(lowered), settings())
        plan = bytes(engine.serialize())
    except Exception as error:
        raise NoEngineError(f"its refit failed ({type(error).__name__}: {error})") from error
    return dataclasses.replace(found, weights="", plan=plan)


def load(file: EngineFile) -> Callable[..., Any]:
    """Return a plan as torch_tensorrt's runtime module, which takes and returns tensors.

    Raises:
        NoEngineError: with what TensorRT said.
    """
    from torch_tensorrt.dynamo.runtime import TorchTensorRTModule

    try:
        run = TorchTensorRTModule(
            serialized_engine=file.plan,
            input_binding_names=list(file.inputs),
            output_binding_names=list(file.outputs),
            name="svg2_segment",
            settings=settings(),
            requires_output_allocator=file.needs_output_allocator,
        )
    except Exception as error:
        raise NoEngineError(f"TensorRT cannot load its engine ({type(error).__name__}: {error})") from error

    def as_tuple(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = run(*inputs)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    return as_tuple
