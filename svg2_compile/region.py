"""One compiled graph, dense and sparse, behind one callable that chooses per call.

No guard depends on the denoising step, so switching from dense to sparse recompiles nothing.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from svg2_compile import schedule
from svg2_compile.budgets import BudgetsInForce
from svg2_compile.by_object import ByObject
from svg2_compile.dynamo import fake_mode_of_fixed_sizes, tracing_with
from svg2_compile.forwards import Caller, Forward, caller_of, forget, forward_of, mark, ordinal
from svg2_compile.kernels.known_state import known_as_clustered
from svg2_compile.kernels.launch import is_capturing
from svg2_compile.kernels.self_check import Kind, check_kernels
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.records import Rejection
from svg2_compile.passes.sparsify import Sparsified
from svg2_compile.state import SiteState, store

_numbers = itertools.count()

Runner = Callable[..., Any]
Lower = Callable[[GraphModule, list[Any]], Runner]


@dataclass(frozen=True, slots=True)
class Owner:
    """How a compiled graph learns, at run time, which model or layer it runs for."""

    position: int | None
    """Graph input that is a parameter of the owner; ``None`` for code without parameters."""

    name: str
    """That parameter's name inside the compiled module."""

    root: weakref.ref[torch.nn.Module] | None
    """The module it was compiled for; another one of its class may run it."""

    is_repeated: bool = False
    """The graph is that of a layer, whose model is around it."""
    code: CodeType | None = None
    """The code that was compiled."""
    met: ByObject[weakref.ref[Caller]] = field(default_factory=ByObject, compare=False)
    """Callers by their parameters."""

    def caller(self, args: tuple[Any, ...], graph: Any) -> Caller:
        """Return who calls ``graph``, with these arguments."""
        parameter = None if self.position is None else args[self.position]
        met = self.met.get(parameter)
        known = None if met is None else met()
        if known is not None and known.is_alive:
            return known
        root = None if self.root is None else self.root()
        caller = caller_of(parameter, graph, root, is_repeated=self.is_repeated)
        if parameter is not None:
            self.met.set(parameter, weakref.ref(caller))
        return caller


class Variant:
    """A graph and its compiled form, compiled at first use unless ``now`` is given."""

    def __init__(self, name: str, gm: GraphModule, lower: Lower, now: list[Any] | None = None) -> None:
        self.name = name
        self.compile_seconds = 0.0
        self._gm, self._lower = gm, lower
        self._lock = threading.Lock()
        self._runner: Runner | None = None
        if now is not None:
            self._runner = self._compile(now)

    def __call__(self, *args: Any) -> Any:
        """Run the compiled graph."""
        if self._runner is None:
            with self._lock:
                if self._runner is None:
                    self._runner = self._compile_outside_dynamo(args)
        return self._runner(*args)

    def _compile(self, inputs: list[Any]) -> Runner:
        started = time.perf_counter()
        runner = self._lower(self._gm, inputs)
        self.compile_seconds = time.perf_counter() - started
        return runner

    def _compile_outside_dynamo(self, args: tuple[Any, ...]) -> Runner:
        """Compile for the shapes at hand; only graphs without symbolic shapes wait for this."""
        fake_mode = fake_mode_of_fixed_sizes()
        fakes = [
            fake_mode.from_tensor(each, static_shapes=True) if isinstance(each, torch.Tensor) else each for each in args
        ]
        with tracing_with(fake_mode):
            return self._compile(fakes)


class Region:
    """What Dynamo calls instead of the graph that it traced."""

    instances: ClassVar[weakref.WeakSet[Region]] = weakref.WeakSet()

    def __init__(
        self,
        *,
        config: SparseConfig,
        plan: Sparsified,
        dense: Variant,
        sparse: Variant,
        owner: Owner,
        begins_forward: bool,
        kinds: tuple[tuple[str, Kind], ...] = (),
        budgets: BudgetsInForce | None = None,
    ) -> None:
        """Set up both variants.

        Args: ``begins_forward`` where each of its calls is another forward of the model; ``kinds`` of tensors, by the
        names of ops, for which the kernels are checked before the first sparse call; ``budgets`` of the heads.
        """
        self.config, self.plan, self.dense, self.sparse, self.owner = config, plan, dense, sparse, owner
        self.begins_forward = begins_forward
        self.is_dynamic = any(not isinstance(site.tokens, int) for site in plan.sites)
        self._kinds = kinds
        self._budgets = budgets
        self.number = next(_numbers)
        self.clear()
        Region.instances.add(self)

    def __call__(self, *args: Any) -> Any:
        """Run the dense or the sparse graph, as the schedule says for this call."""
        caller = self.owner.caller(args, self)
        forward = forward_of(caller, self.owner.code or self, begins=self.begins_forward)
        # one graph with all layers leaves the first ones out
        layer = ordinal(forward, caller) if self.owner.is_repeated else None
        why_dense = schedule.why_dense(self.config, forward.tick, layer)
        self._count(caller, why_dense)
        if why_dense:
            return self.dense(*args)
        check_kernels(self._kinds)
        self._kinds = ()
        states = self._states(caller, forward, args)
        clustered = (counter for state in states if state.is_clustered for counter in state.clustering_counters())
        with known_as_clustered(frozenset(clustered)):
            outputs = self.sparse(*args, *(tensor for state in states for tensor in state.tensors.values()))
        # what a CUDA graph records has not run
        if not is_capturing():
            for state in states:
                state.is_clustered = True
        return outputs

    def _states(self, caller: Caller, forward: Forward, args: tuple[Any, ...]) -> list[SiteState]:
        shapes = tuple(each.shape for each in args if isinstance(each, torch.Tensor)) if self.is_dynamic else ()
        now = forward.tick
        states = store.states_for(caller, forward.clock, now.run, now.stream, self.plan.sites, shapes)
        if self._budgets is not None:
            self._budgets.give(caller, self.owner.name, self.plan.sites, states)
        return states

    def owners(self) -> list[Caller]:
        """Return every model or layer that called."""
        return self._calls.keys()

    def dense_calls(self, caller: Caller) -> dict[str, int]:
        """Return how often it was dense for a caller, by reason."""
        return {why: count for why, count in dict(self._calls.get(caller) or {}).items() if why}

    def _count(self, caller: Caller, why_dense: str) -> None:
        counts = self._calls.get(caller)
        if counts is None:
            counts = self._calls.setdefault(caller, {})
        counts[why_dense] = counts.get(why_dense, 0) + 1

    def clear(self) -> None:
        """Forget the counts; what is compiled stays."""
        self._calls: ByObject[dict[str, int]] = ByObject()


class DenseGraph:
    """A compiled graph without sparse attention, and whom it ran for; layers share it as they share regions."""

    instances: ClassVar[weakref.WeakSet[DenseGraph]] = weakref.WeakSet()

    def __init__(
        self, runner: Runner, rejections: tuple[Rejection, ...], owner: Owner, *, begins_forward: bool = False
    ) -> None:
        """Args: ``rejections`` say why each attention stays dense; ``begins_forward`` as of ``Region``."""
        self.rejections, self.owner, self.begins_forward = rejections, owner, begins_forward
        self.number = next(_numbers)
        self._runner, self._lock = runner, threading.Lock()
        self._callers: weakref.WeakSet[Caller] = weakref.WeakSet()
        DenseGraph.instances.add(self)

    def __call__(self, *args: Any) -> Any:
        """Run the graph."""
        caller = self.owner.caller(args, self)
        if caller not in self._callers:
            with self._lock:
                self._callers.add(caller)
        if self.begins_forward:
            mark(caller)
        return self._runner(*args)

    def owners(self) -> list[Caller]:
        """Return every model or layer that called."""
        with self._lock:
            return list(self._callers)


def reset() -> None:
    """Drop centroids, statistics and clocks, as if no generation had run; compiled graphs stay.

    The next generation gives the same bits as the first one did.
    """
    for region in list(Region.instances):
        region.clear()
    store.clear()
    forget()
