"""Tests stand alone: what several of them need is in ``tests/cases``. And they do not pay for what none looks at."""

import ast
import gc
import logging
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
TEST_MODULES = {path.stem: path for path in TESTS.rglob("test_*.py")}


def imported_by(path: Path) -> set[str]:
    """Return the first names of the modules that a file imports, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_no_test_module_is_imported():
    wrong = {str(path.relative_to(TESTS)): imported_by(path) & set(TEST_MODULES) for path in TESTS.rglob("*.py")}
    assert not {path: names for path, names in wrong.items() if names}


def test_torch_writes_no_trace_of_compilations_for_pytest():
    """A handler of its logger, whatever it does, makes torch write one: see ``conftest.py``."""
    assert torch.compile(torch.sin, backend="eager")(torch.zeros(1)) == 0
    handlers = logging.getLogger("torch.__trace").handlers
    assert not [each for each in handlers if type(each).__module__.startswith("_pytest")]


def test_the_collector_does_not_look_through_imports():
    assert gc.get_freeze_count() > 0
