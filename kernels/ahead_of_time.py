"""Kernels as their launchers compile them, for machines without a GPU. Imports without Triton."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svg2_compile.kernels.card import CARDS, PARTS, Part


@dataclass(frozen=True, slots=True)
class AotVariant:
    """One kernel as its launcher compiles it, so that a machine without a GPU can compile it too."""

    name: str
    """Unique in its module."""
    fn: Any
    """The ``triton.jit`` function."""
    signature: Mapping[str, str]
    """Type of every runtime argument, such as ``*bf16``, ``i32`` or ``fp32``."""
    constexprs: Mapping[str, object]
    """Value of every argument known at compile time: ``tl.constexpr`` ones, strides of 1, absent pointers."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Stages of the software pipeline."""
    divisible_by_16: tuple[str, ...] = ()
    """Runtime arguments that are multiples of 16: aligned pointers and most strides."""
    max_registers: int | None = None
    """Most registers of a thread. Told none, the assembler may spill a few to fit more programs into a processor."""

    def source_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of ``triton.compiler.ASTSource``."""
        names = self.fn.arg_names
        types = {**self.signature, **dict.fromkeys(self.constexprs, "constexpr")}
        return {
            "fn": self.fn,
            "signature": {name: types[name] for name in names},
            "constexprs": {(names.index(name),): value for name, value in self.constexprs.items()},
            "attrs": {(names.index(name),): [["tt.divisibility", 16]] for name in self.divisible_by_16},
        }


def kernel_modules() -> tuple[str, ...]:
    """Return the names of the modules with kernels, each once, in the order of the parts of an attention."""
    return tuple(dict.fromkeys(module for part in PARTS for module in _modules_of(part)))


def _modules_of(part: Part) -> list[str]:
    kernels = [card.kernels for card in CARDS.values() if card.part == part and card.kernels is not None]
    return [module for each in kernels for module in each.modules]


def variants_of(module: str, capability: int) -> list[AotVariant]:
    """Return the kernels of a module as they are compiled for a compute capability, such as 90 for 9.0."""
    variants: list[AotVariant] = importlib.import_module(f"svg2_compile.kernels.{module}").aot_variants(capability)
    return variants


def kernel_names(part: Part, capability: int = 90) -> tuple[str, ...]:
    """Return the names that a profile has for the kernels of a part of a sparse attention."""
    return tuple(sorted({each.fn.__name__ for name in _modules_of(part) for each in variants_of(name, capability)}))
