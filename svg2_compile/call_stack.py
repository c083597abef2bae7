"""What the Python frames above a compiled graph tell, while it runs: whose forward it is, its inputs, and its loop.

Frames are only read, and only when a forward begins or a layer is met for the first time. A path of calls that comes
again is told by its code.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from svg2_compile.by_object import ByObject
from svg2_compile.clock import Loop
from svg2_compile.dynamo import COMPILED_CALL, MODULE_CALLS, RESUMED, uncompiled
from svg2_compile.noise_level import is_grid, may_be_level

OURS = "svg2_compile."
MOST_LEAVES = 256
DEEPEST = 3
"""Containers inside containers that are looked into for inputs."""
MOST_WRAPPERS = 32
MOST_CODES = 4096

_tensors: ByObject[KnownTensor] = ByObject()
_next_number = itertools.count(1)
_schedules: ByObject[tuple[float, ...]] = ByObject()
_parameters: dict[int, tuple[CodeType, tuple[str, ...]]] = {}
"""Names of the parameters of code, by its ``id``, which is its own as long as the code stands here."""


def all_frames() -> list[FrameType]:
    """Return the frames that lead to the call of the function that asks, the innermost first, our own among them.

    That function's own frame, which holds the list, would make a cycle with it that keeps the caller's latents.
    """
    found: list[FrameType] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def frames() -> list[FrameType]:
    """Return the frames that lead here, the innermost first, less our own."""
    return [frame for frame in all_frames() if not _is_ours(frame)]


def called_modules() -> list[tuple[Module, bool]]:
    """Return the modules whose calls lead here, the innermost first, and whether each runs as compiled code."""
    found: list[tuple[Module, int]] = []
    outermost = -1
    for depth, frame in enumerate(frames()):
        if frame.f_code.co_name == COMPILED_CALL:
            outermost = depth
        module = called_by(frame)
        if module is not None and not any(module is each for each, _ in found):
            found.append((module, depth))
    return [(module, depth < outermost) for module, depth in found]


def called_by(frame: FrameType) -> Module | None:
    """Return the module whose call or forward a frame runs, whatever its forward is named."""
    code = frame.f_code
    if code.co_name in MODULE_CALLS:
        module = frame.f_locals.get("self")
        return uncompiled(module) if isinstance(module, Module) else None
    module = _first_argument(frame)
    if not isinstance(module, Module) or _is_of_torch(frame):
        return None
    is_forward = code_of(module.forward) is code or code.co_name == "forward"
    return module if is_forward or code.co_name.startswith(RESUMED) else None


def holder_in_locals(part: Module) -> Module | None:
    """Return the largest module that holds ``part`` among the variables of the nearest frame that has one."""
    for frame in frames():
        if _is_of_torch(frame):
            continue
        modules = [uncompiled(each) for each in frame.f_locals.values() if isinstance(each, Module)]
        holders = [each for each in modules if each is not part and holds(each, part)]
        if holders:
            return max(holders, key=lambda each: sum(1 for _ in each.modules()))
    return None


def holds(module: Module, part: Module) -> bool:
    """Say whether ``part`` is in ``module``."""
    return any(each is part for each in module.modules())


def code_of(function: Any) -> CodeType | None:
    """Return the code of a function or method, below what wraps it; None where it has none."""
    function = getattr(function, "__func__", function)
    for _ in range(MOST_WRAPPERS):
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is None:
            break
        function = wrapped
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None


def bound(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return arguments by the names of a function's parameters, or by their places where that has none."""
    names = _parameters_of(code_of(function))
    first = 1 if hasattr(function, "__self__") else 0
    if first + len(args) <= len(names):
        return [*zip(names[first:], args), *kwargs.items()]
    rest = [(str(place), each) for place, each in enumerate(args)][max(0, len(names) - first) :]
    return [*zip(names[first:], args), *rest, *kwargs.items()]


def _parameters_of(code: CodeType | None) -> tuple[str, ...]:
    if code is None:
        return ()
    known = _parameters.get(id(code))
    if known is None:
        if len(_parameters) >= MOST_CODES:
            _parameters.clear()
        known = _parameters[id(code)] = code, code.co_varnames[: code.co_argcount]
    return known[1]


def leaves(inputs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the tensors and numbers among inputs, in containers too, by name and place; weights are left out."""
    found: dict[str, Any] = {}
    for name, value in inputs:
        # what most arguments are, before what costs more to tell
        if type(value) is Tensor:
            found.setdefault(name, value)
        elif value is not None:
            for inner, each in itertools.islice(_leaves(name, value, 0), MOST_LEAVES):
                found.setdefault(inner, each)
    return found if len(found) <= MOST_LEAVES else dict(itertools.islice(found.items(), MOST_LEAVES))


def _leaves(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    # no function inside another one: that would be a cycle that keeps the latents
    if isinstance(value, Tensor | int | float):
        if not isinstance(value, torch.nn.Parameter | bool):
            yield name, value
    elif depth < DEEPEST:
        for key, each in _parts(value):
            yield from _leaves(f"{name}{key}", each, depth + 1)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", each) for key, each in itertools.islice(value.items(), MOST_LEAVES))
    elif isinstance(value, list | tuple):
        yield from ((f"[{place}]", each) for place, each in enumerate(value[:MOST_LEAVES]))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((f".{each.name}", getattr(value, each.name, None)) for each in fields(value))


@dataclass(frozen=True, slots=True)
class KnownTensor:
    """What holds of a tensor as long as it lives."""

    number: int
    """Given when it is first seen, and never again."""
    numel: int
    is_grid: bool
    may_be_level: bool


def known(value: Tensor) -> KnownTensor:
    """Return what was found of a tensor when it was first seen."""
    found = _tensors.get(value)
    if found is None:
        new = KnownTensor(next(_next_number), value.numel(), is_grid(value), may_be_level(value))
        found = _tensors.setdefault(value, new)
    return found


@dataclass(frozen=True, slots=True)
class StackedLoop:
    """A loop of diffusers, seen on the stack."""

    pipeline: Any
    """``None`` where only a scheduler is in sight."""
    call: int
    timesteps: Tensor | None
    total: int | None

    @property
    def unread(self) -> Tensor | None:
        """The scheduler's noise levels where they have not been read."""
        return None if _schedules.get(self.timesteps) is not None else self.timesteps

    def told(self, levels: list[float]) -> Loop:
        """Return what it tells; ``levels`` are those of ``unread``, kept for the rest of the generation."""
        number, schedule = None, _schedules.get(self.timesteps) or ()
        if self.timesteps is not None:
            number = known(self.timesteps).number
            if levels and not schedule:
                schedule = _schedules.set(self.timesteps, tuple(levels))
        # samplers that ask twice at a level have it twice in their schedule
        different = len(set(schedule))
        total = different or None if self.total is None else max(1, self.total - (len(schedule) - different))
        kind = "scheduler" if self.pipeline is None else "pipeline"
        return Loop(kind, (self.call, number), total, schedule)


@dataclass(frozen=True, slots=True)
class _Source:
    """A frame that has inputs of a model's forward among its variables."""

    depth: int
    kind: str
    """``call`` of a module, ``method`` of the model, compiled ``function``, or any with ``variables``."""
    owner: weakref.ref[Any] | None = None
    """The module that is called, or whose method it is."""
    names: tuple[str, ...] = ()
    """The method's parameters."""

    def read(self, frame: FrameType) -> list[tuple[str, Any]] | None:
        """Return the inputs by name; None where the frame is now somebody else's."""
        variables = frame.f_locals
        if self.owner is None:
            if self.kind == "variables":
                return list(variables.items())
            return bound(variables.get("fn"), variables["args"], variables["kwargs"])
        owner = self.owner()
        if self.kind == "method":
            first, *names = self.names
            if variables.get(first) is not owner:
                return None
            return [(name, variables[name]) for name in names if name in variables]
        called = variables["self"]
        if owner is None or (called is not owner and uncompiled(called) is not owner):
            return None
        return bound(owner.forward, variables["args"], variables["kwargs"])


class Route:
    """Where a model's inputs and its loop are found on one path of calls.

    The same code calls a model in every step, so what each frame is has to be asked once; afterwards its code must be
    the same, and the objects that were found there.
    """

    def __init__(self, stack: list[FrameType]) -> None:
        self._codes = [frame.f_code for frame in stack]
        self._sources: tuple[_Source, ...] | None = None
        outside = [place for place, frame in enumerate(stack) if not _is_ours(frame) and not _is_of_torch(frame)]
        self._outside = tuple(outside)
        self._objects = tuple(place for place in outside if self._codes[place].co_name == "__call__")

    def leads(self, stack: list[FrameType]) -> bool:
        """Say whether the same code is on the way."""
        return [frame.f_code for frame in stack] == self._codes

    def inputs(self, model: object, stack: list[FrameType]) -> dict[str, Any]:
        """Return the named inputs of the outermost call of ``model`` on the stack, nested ones too.

        Where no call of it is in sight, as where a function runs its layers, the variables of the two nearest ones.
        """
        found = None if self._sources is None else _read(self._sources, stack)
        if found is None:
            self._sources = _sources(model, stack)
            found = _read(self._sources, stack)
        return leaves(found or [])

    def loop(self, stack: list[FrameType]) -> StackedLoop | None:
        """Return the innermost pipeline of diffusers that is being called, or else a scheduler among the variables."""
        module = sys.modules.get("diffusers.schedulers.scheduling_utils")
        if module is None:
            return None
        kinds = _pipelines() if self._objects else ()
        for depth in self._objects:
            owner = stack[depth].f_locals.get("self")
            if isinstance(owner, kinds):
                total = getattr(owner, "_num_timesteps", None)
                timesteps = _timesteps(getattr(owner, "scheduler", None))
                return StackedLoop(owner, id(stack[depth]), timesteps, int(total) if total else None)
        for depth in self._outside:
            # a copy: the variables of a module are other threads' too
            for each in list(stack[depth].f_locals.values()):
                if isinstance(each, module.SchedulerMixin):
                    timesteps = _timesteps(each)
                    return None if timesteps is None else StackedLoop(None, 0, timesteps, None)
        return None


def _read(sources: tuple[_Source, ...], stack: list[FrameType]) -> list[tuple[str, Any]] | None:
    found: list[tuple[str, Any]] = []
    for source in sources:
        inputs = source.read(stack[source.depth])
        if inputs is None:
            return None
        found += inputs
    return found


def _sources(model: object, stack: list[FrameType]) -> tuple[_Source, ...]:
    """Return which frames of the stack have the inputs of the model's forward."""
    calls: dict[int, tuple[Any, int]] = {}
    methods: list[_Source] = []
    functions: list[_Source] = []
    compiled: _Source | None = None
    for depth, frame in enumerate(stack):
        code = frame.f_code
        if _is_ours(frame):
            continue
        if code.co_name in MODULE_CALLS:
            module = uncompiled(frame.f_locals["self"])
            calls[id(module)] = module, depth
        elif code.co_name == COMPILED_CALL:
            compiled = compiled or _Source(depth, "function")
        elif not _is_of_torch(frame):
            first = _first_argument(frame)
            if first is model:
                names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
                methods.append(_Source(depth, "method", weakref.ref(model), names))
            elif not isinstance(first, Module):
                functions.append(_Source(depth, "variables"))
    found: list[_Source] = []
    if isinstance(model, Module) and id(model) in calls:
        call = calls[id(model)][1]
        found.append(_Source(call, "call", weakref.ref(model)))
        # a forward that is called as a module has no more inputs than that call, and what calls it may be the loop
        given = {*_parameters_of(code_of(model.forward))}
        methods = [each for each in methods if each.depth < call and not given >= {*each.names}]
    elif not isinstance(model, Module) and compiled is not None:
        found.append(compiled)
    found += reversed(methods)
    if isinstance(model, Module):
        outer = [(each, depth) for each, depth in calls.values() if each is not model and holds(each, model)]
        found += [_Source(depth, "call", weakref.ref(module)) for module, depth in outer[-1:]]
    return tuple(found if _read(tuple(found), stack) else functions[:2])


def _pipelines() -> tuple[type, ...]:
    names = (
        ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline"),
        ("diffusers.modular_pipelines.modular_pipeline", "ModularPipeline"),
    )
    return tuple(getattr(sys.modules[name], kind) for name, kind in names if name in sys.modules)


def _timesteps(scheduler: Any) -> Tensor | None:
    timesteps = getattr(scheduler, "timesteps", None)
    # before a loop sets them, a scheduler has those of its training
    is_set = getattr(scheduler, "num_inference_steps", None) is not None
    return timesteps if isinstance(timesteps, Tensor) and is_set else None


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _is_ours(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name.startswith(OURS)


def _is_of_torch(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name == "torch" or name.startswith("torch.")
