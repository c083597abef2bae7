"""Judge a trained subject on made video that it has never seen, and write its model card's figures and pictures.

    python -P examples/tiny_wan/judge_subject.py --folder runs/shipped/model --out runs/judged
    python -P examples/tiny_wan/judge_subject.py --folder runs/shipped/model --out runs/judged --old old_folder

Four questions, each answered for the new subject and, where it makes sense, for an older one:

- How near is one denoising step to the truth? PSNR of the whole picture, of the objects and of the background, at
  several noise levels, beside what needs no learning: a constant colour, and the best linear guess of each channel.
- Does it listen? How often the true prompt explains a video better than the same prompt with one word exchanged.
- What does it make from noise alone? Samples of held-out prompts below the made video that they describe.
- Is what it makes steady? Change between neighbouring frames of samples, beside that of made video.

Writes ``judged.json``, ``samples.png`` and ``prompts.txt``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent))

from made_video import HELD_OUT, PHOTOGRAPHS, Pictures, Plan, Shape, draw_plan, render_with_masks

from svg2_compile import tiny_wan
from svg2_compile.environment import describe_environment
from svg2_compile.tiny_wan import model
from svg2_compile.tiny_wan.transform import CHANNELS, BlockTransform, coordinates
from svg2_compile.tiny_wan.words import ObjectWords, SceneWords, Vocabulary

NOISE_LEVELS = (0.95, 0.85, 0.7, 0.5, 0.3, 0.1)
LISTENING_LEVELS = (0.9, 0.7, 0.5)
SAMPLE_COLUMNS = 6
CONSTANT = "constant colour"
EXCHANGED = ("background", "camera", "light", "object", "motion", "size")

console = Console(soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Truth:
    """Held-out made videos."""

    plans: list[Plan]
    pixels: Tensor
    """fp32 ``[B, 3, F, H, W]`` in [-1, 1]."""
    objects: Tensor
    """bool ``[B, F, H, W]``: where an object is seen."""


class Subject:
    """A model folder, loaded: predicts clean pixels from noised ones."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.network: nn.Module = tiny_wan.load_transformer(device=device, folder=folder)
        self.transform = BlockTransform.load(folder / model.TRANSFORM_NAME)
        self.device = device

    @property
    def knows_words(self) -> bool:
        """Whether its prompts are words."""
        return (self.folder / model.WORDS_NAME).is_file()

    def prompt(self, words: SceneWords) -> Tensor:
        """Return the embedding of a prompt, or of none where the prompts of this model are names."""
        return tiny_wan.embed_prompt(str(words) if self.knows_words else None, self.folder)

    @torch.no_grad()
    def velocity(self, latents: Tensor, noise: Tensor, level: float, words: list[SceneWords]) -> Tensor:
        """Return the velocity of videos ``[B, 48, F, h, w]`` at one noise level, one video at a time."""
        found = []
        frames, height, width = latents.shape[2], latents.shape[3] * 4, latents.shape[4] * 4
        top, left = model.window_corner("", height, width, self.folder)
        place = coordinates(frames, height, width, top=top, left=left, device=self.device)
        for clean, own_noise, said in zip(latents, noise, words, strict=True):
            mixed = torch.cat([torch.lerp(clean, own_noise, level)[None], place], dim=1)
            timestep = torch.tensor([1000 * level], device=self.device)
            prompt = self.prompt(said)[None].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                found.append(self.network(mixed, timestep, prompt, return_dict=False)[0][:, :CHANNELS].float())
        return torch.cat(found)


def main() -> None:
    """Judge, print and write."""
    options = parse_arguments()
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = Pictures.load(options.photographs, device)
    shape = Shape(options.frames, options.height, options.width)
    truth = held_out(pictures, options.videos, shape)
    subjects = {"new": Subject(options.folder, device)}
    if options.old is not None:
        subjects["old"] = Subject(options.old, device)
    record: dict[str, Any] = {
        "environment": describe_environment(),
        "date": time.strftime("%Y-%m-%d"),
        "video": [shape.frames, shape.height, shape.width],
        "videos": options.videos,
        "first_seed": HELD_OUT,
        "noise_levels": list(options.noise_levels),
        "parameters": {name: sum(p.numel() for p in each.network.parameters()) for name, each in subjects.items()},
        "denoised_psnr_db": denoised(subjects, truth, options.noise_levels),
        "listening": listening(subjects["new"], truth, pictures.vocabulary, LISTENING_LEVELS),
    }
    pipeline = tiny_wan.load_pipeline(device=device, folder=options.folder)
    samples = sampled(pipeline, truth.plans[: options.samples], shape, options.sample_steps)
    made = truth.pixels[: options.samples].cpu()
    record["samples"] = {
        "steps": options.sample_steps,
        "guidance_scale": 2.0,
        "prompts": [str(plan.words) for plan in truth.plans[: options.samples]],
        "change_between_frames": {"made": frame_changes(made), "sampled": frame_changes(samples)},
    }
    (options.out / "judged.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "prompts.txt").write_text("".join(f"{each}\n" for each in record["samples"]["prompts"]))
    write_samples(options.out / "samples.png", made, samples)
    for table in tables(record):
        console.print(table)


def parse_arguments() -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="model folder of the new subject")
    add("--old", type=Path, help="model folder of an older one, shown the same videos")
    add("--out", type=Path, required=True)
    add("--photographs", type=Path, default=PHOTOGRAPHS)
    add("--videos", type=int, default=24, help="held-out videos, at least 2")
    add("--samples", type=int, default=8, help="videos generated, of the first held-out prompts")
    add("--sample-steps", type=int, default=24)
    add("--frames", type=int, default=16)
    add("--height", type=int, default=128)
    add("--width", type=int, default=256)
    add("--noise-levels", type=float, nargs="+", default=NOISE_LEVELS)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.videos < max(2, options.samples):
        parser.error(f"--videos must be at least 2 and at least --samples, got {options.videos}")
    return options


def held_out(pictures: Pictures, count: int, shape: Shape) -> Truth:
    """Return the first ``count`` made videos that nothing was trained on."""
    plans = [draw_plan(HELD_OUT + number, pictures.vocabulary, shape.aspect) for number in range(count)]
    videos, objects = [], []
    for plan in plans:
        pixels, masks = render_with_masks(pictures, [plan], shape)
        videos.append(pixels)
        objects.append(masks.sum(1) > 0.5)
    return Truth(plans, torch.cat(videos), torch.cat(objects))


def noise_of(count: int, like: Tensor) -> Tensor:
    """Return the same noise for every subject, of a seed for each video."""
    each = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(n)) for n in range(count)]
    return torch.stack(each).to(like.device)


def denoised(subjects: dict[str, Subject], truth: Truth, levels: tuple[float, ...]) -> dict[str, Any]:
    """Return PSNR by who guesses, part of the picture and noise level: mean, deviation over videos, and every video's.

    A guess of clean latents is ``mixed - level * velocity``; it is decoded before it is compared. The linear guess
    knows mean and variance of each channel over these very videos, which is more than any subject knows. It is made for
    each subject, because the same noise level hides more or less of the picture in another subject's latents.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}

    def note(who: str, level: float, pixels: Tensor) -> None:
        errors = (pixels.clamp(-1, 1) - truth.pixels).square().mean(1) / 4  # [B, F, H, W], of pixels in [0, 1]
        parts = {"all": torch.ones_like(truth.objects), "objects": truth.objects, "background": ~truth.objects}
        for part, where in parts.items():
            values = [psnr_of(error[mask]) for error, mask in zip(errors, where) if mask.any()]
            found.setdefault(who, {}).setdefault(part, {})[f"{level:g}"] = spread(values)

    words = [plan.words for plan in truth.plans]
    for name, subject in subjects.items():
        clean = torch.cat([subject.transform.encode(video[None]) for video in truth.pixels])
        noise = noise_of(len(words), clean)
        for level in levels:
            mixed = torch.lerp(clean, noise, level)
            guess = mixed - level * subject.velocity(clean, noise, level, words)
            note(name, level, torch.cat([subject.transform.decode(each[None]) for each in guess]))
            linear = linear_guess(clean, mixed, level)
            note(f"{name}, linear", level, torch.cat([subject.transform.decode(each[None]) for each in linear]))
    note(CONSTANT, 1.0, truth.pixels.mean((2, 3, 4), keepdim=True).expand_as(truth.pixels))
    return found


def linear_guess(clean: Tensor, mixed: Tensor, level: float) -> Tensor:
    """Return the linear guess of least squared error of each channel, from its mean and variance over all videos."""
    mean = clean.mean((0, 2, 3, 4), keepdim=True)
    variance = (clean - mean).square().mean((0, 2, 3, 4), keepdim=True)
    gain = (1 - level) * variance / ((1 - level) ** 2 * variance + level**2)
    return mean + gain * (mixed - (1 - level) * mean)


def psnr_of(errors: Tensor) -> float:
    """Return the PSNR in dB of squared errors of pixels in [0, 1]."""
    return -10 * math.log10(max(errors.mean().item(), 1e-12))


def spread(values: list[float]) -> dict[str, Any]:
    """Return mean and deviation of values, and the values; the mean of none is ``None``."""
    if not values:
        return {"mean": None, "deviation": None, "values": []}
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": values}


def exchanged(words: SceneWords, kind: str, vocabulary: Vocabulary, number: int) -> SceneWords | None:
    """Return a prompt with one word of a kind exchanged for another, ``None`` where it has none of that kind."""

    def another(word: str) -> str:
        known: tuple[str, ...] = getattr(vocabulary, kind)
        return known[(known.index(word) + 1 + number % (len(known) - 1)) % len(known)]

    if kind in ("background", "camera", "light"):
        return replace(words, **{kind: another(getattr(words, kind))})
    if not words.objects:
        return None
    # the object in front is seen best
    *behind, front = words.objects
    name = "name" if kind == "object" else kind
    changed: ObjectWords = replace(front, **{name: another(getattr(front, name))})
    return replace(words, objects=(*behind, changed))


def listening(
    subject: Subject, truth: Truth, vocabulary: Vocabulary, levels: tuple[float, ...]
) -> dict[str, dict[str, Any]]:
    """Return how often the true prompt gives a smaller error than one with a word exchanged, by kind of word.

    Chance is one half; ``margin`` is the mean of how much larger the error of the wrong prompt is, as a share.
    """
    clean = torch.cat([subject.transform.encode(video[None]) for video in truth.pixels])
    noise = noise_of(len(truth.plans), clean)
    words = [plan.words for plan in truth.plans]

    def errors(said: list[SceneWords], chosen: list[int]) -> Tensor:
        """Return the error of each chosen video, a mean over noise levels."""
        at = torch.tensor(chosen, device=clean.device)
        each = []
        for level in levels:
            velocity = subject.velocity(clean[at], noise[at], level, said)
            each.append((velocity - (noise[at] - clean[at])).square().mean((1, 2, 3, 4)))
        return torch.stack(each).mean(0)

    true = errors(words, list(range(len(words))))
    result = {}
    for kind in EXCHANGED:
        wrong = {n: exchanged(said, kind, vocabulary, n) for n, said in enumerate(words)}
        chosen = [n for n, said in wrong.items() if said is not None]
        told_wrong = errors([said for said in wrong.values() if said is not None], chosen)
        told_right = true[torch.tensor(chosen, device=true.device)]
        result[kind] = {
            "right": (told_right < told_wrong).float().mean().item(),
            "margin": (told_wrong / told_right - 1).mean().item(),
            "videos": len(chosen),
        }
    return result


def sampled(pipeline: Any, plans: list[Plan], shape: Shape, steps: int) -> Tensor:
    """Return a generated video for each plan's prompt, fp32 ``[B, 3, F, H, W]`` in [-1, 1] on the CPU."""
    folder, device = tiny_wan.folder_of(pipeline), pipeline.device
    videos = []
    for seed, plan in enumerate(plans):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents = tiny_wan.generate(
                pipeline, str(plan.words), frames=shape.frames, height=shape.height, width=shape.width,
                steps=steps, guidance_scale=2.0, seed=seed,
            )  # fmt: skip
        videos.append(tiny_wan.decode_pixels(latents, folder).transpose(0, 1) * 2 - 1)
    return torch.stack(videos)


def frame_changes(videos: Tensor) -> list[float]:
    """Return the root mean square of the change from frame to frame of each video, in shares of the whole range."""
    return [(video.diff(dim=1) / 2).square().mean().sqrt().item() for video in videos]


def write_samples(path: Path, made: Tensor, samples: Tensor) -> None:
    """Write a contact sheet: for every prompt a row of made video above a row of the sample."""
    from PIL import Image

    shown = torch.linspace(0, made.shape[2] - 1, min(SAMPLE_COLUMNS, made.shape[2])).round().long()
    both = torch.stack([made, samples], dim=1)[:, :, :, shown]  # [B, 2, 3, columns, H, W]
    pixels = both.permute(0, 1, 4, 3, 5, 2).flatten(3, 4).flatten(0, 2)  # [B * 2 * H, columns * W, 3]
    Image.fromarray(((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()).save(path)


def tables(record: dict[str, Any]) -> list[Table]:
    """Return what was found as tables."""
    levels = [f"{level:g}" for level in record["noise_levels"]]
    psnrs = Table("who", "part", *levels, title="PSNR of one denoising step, dB, by noise level")
    for who, parts in record["denoised_psnr_db"].items():
        for part, by_level in parts.items() if who != CONSTANT else ():
            psnrs.add_row(who, part, *(_said(by_level.get(level)) for level in levels))
    flat = record["denoised_psnr_db"][CONSTANT]["all"]["1"]
    psnrs.caption = f"constant colour: {_said(flat)}"
    heard = Table("word exchanged", "videos", "true prompt better", "error larger by", title="does it listen?")
    for kind, found in record["listening"].items():
        heard.add_row(kind, str(found["videos"]), f"{found['right']:.0%}", f"{found['margin']:.1%}")
    return [psnrs, heard]


def _said(found: dict[str, Any] | None) -> str:
    if found is None or found["mean"] is None:
        return ""
    return f"{found['mean']:.1f}" + (f" ± {found['deviation']:.1f}" if found["deviation"] is not None else "")


if __name__ == "__main__":
    main()
