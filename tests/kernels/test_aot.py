"""Every Triton kernel compiles for the GPUs we name, without one, and keeps its registers to itself."""

import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
from triton_interpreter import INTERPRETED

from svg2_compile.kernels import ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.ahead_of_time import kernel_modules

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels" / "kernel_resources.py"
# `SVG2_AOT=all` compiles every kernel for every architecture; by default one of each kind, for time.
EVERYTHING = os.environ.get("SVG2_AOT") == "all"
pytestmark = pytest.mark.slow
ATTENTION = "^attention_(bf16_(64|128)_context|fp16_128)$"
EXAMINED_ABOVE = (
    "block_sparse_attention_triton",
    "block_sparse_attention_gluon",
    "block_sparse_attention_descriptor",
    "assign_gluon",
    "work_list_triton",
)


@pytest.fixture
def kernel_resources(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    for folder in SCRIPT.parents[:2]:
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("kernel_resources")


@pytest.fixture
def resources(kernel_resources, monkeypatch, tmp_path):
    """Return what compiles as the script's arguments say, in this process, and returns a record per kernel and GPU."""
    if INTERPRETED:
        pytest.skip("Triton interprets in this process; unset TRITON_INTERPRET to compile")

    def run_script(*arguments):
        path = tmp_path / "kernels.json"
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--json", str(path), *arguments])
        kernel_resources.main()
        return json.loads(path.read_text())["kernels"]

    return run_script


def assert_fits(kernels):
    assert kernels
    for kernel in kernels:
        assert kernel["shared_bytes"] <= kernel["shared_limit_bytes"], kernel
        assert not kernel["serialized"], kernel
        assert kernel["overwritten_operands"] == 0, kernel


def assert_spills_nothing(kernels):
    assert [kernel for kernel in kernels if kernel["spilled_bytes"]] == []


def test_attention_spills_nothing_on_ampere_and_hopper(resources):
    chosen = () if EVERYTHING else ("--match", ATTENTION)
    kernels = resources("--modules", "block_sparse_attention_pointer", "--arch", "80", "90", *chosen)
    assert_fits(kernels)
    assert_spills_nothing(kernels)


def test_the_hopper_attention_computes_exponentials_while_tensor_cores_work(resources):
    chosen = () if EVERYTHING else ("--match", "^attention_bf16_(64|128_context_mask)$")
    kernels = resources("--modules", "block_sparse_attention_gluon", "--arch", "90", *chosen)
    assert_fits(kernels)
    # The loop over full tiles, once for either group of warps; at head dimension 64 other groups' products overlap.
    assert {kernel["kernel"]: kernel["overlapped_loops"] >= 2 for kernel in kernels} == {
        kernel["kernel"]: "_128" in kernel["kernel"] for kernel in kernels
    }
    assert_spills_nothing(kernels)


def test_the_hopper_assignment_spills_nothing(resources):
    chosen = () if EVERYTHING else ("--match", "^assign_bf16_(64|128)$")
    kernels = resources("--modules", "assign_gluon", "--arch", "90", *chosen)
    assert_fits(kernels)
    assert_spills_nothing(kernels)


@pytest.mark.parametrize("arch", ["90", "100", "120"])
def test_the_attention_by_descriptors_spills_nothing_and_overlaps_its_exponentials(arch, resources):
    chosen = () if EVERYTHING else ("--match", "^attention_bf16_(64|128_context)$")
    kernels = resources("--modules", "block_sparse_attention_descriptor", "--arch", arch, *chosen)
    assert_fits(kernels)
    assert_spills_nothing(kernels)
    if arch == "90":
        # The loop over whole tiles.
        assert {kernel["overlapped_loops"] for kernel in kernels} == {1}


def test_query_tiles_spill_nothing_on_ampere_and_hopper(resources):
    kernels = resources("--modules", "work_list_triton", "--arch", "80", "90")
    assert_fits(kernels)
    assert_spills_nothing(kernels)


def test_what_compensates_spills_nothing_on_ampere_and_blackwell(resources):
    modules = ("pseudo_keys_triton", "cluster_means_triton", "log_dropped_sizes_triton")
    chosen = () if EVERYTHING else ("--match", "^(?!.*(fp32_d256|fp16|bf16_d256|c100)).*$")
    kernels = resources("--modules", *modules, "--arch", "80", "100", *chosen)
    assert_fits(kernels)
    assert_spills_nothing(kernels)


@pytest.mark.parametrize("module", [name for name in kernel_modules() if name not in EXAMINED_ABOVE])
def test_the_other_kernels_spill_nothing_at_usual_sizes_on_hopper(module, resources):
    chosen = () if EVERYTHING else ("--match", "^(?!.*(fp32|fp16|256|kernel_d80|c(100|200)_given)).*$")
    kernels = resources("--modules", module, "--arch", "90", *chosen)
    assert_fits(kernels)
    assert_spills_nothing(kernels)


def test_selection_among_up_to_256_clusters_spills_nothing_on_ampere(resources):
    kernels = resources(
        "--modules",
        "select_blocks_triton",
        "--arch",
        "86",
        "--match",
        "_d(64|128)_c(32|200)$",
    )
    assert_fits(kernels)
    assert_spills_nothing(kernels)


def test_the_table_in_the_docs_has_the_kernels_that_its_command_compiles(kernel_resources):
    page = (SCRIPT.parents[2] / "docs" / "kernels.md").read_text()
    (command,) = re.findall(r"`python -P benchmarks/kernels/kernel_resources\.py --arch ([\d ]+)`", page)
    (match,) = re.findall(r"`--match '(.*?)'`", page)
    archs = [int(arch) for arch in command.split()]
    wanted = {
        f"{kernel_resources.label_of(module)}: {variant.name}"
        for module, _, variant in kernel_resources.chosen_variants(None, archs, match)
    }
    _, table, _ = re.split("<!-- (?:end of )?kernel resources -->", page)
    assert set(re.findall(r"^\| (\w+: \w+) \|", table, re.MULTILINE)) == wanted


def test_a_spill_is_what_is_loaded_again(kernel_resources):
    is_stack_read = kernel_resources.is_stack_read
    # From functions around a shuffle, and before a call that takes an argument on the stack.
    assert is_stack_read("STL [R1], R0 ;\nSHFL.UP PT, R48, R25, R48, R53 ;\nLDL.LU R0, [R1] ;")
    assert not is_stack_read("STL.64 [R1], RZ ;\nLDC.64 R10, c[0x4][R0] ;\nCALL.ABS.NOINC R10 ;\nLDG.E R1, [R2] ;")


@pytest.mark.skipif(not EVERYTHING, reason="set SVG2_AOT=all to compile what autotuning would time")
def test_no_candidate_of_the_autotuning_spills(resources):
    kernels = resources("--candidates", "--arch", "80", "86", "89", "90", "100", "120")
    assert_fits(kernels)
    assert_spills_nothing(kernels)


@pytest.mark.skipif(not EVERYTHING, reason="set SVG2_AOT=all to compile everything for every architecture")
def test_everything_compiles_everywhere_and_spills_nothing(resources):
    kernels = resources("--arch", "80", "86", "89", "90", "100", "120")
    assert_fits(kernels)
    assert_spills_nothing(kernels)
