"""Real clusters and selections: the trained tiny Wan in the middle of denoising a clip, all layers and heads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from capture import FRAMES, AttentionCapture, mixed_with_noise, real_videos
from torch import Tensor

from svg2_compile import tiny_wan
from svg2_compile.kernels import ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.select_blocks import block_logits, kept_clusters
from svg2_compile.passes.config import SparseConfig
from svg2_compile.tiny_wan import model

NOISE_LEVEL = 0.5
TOP_P = 0.9
svg2 = torch.ops.svg2


@dataclass(frozen=True, slots=True)
class Layers:
    """Queries and keys of every layer."""

    q: Tensor
    """[L, H, N, D]."""
    k: Tensor
    """[L, H, N, D]."""
    scale: float

    @property
    def heads(self) -> int:
        """Heads of a layer."""
        return self.q.shape[1]

    @property
    def dim(self) -> int:
        """Head dimension."""
        return self.q.shape[3]


@torch.no_grad()
def captured_layers(frames_file: Path | None) -> Layers:
    """Return what the self-attentions of one denoising step get."""
    network = tiny_wan.load_transformer().eval()
    (video,) = real_videos(1, frames_file=frames_file)
    mixed, timestep = mixed_with_noise(video.latents, NOISE_LEVEL)
    tokens = model.token_count(FRAMES, 128, 256)
    with AttentionCapture(tokens, lambda q, k, scale: torch.stack((q[0], k[0]))) as capture:
        network(mixed, timestep, tiny_wan.embed_prompt(video.prompt)[None], return_dict=False)
    q, k = torch.stack(capture.measured).unbind(1)
    return Layers(q, k, q.shape[-1] ** -0.5)


def select(layers: Layers, clusters: tuple[int, int] | Literal["auto"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return sizes of query and key clusters, and which are kept, at ``TOP_P`` and the default options."""
    counts = {} if clusters == "auto" else {"q_clusters": clusters[0], "k_clusters": clusters[1]}
    config = SparseConfig(top_p=TOP_P, **counts)
    count, heads, tokens, dim = layers.q.shape
    centroids, sizes = [], []
    for x, number in zip((layers.q, layers.k), config.clusters_for(tokens)):
        centroids.append(torch.zeros((count, heads, number, dim)))
        calls = torch.zeros(1, dtype=torch.int32)
        iterations = (config.kmeans_iters_init, config.kmeans_iters_step)
        labels = svg2.kmeans_(x, centroids[-1], calls, *iterations, config.seed)
        sizes.append(svg2.sort_labels(labels, number)[1])
    logits = block_logits(*centroids, sizes[1], layers.scale)
    keep, _ = kept_clusters(logits, TOP_P, config.min_keep_ratio)
    return (*sizes, keep & (sizes[1] > 0).unsqueeze(2))
