"""How far a video is from another one: PSNR, SSIM and LPIPS, from torchmetrics."""

from __future__ import annotations

import importlib
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FRAMES_AT_ONCE = 8
BACKBONE = "alexnet-owt-7be5be79.pth"
"""The file of torchvision's AlexNet, which LPIPS looks through; torchmetrics ships the weights on top of it."""

SMALLEST_SIDE = 32


@dataclass(frozen=True, slots=True)
class Quality:
    """How far a video is from its reference, as a whole and by frame."""

    psnr_db: float | None
    """``None``: no difference at all."""
    ssim: float
    lpips: float | None
    """``None`` where it could not be computed."""
    psnr_db_per_frame: tuple[float | None, ...]
    ssim_per_frame: tuple[float, ...]
    lpips_per_frame: tuple[float, ...]
    lpips_missing: str | None
    """Why LPIPS could not be computed, and what to do."""


def compare(video: Tensor, reference: Tensor) -> Quality:
    """Return how far a video is from a reference.

    Args:
        video: float [F, 3, H, W], values in [0, 1].
        reference: the same shape and range.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    whole = psnr(video, reference)
    psnrs = peak_signal_noise_ratio(video, reference, data_range=1.0, dim=(1, 2, 3), reduction="none").tolist()
    ssims = _ssim_per_frame(video, reference)
    missing = lpips_missing(*video.shape[2:])
    lpips = () if missing else _lpips_per_frame(video, reference)
    return Quality(
        psnr_db=whole if math.isfinite(whole) else None,
        ssim=statistics.fmean(ssims),
        lpips=statistics.fmean(lpips) if lpips else None,
        psnr_db_per_frame=tuple(each if math.isfinite(each) else None for each in psnrs),
        ssim_per_frame=ssims,
        lpips_per_frame=lpips,
        lpips_missing=missing,
    )


def psnr(video: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB over the whole video; infinite for equal videos.

    Args:
        video: float [F, 3, H, W], values in [0, 1].
        reference: the same shape and range.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(video, reference, data_range=1.0))


def ssim(video: Tensor, reference: Tensor) -> float:
    """Return the structural similarity, averaged over the frames; 1 for equal videos.

    Args:
        video: float [F, 3, H, W], values in [0, 1].
        reference: the same shape and range.
    """
    return statistics.fmean(_ssim_per_frame(video, reference))


def lpips_missing(height: int = SMALLEST_SIDE, width: int = SMALLEST_SIDE) -> str | None:
    """Return why LPIPS cannot be computed here, and what to do; ``None`` where it can. Nothing is downloaded."""
    if min(height, width) < SMALLEST_SIDE:
        return f"LPIPS is skipped: its AlexNet needs frames of at least {SMALLEST_SIDE} pixels"
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return "LPIPS is skipped: torchvision, which has its AlexNet, is not installed; install the one for your torch"
    except Exception as error:  # one for another torch fails in many ways
        return f"LPIPS is skipped: torchvision does not work here ({error}); install the one for your torch"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE
    if not weights.is_file():
        return (
            f"LPIPS is skipped: {weights} is missing; get it with "
            "python -c \"import torchvision; torchvision.models.alexnet(weights='DEFAULT')\" (233 MB)"
        )
    return None


def _ssim_per_frame(video: Tensor, reference: Tensor) -> tuple[float, ...]:
    from torchmetrics.functional.image import structural_similarity_index_measure

    return tuple(
        float(each)
        for a, b in zip(torch.split(video, FRAMES_AT_ONCE), torch.split(reference, FRAMES_AT_ONCE))
        for each in structural_similarity_index_measure(a, b, data_range=1.0, reduction="none").reshape(-1)
    )


def _lpips_per_frame(video: Tensor, reference: Tensor) -> tuple[float, ...]:
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    with torch.no_grad():
        return tuple(
            float(each)
            for a, b in zip(torch.split(video, FRAMES_AT_ONCE), torch.split(reference, FRAMES_AT_ONCE))
            for each in learned_perceptual_image_patch_similarity(
                a, b, net_type="alex", reduction="none", normalize=True
            ).reshape(-1)
        )
