"""Train a small Wan by flow matching on endless made video, and export it as a model folder.

    python -P examples/tiny_wan/train_subject.py --configuration shipped --out runs/shipped --export runs/shipped/model
    python -P examples/tiny_wan/train_subject.py --configuration minute --out runs/minute --steps 200 --device cpu

The same command again goes on where the last one stopped, with the same weights, moments and random numbers. Time is
the budget: the learning rate follows the share of ``--minutes`` that has passed over all runs, start-up and compilation
included; ``--steps`` makes steps the budget. ``--stop-after`` ends a run earlier, with exit code 3 for "not yet done".
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

sys.path.append(str(Path(__file__).resolve().parent))

from configurations import CONFIGURATIONS, EXAMPLES, Configuration, Size
from fast_training import FLASH, attention_backends, compile_blocks, use_linear_patch_embedding
from loss_log import LossLog, final_loss, keep_log_until
from made_video import HELD_OUT, PHOTOGRAPHS, Pictures, Plan, Shape, draw_plan, render

from svg2_compile.environment import describe_environment
from svg2_compile.tiny_wan import model
from svg2_compile.tiny_wan.transform import CHANNELS, BlockTransform, blocks_of, coordinates, cosine_matrix
from svg2_compile.tiny_wan.words import WordVectors

STARTED = time.monotonic()
NOT_DONE = 3
"""Exit code of a run that ``--stop-after`` ended."""

WINDOW = (128, 256)
FLOW_SHIFT = 3.0
DROPPED = 0.1
"""Share of videos that are shown without their prompt, for classifier-free guidance."""
SPIKE = 3.0
"""A gradient longer than this many times the mean length so far is shortened to it."""
LOG_STEPS = 50
MOST_VIDEOS = 256
"""Seeds that a step has to itself; a batch has fewer videos."""
console = Console(soft_wrap=True)


@dataclass(slots=True)
class Progressed:
    """How far training has come, over all runs; the JSON part of a checkpoint."""

    steps: int = 0
    seconds: float = 0.0
    """Wall clock, start-up and compilation included."""
    tokens: int = 0
    videos: int = 0
    runs: int = 0
    """The current one included."""


class Encoder:
    """A transform whose numbers lie on the device, so that no step waits for them; the same latents up to rounding."""

    def __init__(self, transform: BlockTransform, device: torch.device) -> None:
        std = torch.tensor(transform.std, dtype=torch.float64)
        self.matrix = (cosine_matrix() / std[:, None]).float().to(device)
        self.offset = (torch.tensor(transform.mean, dtype=torch.float64) / std).float().view(-1, 1, 1, 1).to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the latents of fp32 pixels ``[B, 3, F, H, W]``."""
        return torch.einsum("ij,bjfhw->bifhw", self.matrix, blocks_of(pixels)) - self.offset


@dataclass(slots=True)
class Training:
    """Everything that a step reads and writes."""

    transformer: nn.Module
    average: dict[str, Tensor]
    """The exponential moving average of the weights, fp32."""
    optimizer: torch.optim.AdamW
    gradient_length: Tensor
    """The mean length of the gradient so far, zero before the first step."""
    encode: Encoder
    pictures: Pictures
    words: WordVectors
    generator: torch.Generator
    """Draws noise, noise levels and dropped prompts; started anew by every step."""
    progressed: Progressed = field(default_factory=Progressed)

    @property
    def device(self) -> torch.device:
        """Where training runs."""
        return self.pictures.device


def main() -> int:
    """Run the command line and return the exit code."""
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    done = train(options)
    if options.export:
        export(options.out, options.export)
        console.print(f"wrote {options.export}")
    return 0 if done else NOT_DONE


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--configuration", default="shipped", choices=CONFIGURATIONS)
    add("--out", type=Path, required=True, help="folder of checkpoint, transform and loss.jsonl")
    add("--photographs", type=Path, default=PHOTOGRAPHS, help="folder of the pictures")
    add("--start-from", type=Path, help="model folder whose weights a new run begins with, in fp16 and without moments")
    add("--minutes", type=float, help="wall clock of all runs together; the configuration's by default")
    add("--steps", type=int, help="optimizer steps of all runs together, instead of minutes")
    add("--stop-after", type=float, default=math.inf, help="minutes after which this run ends, from its start")
    add("--stop-at", type=int, help="step after which this run ends")
    add("--checkpoint-minutes", type=float, default=2.5, help="time between checkpoints")
    add("--learning-rate", type=float, help="at its peak; the configuration's by default")
    add("--batch-tokens", type=int, help="tokens in a batch; the configuration's by default")
    add("--whitening", type=float, default=0.5, help="channels are divided by this power of their deviation; below one,"
        " coarse channels stay stronger and come out of the noise first")  # fmt: skip
    add("--seed", type=int, default=0, help="of weights, noise and videos")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add("--attention", default="flash", choices=("flash", "fastest"), help="of PyTorch's, on a GPU; the fastest is"
        " cuDNN's on an H200, with which one size went wrong (docs/lab, 33)")  # fmt: skip
    add("--no-compile", action="store_true", help="leave the blocks to eager PyTorch")
    add("--export", type=Path, help="write the fp16 moving average as a model folder")
    return parser.parse_args(arguments)


def train(options: argparse.Namespace) -> bool:
    """Train until the budget or the time of this run is over; return whether the budget is."""
    configuration = CONFIGURATIONS[options.configuration]
    if options.batch_tokens:
        configuration = replace(configuration, batch_tokens=options.batch_tokens)
    device = torch.device(options.device)
    training = start_training(configuration, options, device)
    progressed, earlier = training.progressed, training.progressed.seconds
    if share_of_budget(progressed, configuration, options) >= 1:
        console.print(f"trained already, {progressed.steps} steps")
        return True
    progressed.runs += 1
    if not options.no_compile and device.type == "cuda":
        compile_blocks(training.transformer)
    fastest = options.attention == "fastest"
    backends = attention_backends(device, configuration.heads, configuration.head_dim, console) if fastest else FLASH
    console.print(f"{options.configuration} on {device}, {backends[0].name.lower()}, from step {progressed.steps}")
    if device.type == "cuda":
        tell_render_time(training, configuration)
    log = LossLog(options.out / "loss.jsonl", configuration.sizes, device)
    saved = said = time.monotonic()
    with sdpa_kernel(backends, set_priority=True):
        while True:
            now = time.monotonic()
            progressed.seconds = earlier + now - STARTED
            share = share_of_budget(progressed, configuration, options)
            if share >= 1 or now - STARTED >= 60 * options.stop_after or progressed.steps == options.stop_at:
                break
            rate = learning_rate(progressed, share, configuration, options)
            size = draw_size(configuration.sizes, share, options.seed, progressed.steps)
            log.add(size, *training_step(training, size, rate, configuration, options.seed))
            if progressed.steps % LOG_STEPS == 0:
                text = log.write(asdict(progressed), rate, training.gradient_length)
                if now - said > 20:
                    console.print(f"{100 * share:4.1f} % {text}")
                    said = now
            if now - saved > 60 * options.checkpoint_minutes:
                save_checkpoint(training, configuration, options)
                saved = now
    log.write(asdict(progressed), rate, training.gradient_length)
    save_checkpoint(training, configuration, options)
    console.print(f"stopped at step {progressed.steps}, {progressed.seconds / 60:.1f} minutes in all")
    return share >= 1


def start_training(configuration: Configuration, options: argparse.Namespace, device: torch.device) -> Training:
    """Return the state of training at the start of this run, new or from the checkpoint in ``options.out``."""
    transformer = model.untrained_transformer(options.seed, configuration.architecture)
    if options.start_from:
        take_weights(transformer, options.start_from)
    average = {name: value.clone() for name, value in transformer.state_dict().items()}
    pictures = Pictures.load(options.photographs, device)
    transformer = transformer.to(device)
    use_linear_patch_embedding(transformer)
    decayed = {True: 0.01, False: 0.0}
    groups = [
        {"params": [p for p in transformer.parameters() if (p.ndim >= 2) == big], "weight_decay": decayed[big]}
        for big in (True, False)
    ]
    training = Training(
        transformer=transformer,
        average={name: value.to(device) for name, value in average.items()},
        optimizer=torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True),
        gradient_length=torch.zeros((), device=device),
        encode=Encoder(BlockTransform(), device),
        pictures=pictures,
        words=WordVectors.drawn(pictures.vocabulary, configuration.text_dim).to(device),
        generator=torch.Generator(device),
    )
    if (options.out / "checkpoint.safetensors").is_file():
        load_checkpoint(training, configuration, options)
    else:
        (options.out / "loss.jsonl").unlink(missing_ok=True)
        if options.start_from:
            transform = BlockTransform.load(options.start_from / model.TRANSFORM_NAME)
            training.words = WordVectors.load(options.start_from / model.WORDS_NAME).to(device)
        else:
            transform = measured_transform(pictures, options.whitening)
        transform.save(options.out / model.TRANSFORM_NAME)
        training.encode = Encoder(transform, device)
        training.words.save(options.out / model.WORDS_NAME)
    return training


def take_weights(transformer: nn.Module, folder: Path) -> None:
    """Load the weights of a model folder.

    Raises:
        SystemExit: the folder has no words, or is of another architecture.

    """
    if not (folder / model.WORDS_NAME).is_file():
        raise SystemExit(f"{folder} holds no {model.WORDS_NAME}; --start-from needs what --export wrote")
    weights = load_file(folder / model.WEIGHTS_NAME)
    shapes = {name: value.shape for name, value in transformer.state_dict().items()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise SystemExit(f"{folder} is of another architecture; choose the --configuration that it was trained with")
    transformer.load_state_dict({name: value.float() for name, value in weights.items()})


def measured_transform(pictures: Pictures, whitening: float) -> BlockTransform:
    """Return the transform that makes channels of made video partly white, with a mean variance of one."""
    plans = [draw_plan(seed, pictures.vocabulary) for seed in range(96)]
    # the same numbers on every device
    full, half = pictures.backgrounds
    on_cpu = Pictures(pictures.vocabulary, (full.cpu(), half.cpu()), pictures.objects.cpu())
    pixels = torch.cat([render(on_cpu, plans[at : at + 8], Shape(2, *WINDOW)) for at in range(0, len(plans), 8)])
    white = BlockTransform.measured(pixels)
    partly = torch.tensor(white.std, dtype=torch.float64) ** whitening
    remaining = (torch.tensor(white.std, dtype=torch.float64) / partly).square().mean().sqrt()
    return BlockTransform(mean=white.mean, std=tuple((partly * remaining).tolist()))


def share_of_budget(progressed: Progressed, configuration: Configuration, options: argparse.Namespace) -> float:
    """Return how much of all steps or of all minutes is used up, from 0 to 1."""
    if options.steps is not None:
        return min(progressed.steps / options.steps, 1.0)
    return min(progressed.seconds / (60 * (options.minutes or configuration.minutes)), 1.0)


def learning_rate(
    progressed: Progressed, share: float, configuration: Configuration, options: argparse.Namespace
) -> float:
    """Return the rate of the next step: a linear rise, then half a cosine over the whole budget down to 1 %."""
    peak = options.learning_rate or configuration.learning_rate
    rise = min(1.0, (progressed.steps + 1) / configuration.warmup_steps)
    return peak * rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def tell_render_time(training: Training, configuration: Configuration) -> None:
    """Print how long the device renders a batch of the last size that fits twice, beside which a step can be seen."""
    size = next(size for size in reversed(configuration.sizes) if 2 * size.tokens <= configuration.batch_tokens)
    shape = Shape(size.frames, size.height, size.width)
    count = configuration.batch_tokens // size.tokens
    plans = [draw_plan(n, training.pictures.vocabulary, shape.aspect) for n in range(count)]
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for repeat in range(4):
        if repeat == 1:
            start.record()
        training.encode(render(training.pictures, plans, shape))
    end.record()
    torch.cuda.synchronize()
    console.print(f"rendering {count} videos of {size}: {start.elapsed_time(end) / 3:.1f} ms")


def draw_size(sizes: tuple[Size, ...], share: float, seed: int, step: int) -> Size:
    """Return the size of a step's batch; large sizes become frequent as training goes on."""
    weights = torch.tensor([s.first_share + share * (s.last_share - s.first_share) for s in sizes])
    generator = torch.Generator().manual_seed(_seed_of(seed, step))
    return sizes[int(torch.multinomial(weights, 1, generator=generator))]


def training_step(
    training: Training, size: Size, rate: float, configuration: Configuration, seed: int
) -> tuple[Tensor, Tensor]:
    """Take one optimizer step and return loss and noise level of each video, without waiting for the device.

    The velocity of the coordinates is no part of the loss: the rows of the last layer that make it begin at zero and
    get no gradient, so that it is exactly zero for ever.
    """
    device, step = training.device, training.progressed.steps
    batch = max(1, configuration.batch_tokens // size.tokens)
    first = (_seed_of(seed, step) * MOST_VIDEOS) % HELD_OUT
    aspect = size.width / size.height
    plans = [draw_plan(first + number, training.pictures.vocabulary, aspect) for number in range(batch)]
    with torch.no_grad():
        pixels = render(training.pictures, plans, Shape(size.frames, size.height, size.width))
        picture = training.encode(pixels)
    generator = training.generator.manual_seed(_seed_of(seed, step))
    noise = torch.randn(picture.shape, device=device, generator=generator)
    sigma = draw_sigmas(batch, generator, device)
    place = coordinates_of(size, device).expand(batch, -1, -1, -1, -1)
    mixed = torch.cat([torch.lerp(picture, noise, sigma.view(-1, 1, 1, 1, 1)), place], dim=1)
    prompts = training.words.embed(numbers_of(training.words, plans, generator, device))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        velocity = training.transformer(mixed, sigma * 1000, prompts, return_dict=False)[0]
    losses = (velocity[:, :CHANNELS].float() - (noise - picture)).square().mean((1, 2, 3, 4))
    losses.mean().backward()
    shorten_gradient(training)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    training.progressed.steps += 1
    training.progressed.tokens += batch * size.tokens
    training.progressed.videos += batch
    update_average(training, configuration.ema_decay)
    return losses.detach(), sigma


def _seed_of(seed: int, step: int) -> int:
    """Return a seed below 2**31 for a step, another one for every step and every seed of training below 100."""
    return (seed * 20_000_003 + step) % HELD_OUT


_PLACES: dict[tuple[Size, torch.device], Tensor] = {}


def coordinates_of(size: Size, device: torch.device) -> Tensor:
    """Return the coordinate channels of a window in the middle of the trained one, made once."""
    if (size, device) not in _PLACES:
        top, left = (WINDOW[0] - size.height) // 16 * 8, (WINDOW[1] - size.width) // 16 * 8
        place = coordinates(size.frames, size.height, size.width, top=top, left=left, device=device)
        _PLACES[size, device] = place
    return _PLACES[size, device]


def numbers_of(words: WordVectors, plans: list[Plan], generator: torch.Generator, device: torch.device) -> Tensor:
    """Return the words of each video's prompt, ``[B, 16]``, some of them without a prompt."""
    numbers = torch.tensor([words.numbers(plan.words) for plan in plans]).to(device, non_blocking=True)
    null = torch.tensor(words.numbers(None)).to(device, non_blocking=True)
    dropped = torch.rand(len(plans), 1, device=device, generator=generator) < DROPPED
    return torch.where(dropped, null, numbers)


def draw_sigmas(batch: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return noise levels ``[batch]``: one in four uniform, the others logit-normal and shifted towards noise.

    The shift is s -> shift s / (1 + (shift - 1) s), as at generation; without the uniform ones, levels below 0.3, where
    fine texture is made, would be one in forty. Quantiles are stratified over the batch.
    """
    strata = torch.arange(batch, device=device) + torch.rand(batch, device=device, generator=generator)
    quantile = (strata / batch).clamp(1e-4, 1 - 1e-4)
    logit_normal = torch.special.ndtri(quantile).sigmoid()
    shifted = FLOW_SHIFT * logit_normal / (1 + (FLOW_SHIFT - 1) * logit_normal)
    uniform = torch.rand(batch, device=device, generator=generator) < 0.25
    return torch.where(uniform, quantile, shifted)


@torch.no_grad()
def shorten_gradient(training: Training) -> None:
    """Scale the gradient to a length of one at most, and of ``SPIKE`` times the mean length at most."""
    gradients = [p.grad for p in training.transformer.parameters() if p.grad is not None]
    length = nn.utils.get_total_norm(gradients)
    mean = training.gradient_length
    allowed = torch.where(mean > 0, SPIKE * mean, torch.ones_like(mean)).clamp(max=1.0)
    torch._foreach_mul_(gradients, (allowed / (length + 1e-6)).clamp(max=1.0))
    seen = torch.minimum(length, torch.where(mean > 0, SPIKE * mean, length))
    mean.copy_(torch.where(mean > 0, torch.lerp(mean, seen, 0.02), seen))


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


def save_checkpoint(training: Training, configuration: Configuration, options: argparse.Namespace) -> None:
    """Write weights, average, moments and progress as one safetensors file, in the place of the last one."""
    tensors = {f"weights.{name}": value for name, value in training.transformer.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in training.average.items()}
    for name, parameter in training.transformer.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            if parameter in training.optimizer.state:
                tensors[f"{moment}.{name}"] = training.optimizer.state[parameter][moment]
    tensors["gradient_length"] = training.gradient_length
    record = {
        "progressed": asdict(training.progressed),
        "configuration": options.configuration,
        "architecture": dict(configuration.architecture),
        "seed": options.seed,
        "started_from": started_from(options),
        "minutes": None if options.steps is not None else options.minutes or configuration.minutes,
        "steps": options.steps,
        "learning_rate": options.learning_rate or configuration.learning_rate,
        "warmup_steps": configuration.warmup_steps,
        "ema_decay": configuration.ema_decay,
        "batch_tokens": configuration.batch_tokens,
        "sizes": [asdict(size) for size in configuration.sizes],
        "flow_shift": FLOW_SHIFT,
        "whitening": options.whitening,
        "environment": describe_environment(),
    }
    (options.out / "state.json").write_text(json.dumps(record, indent=1) + "\n")
    path = options.out / "checkpoint.safetensors"
    half_written = path.with_suffix(".half_written")
    contiguous = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
    save_file(contiguous, half_written, metadata={"record": json.dumps(record)})
    half_written.replace(path)


def started_from(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return what ``training.json`` of the folder that this run began with says, ``None`` where there was none."""
    if not options.start_from:
        return None
    record: dict[str, Any] = json.loads((options.start_from / "training.json").read_text())
    return {name: record[name] for name in ("progressed", "learning_rate", "final_loss", "started_from")}


def load_checkpoint(training: Training, configuration: Configuration, options: argparse.Namespace) -> None:
    """Put the state of the checkpoint into ``training``.

    Raises:
        SystemExit: it is of another configuration or seed.

    """
    device = training.device
    with safe_open(options.out / "checkpoint.safetensors", "pt") as file:
        record = json.loads(file.metadata()["record"])
        same: dict[str, Any] = {name: getattr(options, name) for name in ("configuration", "seed", "whitening")}
        same["architecture"] = dict(configuration.architecture)
        if other := [name for name, value in same.items() if record[name] != value]:
            raise SystemExit(f"{options.out} holds a checkpoint of another {', '.join(other)}; choose another --out")
        weights = {name: file.get_tensor(f"weights.{name}") for name in training.transformer.state_dict()}
        training.transformer.load_state_dict(weights)
        for name, value in training.average.items():
            value.copy_(file.get_tensor(f"average.{name}"))
        stored = set(file.keys())
        for name, parameter in training.transformer.named_parameters():
            if f"step.{name}" in stored:
                training.optimizer.state[parameter] = {
                    moment: file.get_tensor(f"{moment}.{name}").to(device)
                    for moment in ("exp_avg", "exp_avg_sq", "step")
                }
        training.gradient_length.copy_(file.get_tensor("gradient_length"))
    training.progressed = Progressed(**record["progressed"])
    training.encode = Encoder(BlockTransform.load(options.out / model.TRANSFORM_NAME), device)
    training.words = WordVectors.load(options.out / model.WORDS_NAME).to(device)
    keep_log_until(options.out / "loss.jsonl", training.progressed.steps)


def export(run: Path, folder: Path) -> None:
    """Write the model folder of a run: fp16 average, configs, words, transform, examples and the record of training."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder.mkdir(parents=True, exist_ok=True)
    state = json.loads((run / "state.json").read_text())
    transformer = model.untrained_transformer(config=state["architecture"])
    with safe_open(run / "checkpoint.safetensors", "pt") as file:
        transformer.load_state_dict({name: file.get_tensor(f"average.{name}") for name in transformer.state_dict()})
    transformer.half().save_pretrained(folder, max_shard_size="10GB")
    FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT).save_pretrained(folder)
    for name in (model.TRANSFORM_NAME, model.WORDS_NAME):
        shutil.copyfile(run / name, folder / name)
    subject = {"examples": list(EXAMPLES), "window": list(WINDOW)}
    (folder / model.SUBJECT_NAME).write_text(json.dumps(subject, indent=1) + "\n")
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    record: Mapping[str, Any] = {"parameters": parameters, **state, "final_loss": final_loss(run / "loss.jsonl")}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
