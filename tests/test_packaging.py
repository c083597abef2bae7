"""What is installed is what is in the tree, and Hugging Face's `kernels` stays itself."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="reading pyproject.toml needs Python 3.11 or tomli")

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"svg2_compile": "svg2_compile", "svg2_compile.passes": "passes", "svg2_compile.kernels": "kernels"}


def setuptools_table() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_with_code_is_listed():
    folders = {
        str(path.parent.relative_to(ROOT)) for room in ROOMS.values() for path in (ROOT / room).rglob("__init__.py")
    }
    assert set(setuptools_table()["package-dir"].values()) == folders
    assert set(setuptools_table()["packages"]) == set(setuptools_table()["package-dir"])


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """The wheel, and what was said while it was built."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stdout


def test_building_the_wheel_prints_no_warning_about_packages_or_data(built):
    _, said = built
    about = ("is absent from the `packages`", "Package would be ignored", "package data", "package-data")
    assert not [line for line in said.splitlines() if any(each in line for each in about)]


def test_the_wheel_holds_every_module_and_data_file(built):
    wheel, _ = built
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in setuptools_table()["package-dir"].items():
        for file in (ROOT / folder).glob("*.py"):
            assert f"{package.replace('.', '/')}/{file.name}" in names
    assert "svg2_compile/py.typed" in names
    assert "svg2_compile/evaluation/templates/report.html.j2" in names
    assert "svg2_compile/tiny_wan/diffusion_pytorch_model.safetensors" in names
    assert not [name for name in names if name.startswith(("kernels/", "passes/"))]
    assert wheel.stat().st_size < 20_000_000


@pytest.mark.parametrize(
    "start", ["import kernels", "import svg2_compile, kernels", "import svg2_compile.kernels, kernels"]
)
def test_hugging_face_kernels_is_not_shadowed(start):
    code = f"{start}; import kernels; print(kernels.get_kernel.__module__.split('.')[0])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "kernels\n", done.stderr[-2000:]


@pytest.mark.parametrize("room", ["passes", "kernels"])
def test_a_room_imported_under_the_wrong_name_says_what_to_do(room):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); import {room}"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert f"import svg2_compile.{room}" in done.stderr


def test_the_backend_is_found_by_name():
    import torch

    assert "svg2" in torch._dynamo.list_backends()
