"""Loops around a tiny DiT, for the tests of what is told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import svg2_compile
from svg2_compile.clock import current_clock

TOKENS, CHANNELS = 128, 16
OPTIONS = {"min_tokens": 64, "dense_steps": 0, "dense_layers": 0, "lowering": "eager"}
LEVELS = (900.0, 600.0, 300.0)
WAYS = ("whole", "blocks", "blocks run by a function")

Told = tuple[int, int, str]
"""Generation, step and branch."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, CHANNELS)).permute(2, 0, 3, 1, 4)
        return x + scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Dit(nn.Module):
    """Takes its noise level under a name that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, CHANNELS)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, c: Any, text: Tensor) -> Tensor:
        return through_blocks(self, x, c, text)


def through_blocks(model: Dit, x: Tensor, c: Any, text: Tensor) -> Tensor:
    """Run the model without calling it."""
    level = torch.as_tensor(c, dtype=torch.float32).reshape(1, -1).amax(1, keepdim=True)
    x = x + model.embed(level / 1000)[:, None] + text
    for block in model.blocks:
        x = block(x)
    return x


@dataclass(frozen=True)
class Loop:
    """A kind of loop."""

    name: str
    calls: Callable[[], Iterator[tuple[Any, ...]]]
    """Yields the arguments of the model's forwards, one after the other."""
    expected: list[Told]
    told: str
    is_guess: bool = False
    advice: str = ""


@dataclass(frozen=True)
class Seen:
    calls: list[Told]
    guesses: dict[str, int]


def compiled(way: str) -> Dit:
    """Return a new model, compiled as a whole or block by block."""
    model = Dit().eval()
    for part in (model,) if way == "whole" else model.blocks:
        part.compile(backend="svg2", options=OPTIONS)
    return model


def run(loop: Loop, way: str) -> Seen:
    """Run a loop with a new model and return what was told of its forwards, generations numbered from 0."""
    model = compiled(way)
    call = (lambda *args: through_blocks(model, *args)) if way == WAYS[2] else model
    told = []
    for args in loop.calls():
        call(*args)
        now = current_clock().now
        assert now is not None
        told.append((now.run, now.step, now.stream))
    runs = list(dict.fromkeys(run for run, _, _ in told))
    guesses: dict[str, int] = {}
    for schedule in svg2_compile.report(model).schedules:
        guesses |= schedule.guesses
    return Seen([(runs.index(run), step, stream) for run, step, stream in told], guesses)


def latents() -> Tensor:
    return torch.randn(1, TOKENS, CHANNELS)


def prompts() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 1, CHANNELS), torch.randn(1, 1, CHANNELS)


def guided(level: Callable[[float], Any] = lambda t: torch.tensor([t])) -> Iterator[tuple[Any, ...]]:
    for _ in range(2):
        texts = prompts()
        for t in LEVELS:
            x = latents()
            for text in texts:
                yield x, level(t), text


def without_guidance() -> Iterator[tuple[Any, ...]]:
    for _ in range(2):
        text = prompts()[0]
        for t in LEVELS:
            yield latents(), torch.tensor([t]), text


def guided_for_a_while() -> Iterator[tuple[Any, ...]]:
    cond, uncond = prompts()
    for t in (900.0, 700.0, 500.0, 300.0):
        x = latents()
        for text in (uncond, cond) if t > 600 else (cond,):
            yield x, torch.tensor([t]), text


def going_back() -> Iterator[tuple[Any, ...]]:
    text = prompts()[0]
    for t in (900.0, 700.0, 500.0, 600.0, 400.0):
        yield latents(), torch.tensor([t]), text


def second_order() -> Iterator[tuple[Any, ...]]:
    text = prompts()[0]
    for t in (900.0, 600.0, 600.0, 300.0, 300.0):
        yield latents(), torch.tensor([t]), text


def video_to_video() -> Iterator[tuple[Any, ...]]:
    for levels in (LEVELS, LEVELS[1:]):
        text = prompts()[0]
        for t in levels:
            yield latents(), torch.tensor([t]), text


def frame_after_frame() -> Iterator[tuple[Any, ...]]:
    text = prompts()[0]
    for levels in ([900.0, 900.0], [450.0, 900.0], [0.0, 900.0], [0.0, 450.0]):
        yield latents(), torch.tensor([levels]), text


def scheduled() -> Iterator[tuple[Any, ...]]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    for _ in range(2):
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            yield latents(), t.reshape(1), torch.randn(1, 1, CHANNELS)


TWICE = [(generation, step, str(branch)) for generation in range(2) for step in range(3) for branch in range(2)]
ONCE = [(generation, step, "0") for generation in range(2) for step in range(3)]

LOOPS = (
    Loop("a call for each branch", guided, TWICE, "all"),
    Loop("the level as a Python number", lambda: guided(float), TWICE, "all"),
    Loop("the level for each token", lambda: guided(lambda t: torch.full((1, 9), t)), TWICE, "all"),
    Loop("one call a step", without_guidance, ONCE, "all"),
    Loop("a scheduler of diffusers, prompts made anew", scheduled, ONCE, "all, and the total"),
    Loop(
        "guidance in some steps only",
        guided_for_a_while,
        [(0, 0, "0"), (0, 0, "1"), (0, 1, "0"), (0, 1, "1"), (0, 2, "1"), (0, 3, "1")],
        "branches by their prompts' tensors, which must be the same in each step",
    ),
    Loop(
        "second-order samplers",
        second_order,
        [(0, 0, "0"), (0, 1, "0"), (0, 1, "1"), (0, 2, "0"), (0, 2, "1")],
        "a step for each level; the second call at one has centroids of its own",
        True,
        "nothing: it costs one first clustering",
    ),
    Loop(
        "samplers that go back",
        going_back,
        [(0, step, "0") for step in range(5)],
        "the same generation",
        True,
        "`denoise_step`",
    ),
    Loop(
        "video-to-video of any strength",
        video_to_video,
        [*ONCE[:3], (1, 0, "0"), (1, 1, "0")],
        "a generation, by its new prompts",
    ),
    Loop("a level for each frame", frame_after_frame, [(0, step, "0") for step in range(4)], "a step for each change"),
)
