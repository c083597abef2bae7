"""A tiny trained Wan: diffusers' own ``WanTransformer3DModel``, 9.8 million parameters, real moving pictures.

>>> from svg2_compile import tiny_wan
>>> pipeline = tiny_wan.load_pipeline()
>>> prompt = tiny_wan.example_prompts()[0]
>>> latents = tiny_wan.generate(pipeline, prompt, frames=16, height=128, width=256, seed=0)
>>> frames = tiny_wan.decode_latents(latents)  # uint8 [16, 128, 256, 3]

Importing this package imports neither torch nor diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svg2_compile.tiny_wan.model import (
        TinyWanError,
        check_size,
        decode_latents,
        decode_pixels,
        embed_prompt,
        example_prompts,
        folder_of,
        generate,
        load_pipeline,
        load_transformer,
        token_count,
        untrained_transformer,
    )

__all__ = [
    "TinyWanError",
    "check_size",
    "decode_latents",
    "decode_pixels",
    "embed_prompt",
    "example_prompts",
    "folder_of",
    "generate",
    "load_pipeline",
    "load_transformer",
    "token_count",
    "untrained_transformer",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from svg2_compile.tiny_wan import model

    return getattr(model, name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
