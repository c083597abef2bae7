"""``svg2 explain`` needs no weights, says what would be sparse, and predicts what was measured."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from svg2_compile.cli import app
from svg2_compile.explaining.empty_pipeline import ExplainError, first_call, load_empty
from svg2_compile.explaining.explanation import ExplainSettings, explain_model
from svg2_compile.explaining.prediction import GPUS, Prediction, SparseWork, Work, predict
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.kernel_config import KernelConfig
from svg2_compile.passes.plan import plan_site
from svg2_compile.passes.records import AttentionSite, Rejection

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
OPTIONS = {"min_tokens": 64, "dense_layers": 0}
SIZE = {"frames": 5, "height": 128, "width": 128}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function from a family of models to a folder with its pipeline, less the weights."""
    made = {}

    def folder(name):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            make = {"Wan 2.1": tiny_pipelines.wan_pipeline, "HunyuanVideo": tiny_pipelines.hunyuan_pipeline}
            make |= {"CogVideoX": tiny_pipelines.cogvideox_pipeline, "LTX": tiny_pipelines.ltx_pipeline}
            make |= {"Mochi": tiny_pipelines.mochi_pipeline}
            make["Wan 2.2"] = lambda: tiny_pipelines.wan_pipeline(experts=2)
            make[name]().save_pretrained(path)
            for weights in path.rglob("*.safetensors"):
                weights.unlink()
            made[name] = path
        return made[name]

    return folder


@pytest.mark.parametrize(
    ("name", "size", "sites", "shape"),
    [
        ("Wan 2.1", {}, 2, (1, 2, 128, 0)),
        ("Wan 2.2", {}, 2, (1, 2, 128, 0)),
        ("HunyuanVideo", {}, 3, (1, 2, 512, 256)),
        ("CogVideoX", {}, 2, (2, 2, 128, 12)),
        ("LTX", {"frames": 9, "height": 256, "width": 256}, 1, (2, 2, 128, 0)),
        ("Mochi", {"frames": 7}, 4, (1, 2, 128, None)),  # one attention a sample, as much text as is no padding
    ],
)
def test_a_pipeline_without_weights_is_explained_from_its_folder(folders, name, size, sites, shape):
    options = OPTIONS | {"max_context_ratio": 0.9}  # at this size, HunyuanVideo's text is long
    found = explain_model(ExplainSettings(str(folders(name)), **(SIZE | size), options=options))
    sparse = [each for _, each in found.decisions if isinstance(each, AttentionSite)]
    contexts = [each.context_tokens if isinstance(each.context_tokens, int) else None for each in sparse]
    got = [(each.batch, each.q_heads, each.token_hint, context) for each, context in zip(sparse, contexts)]
    assert got == [shape] * sites and found.is_whole
    assert all(isinstance(each, Rejection) and each.reason for _, each in found.decisions if each not in sparse)
    assert len(found.work.sparse) == sites and found.work.product_flops > 0
    assert found.steps == (64 if name == "Mochi" else 50) and found.dense_share == 0.2


def test_the_tiny_model_is_explained_at_its_own_size():
    found = explain_model(ExplainSettings("tiny", frames=8, height=128, width=128, options={"min_tokens": 1024}))
    assert [each.flops for each in found.work.sparse] == [4 * 4 * 2048**2 * 64] * 5  # one layer of six stays dense
    assert found.pipeline == "tiny Wan"


def test_a_model_of_any_size_takes_no_memory(tmp_path):
    pipeline = load_empty(real_wan(tmp_path, layers=40))
    parameters = list(pipeline.transformer.parameters())
    assert sum(each.numel() for each in parameters) > 14e9
    assert sum(each.untyped_storage().nbytes() for each in parameters) < 10_000


def test_products_are_counted_as_torch_counts_them(folders):
    call = first_call(str(folders("Wan 2.1")), 5, 128, 128)
    model = call.transformer.to(torch.float32)
    model._apply(lambda x: x.contiguous())
    inputs = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.kwargs.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counted.items() if "attention" not in str(op))
    work = explain_model(ExplainSettings(str(folders("Wan 2.1")), **SIZE, options=OPTIONS)).work
    # rotary frequencies are made by outer products in places, which are not worth counting
    assert work.product_flops == pytest.approx(products, rel=0.01)
    assert work.sparse_flops == 2 * 4 * 2 * 128 * 128 * 12
    assert work.dense_attention_flops == 2 * 4 * 2 * 128 * 512 * 12


def real_wan(path, layers):
    """Write the folder of a Wan 2.1 with its real widths, which are the defaults of its class."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in (BENCHMARKS, *BENCHMARKS.glob("*/")):
            patch.syspath_prepend(str(folder))
        script = importlib.import_module("predicted_steps")
    script.write_pipeline(path, *script.WAN, {"num_layers": layers})
    return path


def test_the_prediction_is_what_was_measured(tmp_path):
    """Steps of Wan 2.1 14B at 720p on an H200, docs/lab, 22: 11.44 s dense, and the speed-ups."""
    measured = {0.15: 2.47, 0.2: 2.26, 0.25: 2.07, 0.3: 1.93, 0.4: 1.69}
    folder, layers = real_wan(tmp_path, layers=2), 2
    found = explain_model(ExplainSettings(str(folder), 81, 720, 1280, gpu="h200", options={"dense_layers": 0}))
    prediction = found.prediction
    assert [each.flops for each in found.work.sparse] == [4 * 40 * 75_600**2 * 128] * layers
    assert 40 / layers * prediction.dense_step == pytest.approx(11.44, rel=0.05)
    for density, speedup in measured.items():
        assert prediction.speedup(density) == pytest.approx(speedup, rel=0.05)
    assert 0.75 < prediction.highest_density < 0.9
    assert prediction.generation_speedup(0.25, 0.2) == pytest.approx(1 / (0.2 + 0.8 / prediction.speedup(0.25)))


def work(heads, tokens, dim, clusters, **options):
    """Return the work of one attention of a model."""
    q_clusters, k_clusters = clusters
    site = AttentionSite(
        index=0, node="", path="", batch=1, q_heads=heads, k_heads=heads, head_dim=dim, tokens=tokens,
        token_hint=tokens, dtype=torch.bfloat16, device=torch.device("cuda"), segments=(), scale=1.0,
        q_clusters=q_clusters, k_clusters=k_clusters, has_mask=False,
    )  # fmt: skip
    plan = plan_site(site, SparseConfig(**options), KernelConfig())
    return SparseWork(dim, tuple(stage.work(plan) for stage in plan.stages))


def test_the_highest_density_is_where_sparse_takes_as_long_as_dense():
    prediction = Prediction(attention=4.0, selected=5.0, clustering=0.5, rest=3.0)
    assert prediction.speedup(prediction.highest_density) == pytest.approx(1)
    assert prediction.limit == pytest.approx(7 / 3)


def test_short_attention_waits_for_the_host_and_long_does_not():
    # the tiny Wan at 64 frames and Wan 1.3B at 480p: measured, docs/lab, 24 and 22
    tiny = predict(Work((work(4, 32_768, 64, (128, 512), kmeans_iters_step=1),) * 6, 2e11, 0.0, 1e9), GPUS["h200"])
    wan = predict(Work((work(12, 32_760, 128, (55, 218)),) * 30, 8e13, 0.0, 2e11), GPUS["h200"])
    assert tiny.waits_for_the_host(0.2) and not wan.waits_for_the_host(0.2)


@pytest.mark.parametrize(
    ("heads", "tokens", "clusters", "milliseconds"),
    [
        (40, 75_600, (100, 500), 1.98),
        (40, 75_600, (300, 1000), 4.41),
        (24, 118_800, (100, 500), 1.79),
        (24, 118_800, (400, 1000), 4.01),
    ],
)
def test_asking_every_query_costs_what_was_measured(heads, tokens, clusters, milliseconds):
    """On an H200, docs/lab, 30."""
    asking, not_asking = (
        work(heads, tokens, 128, clusters, estimate_by=asked).clustering_seconds(GPUS["h200"])
        for asked in ("queries", "centroids")
    )
    assert 1e3 * (asking - not_asking) == pytest.approx(milliseconds, rel=0.25)


def test_a_short_sequence_does_not_pay():
    longer, short = (Work((work(12, tokens, 64, (16, 16)),), 0.0, 0.0, 1.0) for tokens in (1024, 256))
    assert predict(longer, GPUS["h100"]).highest_density < 0.5
    assert predict(short, GPUS["h100"]).highest_density <= 0


def test_the_command_says_when_the_host_would_decide():
    size = ("--height", 128, "--width", 256, "--config", "dense_layers=0,min_tokens=1024", "--gpu", "h200")
    assert "replay CUDA graphs (docs/integration.md)" in run("tiny", "--frames", 64, *size)[1]


def run(*arguments):
    done = CliRunner().invoke(app, ["explain", *map(str, arguments)], env={"COLUMNS": "200"})
    return done.exit_code, " ".join(done.output.split())


def test_the_command_prints_decisions_and_a_prediction(tmp_path):
    code, text = run(
        real_wan(tmp_path, layers=2),
        "--frames",
        81,
        "--height",
        480,
        "--width",
        832,
        "--gpu",
        "a100",
        "--preset",
        "turbo",
    )
    assert code == 0
    for words in (
        "WanPipeline, 50 steps",
        "sparse: 1x40x32760x128, 55 query and 218 key clusters",
        "dense: among the first dense_layers=1 layers",
        "dense: cross-attention: 32760 queries, 512 keys",
        "NVIDIA A100",
        "not measured",
        "top_p=0.7",
        "It pays below a density of",
        "20% of the steps stay dense",
        "Predicted speed-up",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "model must be a folder or a model id such as"),
        (["{empty}"], "there is no model_index.json in"),
        (["{wan}", "--gpu", "tpu"], "gpu must be one of h100, h200"),
        (["{wan}", "--frames", 0], "frames must be at least 1, got 0"),
        (
            ["{wan}", "--height", 100],
            "WanPipeline did not reach its transformer: `height` and `width` have to be divisible",
        ),
        (["{wan}", "--config", "top_q=0.5"], "did you mean 'top_p'?"),
        (["{wan}", "--preset", "fast"], "unknown preset 'fast'; there are quality"),
        (["{wan}", "--config", "top_p"], "--config must look like top_p=0.9"),
        (["{wan}", "--preset", "turbo", "--config", "top_p=7"], "top_p must be in (0, 1], got 7"),
        (["{other}"], "StableVideoDiffusionPipeline has no transformer"),
        (["{image}"], "WanImageToVideoPipeline needs image, which cannot be made up"),
        (["{unknown}"], "names no pipeline of diffusers"),
        (["tiny", "--height", 100], "height must be a multiple of 8 pixels, got 100"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_with_what_to_do(folders, tmp_path, arguments, message):
    shutil.copytree(folders("Wan 2.1"), tmp_path / "wan")
    index = json.loads((tmp_path / "wan" / "model_index.json").read_text())
    for name, changes in {
        "other": {"_class_name": "StableVideoDiffusionPipeline", "transformer": [None, None]},
        "image": {
            "_class_name": "WanImageToVideoPipeline",
            "image_encoder": [None, None],
            "image_processor": [None, None],
        },
        "unknown": {"_class_name": "NoSuchPipeline"},
    }.items():
        shutil.copytree(tmp_path / "wan", tmp_path / name)
        (tmp_path / name / "model_index.json").write_text(json.dumps(index | changes))
    (tmp_path / "empty").mkdir()
    names = {name: str(tmp_path / name) for name in ("empty", "wan", "other", "image", "unknown")}
    code, text = run(*(each.format(**names) if isinstance(each, str) else each for each in arguments))
    assert code == 2
    assert message in text


def test_a_model_that_cannot_be_traced_says_so(folders, monkeypatch):
    call = first_call(str(folders("CogVideoX")), **SIZE)
    call.kwargs["encoder_hidden_states"] = torch.zeros(2, 9, 16)  # more text than it has positions for
    monkeypatch.setattr("svg2_compile.explaining.explanation.first_call", lambda *_: call)
    with pytest.raises(ExplainError, match=r"cannot be traced at that size: .*\(1, 140, 32\)|size: .*1, 140, 32"):
        explain_model(ExplainSettings("any", options=OPTIONS))


def test_a_model_id_that_cannot_be_fetched_says_so(monkeypatch):
    import huggingface_hub

    def refuse(model, allow_patterns):
        assert all(pattern.endswith(".json") for pattern in allow_patterns)  # no weights
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ExplainError, match="configuration of 'some/model' cannot be fetched: no network; give a"):
        first_call("some/model", None, None, None)
