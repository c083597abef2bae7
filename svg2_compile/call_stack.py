"""What the Python frames above a compiled graph tell, while it runs: whose forward it is, its inputs, and its loop.

Frames are only read, and only when a forward begins or a layer is met for the first time.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.weak import WeakIdKeyDictionary

from svg2_compile.branches import Identity
from svg2_compile.clock import Loop
from svg2_compile.dynamo import COMPILED_CALL, MODULE_CALLS, RESUMED, uncompiled, version_of

OURS = "svg2_compile."
MOST_LEAVES = 256
DEEPEST = 3
"""Containers inside containers that are looked into for inputs."""

_numbers: Any = WeakIdKeyDictionary()
_next_number = itertools.count(1)
_schedules: Any = WeakIdKeyDictionary()
_lock = threading.Lock()


def frames() -> list[FrameType]:
    """Return the frames that lead here, the innermost first, less our own.

    Reading the variables of a frame of ours, which holds frames, would make a cycle that keeps the caller's latents.
    """
    found: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith(OURS):
            found.append(frame)
        frame = frame.f_back
    return found


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
    forward = inspect.unwrap(getattr(module.forward, "__func__", module.forward))
    is_forward = getattr(forward, "__code__", None) is code or code.co_name == "forward"
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


def inputs_of_forward(model: object, stack: list[FrameType]) -> list[tuple[str, Any]]:
    """Return the named inputs of the outermost call of ``model`` on the stack, nested ones too.

    Where no call of it is in sight, as where a function runs its layers, the variables of the nearest two functions.
    """
    calls: dict[int, tuple[Any, FrameType]] = {}
    methods: list[FrameType] = []
    functions: list[FrameType] = []
    compiled: FrameType | None = None
    for frame in stack:
        name = frame.f_code.co_name
        if name in MODULE_CALLS:
            module = uncompiled(frame.f_locals["self"])
            calls[id(module)] = module, frame
        elif name == COMPILED_CALL:
            compiled = compiled or frame
        elif not _is_of_torch(frame):
            first = _first_argument(frame)
            if first is model:
                methods.append(frame)
            elif not isinstance(first, Module):
                functions.append(frame)
    found: list[tuple[str, Any]] = []
    if id(model) in calls:
        module, frame = calls[id(model)]
        found += bound(module.forward, frame.f_locals["args"], frame.f_locals["kwargs"])
    elif not isinstance(model, Module) and compiled is not None:
        function = compiled.f_locals.get("fn")
        found += bound(function, compiled.f_locals["args"], compiled.f_locals["kwargs"])
    for frame in reversed(methods):
        names = frame.f_code.co_varnames[1 : frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
        found += [(name, frame.f_locals[name]) for name in names if name in frame.f_locals]
    if isinstance(model, Module):
        outer = [(each, frame) for each, frame in calls.values() if each is not model and holds(each, model)]
        for module, frame in outer[-1:]:
            found += bound(module.forward, frame.f_locals["args"], frame.f_locals["kwargs"])
    if not found:
        found = [item for frame in functions[:2] for item in frame.f_locals.items()]
    return leaves(found)


def bound(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return arguments by the names of a function's parameters, or by their places where that has none."""
    inner = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(inner, "__code__", None)
    names: tuple[str, ...] = () if code is None else code.co_varnames[: code.co_argcount]
    if hasattr(function, "__self__"):
        names = names[1:]
    return [(names[place] if place < len(names) else str(place), each) for place, each in enumerate(args)] + [
        *kwargs.items()
    ]


def leaves(inputs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the tensors and numbers among inputs, in containers too, by name and place; weights are left out."""
    found: dict[str, Any] = {}
    for name, value in inputs:
        for inner, each in itertools.islice(_leaves(name, value, 0), MOST_LEAVES):
            found.setdefault(inner, each)
    return list(itertools.islice(found.items(), MOST_LEAVES))


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


def identities(inputs: list[tuple[str, Any]]) -> dict[str, Identity]:
    """Return what tells the tensors among inputs from all others that were ever seen, also from what they held."""
    return {name: _identity(value) for name, value in inputs if isinstance(value, Tensor)}


def _identity(value: Tensor) -> Identity:
    with _lock:
        number = _numbers.get(value)
        if number is None:
            number = _numbers[value] = next(_next_number)
    return number, version_of(value)


def largest(inputs: list[tuple[str, Any]]) -> Tensor | None:
    """Return the first of the largest tensors, which are the latents."""
    return max((value for _, value in inputs if isinstance(value, Tensor)), key=Tensor.numel, default=None)


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
        return None if self.timesteps is None or self.timesteps in _schedules else self.timesteps

    def told(self, levels: list[float]) -> Loop:
        """Return what it tells; ``levels`` are those of ``unread``, kept for the rest of the generation."""
        if self.unread is not None and levels:
            _schedules[self.timesteps] = tuple(levels)
        schedule = () if self.timesteps is None else _schedules.get(self.timesteps, ())
        number = None if self.timesteps is None else _identity(self.timesteps)[0]
        # samplers that ask twice at a level have it twice in their schedule
        twice = len(schedule) - len(set(schedule))
        total = len(set(schedule)) or None if self.total is None else max(1, self.total - twice)
        kind = "scheduler" if self.pipeline is None else "pipeline"
        return Loop(kind, (self.call, number), total, schedule)


def loop_on(stack: list[FrameType]) -> StackedLoop | None:
    """Return the innermost pipeline of diffusers that is being called, or else a scheduler among the variables."""
    pipelines = tuple(
        getattr(sys.modules[name], kind)
        for name, kind in (
            ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline"),
            ("diffusers.modular_pipelines.modular_pipeline", "ModularPipeline"),
        )
        if name in sys.modules
    )
    module = sys.modules.get("diffusers.schedulers.scheduling_utils")
    if module is None:
        return None
    scheduler: Any = None
    for frame in stack:
        if _is_of_torch(frame):
            continue
        variables = frame.f_locals
        owner = variables.get("self")
        if frame.f_code.co_name == "__call__" and isinstance(owner, pipelines):
            total = getattr(owner, "_num_timesteps", None)
            timesteps = _timesteps(getattr(owner, "scheduler", None))
            return StackedLoop(owner, id(frame), timesteps, int(total) if total else None)
        if scheduler is None:
            scheduler = next((each for each in variables.values() if isinstance(each, module.SchedulerMixin)), None)
    timesteps = _timesteps(scheduler)
    return None if timesteps is None else StackedLoop(None, 0, timesteps, None)


def _timesteps(scheduler: Any) -> Tensor | None:
    timesteps = getattr(scheduler, "timesteps", None)
    # before a loop sets them, a scheduler has those of its training
    is_set = getattr(scheduler, "num_inference_steps", None) is not None
    return timesteps if isinstance(timesteps, Tensor) and is_set else None


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _is_of_torch(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name == "torch" or name.startswith("torch.")
