"""The rooms and the one direction of their imports; and what importing us must not do."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "kernels": ("svg2_compile.passes", "diffusers", "torch.fx", "torch._dynamo", "torch._inductor"),
    "passes": ("diffusers", "triton", "torch._dynamo", "torch._inductor"),
}
ROOMS_OF_THE_API = {path.parent.name for path in (ROOT / "svg2_compile").glob("*/__init__.py")}
API = sorted({path.stem for path in (ROOT / "svg2_compile").glob("*.py")} - {"__init__"} | ROOMS_OF_THE_API)
ARROWS = {
    "core": (),
    "tiny_wan": (),
    "video": ("core", "tiny_wan"),
    "explaining": ("core", "tiny_wan"),
    "evaluation": ("core", "tiny_wan", "video"),
    "calibration": ("core", "tiny_wan", "video", "evaluation"),
    "tensorrt": ("cut_graphs", "dynamo", "frames", "region"),
}
"""The rooms of the API room, and what each may import; the core is the flat files, and single files are of the core."""
LAZILY = {"backend": ("tensorrt",), "cli": ("calibration", "explaining", "evaluation", "tiny_wan", "video")}
"""What files of the core import where it is asked for, inside a function."""
MODULES = sorted(path for room in ("kernels", "passes", "svg2_compile") for path in (ROOT / room).rglob("*.py"))


def imports_of(path: Path, inside_functions: bool = True) -> set[str]:
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in ast.walk(tree) if inside_functions else top_level(tree):
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


def top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs at import; not what only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not is_for_types and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from top_level(node)


def part_of(module: str) -> tuple[str, str]:
    """Return the room inside the API room and the file, which counts in the core only; empty for what is not ours."""
    _, *parts = module.split(".")
    room = parts[0] if parts else "__init__"
    is_ours = module.split(".")[0] == "svg2_compile" and room not in ("kernels", "passes")
    if not is_ours:
        return "", ""
    return (room, room) if room in ARROWS else ("core", room)


@pytest.mark.parametrize("path", sorted((ROOT / "svg2_compile").rglob("*.py")), ids=lambda path: path.name)
def test_rooms_of_the_api_room_import_one_way(path):
    folder = path.relative_to(ROOT).parts[1:-1]
    room = folder[0] if folder else "core"
    allowed = {room, *ARROWS[room]}
    now = imports_of(path, inside_functions=False)
    later = imports_of(path) - now if path.stem != "__init__" else set()
    for names, more in ((now, ()), (later, LAZILY.get(path.stem, ()) if room == "core" else ())):
        wrong = [name for name in names if any(part_of(name)) and not (allowed | {*more}) & {*part_of(name)}]
        assert not wrong, f"{room} must not import {sorted(wrong)}"


def test_the_core_enters_no_room_before_it_is_asked_to():
    rooms = tuple(f"svg2_compile.{room}" for room in ARROWS)
    code = f"""
import sys
import svg2_compile.backend, svg2_compile.reporting, svg2_compile.cli, svg2_compile.doctor
print([name for name in sys.modules if name.startswith({rooms})])
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr[-2000:]


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
