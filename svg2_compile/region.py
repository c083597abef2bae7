"""One compiled graph, dense and sparse, behind one callable that chooses per call.

No guard depends on the denoising step, so switching from dense to sparse recompiles nothing.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule
from torch.utils.weak import WeakIdKeyDictionary

from svg2_compile.clock import Tick, current_clock, forget, tick
from svg2_compile.dynamo import fake_mode_of_fixed_sizes, tracing_with
from svg2_compile.kernels.known_state import known_as_clustered
from svg2_compile.kernels.launch import is_capturing
from svg2_compile.kernels.self_check import Kind, check_kernels
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.records import Rejection
from svg2_compile.passes.sparsify import Sparsified
from svg2_compile.schedule import is_dense
from svg2_compile.state import store

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
    """The compiled module, which stands in for a parameter where there is none."""

    def of(self, args: tuple[Any, ...]) -> Any:
        """Return the parameter that names the caller, or what stands in for it; None where nothing does."""
        if self.position is not None:
            return args[self.position]
        return self.root() if self.root is not None else None


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
        layers: LayerOrder | None,
        timestep: int | None,
        ticks: bool,
        kinds: tuple[tuple[str, Kind], ...] = (),
    ) -> None:
        """Set up both variants.

        Args: ``layers`` where one graph serves many layers; ``ticks`` unless a caller of this graph does; ``kinds`` of
        tensors, by the names of ops, for which the kernels are checked before the first sparse call.
        """
        self.config, self.plan, self.dense, self.sparse, self.owner = config, plan, dense, sparse, owner
        self.layers, self.timestep, self.ticks = layers, timestep, ticks
        self._kinds = kinds
        self.number = next(_numbers)
        self.clear()
        Region.instances.add(self)

    def __call__(self, *args: Any) -> Any:
        """Run the dense or the sparse graph, as the schedule says for this call."""
        owner = self.owner_of(args)
        now = self._tick(args, owner)
        layer = None if self.layers is None else self.layers.ordinal(owner)
        if is_dense(self.config, now, layer):
            self.dense_calls[owner] = self.dense_calls.get(owner, 0) + 1
            return self.dense(*args)
        check_kernels(self._kinds)
        self._kinds = ()
        self.sparse_calls[owner] = self.sparse_calls.get(owner, 0) + 1
        states = store.states_for(owner, current_clock(), now.run, now.stream, self.plan.sites)
        clustered = (counter for state in states if state.is_clustered for counter in state.clustering_counters())
        with known_as_clustered(frozenset(clustered)):
            outputs = self.sparse(*args, *(tensor for state in states for tensor in state.tensors.values()))
        # what a CUDA graph records has not run
        if not is_capturing():
            for state in states:
                state.is_clustered = True
        return outputs

    def owner_of(self, args: tuple[Any, ...]) -> Any:
        """Return who calls, or this region where nothing tells."""
        owner = self.owner.of(args)
        return self if owner is None else owner

    def _tick(self, args: tuple[Any, ...], owner: Any) -> Tick:
        clock = current_clock()
        if not self.ticks and clock.now is not None:
            return clock.now
        tick(id(owner), args[self.timestep] if self.timestep is not None else None)
        now = current_clock().now
        assert now is not None
        return now

    def owners(self) -> list[Any]:
        """Return every model or layer that called."""
        return list({id(each): each for each in [*self.dense_calls.keys(), *self.sparse_calls.keys()]}.values())

    def clear(self) -> None:
        """Forget the counts; what is compiled stays."""
        self.dense_calls: Any = WeakIdKeyDictionary()
        self.sparse_calls: Any = WeakIdKeyDictionary()


class LayerOrder:
    """Numbers the separately compiled layers of a model in the order in which they first run."""

    _by_parent: ClassVar[weakref.WeakKeyDictionary[torch.nn.Module, LayerOrder]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self._ordinals: dict[int, int] = {}

    @classmethod
    def of(cls, parent: torch.nn.Module) -> LayerOrder:
        """Return the order of the layers of ``parent``."""
        return cls._by_parent.setdefault(parent, cls())

    def ordinal(self, owner: Any) -> int:
        """Return the layer's place, counting from 0."""
        return self._ordinals.setdefault(id(owner), len(self._ordinals))


def ticking(runner: Runner, model: Hashable, timestep: int) -> Runner:
    """Wrap a graph that has no sparse attention but sees the timestep of a model whose blocks are compiled apart."""

    def run(*args: Any) -> Any:
        tick(model, args[timestep])
        return runner(*args)

    return run


class DenseGraph:
    """A compiled graph without sparse attention, and whom it ran for; layers share it as they share regions."""

    instances: ClassVar[weakref.WeakSet[DenseGraph]] = weakref.WeakSet()

    def __init__(self, runner: Runner, rejections: tuple[Rejection, ...], owner: Owner) -> None:
        """Args: ``rejections`` say why each attention stays dense."""
        self.rejections, self.owner = rejections, owner
        self.number = next(_numbers)
        self._runner = runner
        self._owners: Any = WeakIdKeyDictionary()
        DenseGraph.instances.add(self)

    def __call__(self, *args: Any) -> Any:
        """Run the graph."""
        owner = self.owner.of(args)
        if owner is not None and owner not in self._owners:
            self._owners[owner] = True
        return self._runner(*args)

    def owners(self) -> list[Any]:
        """Return every model or layer that called."""
        return list(self._owners.keys())


def reset() -> None:
    """Drop centroids, statistics and clocks, as if no generation had run; compiled graphs stay.

    The next generation gives the same bits as the first one did.
    """
    for region in list(Region.instances):
        region.clear()
    store.clear()
    forget()
