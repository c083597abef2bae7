"""Endless made video: a camera over a photograph, objects that move and hide each other, light that changes.

    pictures = Pictures.load(PHOTOGRAPHS, device)
    plans = [draw_plan(seed, pictures.vocabulary) for seed in range(8)]
    pixels = render(pictures, plans, Shape(16, 128, 256))  # fp32 [8, 3, 16, 128, 256] in [-1, 1]
    prompts = [plan.words for plan in plans]

A plan is all that makes a video: numbers drawn from a seed alone, and the words that say what is seen. It does not
depend on the number of frames or pixels, only on the shape of the picture. Time runs from -1/2 to 1/2 over a video, so
that a motion takes as long as the video. Rendering is plain ``grid_sample`` on whichever device the pictures are on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from svg2_compile.tiny_wan.words import MAX_OBJECTS, ObjectWords, SceneWords, Vocabulary

PHOTOGRAPHS = Path(__file__).resolve().parent / "photographs"
HELD_OUT = 2**31
"""Seeds from here on are never trained on; seeds end at 2**32, because PyTorch's generator takes 32 bits."""

BACKGROUND_HEIGHT, BACKGROUND_WIDTH = 288, 512
OBJECT_SIZE, OBJECT_MARGIN, OBJECT_LEVELS = 128, 4, 4

OBJECT_COUNTS = (0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4)
"""Drawn with equal chances: one object in 30 % of the videos, two in 35 %."""

DIAMETERS = {"small": (0.24, 0.30), "medium": (0.36, 0.44), "large": (0.54, 0.64)}
"""Diameter of an object at half time, in heights of the picture."""


class MadeVideoError(ValueError):
    """Video is asked for that cannot be made."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Frames, height and width of a video in pixels."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise MadeVideoError(f"frames, height and width must be at least 1, got {self}")

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height


@dataclass(frozen=True, slots=True)
class CameraPath:
    """Where the camera looks: linear in time, in pixels of the background, radians and the logarithm of the scale."""

    x: float
    y: float
    dx: float
    dy: float
    height: float
    """Height of what is seen at half time, in pixels of the background."""

    zoom: float
    """What is seen grows by ``exp(zoom * time)``."""

    angle: float
    turn: float
    """Clockwise, as y points down."""


@dataclass(frozen=True, slots=True)
class LightPath:
    """Brightness over time and place, and a fixed colour."""

    start: float
    end: float
    """Brightness at the two ends of the video, linear between them."""

    sweep: float
    """How much brighter a band is that crosses the picture from left to right; zero is no band."""

    red: float
    blue: float


@dataclass(frozen=True, slots=True)
class ObjectPath:
    """Where an object is, in heights of the picture: a line and a circle or a swing on top of it."""

    number: int
    """Of the object in the vocabulary."""

    x: float
    y: float
    dx: float
    dy: float
    around_x: float
    around_y: float
    """How far it goes out, around a point."""

    rounds: float
    phase: float
    diameter: float
    growth: float
    """The diameter grows by ``exp(growth * time)``."""

    angle: float
    spin: float


@dataclass(frozen=True, slots=True)
class Plan:
    """All that makes a video, and what is to be said of it."""

    words: SceneWords
    background: int
    """Its number in the vocabulary."""

    aspect: float
    """Width over height of the picture that it was drawn for."""

    camera: CameraPath
    light: LightPath
    objects: tuple[ObjectPath, ...]
    """From back to front."""


class Draws:
    """Numbers and choices that depend on a seed alone."""

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**32:
            raise MadeVideoError(f"a seed must be in [0, 2**32), got {seed}; held-out seeds begin at 2**31")
        count = 16 + 16 * MAX_OBJECTS
        generator = torch.Generator("cpu").manual_seed(seed)
        self._numbers = iter(torch.rand(count, generator=generator, dtype=torch.float64, device="cpu").tolist())

    def between(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * next(self._numbers)

    def index(self, count: int) -> int:
        """Return a whole number below ``count``."""
        return int(next(self._numbers) * count)

    def sign(self) -> float:
        """Return -1 or 1."""
        return -1.0 if next(self._numbers) < 0.5 else 1.0


def draw_plan(seed: int, vocabulary: Vocabulary, aspect: float = 2.0) -> Plan:
    """Return the plan of a seed.

    Args:
        seed: in [0, 2**32); from ``HELD_OUT`` on for what is never trained on.
        vocabulary: of the pictures.
        aspect: width over height of the picture, in [0.5, 4].

    Promises: depends on these alone, on every device.
    """
    if not 0.5 <= aspect <= 4:
        raise MadeVideoError(f"width over height must be in [0.5, 4], got {aspect}")
    draws = Draws(seed)
    background = draws.index(len(vocabulary.background))
    camera_word = vocabulary.camera[draws.index(len(vocabulary.camera))]
    light_word = vocabulary.light[draws.index(len(vocabulary.light))]
    camera = _camera(camera_word, draws, aspect)
    light = _light(light_word, draws)
    told, paths = [], []
    for _ in range(OBJECT_COUNTS[draws.index(len(OBJECT_COUNTS))]):
        number = draws.index(len(vocabulary.object))
        size = vocabulary.size[draws.index(len(vocabulary.size))]
        motion = vocabulary.motion[draws.index(len(vocabulary.motion))]
        told.append(ObjectWords(vocabulary.object[number], motion, size))
        paths.append(_object(number, size, motion, draws, aspect))
    words = SceneWords(vocabulary.background[background], camera_word, light_word, tuple(told))
    return Plan(words, background, aspect, camera, light, tuple(paths))


def _camera(word: str, draws: Draws, aspect: float) -> CameraPath:
    """Return a path whose frames stay inside of the background."""
    widest = min(BACKGROUND_HEIGHT, BACKGROUND_WIDTH / aspect)
    height = widest * draws.between(0.38, 0.58)
    zoom = {"zooms in": -1.0, "zooms out": 1.0}.get(word, 0.0) * draws.between(0.35, 0.6)
    turn = {"turns left": -1.0, "turns right": 1.0}.get(word, 0.0) * draws.between(0.2, 0.4)
    angle = draws.between(-0.05, 0.05)
    # half of the box around what is seen, at the widest and most turned moment
    most_height, most_angle = height * math.exp(abs(zoom) / 2), abs(angle) + abs(turn) / 2
    sine, cosine = math.sin(most_angle), math.cos(most_angle)
    half_x, half_y = most_height / 2 * (aspect * cosine + sine), most_height / 2 * (cosine + aspect * sine)
    room_x, room_y = max(0.0, BACKGROUND_WIDTH - 2 * half_x - 1), max(0.0, BACKGROUND_HEIGHT - 2 * half_y - 1)
    far = draws.between(0.55, 0.95)
    dx = {"pans left": -1.0, "pans right": 1.0}.get(word, 0.0) * min(far * room_x, 0.7 * height * aspect)
    dy = {"tilts up": -1.0, "tilts down": 1.0}.get(word, 0.0) * min(far * room_y, 0.9 * height)
    x = BACKGROUND_WIDTH / 2 + draws.between(-0.5, 0.5) * (room_x - abs(dx))
    y = BACKGROUND_HEIGHT / 2 + draws.between(-0.5, 0.5) * (room_y - abs(dy))
    return CameraPath(x, y, dx, dy, height, zoom, angle, turn)


def _light(word: str, draws: Draws) -> LightPath:
    level, dim = draws.between(0.85, 1.05), draws.between(0.4, 0.55)
    start = dim if word == "brightens" else level
    end = dim if word == "darkens" else level
    sweep = 0.0
    if word == "sweeps":
        start = end = 0.6 * level
        sweep = draws.between(0.5, 0.8)
    return LightPath(start, end, sweep, draws.between(0.93, 1.07), draws.between(0.93, 1.07))


def _object(number: int, size: str, motion: str, draws: Draws, aspect: float) -> ObjectPath:
    """Return a path that stays inside of the picture with the centre of the object."""
    diameter = draws.between(*DIAMETERS[size])
    growth = {"grows": 1.0, "shrinks": -1.0}.get(motion, 0.0) * draws.between(0.6, 0.9)
    spin = draws.sign() * draws.between(0.5, 1.0) * 2 * math.pi if motion == "spins" else 0.0
    far = draws.between(0.55, 0.95)
    margin = 0.16
    room_x, room_y = aspect - 2 * margin, 1 - 2 * margin
    dx = {"moves left": -1.0, "moves right": 1.0}.get(motion, 0.0) * far * min(room_x, 1.2)
    dy = {"rises": -1.0, "falls": 1.0}.get(motion, 0.0) * far * room_y
    around_x = around_y = 0.0
    if motion == "circles":
        around_x = around_y = far * 0.3
    elif motion == "swings":
        around_x = far * min(0.4, room_x / 2)
    x = aspect / 2 + draws.between(-0.5, 0.5) * (room_x - abs(dx) - 2 * around_x)
    y = 0.5 + draws.between(-0.5, 0.5) * (room_y - abs(dy) - 2 * around_y)
    rounds = draws.sign() * (1.5 if motion == "swings" else 1.0)
    phase, angle = draws.between(0, 2 * math.pi), draws.between(-0.12, 0.12)
    return ObjectPath(number, x, y, dx, dy, around_x, around_y, rounds, phase, diameter, growth, angle, spin)


class Pictures:
    """The photographs and objects on a device, ready to be sampled.

    ``backgrounds`` holds them at full and half size, fp32 ``[n, 3, H, W]``; ``objects`` is fp32 ``[n, 4, 128, 256]``,
    each object at 128, 64, 32 and 16 pixels beside each other, colours multiplied by the alpha channel, in [0, 1].
    """

    def __init__(self, vocabulary: Vocabulary, backgrounds: tuple[Tensor, Tensor], objects: Tensor) -> None:
        self.vocabulary = vocabulary
        self.backgrounds = backgrounds
        self.objects = objects

    @property
    def device(self) -> torch.device:
        """Where the pictures are."""
        return self.objects.device

    @classmethod
    def load(cls, folder: Path = PHOTOGRAPHS, device: str | torch.device = "cpu") -> Pictures:
        """Read what ``prepare_photographs.py`` wrote.

        Raises:
            MadeVideoError: the catalogue or a picture is missing, or has another size.

        """
        if not (folder / "catalogue.json").is_file():
            raise MadeVideoError(f"{folder} holds no catalogue.json; write it with prepare_photographs.py")
        entries = json.loads((folder / "catalogue.json").read_text("utf-8"))
        named = {
            kind: {each["name"]: each["file"] for each in entries if each["kind"] == kind}
            for kind in ("background", "object")
        }
        vocabulary = Vocabulary(background=tuple(named["background"]), object=tuple(named["object"]))
        full = torch.stack([_read(folder / file, "RGB") for file in named["background"].values()])
        if full.shape[2:] != (BACKGROUND_HEIGHT, BACKGROUND_WIDTH):
            raise MadeVideoError(f"backgrounds must have 288 x 512 pixels, got {tuple(full.shape[2:])}")
        cut = torch.stack([_read(folder / file, "RGBA") for file in named["object"].values()])
        objects = _levels_of_objects(torch.cat([cut[:, :3] * cut[:, 3:], cut[:, 3:]], dim=1))
        return cls(vocabulary, (full.to(device), F.avg_pool2d(full, 2).to(device)), objects.to(device))


def _read(path: Path, mode: str) -> Tensor:
    """Return a picture as fp32 ``[channels, H, W]`` in [0, 1]."""
    if not path.is_file():
        raise MadeVideoError(f"{path.name} is missing in {path.parent}; write it with prepare_photographs.py")
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert(mode))).permute(2, 0, 1).float() / 255


def _levels_of_objects(cut: Tensor) -> Tensor:
    """Return ``[n, 4, 128, 256]``: each object at full size and, to the right, at half, a quarter and an eighth."""
    if cut.shape[1:] != (4, OBJECT_SIZE, OBJECT_SIZE):
        raise MadeVideoError(f"objects must have 128 x 128 pixels, got {tuple(cut.shape[2:])}")
    sheet = cut.new_zeros(cut.shape[0], 4, OBJECT_SIZE, 2 * OBJECT_SIZE)
    for level in range(OBJECT_LEVELS):
        size, left = OBJECT_SIZE >> level, _left_of(level)
        sheet[:, :, :size, left : left + size] = F.avg_pool2d(cut, 1 << level) if level else cut
    return sheet


def _left_of(level: int) -> int:
    """Return the column where a level of the objects begins: 0, 128, 192, 224."""
    return 2 * OBJECT_SIZE - (2 * OBJECT_SIZE >> level)


def render(pictures: Pictures, plans: Sequence[Plan], shape: Shape) -> Tensor:
    """Return the videos of plans.

    Args:
        pictures: on the device that is to render.
        plans: drawn for the aspect of ``shape``.
        shape: of every video.

    Returns:
        fp32 ``[B, 3, F, H, W]`` in [-1, 1], on the device of the pictures.

    Promises: a video depends on its own plan alone, up to the rounding of the device.
    """
    return _compose(pictures, plans, shape)[0]


def render_with_masks(pictures: Pictures, plans: Sequence[Plan], shape: Shape) -> tuple[Tensor, Tensor]:
    """Return the videos, and what is seen of each object.

    Returns:
        The videos as ``render`` returns them, and fp32 ``[B, 4, F, H, W]`` in [0, 1]: the share of each pixel that
        shows the object, from back to front, what others hide left out; zero for objects that are not there.

    """
    pixels, covers = _compose(pictures, plans, shape)
    seen = torch.zeros(pixels.shape[0], MAX_OBJECTS, *pixels.shape[2:], device=pixels.device)
    free = torch.ones_like(seen[:, 0])
    for number in reversed(range(len(covers))):
        seen[:, number] = covers[number] * free
        free = free * (1 - covers[number])
    return pixels, seen


def _compose(pictures: Pictures, plans: Sequence[Plan], shape: Shape) -> tuple[Tensor, list[Tensor]]:
    """Return the videos and the alpha channel of every object, ``[B, F, H, W]`` each, from back to front."""
    for plan in plans:
        if abs(plan.aspect - shape.aspect) > 1e-6:
            raise MadeVideoError(f"a plan was drawn for width / height = {plan.aspect}, got {shape}; draw it for that")
    grid = _Grid(shape, pictures.device)
    colours = _background(pictures, plans, grid)
    covers = []
    for number in range(max((len(plan.objects) for plan in plans), default=0)):
        painted = _one_object(pictures, [_object_row(plan, number) for plan in plans], grid)
        colours = colours * (1 - painted[:, 3:]) + painted[:, :3]
        covers.append(painted[:, 3])
    return (colours * _light_over(plans, grid)).clamp(0, 1) * 2 - 1, covers


class _Grid:
    """Time and place of every pixel: ``time`` [F, 1, 1] from -1/2 to 1/2, ``x`` [W] and ``y`` [H, 1] in heights."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        frames = torch.arange(shape.frames, device=device, dtype=torch.float32)
        self.time = ((frames + 0.5) / shape.frames - 0.5).view(-1, 1, 1)
        self.x = (torch.arange(shape.width, device=device, dtype=torch.float32) + 0.5) / shape.height
        self.y = ((torch.arange(shape.height, device=device, dtype=torch.float32) + 0.5) / shape.height).view(-1, 1)

    def columns(self, rows: Sequence[Sequence[float]]) -> list[Tensor]:
        """Return the columns of a table of one row a video, each ``[B, 1, 1, 1]``."""
        table = torch.tensor(rows, dtype=torch.float32).to(self.time.device, non_blocking=True)
        return [column.view(-1, 1, 1, 1) for column in table.unbind(1)]

    def sample(self, pictures: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return ``[B, C, F, H, W]``: pictures ``[B, C, h, w]`` at pixel coordinates ``[B, F, H, W]``."""
        height, width = pictures.shape[2:]
        where = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=-1).flatten(1, 2)  # [B, F * H, W, 2]
        found = F.grid_sample(pictures, where, mode="bilinear", padding_mode="border", align_corners=False)
        return found.unflatten(2, (self.shape.frames, self.shape.height))


def _background(pictures: Pictures, plans: Sequence[Plan], grid: _Grid) -> Tensor:
    """Return what the camera sees of the photographs, ``[B, 3, F, H, W]``."""
    rows = [
        (c.x, c.y, c.dx, c.dy, c.height, c.zoom, c.angle, c.turn, plan.aspect) for plan in plans for c in (plan.camera,)
    ]
    x0, y0, dx, dy, height, zoom, angle, turn, aspect = grid.columns(rows)
    seen = height * torch.exp(zoom * grid.time)  # [B, F, 1, 1]
    bend = angle + turn * grid.time
    across, down = seen * (grid.x - aspect / 2), seen * (grid.y - 0.5)
    x = x0 + dx * grid.time + bend.cos() * across - bend.sin() * down
    y = y0 + dy * grid.time + bend.sin() * across + bend.cos() * down
    number = torch.tensor([plan.background for plan in plans]).to(grid.time.device, non_blocking=True)
    full, half = (level[number] for level in pictures.backgrounds)
    blur = (seen / grid.shape.height).log2().clamp(0, 1)[:, None]  # [B, 1, F, 1, 1]
    return torch.lerp(grid.sample(full, x, y), grid.sample(half, x / 2, y / 2), blur)


def _object_row(plan: Plan, number: int) -> tuple[float, ...]:
    """Return the numbers of an object's path, the last one zero where the video has no such object."""
    if number >= len(plan.objects):
        return (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    o = plan.objects[number]
    line = (float(o.number), o.x, o.y, o.dx, o.dy)
    return (*line, o.around_x, o.around_y, o.rounds, o.phase, o.diameter, o.growth, o.angle, o.spin, 1.0)


def _one_object(pictures: Pictures, rows: Sequence[Sequence[float]], grid: _Grid) -> Tensor:
    """Return one object of every video, ``[B, 4, F, H, W]``, colours multiplied by the alpha channel."""
    number, x0, y0, dx, dy, around_x, around_y, rounds, phase, diameter, growth, angle, spin, there = grid.columns(rows)
    time = grid.time
    circle = 2 * math.pi * rounds * time + phase
    centre_x = x0 + dx * time + around_x * circle.cos()
    centre_y = y0 + dy * time + around_y * circle.sin()
    size = diameter * torch.exp(growth * time)  # [B, F, 1, 1]
    bend = angle + spin * time
    across, down = (grid.x - centre_x) / size, (grid.y - centre_y) / size
    # in diameters from the centre, turned back
    u, v = bend.cos() * across + bend.sin() * down, bend.cos() * down - bend.sin() * across
    inside = there * ((u.abs() < 0.55) & (v.abs() < 0.55))
    texels = OBJECT_SIZE - 2 * OBJECT_MARGIN
    level = (texels / (size * grid.shape.height)).log2().clamp(0, OBJECT_LEVELS - 1.001)
    lower = level.floor()
    chosen = pictures.objects[number.flatten().long()]
    finer, coarser = (_sample_level(chosen, u, v, lower + more, grid) for more in (0, 1))
    return torch.lerp(finer, coarser, (level - lower)[:, None]) * inside[:, None]


def _sample_level(chosen: Tensor, u: Tensor, v: Tensor, level: Tensor, grid: _Grid) -> Tensor:
    """Return objects ``[B, 4, 128, 256]`` at places in diameters, out of the level of each frame ``[B, F, 1, 1]``."""
    texels = (OBJECT_SIZE - 2 * OBJECT_MARGIN) * torch.exp2(-level)
    size = OBJECT_SIZE * torch.exp2(-level)
    left = 2 * OBJECT_SIZE * (1 - torch.exp2(-level))
    x = (u * texels + size / 2).clamp(min=0.5).minimum(size - 0.5)
    y = (v * texels + size / 2).clamp(min=0.5).minimum(size - 0.5)
    return grid.sample(chosen, left + x, y)


def _light_over(plans: Sequence[Plan], grid: _Grid) -> Tensor:
    """Return the factor of every colour and pixel, ``[B, 3, F, H, W]``, of one row where the light is even."""
    rows = [
        (light.start, light.end, light.sweep, light.red, light.blue, plan.aspect)
        for plan in plans
        for light in (plan.light,)
    ]
    start, end, sweep, red, blue, aspect = grid.columns(rows)
    even = (start + end) / 2 + (end - start) * grid.time
    band = torch.exp(-(((grid.x - aspect * (grid.time * 1.2 + 0.5)) / (0.22 * aspect)) ** 2))
    colour = torch.cat([red, torch.ones_like(red), blue], dim=1)[..., None]  # [B, 3, 1, 1, 1]
    return colour * (even + sweep * band)[:, None]
