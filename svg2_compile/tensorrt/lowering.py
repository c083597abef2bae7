"""``lowering="tensorrt"``: dense segments as TensorRT engines, attention between them in PyTorch.

    Dynamo's graph ─► attention made opaque ─► AOTAutograd ─► state updated in place again ─► ATen graph
    ATen graph + weights of the caller ─► constants ─► segments ─► an engine each, or Inductor, and the reason why

AOTAutograd runs once for a graph. Weights become constants at the first call, once for every model or layer that calls.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils.weak import WeakIdKeyDictionary

from svg2_compile.cut_graphs import SegmentReport, hand_in
from svg2_compile.dynamo import version_of
from svg2_compile.frames import is_dynamic, is_weight, placeholders
from svg2_compile.passes.canonicalize import canonicalize
from svg2_compile.passes.clone import clone
from svg2_compile.passes.dump import dump_graph
from svg2_compile.passes.errors import ConfigError
from svg2_compile.passes.freeze_weights import freeze_weights
from svg2_compile.passes.hold_attention import hold_attention
from svg2_compile.passes.join_slices import join_slices
from svg2_compile.passes.restore_mutation import restore_mutation
from svg2_compile.passes.split_segments import SplitGraph, split_segments
from svg2_compile.region import Lower, Runner, Variant
from svg2_compile.tensorrt import engines as tensorrt_engines
from svg2_compile.tensorrt.private_names import (
    BufferAOTInput,
    ParamAOTInput,
    PlainAOTInput,
    aot_module_simplified,
    without_modes,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Program:
    """A graph with the weights of one caller inside."""

    run: Callable[..., Any]
    stamps: tuple[tuple[int, int, int], ...]
    """Tells whether a weight was replaced, moved or written since."""
    segments: tuple[SegmentReport, ...]


class Programs:
    """What AOTAutograd calls instead of the ATen graph: the program of whoever calls, told by the first weight."""

    _boxed_call = True  # AOTAutograd hands over one list

    def __init__(self, aten: GraphModule, weights: tuple[int, ...], folder: Path, inductor: Lower) -> None:
        """Args: ``weights`` are the positions of the inputs to freeze."""
        self._aten, self._weights, self._folder = aten, weights, folder

        def inductor_without_modes(gm: GraphModule, inputs: list[Any]) -> Runner:
            # AOTAutograd watches the first call through a dispatch mode, under which nothing can be compiled
            with without_modes():
                return inductor(gm, inputs)

        self._inductor = inductor_without_modes
        self._frozen = frozenset(weights)
        self._lock = threading.Lock()
        self._programs: Any = WeakIdKeyDictionary()
        hand_in(self)

    def __call__(self, args: list[Any]) -> Any:
        """Run with the weights among ``args``."""
        weights = [args[position] for position in self._weights]
        rest = [arg for position, arg in enumerate(args) if position not in self._frozen]
        args.clear()
        return self._program(weights).run(*rest)

    def segments_of(self, tensors: set[int]) -> list[SegmentReport]:
        """Return the segments of the programs whose first weight is among the ids of a model's tensors."""
        programs = [program for owner, program in self._programs.items() if id(owner) in tensors]
        return [segment for program in programs for segment in program.segments]

    def _program(self, weights: list[Tensor]) -> Program:
        owner: Any = weights[0] if weights else self
        stamps = tuple((id(each), each.data_ptr(), version_of(each)) for each in weights)
        with self._lock:
            program: Program | None = self._programs.get(owner)
            if program is not None and program.stamps != stamps:
                log.warning("weights changed since they were frozen into engines; the engines are made anew")
                program = None
            if program is None:
                program = self._programs[owner] = self._build(weights, stamps)
        return program

    def _build(self, weights: list[Tensor], stamps: tuple[tuple[int, int, int], ...]) -> Program:
        # constants made in inference mode could not be used outside of it
        with torch.inference_mode(False), torch.no_grad(), without_modes():
            split = split_segments(freeze_weights(self._aten, dict(zip(self._weights, weights))))
            dump_graph(split.gm, "segments")
            return Program(split.gm, stamps, tuple(self._compile(split, each.name) for each in split.segments))

    def _compile(self, split: SplitGraph, name: str) -> SegmentReport:
        """Put an engine, or Inductor's code, in the place of a segment."""
        module = split.gm.get_submodule(name)
        assert isinstance(module, GraphModule)
        started, source, why_not = time.perf_counter(), "", ""
        run: Callable[..., Any]
        try:
            engine = tensorrt_engines.engine_for(module, self._folder)
            run, source = engine.run, engine.source
        except tensorrt_engines.NoEngineError as error:
            run, why_not = Variant(name, module, self._inductor), str(error)
            log.warning("%s is compiled by Inductor: %s", name, why_not)
        delattr(split.gm, name)
        setattr(split.gm, name, run)
        return SegmentReport(
            graph=variant_of(self._aten.graph),
            name=name,
            ops=sum(1 for node in module.graph.nodes if node.op == "call_function"),
            compiler="tensorrt" if source else "inductor",
            engine=source,
            why_not=why_not,
            seconds=time.perf_counter() - started,
        )


class WholeGraph:
    """A graph that cannot be cut, compiled by Inductor."""

    def __init__(self, run: Runner, owner: int | None, report: SegmentReport) -> None:
        """Args: ``owner`` is the position of the first weight among the inputs."""
        self._run, self._owner, self._report = run, owner, report
        self._owners: Any = WeakIdKeyDictionary()
        log.warning("a %s graph is compiled by Inductor: %s", report.graph, report.why_not)
        hand_in(self)

    def __call__(self, *args: Any) -> Any:
        """Run the graph."""
        if self._owner is not None:
            self._owners[args[self._owner]] = None
        return self._run(*args)

    def segments_of(self, tensors: set[int]) -> list[SegmentReport]:
        """Return the graph as one segment, where a model with these tensors called it."""
        return [self._report] if any(id(owner) in tensors for owner in self._owners) else []


def variant_of(graph: Graph) -> str:
    """Return whether a graph is the sparse or the dense one."""
    return "sparse" if any(str(node.target).startswith("svg2.block_sparse") for node in graph.nodes) else "dense"


def lower_with_tensorrt(gm: GraphModule, inputs: list[Any], min_tokens: int, folder: Path, inductor: Lower) -> Runner:
    """Compile a graph with TensorRT for its dense segments.

    Args:
        gm: Dynamo's graph, or its sparse twin; it is not changed.
        inputs: its inputs, real or fake.
        min_tokens: from how many tokens on hand-written attention is kept out of engines.
        folder: where engines are kept.
        inductor: compiles what cannot be an engine.

    Raises:
        ConfigError: autograd records, and engines have no gradients.
    """
    if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in inputs):
        raise ConfigError(
            'lowering="tensorrt" is for inference, and autograd is recording; call the model under torch.no_grad()'
        )
    weights = [position for position, node in enumerate(placeholders(gm)) if is_weight(node)]
    if is_dynamic(gm):
        why = "it has symbolic sizes, and an engine has fixed ones: torch.compile(dynamic=False) compiles each size"
        return WholeGraph(inductor(gm, inputs), weights[0] if weights else None, _uncut(gm, why))
    held = clone(gm)
    canonicalize(held, min_tokens)
    hold_attention(held)

    def compile_aten(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        constants = tuple(place for place, node in enumerate(placeholders(gm)) if _is_constant(node, weights))
        if gm.graph.find_nodes(op="call_function", target=torch.ops.aten.as_strided.default):
            why = "it reads memory by strides (as_strided), and engines return strides of their own"
            run = inductor(gm, list(example_inputs))
            return WholeGraph(run, constants[0] if constants else None, _uncut(gm, why))
        restore_mutation(gm)
        gm.graph.eliminate_dead_code()
        join_slices(gm)
        return Programs(gm, constants, folder, inductor)

    runner: Runner = aot_module_simplified(
        held,
        inputs,
        fw_compiler=compile_aten,
        inference_compiler=compile_aten,
        decompositions=tensorrt_engines.decompositions(),
        keep_inference_input_mutations=True,
    )
    return runner


def _uncut(gm: GraphModule, why_not: str) -> SegmentReport:
    ops = sum(1 for node in gm.graph.nodes if node.op == "call_function")
    return SegmentReport(variant_of(gm.graph), "whole graph", ops, "inductor", "", why_not, 0.0)


def _is_constant(node: Node, weights: list[int]) -> bool:
    """Say whether an input of the ATen graph is a weight of the graph that AOTAutograd was given, and only read."""
    match node.meta["desc"]:
        case PlainAOTInput(idx=position):
            is_weight = position in weights
        case source:
            is_weight = isinstance(source, ParamAOTInput | BufferAOTInput)
    return is_weight and not any(user.is_impure() for user in node.users)
