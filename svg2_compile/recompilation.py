"""When Dynamo compiles a piece of code again, and when it stops doing so.

Compiled code is found again for as long as its guards hold. One guard more holds as long as the defaults do that its
options left to ``configure``; when they change back, what was compiled under them is found again. Whoever tries many
settings gets all of them compiled: where places run out, what was compiled under earlier ones is dropped.

Dynamo keeps ``recompile_limit`` graphs of a piece of code. Beyond that it runs the code as it stands, dense: the report
says so when no place is left, and the first call that runs so warns; under ``on_unsupported="error"`` it fails.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from svg2_compile import options as defaults
from svg2_compile.dynamo import CompiledCode, Limit, call_before_compiling, code_under_compilation, guard_attribute
from svg2_compile.passes.errors import UnsupportedError
from svg2_compile.region import DenseGraph, Region

log = logging.getLogger(__name__)

Backend = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _Watched:
    """A piece of code that this backend compiles."""

    code: CompiledCode
    root: type[torch.nn.Module] | None
    """Whose code it is: one piece of code serves every module of a class."""
    settings: dict[str, tuple[str, str]] = field(default_factory=dict)
    """For each compilation, the attribute of ``in_force`` that it depends on, and what that said."""
    dropped: list[Region | DenseGraph] = field(default_factory=list)
    """What ran before its graphs were dropped: a report still tells of it, until the code is compiled again."""
    warnings: list[str] = field(default_factory=list)
    """What was said of it since then."""

    def serves(self, module: type[torch.nn.Module]) -> bool:
        """Say whether modules of a class run this code."""
        if self.root is None or not issubclass(module, self.root):
            return False
        return getattr(module, self.code.name, None) is getattr(self.root, self.code.name, None)

    def made(self, graph: Region | DenseGraph) -> bool:
        """Say whether a graph may be one of this code."""
        root = None if graph.owner.root is None else graph.owner.root()
        return root is not None and self.serves(type(root))

    def out_of_places(self, limit: Limit) -> str:
        """Say what follows from the limit, and what helps."""
        owner = "" if self.root is None else f"{self.root.__name__}."
        return (
            f"{owner}{self.code.name} is compiled {limit.value} times, as often as {limit.setting} allows; Dynamo does "
            "not recompile it for further sizes and settings, which run uncompiled and dense: set "
            f"{limit.setting} higher"
        )


_watched: Any = WeakIdKeyDictionary()
"""By code object."""
_wrappers: Any = WeakIdKeyDictionary()
"""Backends that call this one in their turn, and whether they asked to be told what stays dense."""


def watch(options: dict[str, Any] | None, root: torch.nn.Module | None, backend: Backend) -> None:
    """Watch over the code that Dynamo is compiling; to be called by the backend itself.

    Args:
        options: as the backend was given them.
        root: the module whose code it is.
        backend: the function that ``torch.compile`` calls.
    """
    code = code_under_compilation()
    if code is None:
        return
    name = defaults.name_in_force(options)
    guard_attribute(defaults.__name__, "in_force", name)
    before = _watched.get(code.code)
    each = _Watched(code, None if root is None else type(root), before.settings if before else {})
    each.settings[code.compilation] = name, getattr(defaults.in_force, name)
    _watched[code.code] = each
    if code.called(backend) is None:
        _wrappers[code.backend] = _asks_to_be_told(options)
    _backends.add(backend)
    call_before_compiling(_before_compiling)


_backends: set[Backend] = set()


def exhausted(model: torch.nn.Module) -> Iterator[str]:
    """Say of each piece of code of a model that has no place left for another graph what follows, and what helps."""
    classes = {type(module) for module in model.modules()}
    for each in list(_watched.values()):
        if any(each.serves(one) for one in classes) and (limit := each.code.limit_reached()):
            yield each.out_of_places(limit)


def _make_room(changed: set[str]) -> None:
    """Drop the graphs of code that has fewer places left than a setting has taken so far."""
    for each in list(_watched.values()):
        graphs = Counter(each.settings[kept] for kept in each.code.compilations() & each.settings.keys())
        names = {name for name, _ in graphs} & changed
        missing = [max(graphs.values()) - graphs[name, getattr(defaults.in_force, name)] for name in names]
        if missing and max(missing) > 0 and each.code.limit_reached(max(missing)):
            each.dropped.extend(graph for graph in (*Region.instances, *DenseGraph.instances) if each.made(graph))
            each.code.forget()


defaults.call_when_changed(_make_room)


def _asks_to_be_told(options: dict[str, Any] | None) -> bool:
    ours, _ = defaults.split_options(options)
    return ours.sparse.on_unsupported == "error"


def _before_compiling() -> str:
    """Raise where the code that Dynamo is about to compile has no place left, and who compiles it asked to be told."""
    code = code_under_compilation()
    limit = None if code is None else code.limit_exceeded()
    if code is None or limit is None:
        return ""
    given = next((given for each in _backends if (given := code.called(each)) is not None), None)
    if given is None and code.backend not in _wrappers:
        return ""
    each = _watched.setdefault(code.code, _Watched(code, code.root))
    told = each.out_of_places(limit)
    if _wrappers[code.backend] if given is None else _asks_to_be_told(given.get("options")):
        raise UnsupportedError(f'{told}, or set on_unsupported="dense" to accept that')
    if told not in each.warnings:
        each.warnings.append(told)
        log.warning("%s", told)
    return ""
