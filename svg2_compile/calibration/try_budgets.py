"""Measure budgets where an attention runs: what it would do wrong at each, while it stays exact.

    flow of the stages so far   →   everything kept (exact), then each candidate; the exact results go on

The model runs the steps that it would run dense, and every candidate of every head is measured on the same queries,
keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import Module

import svg2_compile
from svg2_compile.calibration.svoo import profile
from svg2_compile.formatting import dotted
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.dynamo_graphs import FakeTensor
from svg2_compile.passes.errors import InternalError
from svg2_compile.passes.plan import SitePlan, stages_of
from svg2_compile.passes.records import AttentionSite, StateSpec
from svg2_compile.passes.stages.attend import Attend
from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.keep_top_p import KeepTopP
from svg2_compile.passes.stages.stage import Stage
from svg2_compile.region import Region
from svg2_compile.site_paths import prefix_of
from svg2_compile.state import store

EVERYTHING = 1.0
"""The candidate that is exact."""
MEASURES = ("density", "head", "attention")
"""What is measured of a head and a candidate: its density, and the square of what is wrong in its results over the
square of the exact ones: its own, or the mean of those of all heads of the attention."""


@dataclass(slots=True)
class Measured:
    """Sums over the calls of one attention."""

    calls: int
    tokens: int
    values: Tensor
    """Fp64: of HEART, ``MEASURES`` [3, H, C]; of SVOO, profiles [1, H, 1]."""

    def add(self, other: Measured) -> None:
        """Add other calls."""
        self.calls += other.calls
        self.values = self.values + other.values


class Recorder:
    """Takes what the stages measure, by the path of the attention in the model."""

    def __init__(self, model: Module, candidates: tuple[float, ...]) -> None:
        """Args: ``candidates`` are shares, the last of them 1; none: profiles are taken."""
        self.model, self.candidates = model, candidates
        self.found: dict[str, Measured] = {}

    def compile(self, options: dict[str, Any]) -> None:
        """Compile the model in place, so that all of its sparse attentions measure."""

        def backend(gm: GraphModule, inputs: list[Any]) -> Any:
            return svg2_compile.svg2_backend(gm, inputs, options=options, stages=self._stages)

        self.model.compile(backend=backend)

    def take(self) -> dict[str, Measured]:
        """Return what was measured since the last time."""
        found, self.found = self.found, {}
        return found

    def add(self, state: Tensor, tokens: int, values: Tensor) -> None:
        """Take what one call of the attention whose state this is has measured."""
        path = self._path_of(state)
        measured = Measured(1, tokens, values.double().cpu())
        if path in self.found:
            self.found[path].add(measured)
        else:
            self.found[path] = measured

    def _stages(self, config: SparseConfig, site: AttentionSite) -> tuple[Stage, ...]:
        stages = stages_of(config, site)
        (first,) = (place for place, each in enumerate(stages) if isinstance(each, KeepTopP))
        (last,) = (place for place, each in enumerate(stages) if isinstance(each, Attend))
        # a selection that is not the final one leaves the statistics of the state alone
        tail = (KeepTopP(is_final=False), *stages[first + 1 : last + 1])
        trying: Stage = TryBudgets(tail, self) if self.candidates else TakeProfile(tail, self)
        return *stages[:first], trying, *stages[last + 1 :]

    def _path_of(self, state: Tensor) -> str:
        """Return the path of the attention in the model: one graph may serve several."""
        for region in list(Region.instances):
            for caller in region.owners():
                for site in region.plan.sites:
                    states = (each for of_stream in store.states_of(caller, site).values() for each in of_stream)
                    if any(each.tensors.get("statistics") is state for each in states):
                        prefix = prefix_of(caller, self.model, region.owner.name)
                        return dotted(prefix or "", site.path)
        raise InternalError("calibrate: the state of an attention that runs is in no store")


@dataclass(frozen=True, slots=True)
class _Measuring(Stage):
    """Runs the rest of the stages with everything kept, and measures beside them."""

    tail: tuple[Stage, ...]
    """From the selection to the attention."""
    recorder: Recorder

    def state(self, site: SitePlan) -> tuple[StateSpec, ...]:
        """Return the state of the stages inside."""
        return tuple(spec for stage in self.tail for spec in stage.state(site))

    def exact(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the stages with everything kept: the attention that the model goes on with."""
        return self._run(SiteWriter(*_with_share(writer, EVERYTHING)), flow)

    def tried(self, writer: SiteWriter, flow: Flow, top_p: float) -> Flow:
        """Write the stages with one share for all heads, beside the attention."""
        return self._run(_WriterBeside(*_with_share(writer, top_p)), flow)

    def _run(self, writer: SiteWriter, flow: Flow) -> Flow:
        for stage in self.tail:
            flow = stage.emit(writer, flow)
        return flow


def _with_share(writer: SiteWriter, top_p: float) -> tuple[GraphModule, SitePlan, Node, dict[str, Node]]:
    return writer.gm, replace(writer.site, top_p=top_p), writer.node, writer.state


class _WriterBeside(SiteWriter):
    """Writes calls that are not those of the attention itself, of which ``verify`` finds one for each site."""

    def emit(self, target: Any, *args: Any) -> Node:
        """Write a call under another name."""

        def beside(*arguments: Any) -> Any:
            return target(*arguments)

        beside.__name__ = beside.__qualname__ = f"calibration_{getattr(target, '__name__', 'call').replace('.', '_')}"
        return super().emit(beside, *args)


@dataclass(frozen=True, slots=True)
class TryBudgets(_Measuring):
    """Measures error and density of every head for every candidate."""

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write every candidate, each measured as soon as it has run: one tried result at a time lies in memory."""
        exact = self.exact(writer, flow)
        assert exact.out is not None
        found: list[Node] = []
        for candidate in self.recorder.candidates[:-1]:
            tried = self.tried(writer, flow, candidate)
            measure = _as_function("measure", errors_and_densities, lambda out, *_: out.new_empty(3, out.shape[1]))
            found.append(writer.emit(measure, tried.out, exact.out, tried.statistics))

        def record(out: Tensor, state: Tensor, *measured: Tensor) -> Tensor:
            everything = torch.zeros_like(measured[0])
            everything[MEASURES.index("density")] = 1
            self.recorder.add(state, out.shape[2], torch.stack((*measured, everything), -1))
            return out

        function = _as_function("record", record, lambda out, *_: torch.empty_like(out))
        return replace(exact, out=writer.emit(function, exact.out, writer.state["statistics"], *found))


@dataclass(frozen=True, slots=True)
class TakeProfile(_Measuring):
    """Measures the profile of every head."""

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the profile beside the exact attention."""
        exact, scale = self.exact(writer, flow), writer.site.scale

        def record(
            out: Tensor,
            state: Tensor,
            q: Tensor,
            k: Tensor,
            key_mask: Tensor | None,
            context_k: Tensor | None,
            context_mask: Tensor | None,
        ) -> Tensor:
            shares = profile(q, k, key_mask, context_k, context_mask, scale)
            self.recorder.add(state, out.shape[2], shares.view(1, -1, 1))
            return out

        function = _as_function("profile", record, lambda out, *_: torch.empty_like(out))
        tokens = flow.q, flow.k, flow.key_mask, flow.context_k, flow.context_mask
        return replace(exact, out=writer.emit(function, exact.out, writer.state["statistics"], *tokens))


def errors_and_densities(out: Tensor, exact: Tensor, statistics: Tensor) -> Tensor:
    """Return ``MEASURES`` of every head, fp32 [3, H]."""
    least = torch.finfo(torch.float32).tiny
    wrong = (out.float() - exact.float()).square().sum((0, 2, 3))
    given = exact.float().square().sum((0, 2, 3)).clamp(min=least)
    density = statistics[..., STATISTICS.index("density_sum")].sum(-1).mean(0)
    return torch.stack((density.float(), wrong / given, wrong / given.mean()))


def _as_function(name: str, call: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that a graph can call; while the graph is written, it gives what ``fake`` does."""

    def function(*arguments: Any) -> Tensor:
        return (fake if isinstance(arguments[0], FakeTensor) else call)(*arguments)

    function.__name__ = function.__qualname__ = f"calibration_{name}"
    return function
