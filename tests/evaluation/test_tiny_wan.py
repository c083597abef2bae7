"""The tiny Wan: its transform, its coordinates, its files, and generation through the real WanPipeline."""

import json
import math

import minute_wan
import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.testing import assert_close

from svg2_compile import tiny_wan
from svg2_compile.tiny_wan import model, words
from svg2_compile.tiny_wan.transform import (
    BLOCK_SIZE,
    CHANNELS,
    COORDINATE_CHANNELS,
    BlockTransform,
    TransformError,
    coordinates,
    cosine_matrix,
    frames_to_pixels,
    pixels_to_frames,
)
from svg2_compile.video.measure import Video

EXAMPLES = tiny_wan.example_prompts()
SMALL = {"frames": 2, "height": 16, "width": 24, "steps": 2}


@pytest.fixture(scope="module")
def pipeline():
    return tiny_wan.load_pipeline()


@st.composite
def videos(draw):
    frames, rows, columns = (draw(st.integers(1, 4)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (frames, BLOCK_SIZE * rows, BLOCK_SIZE * columns, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@st.composite
def transforms(draw):
    mean = draw(st.lists(st.floats(-1, 1), min_size=CHANNELS, max_size=CHANNELS))
    std = draw(st.lists(st.floats(2e-3, 4), min_size=CHANNELS, max_size=CHANNELS))
    return BlockTransform(mean=tuple(mean), std=tuple(std))


@given(videos(), transforms())
@settings(deadline=None, max_examples=25)
def test_frames_survive_the_transform_unchanged(frames, transform):
    latents = transform.encode(frames_to_pixels(frames))
    assert torch.equal(pixels_to_frames(transform.decode(latents)), frames)


@given(videos())
@settings(deadline=None, max_examples=10)
def test_the_transform_keeps_lengths(frames):
    pixels = frames_to_pixels(frames)
    assert_close(BlockTransform().encode(pixels).square().sum(), pixels.square().sum())


def test_the_cosine_transform_is_orthonormal():
    assert_close(cosine_matrix() @ cosine_matrix().T, torch.eye(CHANNELS, dtype=torch.float64))


def test_blocks_are_independent_of_each_other():
    pixels = torch.zeros(1, 3, 2, 8, 12)
    pixels[..., 1, 4:8, 8:12] = 1
    changed = BlockTransform().encode(pixels).abs().sum(1)[0] > 0
    assert changed.nonzero().tolist() == [[1, 1, 2]]


def test_channel_zero_is_brightness():
    latents = BlockTransform().encode(torch.full((1, 3, 1, 4, 4), 0.5))[0, :, 0, 0, 0]
    assert_close(latents[0].item(), 0.5 * math.sqrt(CHANNELS))
    assert_close(latents[1:], torch.zeros(CHANNELS - 1), atol=1e-6, rtol=0)


def test_a_measured_transform_whitens_what_it_measured():
    pixels = torch.rand(1, 3, 3, 16, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = BlockTransform.measured(pixels).encode(pixels).transpose(0, 1).flatten(1)
    assert_close(latents.mean(1), torch.zeros(CHANNELS), atol=1e-4, rtol=0)
    assert_close(latents.std(1), torch.ones(CHANNELS))


def test_a_saved_transform_is_the_same(tmp_path):
    transform = BlockTransform(mean=(0.1,) * CHANNELS, std=(1 / 3,) * CHANNELS)
    transform.save(tmp_path / "transform.json")
    assert BlockTransform.load(tmp_path / "transform.json") == transform


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BlockTransform(std=(1.0,) * 47), "std must hold 48 numbers"),
        (lambda: BlockTransform(std=(0.0,) * 48), "std must be above 0"),
        (lambda: BlockTransform().encode(torch.zeros(1, 3, 1, 6, 8)), "multiples of 4, got 6 x 8"),
        (lambda: BlockTransform().encode(torch.zeros(3, 8, 8)), "frames_to_pixels makes them"),
        (lambda: BlockTransform().decode(torch.zeros(1, 47, 1, 2, 2)), r"\[B, 48, F, h, w\]"),
        (lambda: frames_to_pixels(torch.zeros(1, 8, 8, 3)), "must be uint8"),
        (lambda: pixels_to_frames(torch.zeros(2, 3, 1, 8, 8)), "one video at a time"),
    ],
)
def test_the_transform_says_what_it_needs(call, message):
    with pytest.raises(TransformError, match=message):
        call()


def test_a_window_has_the_coordinates_of_its_place_in_the_scene():
    whole, window = coordinates(3, 128, 256), coordinates(3, 40, 72, top=16, left=24)
    assert torch.equal(window, whole[..., 4:14, 6:24])


def test_no_two_latents_share_coordinates():
    place = coordinates(33, 128, 256)[0].flatten(1).T
    assert place.shape[1] == COORDINATE_CHANNELS
    assert (place * 1e3).round().unique(dim=0).shape[0] == place.shape[0]


def test_the_weights_are_the_network_of_the_config():
    with torch.device("meta"):
        network = WanTransformer3DModel.from_config(model.read_config())
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    with safe_open(model.FOLDER / model.WEIGHTS_NAME, "pt") as file:
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (the file is no dict)
        assert {name: tuple(one.get_shape()) for name, one in stored.items()} == shapes
        assert {one.get_dtype() for one in stored.values()} == {"F16"}


def test_the_model_folder_stays_below_twenty_megabytes():
    assert sum(path.stat().st_size for path in model.FOLDER.iterdir() if path.is_file()) <= 20_000_000


def test_the_model_card_has_no_gap_that_a_person_was_to_fill():
    assert "To be written" not in (model.FOLDER / "README.md").read_text("utf-8")


def test_the_trained_transformer_is_finite_and_in_evaluation_mode(pipeline):
    assert not pipeline.transformer.training
    assert all(parameter.isfinite().all() for parameter in pipeline.transformer.parameters())


def test_the_network_cannot_move_coordinates(pipeline):
    latents = model.initial_latents(EXAMPLES[0], **{k: SMALL[k] for k in ("frames", "height", "width")}, seed=0)
    prompt = tiny_wan.embed_prompt(EXAMPLES[0])[None]
    with torch.no_grad():
        velocity = pipeline.transformer(latents, torch.tensor([700.0]), prompt, return_dict=False)[0]
    assert velocity.shape == latents.shape
    assert (velocity[:, CHANNELS:] == 0).all()
    assert velocity[:, :CHANNELS].abs().max() > 0


def test_an_untrained_transformer_depends_on_its_seed_alone():
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, second, other = (tiny_wan.untrained_transformer(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "blocks.0.attn1.to_q.weight"
    assert not torch.equal(first[name], other[name])


def test_there_are_four_examples_and_each_has_an_embedding_of_its_own():
    assert len(set(EXAMPLES)) == len(EXAMPLES) >= 4
    embeddings = [tiny_wan.embed_prompt(prompt) for prompt in (*EXAMPLES, None)]
    assert {tuple(each.shape) for each in embeddings} == {(16, model.read_config()["text_dim"])}
    assert len({each.sum().item() for each in embeddings}) == len(embeddings)


def test_a_seed_means_the_same_bits_twice_and_another_seed_another_video(pipeline):
    first, second, other = (tiny_wan.generate(pipeline, EXAMPLES[1], **SMALL, seed=seed) for seed in (3, 3, 4))
    assert first.shape == (1, CHANNELS, 2, 4, 6)
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_prompt_changes_the_video(pipeline):
    one, other = (tiny_wan.generate(pipeline, prompt, **SMALL | {"steps": 1}) for prompt in EXAMPLES[:2])
    assert not torch.equal(one, other)


def test_the_callback_sees_every_step_and_unchanged_coordinates(pipeline):
    seen = []

    def callback(_pipeline, step, _timestep, tensors):
        seen.append((step, tensors["latents"][:, CHANNELS:].clone()))
        return {}

    tiny_wan.generate(pipeline, EXAMPLES[0], **SMALL, callback_on_step_end=callback)
    sizes = {name: SMALL[name] for name in ("frames", "height", "width")}
    place = model.initial_latents(EXAMPLES[0], **sizes, seed=0)[:, CHANNELS:]
    assert [step for step, _ in seen] == [0, 1]
    assert all(torch.equal(one, place) for _, one in seen)


def test_frames_are_the_rounded_pixels():
    latents = torch.randn(1, CHANNELS, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    pixels, frames = tiny_wan.decode_pixels(latents), tiny_wan.decode_latents(latents)
    assert pixels.shape == (3, 3, 24, 40)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert frames.dtype == torch.uint8
    assert torch.equal(frames, (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1))


def test_decoding_ignores_coordinate_channels():
    latents = torch.randn(1, CHANNELS + COORDINATE_CHANNELS, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tiny_wan.decode_pixels(latents), tiny_wan.decode_pixels(latents[:, :CHANNELS]))


def test_a_video_of_sixteen_frames_has_8192_tokens():
    assert model.token_count(16, 128, 256) == 8192


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "a cat"}, "got 'a cat'"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"height": 20}, "height must be a multiple of 8 pixels, got 20; try 24"),
        ({"width": 3}, "width must be a multiple of 8 pixels, got 3; try 8"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_generate_says_what_it_needs(pipeline, changes, message):
    with pytest.raises(tiny_wan.TinyWanError, match=message):
        tiny_wan.generate(pipeline, **({"prompt": EXAMPLES[0]} | SMALL | changes))


@pytest.mark.parametrize("shape", [(48, 1, 2, 2), (2, 48, 1, 2, 2), (1, 47, 1, 2, 2)])
def test_decoding_says_which_shape_it_needs(shape):
    with pytest.raises(tiny_wan.TinyWanError, match="latents must be"):
        tiny_wan.decode_latents(torch.zeros(shape))


@pytest.mark.parametrize(
    "load", [tiny_wan.load_pipeline, tiny_wan.load_transformer, lambda folder: tiny_wan.embed_prompt(None, folder)]
)
def test_a_missing_file_is_named_with_a_way_out(load, tmp_path):
    with pytest.raises(tiny_wan.TinyWanError, match=r"safetensors is missing in .* reinstall"):
        load(folder=tmp_path)


WORDS = words.Vocabulary(background=("sea", "sky"), object=("cat", "ball"))


@pytest.fixture(scope="module")
def model_of_words(tmp_path_factory):
    """A model folder whose prompts are words, with another architecture and window than the shipped one's."""
    folder = tmp_path_factory.mktemp("model_of_words")
    minute_wan.write_model_of_words(folder, WORDS, ["sea, cat", "sky"], [64, 96])
    return folder


def test_a_model_of_words_is_asked_in_words(model_of_words):
    pipeline = tiny_wan.load_pipeline(folder=model_of_words)
    assert tiny_wan.folder_of(pipeline) == model_of_words
    assert tiny_wan.example_prompts(model_of_words) == ("sea, cat", "sky")
    prompts = ("sea, cat moves left", "sea, cat moves right", "sky, large ball, camera turns left")
    made = [tiny_wan.generate(pipeline, prompt, **SMALL) for prompt in prompts]
    assert made[0].shape == (1, CHANNELS, 2, 4, 6)
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    # the same scene in other words
    assert torch.equal(made[0], tiny_wan.generate(pipeline, "sea, camera still, medium cat moves left", **SMALL))


def test_a_model_of_words_says_which_words_it_has(model_of_words):
    pipeline = tiny_wan.load_pipeline(folder=model_of_words)
    with pytest.raises(tiny_wan.TinyWanError, match="one of sea, sky, ball, cat; got 'rabbit_wakes'"):
        tiny_wan.generate(pipeline, "rabbit_wakes", **SMALL)


def test_a_video_is_decoded_with_the_numbers_of_its_own_model(model_of_words):
    pipeline = tiny_wan.load_pipeline(folder=model_of_words)
    video = Video("sea", frames=2, height=16, width=24, steps=1)
    latents = video.latents(pipeline)
    assert torch.equal(video.pixels(pipeline), tiny_wan.decode_pixels(latents, model_of_words))
    assert not torch.equal(video.pixels(pipeline), tiny_wan.decode_pixels(latents))


def test_a_window_lies_in_the_middle_of_the_trained_one_or_where_the_prompt_has_it(model_of_words):
    assert model.window_corner("sea", 32, 32, model_of_words) == (16, 32)
    assert model.window_corner("sea", 64, 96, model_of_words) == (0, 0)
    assert model.window_corner("sea", 96, 128, model_of_words) == (-16, -16)
    subject = json.loads((model_of_words / model.SUBJECT_NAME).read_text())
    (model_of_words / model.SUBJECT_NAME).write_text(json.dumps(subject | {"centre_x": {"sky": 88, "sea": 40}}))
    assert model.window_corner("sky", 64, 32, model_of_words) == (0, 64)
    assert model.window_corner("sea", 64, 32, model_of_words) == (0, 24)
    (model_of_words / model.SUBJECT_NAME).write_text(json.dumps(subject))


def test_the_first_example_is_what_a_video_shows_by_default():
    assert Video().prompt == EXAMPLES[0]
