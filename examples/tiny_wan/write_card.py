"""Write a subject's model card and its pictures from what was recorded and measured, and from nothing else.

    python -P examples/tiny_wan/write_card.py --run runs/shipped --folder runs/shipped/model

Reads ``training.json`` of the model folder, ``loss.jsonl`` of the run, ``judged/judged.json`` and
``attention/learned_attention.json`` beside it, and the catalogue of the photographs. Writes ``README.md``,
``card.json``, ``loss.png`` and ``samples.png`` into the model folder. What a person must add (what works and what
fails, seen in the samples) is marked in the page, so that it cannot be forgotten.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from string import Template
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parent))

from made_video import PHOTOGRAPHS

TO_BE_WRITTEN = "**To be written by whoever has looked at the samples:**"
COLOURS = 96
SAMPLE_SHARE = 0.4
"""The pictures of the card have this share of the samples' height and width."""


def main() -> None:
    """Write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of training, with judged and attention in it")
    parser.add_argument("--folder", type=Path, required=True, help="the model folder, which gets the card")
    options = parser.parse_args()
    card = gather(options.run, options.folder)
    (options.folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    write_loss_curve(options.folder / "loss.png", read_lines(options.run / "loss.jsonl"))
    write_small_samples(options.run / "judged" / "samples.png", options.folder / "samples.png")
    page = page_of(card, json.loads((PHOTOGRAPHS / "catalogue.json").read_text("utf-8")))
    (options.folder / "README.md").write_text(page, encoding="utf-8")


def gather(run: Path, folder: Path) -> dict[str, Any]:
    """Return all figures of the card, lists of single videos left out.

    Raises:
        SystemExit: something was not measured yet.

    """
    paths = {
        "training": folder / "training.json",
        "config": folder / "config.json",
        "subject": folder / "subject.json",
        "judged": run / "judged" / "judged.json",
        "attention": run / "attention" / "learned_attention.json",
    }
    if missing := [str(path) for path in paths.values() if not path.is_file()]:
        raise SystemExit(f"{', '.join(missing)} missing; train_and_judge.py makes them in this order")
    card = {name: json.loads(path.read_text("utf-8")) for name, path in paths.items()}
    for parts in card["judged"]["denoised_psnr_db"].values():
        for levels in parts.values():
            for found in levels.values():
                del found["values"]
    for length in card["attention"]["lengths"]:
        del length["share_of_keys"]
    return card


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def page_of(card: dict[str, Any], catalogue: list[dict[str, str]]) -> str:
    """Return the model card: the template with the figures filled in; a figure that is missing is an error."""
    template = Template((Path(__file__).resolve().parent / "card.md.template").read_text("utf-8"))
    parts = (quality_figures(card["judged"]), attention_figures(card["attention"]), training_figures(card["training"]))
    config = card["config"]
    return template.substitute(
        example=card["subject"]["examples"][0],
        vocabulary="\n".join(vocabulary_lines(catalogue)),
        to_be_written=TO_BE_WRITTEN,
        sources_table="\n".join(sources_table(catalogue)),
        layers=config["num_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        feed_forward=config["ffn_dim"],
        **{name: value for part in parts for name, value in part.items()},
    )


def quality_figures(judged: dict[str, Any]) -> dict[str, Any]:
    """Return what the card says of the judge's figures."""
    frames, height, width = judged["video"]
    (flat,) = judged["denoised_psnr_db"]["constant colour"]["all"].values()
    changes = judged["samples"]["change_between_frames"]
    prompts = judged["samples"]["prompts"]
    return {
        "videos": judged["videos"],
        "shape": f"{frames} frames of {height} x {width}",
        "sample_steps": judged["samples"]["steps"],
        "guidance": f"{judged['samples']['guidance_scale']:g}",
        "sample_prompts": "\n".join(f"{number}. {prompt}" for number, prompt in enumerate(prompts, 1)),
        "psnr_table": "\n".join(psnr_table(judged)),
        "constant_psnr": f"{flat['mean']:.1f}",
        "listening_table": "\n".join(listening_table(judged)),
        "made_change": f"{100 * statistics.fmean(changes['made']):.1f}",
        "sampled_change": f"{100 * statistics.fmean(changes['sampled']):.1f}",
    }


def attention_figures(attention: dict[str, Any]) -> dict[str, Any]:
    """Return what the card says of the attention."""
    return {
        "attention_videos": len(attention["lengths"][0]["prompts"]),
        "attention_device": attention["environment"]["device"],
        "attention_torch": attention["environment"]["torch"],
        "attention_table": "\n".join(attention_table(attention)),
    }


def training_figures(training: dict[str, Any]) -> dict[str, Any]:
    """Return what the card says of training."""
    state, environment, loss = training["progressed"], training["environment"], training["final_loss"]
    before = training["started_from"]
    sizes = [f"{size['frames']} frames of {size['height']} x {size['width']}" for size in training["sizes"]]
    return {
        "parameters": f"{training['parameters']:,}",
        "configuration": training["configuration"],
        "whitening": f"{training['whitening']:g}",
        "flow_shift": f"{training['flow_shift']:g}",
        "learning_rate": f"{training['learning_rate']:g}",
        "warmup_steps": training["warmup_steps"],
        "ema_decay": f"{training['ema_decay']:g}",
        "batch_tokens": f"{training['batch_tokens']:,}",
        "sizes": ", ".join(sizes),
        "beginning": "The first weights were random."
        if before is None
        else f"The first weights were those of an earlier run of {before['progressed']['steps']:,} steps, in fp16.",
        "steps": f"{state['steps']:,}",
        "trained_videos": f"{state['videos']:,}",
        "trained_tokens": f"{state['tokens'] / 1e9:.2f}",
        "minutes": f"{state['seconds'] / 60:.1f}",
        "runs": state["runs"],
        "device": environment["device"],
        "torch": environment["torch"],
        "final_loss": f"{loss['all']:.3f}",
        "final_loss_by_level": ", ".join(f"{level}: {value:.3f}" for level, value in loss["by_noise_level"].items()),
    }


def vocabulary_lines(catalogue: list[dict[str, str]]) -> list[str]:
    """Return the words that come from pictures, a line a kind."""
    kinds = ("background", "object")
    named = {kind: sorted(each["name"] for each in catalogue if each["kind"] == kind) for kind in kinds}
    return [f"- {kind}s: {', '.join(names)}" for kind, names in named.items()]


def sources_table(catalogue: list[dict[str, str]]) -> list[str]:
    """Return author and licence of every picture."""
    lines = ["| word | author | licence | from |", "|---|---|---|---|"]
    for each in catalogue:
        lines.append(f"| {each['name']} | {each['author']} | {each['licence']} | {each['package'] or 'drawn'} |")
    return lines


def psnr_table(judged: dict[str, Any]) -> list[str]:
    """Return PSNR by who guesses and part of the picture, and noise level."""
    levels = [f"{level:g}" for level in judged["noise_levels"]]
    lines = [f"| who | part | {' | '.join(levels)} |", f"|---|---|{'---|' * len(levels)}"]
    for who, parts in judged["denoised_psnr_db"].items():
        for part, found in parts.items():
            if not set(levels) & set(found):
                continue
            cells = (f"{found[level]['mean']:.1f} ± {found[level]['deviation']:.1f}" for level in levels)
            lines.append(f"| {who} | {part} | {' | '.join(cells)} |")
    return lines


def listening_table(judged: dict[str, Any]) -> list[str]:
    """Return how often the true word is preferred."""
    lines = ["| word exchanged | videos | true prompt better | error larger by |", "|---|---|---|---|"]
    for kind, found in judged["listening"].items():
        lines.append(f"| {kind} | {found['videos']} | {found['right']:.0%} | {found['margin']:.1%} |")
    return lines


def attention_table(attention: dict[str, Any]) -> list[str]:
    """Return the share of keys at each length, trained and untrained."""
    masses = [f"{mass:g}" for mass in attention["masses"]]
    names = ("untrained", "trained")
    columns = [f"{name}, {mass}" for mass in masses for name in names]
    lines = [f"| tokens | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for length in attention["lengths"]:
        both = (length["mean_share_of_keys"], length["median_share_of_keys"])
        cells = (" / ".join(f"{each[name][mass]:.1%}" for each in both) for mass in masses for name in names)
        lines.append(f"| {length['tokens']:,} | {' | '.join(cells)} |")
    return lines


def write_small_samples(source: Path, path: Path) -> None:
    """Write the samples smaller and in few colours."""
    with Image.open(source) as image:
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1)[None].float()
    size = (round(pixels.shape[2] * SAMPLE_SHARE), round(pixels.shape[3] * SAMPLE_SHARE))
    small = F.interpolate(pixels, size=size, mode="area")[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
    picture = Image.fromarray(small.contiguous().numpy())
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def write_loss_curve(path: Path, lines: list[dict[str, Any]]) -> None:
    """Draw the loss, by noise level too, and the learning rate over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    steps = [line["step"] for line in lines]
    axis.plot(steps, [line["loss"] for line in lines], color="black", linewidth=1.2, label="all")
    for level in sorted({level for line in lines for level in line["by_noise_level"]}):
        found = [(line["step"], line["by_noise_level"][level]) for line in lines if level in line["by_noise_level"]]
        axis.plot(*zip(*found), linewidth=0.6, label=f"noise {level}")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("flow-matching loss")
    axis.set_ylim(0, None)
    axis.legend(fontsize=7, ncols=3)
    right = axis.twinx()
    right.plot(steps, [line["learning_rate"] for line in lines], color="tab:gray", linestyle=":", linewidth=1)
    right.set_ylabel("learning rate (dotted)")
    right.set_ylim(0, None)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
