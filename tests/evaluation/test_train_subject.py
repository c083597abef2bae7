"""Training of the subject: a run that was interrupted is the run that was not, and what is exported can be used."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch.testing import assert_close

from svg2_compile import tiny_wan
from svg2_compile.tiny_wan import model
from svg2_compile.tiny_wan.transform import CHANNELS, BlockTransform

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "tiny_wan"))
training = importlib.import_module("train_subject")
configurations = importlib.import_module("configurations")


@pytest.fixture(scope="module", autouse=True)
def one_measured_transform():
    """Measure the transform on few videos, once: what it is does not matter here."""
    measured = training.measured_transform
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training, "measured_transform", lambda _pictures, _whitening: BlockTransform(std=(0.5,) * CHANNELS)
        )
        yield measured


def run(out, *arguments):
    device = () if "--device" in arguments else ("--device", "cpu")
    given = ("--configuration", "minute", *device, "--out", out, *arguments)
    options = training.parse_arguments(list(map(str, given)))
    options.out.mkdir(parents=True, exist_ok=True)
    return training.train(options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert run(out, "--steps", 100)
    return out


@pytest.mark.slow
def test_an_interrupted_run_is_the_run_that_was_not_interrupted(tmp_path):
    assert run(tmp_path / "whole", "--steps", 24)
    assert not run(tmp_path / "parts", "--steps", 24, "--stop-at", 5)
    assert not run(tmp_path / "parts", "--steps", 24, "--stop-at", 16)
    assert run(tmp_path / "parts", "--steps", 24)
    whole, parts = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert {name.split(".")[0] for name in whole} == {
        "weights", "average", "exp_avg", "exp_avg_sq", "step", "gradient_length",
    }  # fmt: skip
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    state = json.loads((tmp_path / "parts" / "state.json").read_text())["progressed"]
    assert (state["steps"], state["runs"]) == (24, 3)


@pytest.mark.slow
def test_a_run_that_is_done_does_nothing_more(trained, capsys):
    before = (trained / "checkpoint.safetensors").read_bytes()
    assert run(trained, "--steps", 100)
    assert "trained already, 100 steps" in capsys.readouterr().out
    assert (trained / "checkpoint.safetensors").read_bytes() == before


def test_the_loss_falls_and_is_told_by_noise_level_and_size(trained):
    lines = [json.loads(line) for line in (trained / "loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100]
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"]
    assert set(lines[-1]["by_size"]) == {"2x32x64", "4x32x64"}
    assert set(lines[-1]["by_noise_level"]) == {"0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0"}


def test_lines_of_steps_after_the_checkpoint_are_dropped(tmp_path):
    log = tmp_path / "loss.jsonl"
    log.write_text('{"step": 50}\n{"step": 100}\n{"step": 150}\n')
    training.keep_log_until(log, 100)
    assert log.read_text() == '{"step": 50}\n{"step": 100}\n'


def test_a_checkpoint_of_another_seed_or_configuration_is_refused(trained):
    with pytest.raises(SystemExit, match="another seed, whitening; choose another --out"):
        run(trained, "--steps", 200, "--seed", 1, "--whitening", 1)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    sizes = configurations.CONFIGURATIONS["minute"].sizes
    log = training.LossLog(tmp_path / "loss.jsonl", sizes, torch.device("cpu"))
    log.add(sizes[0], torch.tensor([1.0, math.nan]), torch.tensor([0.1, 0.9]))
    with pytest.raises(SystemExit, match="the loss is nan at step 7; run again with a lower"):
        log.write({"steps": 7, "seconds": 1.0, "tokens": 8}, 1e-3, torch.tensor(1.0))


def test_what_is_exported_can_be_asked_in_words(trained, tmp_path):
    training.export(trained, tmp_path)
    pipeline = tiny_wan.load_pipeline(folder=tmp_path)
    examples = tiny_wan.example_prompts(tmp_path)
    assert len(examples) >= 4
    small = {"frames": 2, "height": 32, "width": 64, "steps": 1}
    first, second = (tiny_wan.generate(pipeline, prompt, **small) for prompt in examples[:2])
    assert first.isfinite().all()
    assert not torch.equal(first, second)
    average = load_file(trained / "checkpoint.safetensors")["average.blocks.0.attn1.to_q.weight"]
    assert_close(pipeline.transformer.blocks[0].attn1.to_q.weight, average.half().float())
    latents = model.initial_latents("", frames=2, height=32, width=64, seed=0, folder=tmp_path)
    prompt = tiny_wan.embed_prompt(None, tmp_path)[None]
    with torch.no_grad():
        velocity = pipeline.transformer(latents, torch.tensor([700.0]), prompt, return_dict=False)[0]
    assert not velocity[:, CHANNELS:].any()
    assert velocity[:, :CHANNELS].any()
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["parameters"] == sum(p.numel() for p in pipeline.transformer.parameters())
    assert record["final_loss"]["all"] > 0


def test_a_new_run_can_begin_with_exported_weights(trained, tmp_path):
    training.export(trained, tmp_path / "first")
    assert run(
        tmp_path / "second", "--steps", 1, "--start-from", tmp_path / "first", "--seed", 5, "--learning-rate", 1e-9
    )
    training.export(tmp_path / "second", tmp_path / "model")
    first, second = (load_file(tmp_path / name / model.WEIGHTS_NAME) for name in ("first", "model"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in (model.TRANSFORM_NAME, model.WORDS_NAME):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["progressed"]["steps"] == 1
    assert record["started_from"]["progressed"]["steps"] == 100


def test_weights_of_another_architecture_are_not_begun_with(trained, tmp_path):
    training.export(trained, tmp_path / "first")
    options = ["--configuration", "shipped", "--out", str(tmp_path / "out"), "--device", "cpu", "--steps", "1"]
    options = training.parse_arguments([*options, "--start-from", str(tmp_path / "first")])
    with pytest.raises(SystemExit, match="is of another architecture"):
        training.start_training(configurations.CONFIGURATIONS["shipped"], options, torch.device("cpu"))
    with pytest.raises(SystemExit, match=r"holds no words\.safetensors"):
        training.take_weights(torch.nn.Module(), tmp_path)


def test_every_example_can_be_read_by_the_words_that_are_trained():
    vocabulary = training.Pictures.load().vocabulary
    words = importlib.import_module("svg2_compile.tiny_wan.words")
    assert len({words.parse(prompt, vocabulary) for prompt in training.EXAMPLES}) == len(training.EXAMPLES)


def parameters(name):
    with torch.device("meta"):
        network = WanTransformer3DModel.from_config(dict(configurations.CONFIGURATIONS[name].architecture))
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_shipped_subject_fits_and_the_large_one_is_large():
    shipped, large = (configurations.CONFIGURATIONS[name] for name in ("shipped", "large"))
    assert 2 * parameters("shipped") < 19_600_000
    assert shipped.head_dim == large.head_dim == 128
    assert parameters("large") >= 60_000_000
    assert large.heads >= 8
    assert large.layers >= 12
    longest = max(size.tokens for each in (shipped, large) for size in each.sizes)
    assert longest == 32_768
    assert all(
        each.batch_tokens // size.tokens <= training.MOST_VIDEOS for each in (shipped, large) for size in each.sizes
    )


def test_steps_share_no_video_and_none_is_held_out():
    firsts = [(training._seed_of(0, step) * training.MOST_VIDEOS) % training.HELD_OUT for step in range(40_000)]
    assert len(set(firsts)) == len(firsts)
    assert max(firsts) + training.MOST_VIDEOS <= training.HELD_OUT


def test_noise_levels_fill_the_range_and_lean_to_noise():
    sigma = training.draw_sigmas(4096, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert 0 < sigma.min() < 0.02
    assert 0.98 < sigma.max() < 1
    assert 0.6 < sigma.mean() < 0.7
    assert 0.07 < (sigma < 0.3).float().mean() < 0.12


def test_the_learning_rate_rises_then_falls_to_a_hundredth(tmp_path):
    options = training.parse_arguments(["--out", str(tmp_path), "--configuration", "shipped"])
    configuration = configurations.CONFIGURATIONS["shipped"]
    rates = [
        training.learning_rate(training.Progressed(steps=steps), share, configuration, options)
        for steps, share in ((0, 0.0), (249, 0.02), (500, 0.04), (9_000, 0.5), (20_000, 1.0))
    ]
    assert rates[0] < rates[1] < rates[2] <= configuration.learning_rate
    assert rates[2] > rates[3] > rates[4] == pytest.approx(configuration.learning_rate / 100)


def test_a_spike_is_shortened_to_three_mean_lengths_and_never_above_one():
    weight = torch.nn.Parameter(torch.zeros(4))
    fake = replace_training(weight)
    lengths = []
    for length in (0.1, 0.1, 5.0, 0.1):
        weight.grad = torch.full((4,), length / 2)
        training.shorten_gradient(fake)
        lengths.append(weight.grad.norm().item())
    assert lengths == pytest.approx([0.1, 0.1, 0.3, 0.1], rel=1e-3)
    fake.gradient_length.fill_(10.0)
    weight.grad = torch.full((4,), 4.0)
    training.shorten_gradient(fake)
    assert weight.grad.norm().item() == pytest.approx(1.0, rel=1e-3)


def replace_training(weight):
    """Return a training of a single parameter, as far as its gradient is concerned."""
    transformer = torch.nn.Module()
    transformer.weight = weight
    nothing = dict.fromkeys(("average", "optimizer", "encode", "pictures", "words", "generator"))
    return training.Training(transformer=transformer, gradient_length=torch.zeros(()), **nothing)


@pytest.mark.slow
def test_the_measured_transform_leaves_coarse_channels_stronger(one_measured_transform):
    pictures = training.Pictures.load()
    transform = one_measured_transform(pictures, 0.5)
    made = importlib.import_module("made_video")
    plans = [made.draw_plan(seed, pictures.vocabulary) for seed in range(200, 224)]
    latents = transform.encode(made.render(pictures, plans, made.Shape(1, *training.WINDOW)))
    deviation = latents.transpose(0, 1).flatten(1).std(1)
    assert 0.7 < deviation.square().mean().sqrt() < 1.4
    assert deviation[0] == deviation.max()
    assert 2 < deviation[0] < 8
    assert deviation.min() > 0.1
    white = one_measured_transform(pictures, 1.0)
    assert_close(torch.tensor(white.std) / white.std[0], (torch.tensor(transform.std) / transform.std[0]) ** 2)


def test_the_encoder_on_a_device_is_the_transform():
    generator = torch.Generator().manual_seed(0)
    std = tuple((0.1 + torch.rand(CHANNELS, generator=generator)).tolist())
    transform = BlockTransform(mean=tuple(torch.randn(CHANNELS, generator=generator).tolist()), std=std)
    pixels = torch.rand(2, 3, 2, 8, 12, generator=generator) * 2 - 1
    assert_close(training.Encoder(transform, torch.device("cpu"))(pixels), transform.encode(pixels))


def test_draws_of_sizes_follow_their_shares():
    sizes = configurations.CONFIGURATIONS["shipped"].sizes
    early, late = (sum(training.draw_size(sizes, share, 0, step).frames for step in range(200)) for share in (0.0, 1.0))
    assert late > 1.5 * early
    only = (replace(sizes[0], first_share=0.0), sizes[1])
    assert {training.draw_size(only, 0.0, 0, step) for step in range(50)} == {sizes[1]}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_run_on_a_gpu_goes_on_where_it_stopped_and_its_loss_falls(tmp_path, capsys):
    """The only test of what training does on a GPU alone: compilation, autocast, no waiting for the device."""
    assert not run(tmp_path, "--steps", 150, "--stop-at", 60, "--device", "cuda")
    assert run(tmp_path, "--steps", 150, "--device", "cuda")
    assert "rendering" in capsys.readouterr().out
    losses = [json.loads(line)["loss"] for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.95 * losses[0]
