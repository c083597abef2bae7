"""How far a video is from another one: PSNR and SSIM, from torchmetrics."""

from __future__ import annotations

from torch import Tensor


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
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(video, reference, data_range=1.0))
