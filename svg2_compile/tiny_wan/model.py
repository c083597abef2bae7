"""Load the tiny Wan and generate with diffusers' own ``WanPipeline``, in pixels and frames.

The pipeline thinks in the units of Wan's VAE (8 x 8 pixels and 4 frames to one latent) even when it has none; the tiny
Wan has 4 x 4 pixels and 1 frame to one latent. ``generate`` does that arithmetic, and hands the pipeline noise with
the coordinate channels beside it; the network's velocity there is exactly zero, so that no step changes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from svg2_compile.tiny_wan.transform import (
    BLOCK_SIZE,
    CHANNELS,
    COORDINATE_CHANNELS,
    BlockTransform,
    coordinates,
)
from svg2_compile.tiny_wan.words import PromptError, WordVectors, parse

if TYPE_CHECKING:
    from diffusers import WanPipeline, WanTransformer3DModel

StepCallback = Callable[["WanPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor]]
"""What ``generate`` forwards to the pipeline as ``callback_on_step_end``."""

FOLDER = Path(__file__).resolve().parent
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CONFIG_NAME = "config.json"
PROMPTS_NAME = "prompts.safetensors"
"""Embeddings by name, of a model whose prompts are names."""
WORDS_NAME = "words.safetensors"
"""Vectors of words, of a model whose prompts are made of words."""
SUBJECT_NAME = "subject.json"
"""What a user of the model asks for: prompts that are worth looking at, and the window that it was trained on."""
TRANSFORM_NAME = "transform.json"
SCHEDULER_NAME = "scheduler_config.json"

NULL_PROMPT = "null"
"""The name of the embedding that stands for no prompt, used by classifier-free guidance."""

TOKEN_SIZE = 2 * BLOCK_SIZE
"""A token covers 8 x 8 pixels of one frame."""

_FOLDER_OF_PIPELINE = "tiny_wan_folder"

# Sizes of Wan's VAE, which WanPipeline assumes when it has none.
_PIPELINE_PIXELS = 8
_PIPELINE_FRAMES = 4


class TinyWanError(ValueError):
    """The tiny Wan is asked for something it does not have or cannot make."""


def load_transformer(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", folder: Path = FOLDER
) -> WanTransformer3DModel:
    """Return the trained transformer in evaluation mode.

    Args:
        dtype: of the weights; they are stored in fp16.
        device: where the weights go.
        folder: a diffusers model folder; the one shipped in this package unless told otherwise.

    Raises:
        TinyWanError: the weights are missing.

    """
    from diffusers import WanTransformer3DModel

    _require(folder / WEIGHTS_NAME)
    transformer = WanTransformer3DModel.from_pretrained(str(folder), torch_dtype=dtype)
    return cast("WanTransformer3DModel", transformer.to(device).eval())


def read_config(folder: Path = FOLDER) -> dict[str, Any]:
    """Return the arguments of ``WanTransformer3DModel`` that a model folder was made with.

    Raises:
        TinyWanError: the file is missing.

    """
    record: dict[str, Any] = json.loads(_require(folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return {name: value for name, value in record.items() if not name.startswith("_")}


def untrained_transformer(seed: int = 0, config: Mapping[str, Any] | None = None) -> WanTransformer3DModel:
    """Return a network as training starts from, fp32 on the CPU.

    Linear layers are Xavier uniform, the embeddings of prompt and time normal with deviation 0.02, biases and the last
    layer zero.

    Args:
        seed: of the weights.
        config: the arguments of ``WanTransformer3DModel``; those of the shipped model unless told otherwise.

    Promises: depends on these alone, and leaves the global random state as it was.
    """
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel.from_config(dict(read_config() if config is None else config))
        for module in transformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(transformer.patch_embedding.weight.flatten(1))
        nn.init.zeros_(transformer.patch_embedding.bias)
        embedder = transformer.condition_embedder
        for parent in (embedder.text_embedder, embedder.time_embedder):
            nn.init.normal_(parent.linear_1.weight, std=0.02)
            nn.init.normal_(parent.linear_2.weight, std=0.02)
        nn.init.zeros_(transformer.proj_out.weight)
    return cast("WanTransformer3DModel", transformer)


def load_pipeline(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", folder: Path = FOLDER
) -> WanPipeline:
    """Return diffusers' ``WanPipeline`` around the trained transformer, without tokenizer, text encoder and VAE.

    Call it through ``generate``, or directly with ``prompt_embeds`` from ``embed_prompt``, ``latents`` from
    ``initial_latents`` and ``output_type="latent"``.

    Args:
        dtype: of the transformer; prompt embeddings are cast to it by the pipeline.
        device: where the transformer goes.
        folder: a folder with weights and scheduler; the one shipped in this package unless told otherwise.

    Raises:
        TinyWanError: the weights are missing.

    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    transformer = load_transformer(dtype, device, folder)
    pipeline = assemble_pipeline(transformer, FlowMatchEulerDiscreteScheduler.from_pretrained(str(folder)))
    setattr(pipeline, _FOLDER_OF_PIPELINE, folder)
    return pipeline


def folder_of(pipeline: WanPipeline) -> Path:
    """Return the folder that ``load_pipeline`` read, which a copy of the pipeline keeps; else the shipped one."""
    return cast(Path, getattr(pipeline, _FOLDER_OF_PIPELINE, FOLDER))


def assemble_pipeline(transformer: nn.Module, scheduler: object) -> WanPipeline:
    """Return a ``WanPipeline`` made of nothing but a transformer and a scheduler."""
    from diffusers import WanPipeline

    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    return cast("WanPipeline", pipeline)


def example_prompts(folder: Path = FOLDER) -> tuple[str, ...]:
    """Return prompts that are worth looking at, the best first; at least four.

    Raises:
        TinyWanError: the file is missing.

    """
    return tuple(_subject(folder)["examples"])


def embed_prompt(prompt: str | None, folder: Path = FOLDER) -> Tensor:
    """Return the embedding of a prompt, ``[16, D]`` fp32; ``None`` stands for no prompt.

    Args:
        prompt: as in ``example_prompts``: a name, or words that ``svg2_compile.tiny_wan.words`` can read, whichever the
            model was trained on.
        folder: where the prompts lie.

    Raises:
        TinyWanError: the model does not know the prompt, or a file is missing.

    """
    if (folder / WORDS_NAME).is_file():
        vectors = WordVectors.load(folder / WORDS_NAME)
        try:
            return vectors.embedding(None if prompt is None else parse(prompt, vectors.vocabulary))
        except PromptError as error:
            raise TinyWanError(str(error)) from None
    from safetensors.torch import load_file

    named: dict[str, Tensor] = load_file(str(_require(folder / PROMPTS_NAME)))
    name = NULL_PROMPT if prompt is None else prompt
    if name not in named:
        raise TinyWanError(f"prompt must be one of {', '.join(sorted(set(named) - {NULL_PROMPT}))}; got {prompt!r}")
    return named[name]


def generate(
    pipeline: WanPipeline,
    prompt: str,
    *,
    frames: int = 16,
    height: int = 128,
    width: int = 256,
    steps: int = 16,
    guidance_scale: float = 2.0,
    seed: int = 0,
    callback_on_step_end: StepCallback | None = None,
) -> Tensor:
    """Return the latents of one generated video, made by the pipeline's own denoising loop.

    The noise is drawn on the CPU, so that a seed means the same noise on every device.

    Args:
        pipeline: from ``load_pipeline``; its transformer may be compiled.
        prompt: one of ``example_prompts``, or anything else that ``embed_prompt`` knows.
        frames: number of frames; the model card says which sizes it was trained on.
        height: in pixels, a multiple of 8.
        width: in pixels, a multiple of 8.
        steps: denoising steps.
        guidance_scale: classifier-free guidance; 1.0 turns it off and halves the work.
        seed: of the noise.
        callback_on_step_end: the pipeline's own hook, called as ``(pipeline, step, timestep, {"latents": ...})`` after
            every step; it returns a dict, empty or with replaced latents.

    Returns:
        ``[1, 48, frames, height / 4, width / 4]`` fp32 on the pipeline's device, for ``decode_latents``.

    Raises:
        TinyWanError: the prompt is unknown or a size does not fit.

    """
    check_size(frames, height, width)
    folder = folder_of(pipeline)
    embedding, without = embed_prompt(prompt, folder), embed_prompt(None, folder)
    if steps < 1:
        raise TinyWanError(f"steps must be at least 1, got {steps}; 16 is a good start")
    device = pipeline.device
    with torch.no_grad():
        output = pipeline(
            prompt_embeds=embedding[None].to(device),
            negative_prompt_embeds=without[None].to(device),
            num_frames=_PIPELINE_FRAMES * (frames - 1) + 1,
            height=height // BLOCK_SIZE * _PIPELINE_PIXELS,
            width=width // BLOCK_SIZE * _PIPELINE_PIXELS,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            latents=initial_latents(prompt, frames=frames, height=height, width=width, seed=seed, folder=folder).to(
                device
            ),
            output_type="latent",
            callback_on_step_end=callback_on_step_end,
        )
    return cast(Tensor, output.frames)[:, :CHANNELS]


def initial_latents(prompt: str, *, frames: int, height: int, width: int, seed: int, folder: Path = FOLDER) -> Tensor:
    """Return seeded noise ``[1, 48, ...]`` and the scene's coordinates ``[1, 16, ...]``, in one tensor on the CPU.

    A window smaller than the trained one lies where ``subject.json`` says for this prompt, any other is centred.
    """
    check_size(frames, height, width)
    top, left = window_corner(prompt, height, width, folder)
    place = coordinates(frames, height, width, top=top, left=left)
    noise = torch.randn(
        1,
        CHANNELS,
        *place.shape[2:],
        generator=torch.Generator(device="cpu").manual_seed(seed),
        dtype=torch.float32,
        device="cpu",
    )
    return torch.cat([noise, place], dim=1)


def window_corner(prompt: str, height: int, width: int, folder: Path = FOLDER) -> tuple[int, int]:
    """Return top and left of a window in the window that the model was trained on, in pixels, both multiples of 8."""
    subject = _subject(folder)
    (whole_height, whole_width), centres = subject["window"], subject.get("centre_x", {})
    left = (whole_width - width) // 16 * 8
    if prompt in centres and height <= whole_height and width <= whole_width:
        left = min(max(centres[prompt] - width // 2, 0), whole_width - width) // 8 * 8
    return (whole_height - height) // 16 * 8, left


def decode_latents(latents: Tensor, folder: Path = FOLDER) -> Tensor:
    """Return ``uint8`` frames ``[F, H, W, 3]`` on the CPU from latents ``[1, 48, F, H/4, W/4]``.

    Coordinate channels may follow the 48 and are ignored, as in the latents that a callback sees.

    Raises:
        TinyWanError: the latents have another shape, or the numbers of the transform are missing.

    """
    pixels = decode_pixels(latents, folder)
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def decode_pixels(latents: Tensor, folder: Path = FOLDER) -> Tensor:
    """Return fp32 pixels ``[F, 3, H, W]`` in [0, 1] on the CPU from latents ``[1, 48, F, H/4, W/4]``.

    Values are clamped and not rounded, so that small differences between two videos survive, as a PSNR needs.
    Coordinate channels may follow the 48 and are ignored.

    Raises:
        TinyWanError: the latents have another shape, or the numbers of the transform are missing.

    """
    fits = latents.ndim == 5 and latents.shape[0] == 1
    if not fits or latents.shape[1] not in (CHANNELS, CHANNELS + COORDINATE_CHANNELS):
        raise TinyWanError(f"latents must be [1, {CHANNELS}, F, h, w], got {tuple(latents.shape)}; pass one video")
    transform = BlockTransform.load(_require(folder / TRANSFORM_NAME))
    pixels = transform.decode(latents[:, :CHANNELS].detach().float().cpu())[0].transpose(
        0, 1
    )  # [F, 3, H, W] in [-1, 1]
    return ((pixels + 1) / 2).clamp(0, 1).contiguous()


def token_count(frames: int, height: int, width: int) -> int:
    """Return the length of the self-attention sequence for a video of this size."""
    check_size(frames, height, width)
    return frames * (height // TOKEN_SIZE) * (width // TOKEN_SIZE)


def check_size(frames: int, height: int, width: int) -> None:
    """Raise ``TinyWanError`` unless a video of this size can be cut into tokens."""
    if frames < 1:
        raise TinyWanError(f"frames must be at least 1, got {frames}; 16 is a good start")
    for name, value in (("height", height), ("width", width)):
        if value < TOKEN_SIZE or value % TOKEN_SIZE:
            nearest = max(TOKEN_SIZE, math.floor(value / TOKEN_SIZE + 0.5) * TOKEN_SIZE)
            raise TinyWanError(f"{name} must be a multiple of {TOKEN_SIZE} pixels, got {value}; try {nearest}")


def _subject(folder: Path) -> dict[str, Any]:
    """Return what ``subject.json`` says."""
    record: dict[str, Any] = json.loads(_require(folder / SUBJECT_NAME).read_text(encoding="utf-8"))
    return record


def _require(path: Path) -> Path:
    """Return ``path``, or say how to get the file."""
    if not path.is_file():
        raise TinyWanError(
            f"{path.name} is missing in {path.parent}; it ships with the package: reinstall svg2-compile, "
            "or train it with examples/train_tiny_wan.py --export"
        )
    return path
