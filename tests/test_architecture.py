"""The rooms and the one direction of their imports; and what importing us must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "kernels": ("svg2_compile.passes", "diffusers", "torch.fx", "torch._dynamo", "torch._inductor"),
    "passes": ("diffusers",),
}
API = sorted({path.stem for path in (ROOT / "svg2_compile").glob("*.py")} - {"__init__"} | {"tiny_wan"})
MODULES = sorted(path for room in ("kernels", "passes", "svg2_compile") for path in (ROOT / room).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    forbidden = FORBIDDEN.get(room, ())
    if room in FORBIDDEN:
        forbidden += tuple(f"svg2_compile.{module}" for module in API)
    wrong = {name for name in imports_of(path) if name.startswith(forbidden)} if forbidden else set()
    assert not wrong, f"{room} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_say_something(path):
    assert path.stem not in ("utils", "helpers", "common", "misc", "core", "base")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_prints_or_unpickles(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "torch.load", "pickle.load", "pickle.loads", "eval", "exec"), ast.unparse(
                node
            )


def test_importing_the_backend_changes_one_global_only():
    code = """
import torch, logging, diffusers
from diffusers.models.cache_utils import CacheMixin
import torch._inductor.config as inductor, torch._dynamo.config as dynamo
def state():
    return (inductor.get_config_copy(), dynamo.get_config_copy(), torch.backends.cuda.flash_sdp_enabled(),
            torch.get_num_threads(), logging.getLogger().level, list(logging.getLogger().handlers),
            torch.nn.functional.scaled_dot_product_attention, torch.is_grad_enabled(), torch.initial_seed())
before, context = state(), CacheMixin.cache_context
import svg2_compile.backend
after = state()
print(before == after, CacheMixin.cache_context is not context)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "True True\n", done.stdout + done.stderr[-2000:]
