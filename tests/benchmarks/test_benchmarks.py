"""The GPU benchmarks as far as a machine without a GPU can take them, and the arithmetic behind their figures."""

import ast
import dataclasses
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path for path in BENCHMARKS.rglob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
BENCHMARK_MODULES = {path.stem for path in BENCHMARKS.rglob("*.py")}
REGISTERS_OPS = {
    path.stem for path in BENCHMARKS.rglob("*.py") if "torch.library.define" in path.read_text(encoding="utf-8")
}
"""These can be imported once in a process."""


@pytest.fixture
def module(monkeypatch):
    """Import a module of the benchmarks folder by name."""
    for folder in (BENCHMARKS, *BENCHMARKS.glob("*/")):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module


def run(script, *arguments):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(next(BENCHMARKS.rglob(script))), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture
def run_here(monkeypatch):
    """Run a script as a process of its own would without a GPU, but for the seconds in which that imports torch."""

    def run_here(script, *arguments):
        monkeypatch.setattr(sys, "path", [each for each in sys.path if not Path(each).is_relative_to(BENCHMARKS)])
        monkeypatch.setattr(sys, "argv", [script.name, *arguments])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for name in (BENCHMARK_MODULES - REGISTERS_OPS) & sys.modules.keys():
            monkeypatch.delitem(sys.modules, name)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            return end.code

    return run_here


@pytest.mark.parametrize(
    "script",
    [
        "gpu_kernels.py",
        "race_control.py",
        "tune_assignment.py",
        "tune_masses.py",
        "denoising_step.py",
        "dense_baselines.py",
        "host_time.py",
        "compare_attention.py another.py",
        "sanitize.py",
        "tensorrt_engines.py",
    ],
)
def test_without_a_gpu_it_says_so_and_succeeds(script, run_here, capsys):
    name, *arguments = script.split()
    assert not run_here(next(BENCHMARKS.rglob(name)), *arguments)
    assert "no GPU: " in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_explains_itself_and_names_the_path_it_has(script, run_here, capsys):
    assert f"python -P {script.relative_to(BENCHMARKS.parent)}" in ast.get_docstring(ast.parse(script.read_text()))
    assert run_here(script, "--help") == 0
    assert f"usage: {script.name}" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted(BENCHMARKS.rglob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_of_the_others_lies_in_its_folder_or_above_it(file):
    found = {BENCHMARKS, file.parent}
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in BENCHMARK_MODULES.intersection(names):
            assert any((folder / f"{name}.py").is_file() for folder in found), f"line {node.lineno}: {name}"


def test_no_two_modules_of_the_benchmarks_share_a_name():
    assert len(BENCHMARK_MODULES) == len(list(BENCHMARKS.rglob("*.py")))


def test_without_a_gpu_nothing_is_written(tmp_path):
    result = run("gpu_kernels.py", "--quick", "--heads", "3", "--out", str(tmp_path / "out.json"))
    assert result.returncode == 0, result.stderr
    assert "Wan 14B 720p" in result.stdout
    assert not (tmp_path / "out.json").exists()


def test_red_tests_are_not_followed_by_timings(module, monkeypatch, capsys):
    gpu_kernels = module("gpu_kernels")
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py"])
    monkeypatch.setattr(gpu_kernels, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu_kernels, "tests_are_green", lambda: False)
    monkeypatch.setattr(gpu_kernels, "measure", lambda *arguments: pytest.fail("timed on red tests"))
    assert gpu_kernels.main() == 1
    assert "nothing is timed" in capsys.readouterr().out


def test_a_failing_test_is_red(module, monkeypatch, tmp_path):
    gpu_kernels = module("gpu_kernels")
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    monkeypatch.setattr(gpu_kernels, "ROOT", tmp_path)
    assert not gpu_kernels.tests_are_green()
    file = tmp_path / "tests" / "kernels" / "test_some_triton.py"
    file.write_text("def test_it():\n    assert True\n")
    assert gpu_kernels.tests_are_green()
    file.write_text("def test_it():\n    assert False\n")
    assert not gpu_kernels.tests_are_green()


def test_a_measurement_calls_every_op_as_its_schema_wants_and_can_be_written(module, monkeypatch, capsys):
    from svg2_compile.kernels.tuning import AttentionTiles

    gpu_kernels = module("gpu_kernels")

    def call_once(function, rep_ms):
        """Attention takes 2 ms, everything else 1."""
        function()
        return 2.0 if getattr(function, "func", None) is torch.ops.svg2.block_sparse_attention else 1.0

    tiles = AttentionTiles(128, 64, 16, 8, 3)
    monkeypatch.setattr(gpu_kernels, "median_ms", call_once)
    monkeypatch.setattr(gpu_kernels, "attempt", call_once)
    monkeypatch.setattr(gpu_kernels, "device_median_ms", call_once)
    monkeypatch.setattr(gpu_kernels, "dense_ms", lambda *tensors: {"cuDNN": 1.0, "flash": "failed: for a test"})
    monkeypatch.setattr(gpu_kernels, "implementations", lambda dim: {"descriptor": tiles, "pointer": tiles})
    shape = module("shapes").Shape("Wan 14B 720p", 2, 300, 128, ((3, 10),))
    result = gpu_kernels.measure(shape, 2, (0.4,), 1.0, device="cpu")
    json.dumps(result)
    (overhead,), (attention,) = result["overhead"], result["attention"]
    # Clustering and selection, 1 ms each.
    assert overhead["percent_of_dense"] == {1: 200.0, 2: 200.0}
    assert attention["other_ms"] == {"pointer": 2.0}
    assert overhead["verdicts"][2] == "below gate (5/3/2.3)"
    assert attention["eps_sel"] == pytest.approx(attention["density"] / 2)
    assert attention["eps_tile"] > attention["eps_sel"]
    assert attention["speedup"] == 0.5
    assert "failed: for a test" in capsys.readouterr().out


def test_host_and_gpu_times_are_of_every_op(module, monkeypatch, capsys):
    host_time = module("host_time")
    monkeypatch.setattr(host_time, "host_ms", lambda call, repeats: call() is None or 3.0)
    monkeypatch.setattr(host_time, "device_median_ms", lambda call, rounds: 2.0)
    monkeypatch.setattr(host_time, "count_launches", lambda call: 7)
    result = host_time.measure(module("shapes").Shape("small", 2, 300, 64, ((3, 10),)), repeats=1, device="cpu")
    json.dumps(result)
    ops = ("cluster_tokens_", "select_blocks", "block_sparse_attention", "block_masses", "measure_recall")
    assert [result[op]["launches"] for op in ops] == [7] * 5 and result["select_blocks"]["device_ms"] == 2.0
    printed = capsys.readouterr().out
    assert all(op in printed for op in ops)


def test_versions_of_the_attention_are_compared_in_the_same_rounds(module, monkeypatch):
    compare_attention = module("compare_attention")
    calls = []
    monkeypatch.setattr(compare_attention, "device_ms", lambda call: calls.append(call) or 4.0)
    monkeypatch.setattr(compare_attention, "sdpa", lambda backend, *qkv: pytest.fail("timed outside the rounds"))

    def ours(*arguments):
        return torch.ops.svg2.block_sparse_attention(*arguments)

    def wrong(*arguments):
        out, lse = ours(*arguments)
        return out + 1, lse

    shape = module("shapes").Shape("small", 2, 300, 64, ((3, 10),))
    launchers = {compare_attention.OURS: ours, "wrong": wrong}
    (row,) = compare_attention.compare(shape, launchers, [0.4], rounds=2, device="cpu")
    json.dumps(row)
    assert row["same_bits"] == {compare_attention.OURS: True, "wrong": False}
    assert len(calls) == 2 * 3 and calls[3:] == calls[1:3] + calls[:1]
    assert row["eps_tile"]["wrong"] > row["eps_sel"]["wrong"] == pytest.approx(row["density"])
    assert "wrong 4.00 ms" in compare_attention.line(row) and "OTHER BITS" in compare_attention.line(row)


@pytest.fixture
def steps(module, monkeypatch):
    """Return the benchmark of steps for a CPU: a step takes 2 ms, half of it attention; nothing is compiled."""
    steps = module("denoising_step")
    for name, value in (("synchronize", None), ("empty_cache", None), ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2**30)

    def time_once_ms(function):
        function()
        return 2.0

    monkeypatch.setattr(steps, "DEVICE", "cpu")
    monkeypatch.setattr(steps, "time_once_ms", time_once_ms)
    monkeypatch.setattr(
        steps, "kernels_ms", lambda function: {"attention_gluon_kernel": 1.0, "sum_kernel": 0.5, "gemm": 0.5}
    )
    monkeypatch.setattr(steps, "compiled", lambda model, *rest: model)
    return steps


def test_every_kernel_of_ours_counts_to_attention_or_to_clustering(steps):
    pytest.importorskip("triton", reason="Triton is not installed")
    ours = {"_query_tiles_kernel": 1.0, "select_kernel": 2.0, "sums_kernel": 4.0, "mark_kernel": 8.0}
    kinds = steps.kinds_ms(ours | {"cudnn_generated_fort_native_sdpa": 16.0, "gemm": 32.0})
    assert kinds == {"attention": 17.0, "clustering": 14.0, "rest": 32.0}


@pytest.mark.parametrize("name", ["wan-14b-720p", "hunyuan-720p"])
def test_a_step_is_timed_dense_and_at_every_density_and_saved_each_time(steps, monkeypatch, capsys, name):
    spec = steps.MODELS[name]
    small = {"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 1, "patch_size": 1}
    if name == "wan-14b-720p":
        small |= {"ffn_dim": 16, "patch_size": (1, 2, 2)}
    else:
        small |= {"num_refiner_layers": 1, "rope_axes_dim": (4, 6, 6), "mlp_ratio": 1.0}
    spec = dataclasses.replace(spec, config=spec.config | small, latents=(1, 16, 1, 8, 8), tokens=64, clusters=(3, 5))
    monkeypatch.setitem(steps.MODELS, name, spec)
    saved, run = [], {"model": name}
    way = steps.Way(whole=False, cuda_graphs=True)
    steps.measure(run, way, [0.25, 0.5], 1, None, 2, lambda: saved.append(json.dumps(run)))
    assert [len(json.loads(each)["sparse"]) for each in saved] == [0, 1, 2]
    assert run["way"] == "layer by layer, CUDA graphs" and run["clusters"] == (3, 5)
    assert run["dense"]["kinds_ms"] == {"attention": 1.0, "clustering": 0.5, "rest": 0.5}
    quarter = run["sparse"]["0.25"]
    assert quarter["speedup"] == 1.0 and quarter["ideal"] == pytest.approx(1 / (0.5 + 0.25 / 2))
    asked = {"wan-14b-720p": "asked 1.85: missed", "hunyuan-720p": "asked 2.29: missed"}[name]
    assert asked in capsys.readouterr().out


def test_a_forced_selection_has_the_density_and_stays_where_it_is(steps):
    from svg2_compile.kernels.work_list import kept_keys

    with steps.Forced(2, 30_000, 20, 200, device="cpu") as forced:
        places = set()
        for density in (0.15, 0.4):
            forced.keep(density)
            places.add(tuple(each.data_ptr() for each in forced.selection))
            runs, counts = torch.ops.svg2_benchmarks.forced_selection(*forced.selection)
            assert kept_keys(runs, counts, 30_000).float().mean() == pytest.approx(density, abs=0.01)
        q_order, q_sizes, _ = torch.ops.svg2_benchmarks.forced_clusters(*forced.clusters)
    assert len(places) == 1
    assert torch.equal(q_order.sort(-1).values, torch.arange(30_000).expand(1, 2, -1))
    assert (q_sizes.sum(-1) == 30_000).all()
    assert not hasattr(steps.Forced, "entered")


@pytest.mark.parametrize("hides", [False, True], ids=["together", "each side by itself"])
def test_forced_stages_cluster_and_select_and_then_attend_to_what_is_forced(steps, hides):
    from torch.nn.functional import scaled_dot_product_attention

    torch._dynamo.reset()
    q, k, v = torch.randn((3, 1, 2, 300, 16), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(300) < 300).view(1, 1, 1, -1) if hides else None
    options = {"q_clusters": 4, "k_clusters": 12, "dense_steps": 0, "dense_layers": 0, "min_tokens": 64}

    def attend(q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, mask) + 0

    with torch.no_grad(), steps.Forced(2, 300, 4, 12, device="cpu") as forced:
        compiled = torch.compile(attend, backend=steps.forced_backend, options=options, fullgraph=True)
        everything, dense = compiled(q, k, v, mask), attend(q, k, v, mask)
        assert torch.allclose(everything, dense, atol=1e-5)
        forced.keep(0.3)
        less = compiled(q, k, v, mask)
    assert less.isfinite().all() and not torch.allclose(less, dense, atol=1e-2)


def test_dense_baselines_are_written_with_their_rates(module, monkeypatch, capsys):
    baselines = module("dense_baselines")

    def median_ms(function, rep_ms):
        function()
        return 2.0

    monkeypatch.setattr(baselines, "median_ms", median_ms)
    monkeypatch.setattr(baselines, "MATRIX", 64)
    monkeypatch.setattr(baselines, "COPIED_BYTES", 1000)
    monkeypatch.setattr(baselines, "dense_ms", lambda *arguments: {"cuDNN": 2.0, "flash": "failed: for a test"})
    assert baselines.ceilings(1.0, "cpu") == {"matmul_tflops": 2 * 64**3 / 2e9, "copy_gbs": 2 * 1000 / 2e6}
    record = baselines.dense_record(module("shapes").Shape("a shape", 2, 100, 64), 1.0, "cpu")
    assert record["tflops"] == {"cuDNN": 4 * 64 * 2 * 100**2 / 2e9}
    json.dumps(record)
    assert "failed: for a test" in capsys.readouterr().out


def test_the_goal_of_a_step_is_that_of_amdahl(module):
    targets = module("gpu_targets")
    # attention is 0.7 of the step: a quarter of the pairs at 0.8 of the efficiency, and 3 % of it for clustering
    goal = targets.step_goal("wan-14b-720p", 0.7, 0.25)
    assert goal.ideal == pytest.approx(2.11, abs=0.01) and goal.target == pytest.approx(1.85, abs=0.01)
    assert goal.asked == 1.85
    assert targets.step_goal("hunyuan-720p", 0.85, 0.25).target == pytest.approx(2.29, abs=0.01)
    assert targets.step_goal("hunyuan-720p", 0.85, 0.3).asked is None


@pytest.mark.parametrize("clusters", [1, 7, 500])
def test_sizes_add_up_and_labels_have_them(module, clusters):
    blocks = module("random_blocks")
    generator = torch.Generator().manual_seed(0)
    sizes = blocks.lognormal_sizes(generator, 2, 3, clusters, 1003)
    assert (sizes.sum(-1) == 1003).all()
    assert (sizes >= 0).all()
    labels = blocks.shuffled_labels(generator, sizes)
    counted = torch.nn.functional.one_hot(labels.long(), clusters).sum(2)
    assert torch.equal(counted.int(), sizes)


def test_random_blocks_reach_the_density(module):
    blocks, costs = module("random_blocks"), module("plan_costs")
    generator = torch.Generator().manual_seed(0)
    q_sizes = blocks.lognormal_sizes(generator, 1, 2, 20, 30_000)
    k_sizes = blocks.lognormal_sizes(generator, 1, 2, 200, 30_000)
    keep = blocks.random_blocks(generator, 0.25, k_sizes, 20)
    assert costs.selected_pairs(q_sizes, k_sizes, keep) / (2 * 30_000**2) == pytest.approx(0.25, abs=0.01)


def test_issued_pairs_are_counted_tile_by_tile(module):
    from svg2_compile.kernels.work_list import kept_runs_reference

    costs = module("plan_costs")
    q_sizes = torch.tensor([[[130, 0, 70]]], dtype=torch.int32)
    k_sizes = torch.tensor([[[40, 10, 150]]], dtype=torch.int32)
    keep = torch.tensor([[[[True, False, True], [True, True, True], [False, True, False]]]])
    counts = kept_runs_reference(keep, k_sizes).counts
    # 40 and 150 keys are 2 + 9 full pieces of 16 and 2 shorter ones; all 200 are 12 and one; 10 keys are one.
    assert costs.key_tiles(counts, 64, 16)[0, 0].tolist() == [4, 4, 1]
    # Of 64: 0 + 2 full ones and 2 shorter ones; 3 and one; one.
    assert costs.key_tiles(counts, 64, 64)[0, 0].tolist() == [4, 4, 1]
    assert costs.issued_pairs(q_sizes, counts, 128, 64, 16) == 128 * 64 * (2 * 4 + 1)
    # A group of 64 rows without queries multiplies nothing.
    assert costs.issued_pairs(q_sizes, counts, 64, 64, 16) == 64 * 64 * (3 * 4 + 2)
    assert costs.selected_pairs(q_sizes, k_sizes, keep) == 130 * 190 + 70 * 10


def test_the_tiles_of_the_masses_are_timed_on_what_the_op_takes(module):
    arguments = module("tune_masses").make_arguments(2, 300, 64, (3, 5), device="cpu")
    masses = torch.ops.svg2.block_masses(*arguments)
    assert masses.shape == (1, 2, 3, 5)
    torch.testing.assert_close(masses.sum(-1), torch.ones(1, 2, 3))


def test_a_newer_file_goes_before_an_older_one_and_a_file_with_nothing_new_is_left_out(module, monkeypatch):
    performance = module("performance_table")
    files = {"new": [1, 2], "older": [2, 3], "oldest": [1, 3]}
    monkeypatch.setattr(performance, "load", lambda name: {"rows": files[name], "file": name})
    found = performance.without_repeats(tuple(files), "rows", lambda row: row)
    assert found == [{"rows": [1, 2], "file": "new"}, {"rows": [3], "file": "older"}]


def test_verdicts_know_which_way_is_better(module):
    goal = module("gpu_targets").Goal
    assert [goal(0.6, 0.8, 0.9).verdict(value) for value in (0.59, 0.6, 0.8, 0.95)] == [
        "below gate",
        "gate",
        "target",
        "stretch",
    ]
    assert [goal(3, 2, 1).verdict(value) for value in (3.1, 3, 1.5, 0.5)] == ["below gate", "gate", "target", "stretch"]


def test_the_balance_is_that_of_a_queue(module):
    imbalance = module("planning_simulator").imbalance
    assert imbalance([1, 1, 1, 1], 2) == 1
    assert imbalance([1, 1, 2], 2) == 3 / 2
    assert imbalance([4], 2) == 2


def test_a_wave_reads_once_what_any_of_its_tiles_keeps(module):
    simulator = module("planning_simulator")
    q_tiles, k_sizes = torch.tensor([2, 0, 1]), torch.tensor([5, 7, 11])
    keep = torch.tensor([[True, False, False], [True, True, True], [True, False, True]])
    # Waves of two tiles: the first cluster's, then the last one's; the cluster without a tile reads nothing.
    assert simulator.wave_keys(simulator.Machine(128, 64, 16, 2), q_tiles, k_sizes, keep) == 5 + 16
    assert simulator.wave_keys(simulator.Machine(128, 64, 16, 3), q_tiles, k_sizes, keep) == 16


def test_keeping_everything_pads_only_the_last_tiles(module):
    simulator = module("planning_simulator")
    sizes = torch.full((1, 2, 2), 120, dtype=torch.int32)
    selection = simulator.Selection("a model", 2, 64, sizes, sizes, torch.ones(1, 2, 2, 2, dtype=torch.bool))
    cells = [cell.strip() for cell in simulator.row(simulator.Machine(128, 64, 16, 4), selection).split("|")[1:-1]]
    # 240 keys are 15 pieces of 16 and an empty one, 4 tiles of 64; 120 queries are a tile of 128.
    assert cells[:8] == ["a model", "2 / 2", "1.000", "1.067 pass", "1.067", "1.067", "1", "1.000 pass"]
    # 2 heads, 2 tiles, 240 keys of 64 numbers of 2 bytes, K and V; from afar K, V, Q and the result once.
    assert cells[8:10] == [f"{2 * 2 * 240 * 256 / 1e9:.3g}", f"{2 * 2 * 240 * 256 / 1e9:.3g}"]


def test_a_table_replaces_the_one_between_its_markers(module, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb\n")
    module("marked_table").write_between(page, "x", r"new \1")
    assert page.read_text() == "a\n<!-- x -->\nnew \\1\n<!-- end of x -->\nb\n"
    with pytest.raises(SystemExit, match="lacks the markers"):
        module("marked_table").write_between(page, "y", "")


def test_the_pages_have_the_performance_of_the_committed_figures(module):
    performance = module("performance_table")
    kernels, steps = performance.load_kernels(), performance.load_steps()
    assert len({result["shape"] for record in kernels for result in record["results"]}) == 4
    texts = performance.texts(kernels, steps, performance.load(performance.DENSE))
    assert [(page, marker) for page, marker, _ in texts] == [
        ("docs/measurements.md", "layers"),
        ("docs/measurements.md", "steps"),
        ("README.md", "headline"),
    ]
    for page, marker, text in texts:
        written = (performance.ROOT / page).read_text(encoding="utf-8")
        assert f"<!-- {marker} -->\n{text}\n<!-- end of {marker} -->" in written
    assert (performance.FIGURES / performance.PLOT).stat().st_size > 10_000


def test_timed_steps_get_a_table_and_a_plot(module, tmp_path):
    performance = module("performance_table")
    kernels = performance.load_kernels()
    kinds = {"attention": 20.0, "clustering": 2.0, "rest": 28.0}
    sparse = {"ms": 50.0, "speedup": 2.0, "ideal": 2.2, "peak_gib": 1.5, "kinds_ms": kinds}
    run = {"model": "hunyuan-720p", "way": "whole model", "layers": 3, "dense": {"ms": 100.0, "peak_gib": 1.0}}
    runs = [run | {"sparse": {"0.25": sparse, "0.15": sparse}}, run | {"sparse": {"0.4": sparse}}]
    record = {"environment": {"device": "a GPU", "torch": "2.11"}, "date": "today", "file": "steps.json", "runs": runs}
    row = performance.step_table(record)[-1]
    assert row == (
        "| HunyuanVideo, 720p, 3 layers of a kind | whole model | 100 ms | 50 ms | **2.00×** (2.20) | 20 ms | 2 ms | "
        "28 ms | 1.0 to 1.5 GiB |"
    )
    performance.plot(kernels, [record], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_quick_run_gets_no_table(module):
    performance = module("performance_table")
    kernels = performance.load_kernels()[0]
    with pytest.raises(SystemExit, match="from a quick run"):
        performance.kernel_table(kernels | {"options": {"quick": True}})


def test_the_sanitizers_cases_run_every_op(module, capsys):
    sanitize = module("sanitize")
    sanitize.run_cases("cpu")
    names = {line.split(",")[0] for line in capsys.readouterr().out.splitlines()}
    registered = {"cluster_tokens_", "kmeans_", "sort_labels", "permute_tokens", "unpermute_tokens", "select_blocks"}
    assert names == registered | {"block_sparse_attention"}


@pytest.mark.parametrize(
    ("statuses", "expected", "said"),
    [
        ([0, 0, 0], 0, "memcheck: nothing found; racecheck: nothing found"),
        ([0, 9, 0], 1, "memcheck: found something, see above; racecheck: nothing found"),
        ([0, 0, 255], 1, "memcheck: nothing found; racecheck: failed with status 255"),
        ([1], 1, "the cases fail without any tool"),
    ],
)
def test_what_the_sanitizer_finds_is_an_error(module, monkeypatch, capsys, statuses, expected, said):
    sanitize, commands = module("sanitize"), []

    def run(command, **options):
        commands.append(command)
        assert options["env"]["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        return subprocess.CompletedProcess(command, statuses[len(commands) - 1])

    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize.shutil, "which", lambda name, path: f"/bin/{name}")
    monkeypatch.setattr(sanitize.subprocess, "run", run)
    assert sanitize.main() == expected
    assert said in capsys.readouterr().out
    assert [command[2] for command in commands[1:]] == ["memcheck", "racecheck"][: len(commands) - 1]


def test_without_the_sanitizer_it_says_so(module, monkeypatch, capsys):
    sanitize = module("sanitize")
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize.shutil, "which", lambda name, path: None)
    assert sanitize.main() == 0
    assert "no compute-sanitizer" in capsys.readouterr().out


def test_what_the_sparse_variant_adds_is_a_share_of_the_medians(module):
    compile_time = module("compile_time")
    seconds = {"dense": (10.0, 12.0, 40.0), "sparse": (11.0, 13.0, 9.0), "both": (15.0, 30.0, 14.0)}
    runs = [
        {
            "mode": "regional",
            "caches": "cold",
            "variant": variant,
            "seconds": each,
            "passes_ms": {"match": 1.0, "fuse": 2.0},
        }
        for variant, found in seconds.items()
        for each in found
    ]
    (row,) = compile_time.medians(runs).values()
    assert row == {"dense": 12.0, "sparse": 11.0, "both": 15.0}
    assert compile_time.added(row) == pytest.approx(0.25)
    assert compile_time.table({"runs": runs}).splitlines()[2:] == [
        "| regional | cold | 3 | 12.0 | 11.0 | 15.0 | 25% | 3 |"
    ]


def test_a_mode_that_lacks_a_variant_has_no_row(module):
    runs = [{"mode": "regional", "caches": "cold", "variant": "dense", "seconds": 1.0}]
    assert module("compile_time").medians(runs) == {}


def test_the_cost_of_recall_is_timed_beside_the_attention():
    sizes = ("--heads", "1", "--tokens", "1024", "--dim", "16", "--dtype", "float32", "--rows", "8", "--repeats", "1")
    result = run("recall_cost.py", *sizes)
    assert result.returncode == 0, result.stderr
    assert "| recall on 8 rows |" in result.stdout
