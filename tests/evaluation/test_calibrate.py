"""``svg2 calibrate``: a file comes out that the backend takes, a stopped run goes on to the same one."""

import errno

import pytest
import tiny_folders
import torch
from typer.testing import CliRunner

import svg2_compile
from svg2_compile.calibration import calibration
from svg2_compile.calibration.samples import Samples
from svg2_compile.cli import app
from svg2_compile.evaluation.pipelines import load
from svg2_compile.fingerprint import budgets_for
from svg2_compile.passes.read_budgets import read_budgets

OPTIONS = "min_tokens=64,dense_layers=0,dense_steps=1,q_clusters=4,k_clusters=12"
SIZE = ("--frames", "5", "--height", "128", "--width", "128", "--steps", "4")
PROMPTS = ("a cat walks on the grass", "boat sails")
MORE = ("--candidates", "0.3,0.6", "--levels", "2", "--config", OPTIONS)


def run(*arguments):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def message(done) -> str:
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline with two denoising models, as Wan 2.2."""

    def make():
        pipeline = tiny_folders.wan(experts=2)
        for parameter in pipeline.transformer_2.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        return pipeline

    return tiny_folders.save(make, tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def arguments(folder, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    return (folder, "--prompts", prompts, *SIZE, *MORE)


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """The file of a run that nothing stopped, and how it ended."""
    out = tmp_path_factory.mktemp("finished") / "budgets.json"
    return out, run(*arguments, "--out", out)


@pytest.mark.slow
def test_the_file_has_budgets_of_every_head_and_what_they_were_made_from(finished, folder):
    out, done = finished
    assert done.exit_code == 0, done.output
    budgets = read_budgets(out)
    assert budgets.method == "heart" and budgets.made_from.prompts == PROMPTS
    assert budgets.made_from.measured_steps == (1, 3)
    assert dict(budgets.made_from.options)["k_clusters"] == 12
    assert budgets.models and all(each.attentions for each in budgets.models)
    for model in budgets.models:
        for each in model.attentions:
            assert each.path.startswith("blocks.") and all(0.3 <= share <= 1 for share in each.top_p)
    figures = dict(budgets.made_from.outcome)
    assert figures["density"] <= figures["shared_density"] + 1e-6
    assert figures["error"] <= figures["shared_error"]
    assert len(list(out.with_name("budgets.json.samples").iterdir())) == 4
    pipeline = load(str(folder), torch.device("cpu"), torch.float32)
    for model in budgets.models:
        assert budgets_for(getattr(pipeline, model.name), budgets).models == (model,)


@pytest.mark.slow
def test_the_time_is_told_before_it_begins_and_the_outcome_at_the_end(finished):
    _, done = finished
    told = message(done)
    assert "4 measured steps of" in told and told.index("about") < told.index("seed 0: a cat")
    for text in ("Budgets by heart", "expected at a mean density of", "one top_p of 0.9 for all", "may be deleted"):
        assert text in told


@pytest.mark.slow
def test_the_model_runs_with_it(finished, folder):
    out, _ = finished
    torch._dynamo.reset()
    pipeline = load(str(folder), torch.device("cpu"), torch.float32)
    budgets = read_budgets(out)
    options = {name: int(value) for name, _, value in (each.partition("=") for each in OPTIONS.split(","))}
    options |= {"budgets": str(out), "lowering": "eager", "dense_steps": 0}
    for name in ("transformer", "transformer_2"):
        if name in {each.name for each in budgets.models}:
            getattr(pipeline, name).compile(backend="svg2", options=options)
    pipeline(prompt=PROMPTS[0], num_frames=5, height=128, width=128, num_inference_steps=4, output_type="latent")
    for model in budgets.models:
        sites = svg2_compile.report(getattr(pipeline, model.name)).sparse_sites
        told = {site.path: site.more["budgets"].top_p for site in sites}
        assert told == {each.path: pytest.approx(each.top_p) for each in model.attentions}


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_file(arguments, finished, tmp_path, monkeypatch):
    out = tmp_path / "budgets.json"
    put, kept = Samples.put, []

    def stop(self, key, sample):
        if len(kept) == 2:
            raise KeyboardInterrupt
        put(self, key, sample)
        kept.append(key)

    with monkeypatch.context() as patched:
        patched.setattr(Samples, "put", stop)
        stopped = run(*arguments, "--out", out)
    assert stopped.exit_code != 0 and not out.exists()
    assert "2 of 4 measured steps are kept" in message(stopped)
    samples = out.with_name("budgets.json.samples")
    before = {each.name: each.read_bytes() for each in samples.iterdir()}
    damaged = samples / f"{kept[0]}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    written = []
    with monkeypatch.context() as patched:
        patched.setattr(Samples, "put", lambda self, key, sample: (written.append(key), put(self, key, sample)))
        assert run(*arguments, "--out", out).exit_code == 0
    # what was whole is not measured again
    assert kept[1] not in written and kept[0] in written and len(written) == 3
    assert all((samples / name).read_bytes() == data for name, data in before.items())
    assert out.read_bytes() == finished[0].read_bytes()


@pytest.mark.slow
def test_another_density_needs_no_measurement(arguments, finished, monkeypatch):
    out, _ = finished
    monkeypatch.setattr(calibration.Calibration, "_measure", None)
    before = out.read_bytes()
    shared = dict(read_budgets(out).made_from.outcome)["shared_density"]
    done = run(*arguments, "--out", out, "--density", 0.9 * shared + 0.1)
    assert done.exit_code == 0, done.output
    assert "all 4 steps were measured before" in message(done)
    figures = dict(read_budgets(out).made_from.outcome)
    assert figures["asked_density"] == pytest.approx(0.9 * shared + 0.1, rel=1e-5)
    assert figures["density"] <= figures["asked_density"] + 1e-6
    assert run(*arguments, "--out", out, "--density", 1e-6).exit_code == 2
    assert run(*arguments, "--out", out, "--error-of", "attention").exit_code == 0
    assert dict(read_budgets(out).made_from.environment)["error_of"] == "attention"
    assert out.read_bytes() != before
    assert run(*arguments, "--out", out).exit_code == 0 and out.read_bytes() == before


@pytest.mark.slow
def test_svoos_two_rules_share_their_measurements(arguments, tmp_path, monkeypatch):
    out = tmp_path / "budgets.json"
    assert run(*arguments, "--out", out, "--method", "svoo").exit_code == 0
    papers = read_budgets(out)
    assert papers.method == "svoo"
    for model in papers.models:
        for each in model.attentions:
            assert each.top_p is None
            for floor, cap in zip(each.min_keep_ratio, each.max_keep_ratio, strict=True):
                assert (floor == 0 and cap > 0.1) or (floor <= 0.1 and cap == 1)
    monkeypatch.setattr(calibration.Calibration, "_measure", None)
    assert run(*arguments, "--out", out, "--method", "svoo-clipped", "--band", "0.3,0.4").exit_code == 0
    for model in read_budgets(out).models:
        for each in model.attentions:
            assert each.given.keys() == {"min_keep_ratio"} and all(0.3 <= share <= 0.4 for share in each.min_keep_ratio)


@pytest.mark.slow
def test_a_full_disk_is_told(arguments, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("svg2_compile.calibration.samples.os.fsync", full)
    done = run(*arguments, "--out", tmp_path / "b.json")
    assert (
        done.exit_code == 2 and "No space left on device" in message(done) and "run the same command" in message(done)
    )


@pytest.mark.slow
def test_nothing_sparse_is_told(folder, tmp_path):
    done = run(folder, *SIZE, "--config", "min_tokens=9999,dense_steps=1", "--out", tmp_path / "b.json")
    assert done.exit_code == 2 and "nothing is sparse" in message(done) and "short: 128 tokens" in message(done)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--method", "magic"), "method must be one of 'heart', 'svoo', 'svoo-clipped', got 'magic'"),
        (("--error-of", "layer"), "error_of must be one of 'head', 'attention', got 'layer'"),
        (("--density", "1.5"), "density must be in (0, 1], got 1.5"),
        (("--candidates", "0.5,x"), "candidates must be numbers separated by commas"),
        (("--candidates", "1.0"), "candidates must have a share below 1"),
        (("--candidates", "0,0.5"), "candidates must be in (0, 1], got 0.0"),
        (("--band", "0.1"), "band must be a lowest and a highest floor"),
        (("--band", "0.3,0.2"), "band must be a lower and a higher share"),
        (("--seeds", "one"), "seeds must be whole numbers"),
        (("--levels", "0"), "levels must be in [1, 1000], got 0"),
        (("--config", "top_p=2"), "top_p must be in (0, 1], got 2"),
        (("--config", "budgets=nothing.json"), "budgets nothing.json cannot be read"),
        (("--prompts", "no.txt"), "cannot read the prompts in no.txt"),
        (("--frames", "0"), "frames must be at least 1, got 0"),
        (("--config", "dense_steps=16", "--steps", "4"), "at least one step must be sparse"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(given, words, tmp_path):
    done = run(*given, "--out", tmp_path / "b.json")
    assert done.exit_code == 2 and words in message(done), done.output


def test_budgets_are_not_made_from_budgets(finished_file):
    done = run("--config", f"budgets={finished_file}")
    assert done.exit_code == 2 and "budgets must be left away" in message(done)


@pytest.fixture
def finished_file(tmp_path):
    from budgets_cases import budgets_for_models

    from svg2_compile.passes.budgets import AttentionBudgets
    from svg2_compile.passes.read_budgets import write_budgets

    one = {"one": AttentionBudgets("a", 1, (0.5,))}
    return write_budgets(budgets_for_models({"m": torch.nn.Linear(8, 8)}, **one), tmp_path / "b.json").source
