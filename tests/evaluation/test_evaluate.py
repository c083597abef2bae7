"""``svg2 evaluate``: every figure is there, a killed run goes on, bad input and a full disk are told clearly."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_folders
import torch
from headless_browser import BROWSER, Browser
from typer.testing import CliRunner

from svg2_compile.cli import app
from svg2_compile.evaluation import evaluation as evaluate
from svg2_compile.evaluation import page as evaluation_page
from svg2_compile.evaluation import pipelines
from svg2_compile.evaluation.errors import EvaluationError
from svg2_compile.evaluation.ledger import Ledger
from svg2_compile.evaluation.pipelines import Size
from svg2_compile.video import measure, quality

STEPS = 4
CONFIGURATION = "top_p=0.5,min_tokens=64,dense_layers=0,dense_steps=1,lowering=eager"
NAME = "half"
PROMPTS = ("a cat walks on the grass", '<script>alert("boat")</script> sails')
SIZE = ("--frames", "5", "--height", "128", "--width", "128", "--steps", str(STEPS))


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def message(done) -> str:
    return " ".join(done.output.split())


def records(out: Path, kind: str) -> list[dict]:
    lines = (out / "results.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline with two denoising models, as Wan 2.2."""
    return tiny_folders.save(lambda: tiny_folders.wan(experts=2), tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def killed_then_finished(folder, tmp_path_factory):
    """Arguments, folder, what the killed process had written, and how the second run ended."""
    out = tmp_path_factory.mktemp("evaluation")
    (out / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = (folder, "--prompts", out / "prompts.txt", *SIZE, "--config", f"{NAME}:{CONFIGURATION}", "--out", out)
    command = [sys.executable, "-P", "-m", "svg2_compile", "evaluate", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    results = out / "results.jsonl"
    deadline = time.monotonic() + 240
    while not results.exists() or results.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline, "ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = results.read_bytes()
    # as if the kill had come in the middle of a line
    results.write_bytes(before + b'{"key": "half a li')
    return arguments, out, before, run(*arguments)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_recomputes_nothing(killed_then_finished):
    arguments, out, before, done = killed_then_finished
    assert done.exit_code == 0, done.output
    after = (out / "results.jsonl").read_bytes()
    assert after.startswith(before[: before.rfind(b"\n") + 1])
    keys = [json.loads(line)["key"] for line in after.splitlines()]
    # rehearsal; three ways for each prompt; one measurement of speed; two comparisons for each prompt
    assert len(keys) == len(set(keys)) == 1 + 3 * 2 + 1 + 2 * 2
    assert run(*arguments).exit_code == 0
    assert (out / "results.jsonl").read_bytes() == after


@pytest.mark.slow
def test_every_figure_is_in_the_results(killed_then_finished):
    _, out, _, done = killed_then_finished
    assert done.exit_code == 0, done.output
    (rehearsal,) = records(out, "rehearsal")
    assert (rehearsal["frames"], rehearsal["height"], rehearsal["width"]) == (5, 128, 128)
    assert rehearsal["flops"]["transformer"] > 0
    (speed,) = records(out, "speed")
    assert speed["step_speedup"] > 0 and speed["loop_speedup"] > 0
    assert speed["predicted_step_speedup"] > 1
    for split in speed["split"].values():
        assert sum(split.values()) == pytest.approx(1)
        assert split["attention"] > 0
    assert speed["split"]["dense"]["clustering"] == 0 < speed["split"]["sparse"]["clustering"]
    assert speed["peak_memory_gib"] is None
    generations = records(out, "generation")
    assert {each["configuration"] for each in generations} == {evaluate.EAGER, evaluate.DENSE, NAME}
    for each in generations:
        assert len(each["step_seconds"]) == STEPS
    for each in generations:
        if each["configuration"] == NAME:
            density = each["heads"]["density"]
            assert {path.split(".")[0] for path in density} == {"blocks", "transformer_2"}
            assert all(len(steps) == STEPS and steps[0] is None for steps in density.values())
            heads = [value for steps in density.values() for row in steps if row for value in row]
            assert heads and all(0 < value < 1 for value in heads)
            recall = each["heads"]["recall"]
            assert {path: [row is None for row in steps] for path, steps in recall.items()} == {
                path: [row is None for row in steps] for path, steps in density.items()
            }
            assert 0 < each["report"]["recall"] < 1
            assert 0 < each["report"]["density"] < each["report"]["density_with_dense_calls"] < 1
    comparisons = records(out, "comparison")
    for each in comparisons:
        assert len(each["psnr_db_per_frame"]) == len(each["ssim_per_frame"]) == 5
        assert each["lpips"] is None and "LPIPS is skipped" in each["lpips_missing"]
    floor, sparse = (
        [each["psnr_db"] for each in comparisons if each["configuration"] == name] for name in (evaluate.EAGER, NAME)
    )
    assert min(each or 200 for each in floor) > max(sparse)


@pytest.mark.slow
def test_the_console_shows_the_table_and_why_a_metric_is_skipped(killed_then_finished):
    *_, done = killed_then_finished
    for text in (
        "step faster",
        "PSNR, dB",
        "LPIPS is skipped",
        "Peak memory is not measured on the CPU",
        "report.html",
    ):
        assert text in message(done)


@pytest.mark.slow
def test_the_page_is_one_file_and_prompts_are_text_in_it(killed_then_finished):
    _, out, _, done = killed_then_finished
    assert done.exit_code == 0, done.output
    page = (out / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(&#34;boat&#34;)" in page
    for source in page.split('src="')[1:]:
        assert source.startswith(("data:image/png;base64,", "data:video/mp4;base64,"))
    assert "http" not in page.replace("http-equiv", "")


MEDIA = """Promise.all([...document.querySelectorAll('video')].map(video => video.readyState || new Promise(done => {
    video.onloadedmetadata = video.onerror = done }))).then(() => ({
    images: [...document.images].map(image => image.naturalWidth),
    videos: [...document.querySelectorAll('video')].map(video => video.videoWidth),
    width: document.documentElement.scrollWidth, inside: document.documentElement.clientWidth,
    title: document.title, smallest: Math.min(...[...document.querySelectorAll('p, td, th, figcaption')].map(
        each => parseFloat(getComputedStyle(each).fontSize))) }))"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
def test_a_real_browser_shows_the_page_without_complaint(killed_then_finished, tmp_path):
    _, out, _, done = killed_then_finished
    assert done.exit_code == 0, done.output
    with Browser(tmp_path / "profile", width=1280) as browser:
        browser.open(out / "report.html")
        page = browser.evaluate(MEDIA)
        browser.screenshot(tmp_path / "page.png")
        assert browser.complaints() == []
        assert all(each.startswith(("data:", "file:")) for each in browser.requests()), browser.requests()
    # curve and times; at least two heat maps; for each prompt the frames and the curves of the frames
    assert len(page["images"]) >= 2 + 2 + 2 * 2 and min(page["images"]) > 300
    assert page["videos"] == [128] * 4
    assert page["width"] <= page["inside"] <= 1280, "the page is wider than the window"
    assert page["smallest"] >= 14
    assert page["title"].startswith("svg2 evaluate: ")
    assert (tmp_path / "page.png").stat().st_size > 50_000


def settings(folder, out, **more):
    given = {"size": Size(5, 128, 128, 2), "configurations": (evaluate.Configuration("a", {"min_tokens": 64}),)}
    return evaluate.EvaluationSettings(
        **{"model": str(folder), "out": out, "prompts": PROMPTS, "seeds": (0,), **given, **more}
    )


def test_a_crash_in_the_middle_keeps_what_is_finished(folder, tmp_path, monkeypatch):
    generate, calls = evaluate.generate, []

    def second_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("the GPU fell off the bus")
        return generate(*arguments)

    monkeypatch.setattr(evaluate, "generate", second_fails)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    done = run(folder, "--prompts", tmp_path / "p.txt", *SIZE, "--config", CONFIGURATION, "--out", tmp_path / "out")
    assert done.exit_code == 1 and "fell off the bus" in str(done.exception)
    assert "stopped: 2 finished results are kept" in message(done)
    assert "run the same command again to go on" in message(done)
    (kept,) = records(tmp_path / "out", "generation")
    assert kept["prompt"] == PROMPTS[0]
    assert Ledger(tmp_path / "out").pixels(kept["key"]).shape == (5, 3, 128, 128)


def test_other_settings_are_kept_apart(folder, tmp_path, monkeypatch):
    def key(**more):
        evaluation = evaluate.Evaluation(settings(folder, tmp_path, **more))
        return evaluation.generation_key(evaluation.settings.configurations[0], PROMPTS[0], 0)

    same = key()
    assert key() == same
    assert key(size=Size(5, 128, 128, 3)) != same
    assert key(dtype="float16") != same
    assert key(configurations=(evaluate.Configuration("a", {"min_tokens": 65}),)) != same
    # a name is no setting
    assert key(configurations=(evaluate.Configuration("b", {"min_tokens": 64}),)) == same
    monkeypatch.setattr(evaluate, "describe_environment", lambda: {"device": "another GPU"})
    assert key() != same


def test_a_full_disk_is_told_and_what_is_finished_stays(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path)
    ledger.add("one", {"kind": "generation"}, torch.rand(2, 3, 8, 8))
    before = (tmp_path / "results.jsonl").read_bytes()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    for pixels in (None, torch.rand(2, 3, 8, 8)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(
                EvaluationError, match=r"No space left on device; 1 finished results there are whole: make"
            ):
                ledger.add("two", {"kind": "generation"}, pixels)
        assert (tmp_path / "results.jsonl").read_bytes() == before
        assert [path.name for path in (tmp_path / "frames").iterdir()] == ["one.safetensors"]
    ledger.add("two", {"kind": "generation"})
    assert set(Ledger(tmp_path).records) == {"one", "two"}


def test_a_really_full_file_system_is_told(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        ledger = Ledger(tmp_path)
        ledger.add("small", {"kind": "generation"}, torch.rand(1, 3, 16, 16))
        with pytest.raises(EvaluationError, match="No space left on device"):
            ledger.add("large", {"kind": "generation"}, torch.rand(8, 3, 128, 128))
        assert Ledger(tmp_path).pixels("small").shape == (1, 3, 16, 16)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("line", ["hello", "[1]", '"key"', "{}", '{"key": 1}', "\xff"])
def test_a_line_that_is_no_result_is_refused(tmp_path, line):
    (tmp_path / "results.jsonl").write_bytes(b'{"key": "a"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(EvaluationError, match="line 2, is no result of svg2 evaluate"):
        Ledger(tmp_path)


def test_missing_frames_are_made_again(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add("one", {"kind": "generation"}, torch.rand(1, 3, 8, 8))
    (tmp_path / "frames" / "one.safetensors").unlink()
    assert "one" not in Ledger(tmp_path)


BAD_PROMPTS = {
    "missing": (None, "cannot read the prompts in", "No such file"),
    "empty": (b"\n  \n", "holds no prompt; write one a line"),
    "latin-1": ("ein Schäfer".encode("latin-1"), "is not UTF-8 text (byte 7); save it as UTF-8"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_prompt_file_is_refused(tmp_path, name):
    content, *expected = BAD_PROMPTS[name]
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    done = run("tiny", "--prompts", path, "--config", "top_p=0.9", "--out", tmp_path / "out")
    assert done.exit_code == 2
    for text in expected:
        assert text in message(done)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("/nowhere/model",), "/nowhere/model is neither a folder nor a model id; give a folder"),
        (("--frames", "0"), "frames must be at least 1, got 0"),
        (("--steps", "0"), "steps must be at least 1, got 0"),
        (("--height", "100"), "height must be a multiple of 8 pixels, got 100; try 104"),
        (("--config", "top_q=0.9"), "unknown option 'top_q'; did you mean 'top_p'?"),
        (("--config", "top_p"), "--config must look like top_p=0.9,k_clusters=256; got 'top_p'"),
        (("--config", "top_p=2"), "top_p must be in (0, 1], got 2"),
        (("--config", "dense_steps=1.0"), "at least one step must be sparse, got 6 steps of which 6 are dense"),
        (("--preset", "ultra"), "ultra"),
        (("--seeds", "0,x"), "seeds must be whole numbers separated by commas, such as 0,1; got '0,x'"),
        (("--device", "tpu"), "device must be one of 'auto', 'cpu', 'cuda', got 'tpu'"),
        (("--dtype", "int8"), "dtype must be one of"),
        (("--config", "top_p=0.9", "--config", "top_p=0.9"), "configurations must differ"),
    ],
)
def test_bad_input_is_refused_with_a_clear_message(tmp_path, arguments, expected):
    configuration = () if "--config" in arguments or "--preset" in arguments else ("--config", "top_p=0.9")
    done = run(*arguments, *configuration, "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert expected in message(done)


def test_a_prompt_that_the_tiny_model_does_not_know_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("a cat")
    done = run("--prompts", tmp_path / "p.txt", "--config", "top_p=0.9", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "prompt must be one of" in message(done)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    done = run(tmp_path, "--config", "top_p=0.9", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "has no model_index.json: it is not a diffusers pipeline" in message(done)


def test_an_output_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("--config", "top_p=0.9", "--out", tmp_path / "file")
    assert done.exit_code == 2 and "cannot use the folder" in message(done)


def test_a_size_that_the_pipeline_refuses_is_found_before_any_work(folder, tmp_path):
    size = ("--frames", "5", "--height", "100", "--width", "128", "--steps", "2")
    done = run(folder, *size, "--config", "min_tokens=64", "--out", tmp_path / "out")
    assert done.exit_code == 2
    for text in ("WanPipeline cannot do one step", "divisible by 16", "change --height, --width or --frames"):
        assert text in message(done)
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_what_a_pipeline_of_images_does_not_have_is_refused(tmp_path):
    image = tiny_folders.save(tiny_folders.auraflow, tmp_path / "model")
    done = run(image, *SIZE, "--config", "min_tokens=64", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "AuraFlowPipeline takes no num_frames; leave --frames away" in message(done)
    done = run(image, *SIZE[2:], "--config", "min_tokens=64", "--blocks", "--out", tmp_path / "out")
    expected = "AuraFlowTransformer2DModel names no repeated blocks; leave --blocks away"
    assert done.exit_code == 2 and expected in message(done)


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jinja2" else find(name))
    done = run("--config", "top_p=0.9", "--out", tmp_path)
    assert done.exit_code == 2
    assert 'jinja2 not installed; run: pip install "svg2-compile[evaluate]"' in message(done)


@pytest.mark.parametrize(
    ("make", "size", "shape"),
    [
        (tiny_folders.wan, Size(5, 128, 128, 1), (5, 3, 128, 128)),
        (tiny_folders.hunyuan, Size(5, 128, 128, 1), (5, 3, 128, 128)),
        (tiny_folders.ltx, Size(9, 128, 128, 1), (9, 3, 128, 128)),
        (tiny_folders.auraflow, Size(None, 128, 128, 1), (1, 3, 128, 128)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_pipeline_is_called_by_its_own_signature(tmp_path, make, size, shape):
    model = str(tiny_folders.save(make, tmp_path))
    pipeline = pipelines.load(model, torch.device("cpu"), torch.float32)
    request = pipelines.request_for(model, pipeline, PROMPTS[0], 0, size)
    steps = []

    def on_step_end(_pipeline, step, _timestep, tensors):
        steps.append(step)
        return tensors

    pixels = request.pixels(pipeline, on_step_end=on_step_end)
    assert pixels.shape == shape and 0 <= pixels.min() < pixels.max() <= 1
    assert steps == [0]
    assert torch.equal(request.pixels(pipeline), pixels)


def test_a_twin_shares_the_weights_and_nothing_else():
    model = tiny_folders.wan_transformer()
    twin = pipelines.twin(model)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert ours is not theirs and ours.data_ptr() == theirs.data_ptr()
    twin.proj_out = torch.nn.Identity()
    assert isinstance(model.proj_out, torch.nn.Linear)


@pytest.mark.parametrize("blocks", [False, True])
def test_warming_up_compiles_for_both_models_and_leaves_the_originals_alone(folder, tmp_path, blocks):
    """The second model begins later, and runs the graphs of the first, which is of the same class."""
    options = {"min_tokens": 64, "dense_layers": 0, "dense_steps": 0, "lowering": "eager"}
    configurations = (evaluate.Configuration("a", options),)
    evaluation = evaluate.Evaluation(settings(folder, tmp_path, blocks=blocks, configurations=configurations))
    evaluation._progress = SimpleNamespace(call=lambda _, action: action())
    pipeline, _ = evaluation._compiled(configurations[0])
    traced = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    generation = measure.generate(pipeline, evaluation.request(PROMPTS[0], 0))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == traced
    paths = {site.path for site in generation.report.sparse_sites if site.sparse_calls}
    assert paths == {f"{model}blocks.{block}.attn1" for model in ("", "transformer_2.") for block in (0, 1)}
    originals = (evaluation.pipeline.transformer, evaluation.pipeline.transformer_2)
    assert all(part._compiled_call_impl is None for model in originals for part in model.modules())


def test_operations_are_counted_as_by_hand():
    linear = torch.nn.Linear(8, 16)
    pipeline = SimpleNamespace(transformer=linear)
    with pipelines.counted_flops(pipeline) as flops:
        for _ in range(2):
            linear(torch.rand(4, 8))
    assert flops == {"transformer": 2 * 4 * 8 * 16}


def test_a_gpu_that_waits_for_the_host_is_noticed_in_the_rest_of_a_step():
    # the tiny Wan at 64 frames on an H200, docs/lab, 24
    split = {"dense": {"rest": 0.380}, "sparse": {"rest": 0.789}}
    speed = {"dense_step_seconds": 0.0347, "sparse_step_seconds": 0.0272, "split": split}
    note = evaluation_page.waiting_note("balanced", speed)
    assert "In a step of balanced, 21 ms" in note and "dense one 13" in note and "CUDA graphs" in note
    assert evaluation_page.waiting_note("balanced", speed | {"sparse_step_seconds": 0.0180}) is None


def test_density_of_a_step_is_the_difference_of_the_running_means():
    third, fourth = site(3, (0.3, 0.2), 1, (0.9, 0.8)), site(4, (0.3, 0.2), 3, (0.8, 0.7))
    means = iter([[], [site(1, (0.5, 0.3), 0, ())], [third], [fourth]])
    log = measure.StepLog(lambda: SimpleNamespace(sparse_sites=next(means)))
    for _ in range(4):
        log()
    (steps,), (recalls,) = log.density.values(), log.recall.values()
    # measured at other calls than all
    assert recalls[:3] == [None, None, (0.9, 0.8)] and recalls[3] == pytest.approx((0.75, 0.65))
    assert steps[0] is None and steps[1] == (0.5, 0.3)
    assert steps[2] == pytest.approx((0.2, 0.15))
    assert log.density_table["a"][2] == pytest.approx(0.175)


def site(calls, density, measured, recall):
    return SimpleNamespace(
        path="a", sparse_calls=calls, density_per_head=density, recalls_measured=measured, recall_per_head=recall
    )


def test_lpips_is_computed_where_its_weights_are(monkeypatch, tmp_path):
    def alexnet(_name, _pretrained=False):
        """The convolutions of AlexNet, with random weights."""
        torch.manual_seed(0)
        relu, pool = lambda: torch.nn.ReLU(inplace=True), lambda: torch.nn.MaxPool2d(3, 2)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 64, 11, 4, 2), relu(), pool(), torch.nn.Conv2d(64, 192, 5, padding=2), relu(), pool(),
            torch.nn.Conv2d(192, 384, 3, padding=1), relu(), torch.nn.Conv2d(384, 256, 3, padding=1), relu(),
            torch.nn.Conv2d(256, 256, 3, padding=1), relu(), pool(),
        )  # fmt: skip

    video = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    missing = quality.compare(video, video)
    assert missing.lpips is None and missing.lpips_per_frame == () and "LPIPS is skipped" in missing.lpips_missing
    monkeypatch.setattr("torchmetrics.functional.image.lpips._get_tv_model_features", alexnet)
    monkeypatch.setattr(quality, "lpips_missing", lambda *_: None)
    same, near, far = (quality.compare((video + noise).clamp(0, 1), video) for noise in (0, 0.02, 0.3))
    assert same.lpips == 0 and same.psnr_db is None and same.ssim == pytest.approx(1)
    assert 0 < near.lpips < far.lpips and len(near.lpips_per_frame) == 3
    assert near.psnr_db > far.psnr_db and near.ssim > far.ssim


def test_why_lpips_is_skipped_is_said(monkeypatch, tmp_path):
    assert quality.lpips_missing(16, 64) == "LPIPS is skipped: its AlexNet needs frames of at least 32 pixels"
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "torchvision, which has its AlexNet, is not installed" in quality.lpips_missing()
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "alexnet-owt-7be5be79.pth is missing; get it with python -c" in quality.lpips_missing()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / quality.BACKBONE).touch()
    assert quality.lpips_missing() is None
