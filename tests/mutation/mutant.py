"""What a planted bug is; the bugs themselves stand beside the tests that must notice them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One bug: ``original`` occurs exactly once in ``file`` and becomes ``replacement``."""

    bug: str
    file: str
    original: str
    replacement: str
    tests: tuple[str, ...]

    @property
    def room(self) -> str:
        """The first folder of ``file``."""
        return self.file.split("/")[0]


def all_mutants() -> list[Mutant]:
    """Return the mutants of every room: ``MUTANTS`` of the files ``tests/<room>/mutants*.py``."""
    found: list[Mutant] = []
    for path in sorted(TESTS.glob("*/mutants*.py")):
        spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += module.MUTANTS
    return found
