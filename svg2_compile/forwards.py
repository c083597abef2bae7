"""One tick of a clock per forward of a model, however it is compiled and whoever calls it.

A forward begins when the whole model's graph does, when a model that runs eagerly around its compiled layers is
called, or, where neither is in sight, when a layer that has run already runs again. All bookkeeping belongs to the
model and the layer that call, as live objects: Dynamo may run one graph for all of them.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from svg2_compile import call_stack
from svg2_compile.announce import is_announced
from svg2_compile.branches import Identity
from svg2_compile.by_object import ByObject
from svg2_compile.clock import (
    DenoiseClock,
    Observation,
    Recognition,
    Tick,
    current_clock,
    forget_clocks,
    resets,
    set_current,
)
from svg2_compile.dynamo import has_pre_hook, version_of
from svg2_compile.noise_level import read


@dataclass(eq=False, slots=True, weakref_slot=True)
class Caller:
    """Who runs a compiled graph: a layer of a model, or a whole model. One object as long as that lives."""

    layer: weakref.ref[Any]
    """The module whose code the graph is; where none is known, a parameter of it, or the graph itself."""
    model: weakref.ref[Any]
    """The module whose forward counts as one; where none is known, the graph itself."""
    name: str
    """Which of the layer's parameters told, by its name in the layer; a graph that loops serves several."""
    ordinal: int | None = None
    """The layer's place in its model, once it is known."""

    @property
    def is_alive(self) -> bool:
        """Whether both are there still."""
        return self.layer() is not None and self.model() is not None


@dataclass(slots=True)
class Forward:
    """One forward of a model, in one thread."""

    tick: Tick
    clock: DenoiseClock
    route: call_stack.Route
    is_called: bool = False
    """The model was called as a module, so its end will be seen."""
    is_entered: bool = False
    """The model's first graph has run, as it does in each forward."""
    has_ended: bool = False
    ran: set[tuple[int, int]] = field(default_factory=set)
    """Code and layers that have run in it."""
    begins_later: bool = False
    """The next graph of the model begins another one."""


class _Thread(threading.local):
    """What one thread is running."""

    def __init__(self) -> None:
        self.seen_resets = resets()
        self.model: weakref.ref[Any] | None = None
        self.forward: Forward | None = None
        """The forward that began last, and of which model: what each of its layers asks for."""
        self.forwards: weakref.WeakKeyDictionary[Any, Forward] = weakref.WeakKeyDictionary()
        self.by_pipeline: weakref.WeakKeyDictionary[Any, DenoiseClock] = weakref.WeakKeyDictionary()
        self.by_model: weakref.WeakKeyDictionary[Any, DenoiseClock] = weakref.WeakKeyDictionary()


ROOT = "."
"""Stands for a module before the names in it."""

_thread = _Thread()
_lock = threading.RLock()
_callers: ByObject[dict[tuple[type, bool], Caller]] = ByObject()
"""By parameter, then by the class whose code runs and whether its model is around it."""
_of_layer: weakref.WeakKeyDictionary[Any, dict[tuple[str, bool], Caller]] = weakref.WeakKeyDictionary()
"""By layer, or graph where there is none, name of the parameter, and whether a model is around it."""
_ordinals: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_layers: weakref.WeakKeyDictionary[Module, list[weakref.ref[Caller]]] = weakref.WeakKeyDictionary()
"""Who runs compiled code, by each module that was being called around it and is watched."""
_entered: weakref.WeakSet[Any] = weakref.WeakSet()
"""Models of whose forwards the first graph is seen."""
_told: weakref.WeakKeyDictionary[Any, Recognition] = weakref.WeakKeyDictionary()


def _here() -> _Thread:
    """Return what this thread is running: nothing where all threads were told to forget since it last was asked."""
    if _thread.seen_resets != resets():
        _thread.__init__()  # type: ignore[misc]  # threading.local: makes this thread's clocks anew
    return _thread


def forget() -> None:
    """Make the next forward of each thread the first step of a new generation."""
    with _lock:
        forget_clocks()
        _ordinals.clear()
        _told.clear()
        for callers in list(_of_layer.values()):
            for each in list(callers.values()):
                each.ordinal = None


def recognition_of(model: Any) -> Recognition | None:
    """Return how the steps of a model were told in its last forward."""
    return _told.get(model)


def caller_of(parameter: Tensor | None, graph: Any, root: Module | None, *, is_repeated: bool) -> Caller:
    """Return who runs ``graph`` now.

    Args:
        parameter: a parameter of the caller, given to the graph.
        graph: what stands for the caller where it has none.
        root: the module for which the graph was compiled; another one of its class may run it.
        is_repeated: the graph is that of a layer; its model is around it.
    """
    kind = type(root), is_repeated
    if parameter is not None:
        by_kind = _callers.get(parameter)
        known: Caller | None = None if by_kind is None else by_kind.get(kind)
        if known is not None and known.is_alive:
            return known
    with _lock:
        caller = _find_caller(parameter, graph, root, is_repeated)
        if parameter is not None:
            _callers.setdefault(parameter, {})[kind] = caller
    return caller


def _find_caller(parameter: Tensor | None, graph: Any, root: Module | None, is_repeated: bool) -> Caller:
    called = call_stack.called_modules()
    layers = [each for each, _ in called] + ([] if root is None else [root])
    layers.sort(key=lambda each: type(each) is not type(root))
    layer, name = next(((each, found) for each in layers if (found := _name_in(each, parameter, root))), (None, ""))
    if layer is None:
        if parameter is not None:
            return Caller(weakref.ref(parameter), weakref.ref(graph), "")
        alone = Caller(weakref.ref(graph), weakref.ref(graph), "")
        return _of_layer.setdefault(graph, {}).setdefault(("", False), alone)
    callers = _of_layer.setdefault(layer, {})
    key = (name, is_repeated)
    if key in callers and callers[key].model() is not None:
        return callers[key]
    around = [(each, compiled) for each, compiled in called if each is not layer and call_stack.holds(each, layer)]
    model = layer
    if is_repeated:
        model = _model_of(layer, [each for each, _ in around]) or call_stack.holder_in_locals(layer) or layer
    caller = callers[key] = Caller(weakref.ref(layer), weakref.ref(model), name.removeprefix(ROOT))
    for each, is_compiled in around if is_repeated else ():
        if each not in _entered:
            _watch(each, caller, is_compiled=is_compiled)
    return caller


def _model_of(layer: Module, around: list[Module]) -> Module | None:
    """Return the innermost of the modules around a layer that has all its equals: others wrap the model."""
    counts = [_equals(layer, module) for module in around]
    return next((module for module, count in zip(around, counts) if count == counts[-1]), None)


def _equals(layer: Any, module: Module) -> int:
    """Return how many layers of that class a module has."""
    return sum(type(each) is type(layer) for each in module.modules())


def _name_in(module: Module, parameter: Tensor | None, root: Module | None) -> str:
    """Return the parameter's name in a module, after ``ROOT``; empty where it is not in it."""
    if parameter is None:
        return ROOT if root is not None and type(module) is type(root) else ""
    return next((ROOT + name for name, each in module.named_parameters() if each is parameter), "")


def mark(caller: Caller) -> None:
    """Let the next compiled graph of a model begin a forward of it: its first graph, without attention, runs."""
    model = caller.model()
    _entered.add(model)
    forward = _here().forwards.get(model)
    if forward is not None:
        forward.begins_later = True


def forward_of(caller: Caller, code: object, *, begins: bool) -> Forward:
    """Return the forward that a graph runs in now, begun by it or before.

    Args:
        caller: who runs it.
        code: what it was compiled from; there may be a graph of it for each size.
        begins: it is the first graph of every forward of the model.
    """
    here = _here()
    # a module has one plain weak reference, however often it is asked for
    forward = here.forward if here.model is caller.model else here.forwards.get(caller.model())
    place = (id(code), id(caller.layer()))
    is_first = begins or (forward is not None and forward.begins_later)
    if forward is None or is_first or forward.has_ended:
        forward = _begin(caller.model())
        forward.is_entered = is_first
    elif not forward.is_called and not forward.is_entered and place in forward.ran:
        forward = _begin(caller.model())
    forward.ran.add(place)
    return forward


def ordinal(forward: Forward, caller: Caller) -> int:
    """Return the layer's place in its model, from 0, in the order in which layers first run."""
    if caller.ordinal is not None:
        return caller.ordinal
    layer = caller.layer()
    place = _ordinals.get(layer) if isinstance(layer, Module) else None
    if place is None:
        place = len({each for _, each in forward.ran} - {id(layer)})
        if isinstance(layer, Module):
            _ordinals[layer] = place
    if isinstance(layer, Module):
        caller.ordinal = place
    return place


def _begin(model: Any, inputs: dict[str, Any] | None = None) -> Forward:
    """Tick the clock of the loop that calls ``model``."""
    here = _here()
    stack = call_stack.all_frames()
    last = here.forwards.get(model)
    route = last.route if last is not None and last.route.leads(stack) else call_stack.Route(stack)
    loop = route.loop(stack)
    if inputs is None:
        inputs = route.inputs(model, stack)
    known = _known_clock(model, loop)
    observation, latents = observe(inputs, loop, None if known is None else known.input_of(model))
    clock = known or _new_clock(model, loop, observation)
    tick = clock.tick(model, observation)
    clock.last_input = None if latents is None else weakref.ref(latents)
    if _told.get(model) is not clock.told:
        _told[model] = clock.told
    set_current(clock)
    here.model = weakref.ref(model)
    here.forward = here.forwards[model] = Forward(tick, clock, route)
    return here.forward


def observe(
    inputs: dict[str, Any], loop: call_stack.StackedLoop | None, level: str | None
) -> tuple[Observation, Tensor | None]:
    """Return what is seen of a forward, and its latents.

    Args:
        inputs: its tensors and numbers, by name.
        loop: the loop around it.
        level: the input that is known to be the noise level.
    """
    objects: dict[str, Identity] = {}
    grids: list[Identity] = []
    candidates: dict[str, Any] = {}
    latents, largest = None, 0
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            known = call_stack.known(value)
            objects[name] = identity = known.number, version_of(value)
            if known.numel > largest:
                latents, largest = value, known.numel
            if known.is_grid:
                grids.append(identity)
            if known.may_be_level:
                candidates[name] = value
        else:
            candidates[name] = value
    size = () if latents is None else tuple(latents.shape)
    if is_announced():
        told = None if loop is None else loop.told([])
        return Observation(objects=objects, latents=tuple(grids), size=size, loop=told), latents
    if level in candidates:
        candidates = {level: candidates[level]}
    readings, levels = read(candidates, None if loop is None else loop.unread)
    return Observation(readings, objects, tuple(grids), size, None if loop is None else loop.told(levels)), latents


def _known_clock(model: Any, loop: call_stack.StackedLoop | None) -> DenoiseClock | None:
    here = _here()
    if loop is None or loop.pipeline is None:
        return here.by_model.get(model)
    clock = here.by_pipeline.get(loop.pipeline)
    if clock is None:
        clock = here.by_pipeline[loop.pipeline] = DenoiseClock()
    return clock


def _new_clock(model: Any, loop: call_stack.StackedLoop | None, seen: Observation) -> DenoiseClock:
    """Return the clock of a model without one: that which ticked last, where its generation may go on in this model."""
    here = _here()
    last = current_clock()
    shares = last.now is not None and last in here.by_model.values() and last.would_follow(seen)
    clock = last if shares or last.now is None else DenoiseClock()
    here.by_model[model] = clock
    return clock


# Models that run eagerly around compiled layers.


def _watch(module: Module, caller: Caller, *, is_compiled: bool) -> None:
    """Let a module tell when its calls begin and end, which layers alone do not show.

    ``is_compiled`` where Dynamo has given its forward up, and would trace the hooks.
    """
    if module not in _layers:
        _layers[module] = []
        # a copy of a watched module has the hooks of the original
        if not has_pre_hook(module, begins_forward) and not has_pre_hook(module, begins_broken_forward):
            begins = begins_broken_forward if is_compiled else begins_forward
            ends = ends_broken_forward if is_compiled else ends_forward
            module.register_forward_pre_hook(begins, with_kwargs=True)
            module.register_forward_hook(ends, always_call=True)
    _layers[module].append(weakref.ref(caller))


def begins_forward(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Begin a forward of a model whose layers are compiled: a hook of the model."""
    watched = None if torch.compiler.is_compiling() else _layers.get(module)
    if watched is None:
        return
    if any((caller := each()) is not None and caller.model() is module for each in watched):
        inputs = call_stack.leaves(call_stack.bound(module.forward, args, kwargs))
        _begin(module, inputs).is_called = True
        return
    callers = [caller for each in watched if (caller := each()) is not None]
    models = {id(model): model for each in callers if (model := each.model()) is not None}
    for model in models.values():
        forward = _here().forwards.get(model)
        ran = {layer for _, layer in forward.ran} if forward is not None and not forward.has_ended else set()
        mine = [each for each in callers if each.model() is model] if ran else []
        # what has one layer is part of a layer; what has several may be a model
        if any(id(each.layer()) in ran and _equals(each.layer(), module) > 1 for each in mine):
            # this module is called more than once in a call of the one around it, which holds a loop or both branches
            for each in mine:
                if _equals(each.layer(), module) > 1:
                    each.model = weakref.ref(module)
            inputs = call_stack.leaves(call_stack.bound(module.forward, args, kwargs))
            _begin(module, inputs).is_called = True


def ends_forward(module: Module, args: tuple[Any, ...], output: Any) -> None:
    """End a forward of a model whose layers are compiled: a hook of the model."""
    if torch.compiler.is_compiling():
        return
    forward = _here().forwards.get(module)
    if forward is not None:
        forward.has_ended = True


@torch.compiler.disable  # type: ignore[untyped-decorator]
def begins_broken_forward(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Begin a forward of a model whose forward Dynamo has given up: a hook of the model."""
    begins_forward(module, args, kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def ends_broken_forward(module: Module, args: tuple[Any, ...], output: Any) -> None:
    """End a forward of a model whose forward Dynamo has given up: a hook of the model."""
    ends_forward(module, args, output)
