"""Made video: what a prompt says is what is seen, the same seed gives the same video, and objects hide each other."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from svg2_compile.tiny_wan.words import ObjectWords, parse

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny_wan"
sys.path.append(str(FOLDER))
made = importlib.import_module("made_video")
SHAPE = made.Shape(5, 32, 64)


@pytest.fixture(scope="module")
def pictures():
    return made.Pictures.load()


def plan_with(pictures, found, aspect=2.0):
    """Return the first plan of which something is true."""
    return next(p for p in (made.draw_plan(s, pictures.vocabulary, aspect) for s in range(20_000)) if found(p))


def alone(pictures, motion, size="medium"):
    """Return a plan of a single object that moves as told, before a camera at rest in steady light."""

    def found(plan):
        quiet = plan.words.camera == "still" and plan.words.light == "steady"
        return quiet and [(o.motion, o.size) for o in plan.words.objects] == [(motion, size)]

    return plan_with(pictures, found)


def centres(masks):
    """Return the centre of mass of masks [F, H, W] as [F, 2], x and y in pixels."""
    total = masks.sum((1, 2))
    rows, columns = torch.arange(masks.shape[1]), torch.arange(masks.shape[2])
    return torch.stack([(masks.sum(1) * columns).sum(1) / total, (masks.sum(2) * rows).sum(1) / total], dim=1)


def mask_of(pictures, plan, shape=None, number=0):
    return made.render_with_masks(pictures, [plan], shape or made.Shape(9, 64, 128))[1][0, number]


@pytest.mark.parametrize("shape", [SHAPE, made.Shape(1, 24, 24), made.Shape(3, 40, 56)])
def test_videos_have_the_shape_asked_for_and_stay_in_range(pictures, shape):
    plans = [made.draw_plan(seed, pictures.vocabulary, shape.aspect) for seed in range(12)]
    pixels, masks = made.render_with_masks(pictures, plans, shape)
    assert pixels.shape == (12, 3, shape.frames, shape.height, shape.width)
    assert masks.shape == (12, 4, shape.frames, shape.height, shape.width)
    assert pixels.dtype == masks.dtype == torch.float32
    assert -1 <= pixels.min() < pixels.max() <= 1
    assert 0 <= masks.min() < masks.max() <= 1
    assert masks.sum(1).max() <= 1 + 1e-5


def test_a_seed_gives_the_same_video_alone_and_among_others(pictures):
    torch.manual_seed(5)
    plans = [made.draw_plan(seed, pictures.vocabulary) for seed in (7, 8, 9)]
    together = made.render(pictures, plans, SHAPE)
    again = made.render(pictures, [made.draw_plan(8, pictures.vocabulary)], SHAPE)
    assert torch.equal(together[1], again[0])
    assert not torch.equal(together[0], together[1])


def test_trained_and_held_out_seeds_share_no_video(pictures):
    plans = {seed: made.draw_plan(seed, pictures.vocabulary) for seed in (5, made.HELD_OUT + 5, 2**32 - 1)}
    assert len({plan.camera.x for plan in plans.values()}) == 3


def test_all_words_are_used(pictures):
    seen = {kind: set() for kind in ("background", "camera", "light", "object", "motion", "size")}
    for seed in range(600):
        words = made.draw_plan(seed, pictures.vocabulary).words
        for kind in ("background", "camera", "light"):
            seen[kind].add(getattr(words, kind))
        for each in words.objects:
            for kind, word in (("object", each.name), ("motion", each.motion), ("size", each.size)):
                seen[kind].add(word)
    assert seen == {kind: set(getattr(pictures.vocabulary, kind)) for kind in seen}


def test_the_prompt_of_a_plan_can_be_read(pictures):
    for seed in range(50):
        words = made.draw_plan(seed, pictures.vocabulary).words
        assert parse(str(words), pictures.vocabulary) == words


@pytest.mark.parametrize(
    ("motion", "axis", "direction"), [("moves left", 0, -1), ("moves right", 0, 1), ("rises", 1, -1), ("falls", 1, 1)]
)
def test_an_object_moves_where_the_prompt_says_and_nowhere_else(pictures, motion, axis, direction):
    steps = centres(mask_of(pictures, alone(pictures, motion))).diff(dim=0)
    assert (direction * steps[:, axis] > 0.5).all()
    assert steps[:, 1 - axis].abs().max() < 0.6
    assert steps[:, axis].std() < 0.25


def test_an_object_at_rest_rests(pictures):
    masks = mask_of(pictures, alone(pictures, "rests"))
    assert_close(masks, masks[:1].expand_as(masks))


@pytest.mark.parametrize(("motion", "direction"), [("grows", 1), ("shrinks", -1)])
def test_an_object_grows_and_shrinks_in_place(pictures, motion, direction):
    masks = mask_of(pictures, alone(pictures, motion, "small"))
    assert (direction * masks.sum((1, 2)).diff() > 0).all()
    assert (centres(masks) - centres(masks)[0]).abs().max() < 1


def test_a_circle_ends_where_it_began_and_a_spin_stays(pictures):
    shape = made.Shape(9, 64, 128)
    path = centres(mask_of(pictures, alone(pictures, "circles", "small"), shape))
    radius = (path - path.mean(0)).norm(dim=1)
    assert radius.min() > 6
    assert radius.std() < 0.2 * radius.mean()
    spun = mask_of(pictures, alone(pictures, "spins"), shape)
    still = mask_of(pictures, alone(pictures, "rests"), shape)
    assert (spun[0] - spun[4]).abs().sum() > 10 * (still[0] - still[4]).abs().sum()


def test_sizes_are_in_order(pictures):
    plans = [alone(pictures, "rests", size) for size in ("small", "medium", "large")]
    same = [dataclasses.replace(p, objects=(dataclasses.replace(p.objects[0], number=0),)) for p in plans]
    small, medium, large = (mask_of(pictures, plan).sum() for plan in same)
    assert small < medium < large


def test_the_object_in_front_hides_the_one_behind(pictures):
    plan = alone(pictures, "rests", "large")
    back, front = (
        dataclasses.replace(plan.objects[0], number=pictures.vocabulary.object.index(name)) for name in ("cat", "ball")
    )
    both = dataclasses.replace(plan, objects=(back, front))
    swapped = dataclasses.replace(plan, objects=(front, back))
    only = dataclasses.replace(plan, objects=(front,))
    pixels, masks = made.render_with_masks(pictures, [both, swapped, only], SHAPE)
    hidden = masks[2, 0] == 1
    assert hidden.sum() > 20
    assert_close(pixels[0][:, hidden], pixels[2][:, hidden])
    assert not masks[0, 0][hidden].any()
    assert not torch.allclose(pixels[0], pixels[1])


def test_nothing_outside_of_an_object_changes_with_it(pictures):
    plan = alone(pictures, "moves left")
    pixels, masks = made.render_with_masks(pictures, [plan, dataclasses.replace(plan, objects=())], SHAPE)
    outside = masks[0, 0] == 0
    assert torch.equal(pixels[0][:, outside], pixels[1][:, outside])
    assert not torch.equal(pixels[0], pixels[1])


@pytest.mark.parametrize(
    ("word", "axis", "direction"),
    [("pans left", 3, 1), ("pans right", 3, -1), ("tilts up", 2, 1), ("tilts down", 2, -1)],
)
def test_what_is_seen_moves_against_the_camera(pictures, word, axis, direction):
    plan = plan_with(pictures, lambda p: p.words.camera == word and p.words.background == "gravel")
    plan = dataclasses.replace(
        plan, objects=(), light=made.LightPath(1, 1, 0, 1, 1), camera=dataclasses.replace(plan.camera, angle=0.0)
    )
    shape = made.Shape(32, 64, 128)
    first, second = made.render(pictures, [plan], shape)[0][:, :2].transpose(0, 1)
    errors = {s: _error_of_shift(first, second, axis - 1, s) for s in range(-6, 7)}
    assert direction * min(errors, key=errors.get) > 0


def _error_of_shift(first, second, axis, shift):
    """Return how far apart two frames are, the second moved back by ``shift`` pixels, borders left out."""
    moved = second.roll(-shift, dims=axis)
    return (first - moved)[:, 8:-8, 8:-8].square().mean().item()


@pytest.mark.parametrize(("word", "direction"), [("turns left", 1), ("turns right", -1)])
def test_the_camera_turns_where_the_prompt_says(pictures, word, direction):
    """A camera that turns left sees the world turn right: what is right of the middle goes down."""
    full = torch.zeros_like(pictures.backgrounds[0])
    full[:, :, 140:149, 320:329] = 1
    spot = made.Pictures(pictures.vocabulary, (full, torch.nn.functional.avg_pool2d(full, 2)), pictures.objects)
    plan = plan_with(pictures, lambda p: p.words.camera == word)
    camera = dataclasses.replace(plan.camera, x=256.0, y=144.0)
    plan = dataclasses.replace(plan, objects=(), camera=camera, light=made.LightPath(1, 1, 0, 1, 1))
    shown = (made.render(spot, [plan], made.Shape(9, 64, 128))[0, 0] + 1) / 2
    assert (direction * centres(shown).diff(dim=0)[:, 1] > 0.3).all()


@pytest.mark.parametrize(("word", "direction"), [("zooms in", -1), ("zooms out", 1)])
def test_the_camera_zooms_where_the_prompt_says(pictures, word, direction):
    assert direction * plan_with(pictures, lambda p: p.words.camera == word).camera.zoom > 0


def test_the_camera_never_leaves_the_photograph(pictures):
    grid = made._Grid(made.Shape(7, 8, 16), torch.device("cpu"))
    seen = []
    grid.sample = lambda pictures, x, y: seen.append((x, y)) or torch.zeros(*x.shape[:1], 3, *x.shape[1:])
    plans = [made.draw_plan(seed, pictures.vocabulary) for seed in range(400)]
    made._background(pictures, plans, grid)
    x, y = seen[0]
    assert x.min() >= 0
    assert x.max() <= made.BACKGROUND_WIDTH
    assert y.min() >= 0
    assert y.max() <= made.BACKGROUND_HEIGHT


@pytest.mark.parametrize(("word", "direction"), [("brightens", 1), ("darkens", -1)])
def test_the_light_changes_as_the_prompt_says(pictures, word, direction):
    plan = plan_with(pictures, lambda p: p.words.light == word and p.words.camera == "still" and not p.objects)
    brightness = made.render(pictures, [plan], SHAPE)[0].mean((0, 2, 3))
    assert (direction * brightness.diff() > 0).all()


def test_a_sweep_goes_from_left_to_right(pictures):
    plan = plan_with(pictures, lambda p: p.words.light == "sweeps" and p.words.camera == "still" and not p.objects)
    steady = dataclasses.replace(plan, light=dataclasses.replace(plan.light, sweep=0.0))
    swept, plain = made.render(pictures, [plan, steady], made.Shape(5, 32, 64))
    brightest = (swept - plain).mean((0, 2)).argmax(dim=1)
    assert (brightest.diff() > 0).all()


def test_a_plan_is_the_same_video_at_any_number_of_frames_and_pixels(pictures):
    plan = alone(pictures, "moves right", "large")
    # frame 1 of 3 is frame 4 of 9: the middle of the video
    few, many = (made.render(pictures, [plan], made.Shape(frames, 32, 64))[0] for frames in (3, 9))
    assert_close(few[:, 1], many[:, 4])
    fine = made.render(pictures, [plan], made.Shape(3, 64, 128))
    coarse = torch.nn.functional.avg_pool2d(fine[0].transpose(0, 1), 2).transpose(0, 1)
    assert (coarse - few).abs().mean() < 0.05


def test_every_picture_has_terms_that_allow_it():
    free = {"public domain", "CC0", "CC0 1.0", "CC BY 2.0", "CC BY 4.0", "Apache-2.0"}
    entries = json.loads((FOLDER / "photographs" / "catalogue.json").read_text("utf-8"))
    assert {each["licence"] for each in entries} <= free
    assert all(each["author"] for each in entries)
    assert all(each["stated"] for each in entries if each["package"])
    page = (FOLDER / "photographs" / "README.md").read_text("utf-8")
    assert all(f"| {each['name']} |" in page and each["author"] in page for each in entries)
    listed = {each["file"] for each in entries}
    assert listed == {p.name for p in (FOLDER / "photographs").iterdir() if p.suffix in (".jpg", ".png")}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: made.draw_plan(-1, p.vocabulary), r"must be in \[0, 2\*\*32\), got -1"),
        (lambda p: made.draw_plan(0, p.vocabulary, 9.0), r"must be in \[0.5, 4\], got 9"),
        (lambda p: made.Shape(0, 8, 8), "at least 1"),
        (lambda p: made.render(p, [made.draw_plan(0, p.vocabulary)], made.Shape(2, 32, 32)), "draw it for that"),
        (lambda p: made.Pictures.load(FOLDER), "write it with prepare_photographs.py"),
    ],
)
def test_it_says_what_it_needs(pictures, call, message):
    with pytest.raises(made.MadeVideoError, match=message):
        call(pictures)


def test_a_video_without_objects_has_no_masks(pictures):
    plan = plan_with(pictures, lambda p: not p.objects)
    assert plan.words.objects == ()
    assert not made.render_with_masks(pictures, [plan], SHAPE)[1].any()


def test_objects_of_a_prompt_are_those_of_the_plan(pictures):
    for seed in range(100):
        plan = made.draw_plan(seed, pictures.vocabulary)
        names = [pictures.vocabulary.object[each.number] for each in plan.objects]
        assert [each.name for each in plan.words.objects] == names
        assert all(isinstance(each, ObjectWords) for each in plan.words.objects)
        assert pictures.vocabulary.background[plan.background] == plan.words.background


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_renders_the_same_videos(pictures):
    plans = [made.draw_plan(seed, pictures.vocabulary) for seed in range(6)]
    there = made.render(made.Pictures.load(device="cuda"), plans, SHAPE).cpu()
    # a pixel at an edge may fall to the other side, or be taken from the next level of detail
    assert ((there - made.render(pictures, plans, SHAPE)).abs() > 0.02).float().mean() < 1e-3
