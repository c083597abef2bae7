"""The fixed, exactly invertible transform between pixels and latents that takes the place of a VAE, and coordinates.

Every block of 4 x 4 pixels x 3 colours is 48 numbers; an orthonormal cosine transform over colour, row and column turns
them into 48 latent channels, which are then centred and divided by the standard deviation measured on the training
clips. Channel 0 is the mean brightness of the block. Nothing is learned and nothing is lost.

Sixteen more channels, ``coordinates``, say where and when a latent lies. They are never noised: the rotary embedding of
Wan is relative, so that a token of pure noise could not know its place in a scene without them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BLOCK_SIZE = 4
CHANNELS = 3 * BLOCK_SIZE * BLOCK_SIZE
"""Latent channels that hold the picture."""

PERIODS_FRAMES = (128, 32)
PERIODS_PIXELS = (512, 128, 32)
COORDINATE_CHANNELS = 2 * (len(PERIODS_FRAMES) + 2 * len(PERIODS_PIXELS))
"""Latent channels that hold the coordinates: sine and cosine for every period of frame, row and column."""


class TransformError(ValueError):
    """Pixels, frames or latents do not have the shape or dtype the transform works on."""


@dataclass(frozen=True, slots=True)
class BlockTransform:
    """Pixels ``[B, 3, F, H, W]`` in [-1, 1] to whitened latents ``[B, 48, F, H/4, W/4]`` and back.

    Promises: frames are independent of each other and blocks are independent of each other; with standard deviations
    above 1e-3, ``uint8`` frames survive the round trip unchanged in fp32.
    """

    mean: tuple[float, ...] = (0.0,) * CHANNELS
    """The mean of each channel on the training clips, subtracted on the way in."""

    std: tuple[float, ...] = (1.0,) * CHANNELS
    """The standard deviation of each channel on the training clips, divided by on the way in."""

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != CHANNELS:
                raise TransformError(f"{name} must hold {CHANNELS} numbers, one a channel, got {len(values)}")
        if min(self.std) <= 0:
            raise TransformError(f"std must be above 0 in every channel, got {min(self.std)}; measure more frames")

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the latents of ``pixels``: z = (Q x - mean) / std for every block x, with Q orthonormal.

        Args:
            pixels: ``[B, 3, F, H, W]``, floating point, in [-1, 1]; H and W are multiples of 4.

        Returns:
            ``[B, 48, F, H/4, W/4]`` in the dtype of ``pixels``.

        Raises:
            TransformError: the shape or dtype does not fit.

        """
        if pixels.ndim != 5 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise TransformError(
                f"pixels must be floating point [B, 3, F, H, W] in [-1, 1], got {pixels.dtype} {tuple(pixels.shape)}; "
                "frames_to_pixels makes them from uint8 frames [F, H, W, 3]"
            )
        channels = torch.einsum("ij,bjfhw->bifhw", cosine_matrix().to(pixels), blocks_of(pixels))
        return (channels - self._column(self.mean, pixels)) / self._column(self.std, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels of ``latents``, the exact inverse of ``encode``; values may leave [-1, 1].

        Args:
            latents: ``[B, 48, F, h, w]``, floating point.

        Returns:
            ``[B, 3, F, 4h, 4w]`` in the dtype of ``latents``.

        Raises:
            TransformError: the shape or dtype does not fit.

        """
        if latents.ndim != 5 or latents.shape[1] != CHANNELS or not latents.is_floating_point():
            raise TransformError(
                f"latents must be floating point [B, {CHANNELS}, F, h, w], got {latents.dtype} {tuple(latents.shape)}"
            )
        channels = latents * self._column(self.std, latents) + self._column(self.mean, latents)
        blocks = torch.einsum("ij,bifhw->bjfhw", cosine_matrix().to(latents), channels)
        batch, _, frames, rows, columns = latents.shape
        blocks = blocks.reshape(batch, 3, BLOCK_SIZE, BLOCK_SIZE, frames, rows, columns).permute(0, 1, 4, 5, 2, 6, 3)
        return blocks.reshape(batch, 3, frames, BLOCK_SIZE * rows, BLOCK_SIZE * columns)

    def save(self, path: Path) -> None:
        """Write the numbers of the transform as JSON."""
        record = {"block_size": BLOCK_SIZE, "mean": list(self.mean), "std": list(self.std)}
        path.write_text(json.dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> BlockTransform:
        """Read what ``save`` wrote."""
        record = json.loads(path.read_text())
        return cls(mean=tuple(record["mean"]), std=tuple(record["std"]))

    @classmethod
    def measured(cls, pixels: Tensor) -> BlockTransform:
        """Return the transform that gives every channel of ``pixels`` zero mean and unit variance."""
        channels = cls().encode(pixels).transpose(0, 1).flatten(1).double()
        return cls(mean=tuple(channels.mean(1).tolist()), std=tuple(channels.std(1).tolist()))

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        """Return one number for each channel, shaped to broadcast over ``[B, 48, F, h, w]``."""
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, CHANNELS, 1, 1, 1)


def blocks_of(pixels: Tensor) -> Tensor:
    """Return every block of 4 x 4 pixels x 3 colours as 48 channels, ``[B, 48, F, H/4, W/4]`` of ``[B, 3, F, H, W]``.

    Raises:
        TransformError: height or width is no multiple of 4.

    """
    batch, _, frames, height, width = pixels.shape
    if height % BLOCK_SIZE or width % BLOCK_SIZE:
        raise TransformError(f"height and width must be multiples of {BLOCK_SIZE}, got {height} x {width}")
    rows, columns = height // BLOCK_SIZE, width // BLOCK_SIZE
    blocks = pixels.reshape(batch, 3, frames, rows, BLOCK_SIZE, columns, BLOCK_SIZE)
    return blocks.permute(0, 1, 4, 6, 2, 3, 5).reshape(batch, CHANNELS, frames, rows, columns)


def frames_to_pixels(frames: Tensor) -> Tensor:
    """Return ``uint8`` frames ``[F, H, W, 3]`` as fp32 pixels ``[1, 3, F, H, W]`` in [-1, 1]."""
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8:
        raise TransformError(f"frames must be uint8 [F, H, W, 3], got {frames.dtype} {tuple(frames.shape)}")
    return frames.permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5 - 1


def pixels_to_frames(pixels: Tensor) -> Tensor:
    """Return pixels ``[1, 3, F, H, W]`` as ``uint8`` frames ``[F, H, W, 3]``, rounded and clamped."""
    if pixels.ndim != 5 or pixels.shape[:2] != (1, 3):
        raise TransformError(f"pixels must be [1, 3, F, H, W], got {tuple(pixels.shape)}; pass one video at a time")
    scaled = (pixels[0].permute(1, 2, 3, 0).float() + 1) * 127.5
    return scaled.round().clamp(0, 255).to(torch.uint8)


def coordinates(
    frames: int, height: int, width: int, *, top: int = 0, left: int = 0, device: str | torch.device = "cpu"
) -> Tensor:
    """Return the coordinate channels of a window: sqrt(2) sin and sqrt(2) cos of 2 pi position / period.

    Args:
        frames: number of frames, counted from the start of the scene.
        height: of the window in pixels.
        width: of the window in pixels.
        top: where the window begins in the scene, in pixels; may be negative.
        left: where the window begins in the scene, in pixels; may be negative.
        device: where the result goes; the numbers are made on the CPU and do not depend on it.

    Returns:
        ``[1, 16, frames, height / 4, width / 4]`` fp32.

    """
    rows, columns = height // BLOCK_SIZE, width // BLOCK_SIZE
    axes = (
        (torch.arange(frames, dtype=torch.int64, device="cpu").view(-1, 1, 1), PERIODS_FRAMES),
        (top + BLOCK_SIZE * torch.arange(rows, dtype=torch.int64, device="cpu").view(1, -1, 1), PERIODS_PIXELS),
        (left + BLOCK_SIZE * torch.arange(columns, dtype=torch.int64, device="cpu").view(1, 1, -1), PERIODS_PIXELS),
    )
    waves = [
        (math.sqrt(2) * wave(2 * math.pi * position.double() / period)).expand(frames, rows, columns)
        for position, periods in axes
        for period in periods
        for wave in (torch.sin, torch.cos)
    ]
    return torch.stack(waves).unsqueeze(0).float().to(device)


def cosine_matrix() -> Tensor:
    """Return the orthonormal ``[48, 48]`` cosine transform over (colour, row, column), fp64."""
    return torch.kron(_cosine_basis(3), torch.kron(_cosine_basis(BLOCK_SIZE), _cosine_basis(BLOCK_SIZE)))


def _cosine_basis(size: int) -> Tensor:
    """Return the orthonormal DCT-II of n points: row k is sqrt(2/n) cos(pi (2i + 1) k / 2n), row 0 over sqrt 2."""
    index = torch.arange(size, dtype=torch.float64, device="cpu")
    basis = torch.cos(math.pi * (2 * index + 1) * index[:, None] / (2 * size)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis
