"""Real queries and keys: what the self-attentions of the tiny Wan are given while it denoises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from svg2_compile.tiny_wan import clips, model
from svg2_compile.tiny_wan.transform import BlockTransform, coordinates, frames_to_pixels

FRAMES = 16
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


def clean_latents(names: list[str], scenes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return picture and coordinate channels ``[1, 64, F, h, w]`` of each scene's first frames."""
    transform = BlockTransform.load(model.FOLDER / model.TRANSFORM_NAME)
    place = coordinates(FRAMES, clips.HEIGHT, clips.WIDTH)
    return {
        name: torch.cat([transform.encode(frames_to_pixels(scenes[name][:FRAMES])), place], dim=1) for name in names
    }


def mixed_with_noise(latents: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return the network's input at a noise level in (0, 1), always with the same noise, and the timestep."""
    picture, place = latents[:, : model.CHANNELS], latents[:, model.CHANNELS :]
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    return torch.cat([torch.lerp(picture, noise, level), place], dim=1), torch.tensor([1000 * level])
