"""Tiny models cut into segments by ``lowering="tensorrt"``, with something else in the place of TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conformance.cases import CASES
from conformance.examine import output_of
from torch.fx import GraphModule

from svg2_compile import svg2_backend
from svg2_compile.passes.split_segments import SplitGraph, split_segments
from svg2_compile.tensorrt import engines as tensorrt_engines
from svg2_compile.tensorrt import lowering as tensorrt_lowering
from svg2_compile.tensorrt.engines import Engine

CASE = {case.id: case for case in CASES}
MODELS = ("WanTransformer3DModel", "HunyuanVideoTransformer3DModel", "CogVideoXTransformer3DModel")
OPTIONS = {"dense_steps": 1, "dense_layers": 0, "min_tokens": 64, "top_p": 0.3, "lowering": "tensorrt"}


@dataclass(frozen=True, slots=True)
class Cut:
    """One graph of a model before and after the cut."""

    graph: str
    whole: GraphModule
    split: SplitGraph
    modules: dict[str, GraphModule]
    args: list[Any]
    """What the model called it with; copies, made before the state was updated."""


def run_as_it_is(module: GraphModule, folder: Any) -> Engine:
    """Stand in for an engine: the segment itself, in PyTorch."""
    return Engine(module, "built")


def without_tensorrt(
    patch: pytest.MonkeyPatch, engine_for: Callable[..., Engine] = run_as_it_is, decompose: bool = False
) -> None:
    """Let the lowering run where there is no TensorRT; with it, ``decompose`` keeps its own decompositions."""
    patch.setattr(tensorrt_engines, "require_tensorrt", lambda: None)
    patch.setattr(tensorrt_engines, "engine_for", engine_for)
    if not decompose:
        patch.setattr(tensorrt_engines, "decompositions", dict)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a tensor of numbers in another precision, anything else as it is."""
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def cut(name: str, dtype: torch.dtype = torch.float32, decompose: bool = False) -> list[Cut]:
    """Return the dense and the sparse graph of a tiny model, cut, with arguments."""
    split_of: dict[int, tuple[GraphModule, SplitGraph, dict[str, GraphModule]]] = {}
    cuts: list[Cut] = []
    call = tensorrt_lowering.Programs.__call__

    def splitting(whole: GraphModule) -> SplitGraph:
        split = split_segments(whole)
        modules = {each.name: split.gm.get_submodule(each.name) for each in split.segments}
        split_of[len(split_of)] = whole, split, modules
        return split

    def recording(self: Any, args: list[Any]) -> Any:
        rest = [arg.clone() for place, arg in enumerate(args) if place not in self._frozen]
        output = call(self, args)
        if len(split_of) > len(cuts):
            graph = tensorrt_lowering.variant_of(self._aten.graph)
            cuts.append(Cut(graph, *split_of[len(cuts)], rest))
        return output

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        without_tensorrt(patch, decompose=decompose)
        patch.setattr(tensorrt_lowering, "split_segments", splitting)
        patch.setattr(tensorrt_lowering.Programs, "__call__", recording)
        model = torch.compile(CASE[name].make().to(dtype), backend=svg2_backend, options=OPTIONS, fullgraph=True)
        for timestep in (900, 800):
            inputs = {key: cast(value, dtype) for key, value in CASE[name].inputs().items()}
            inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
            output_of(model, inputs)
    return cuts
