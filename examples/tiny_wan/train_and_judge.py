"""Train a subject, export it, judge it, count its attention and write its card: one command, as often as it takes.

    python -P examples/tiny_wan/train_and_judge.py --configuration shipped --out runs/shipped
    python -P examples/tiny_wan/train_and_judge.py --configuration minute --out runs/minute --quick --device cpu
    python -P examples/tiny_wan/train_and_judge.py --unpack packed --into svg2_compile/tiny_wan

Where a call may last only so long, give ``--minutes-per-call``: a call ends in time with exit code 3, and the same
command goes on where it stopped. Expected on an H200: training 18 minutes (the budget), judging 1.5, attention 2 (3.5
for the large one), the rest 0.5.
``--pack`` puts the results into files of at most 15 MiB, after every call, as far as they are; ``--unpack`` puts such
files together again. Nothing is fetched: the photographs lie in the repository.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STARTED = time.monotonic()
NOT_DONE = 3
PIECE_BYTES = 15 * 2**20
MOST_PIECES = 3
"""Weights that need more pieces are not packed."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
ATTENTION = ("--frames", "4", "16", "32", "64", "--videos", "8")
QUICK_ATTENTION = ("--frames", "1", "2", "--videos", "1", "--rows", "16", "--noise-levels", "0.5")
QUICK_JUDGE = (
    *("--videos", "2", "--samples", "2", "--sample-steps", "1", "--noise-levels", "0.8"),
    *("--frames", "2", "--height", "32", "--width", "64"),
)

console = Console(soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the work that leaves a file behind when it is done."""

    name: str
    leaves: Path
    minutes: float
    """What it is given: if less is left in a call, it waits for the next."""
    command: tuple[str, ...]
    """A script and its arguments."""


def main() -> int:
    """Run the command line and return the exit code."""
    options = parse_arguments()
    if options.unpack:
        unpack(options.unpack, options.into)
        return 0
    code = work(options)
    if options.pack:
        pack(options.out, options.pack)
    return code


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--configuration", default="shipped", help="shipped, large or minute")
    add("--out", type=Path, default=Path("runs/subject"), help="folder of checkpoint, model and figures")
    add("--minutes", type=float, help="of training, over all calls; the configuration's by default")
    add("--steps", type=int, help="of training, instead of minutes")
    add("--learning-rate", type=float, help="at its peak; the configuration's by default")
    add("--start-from", type=Path, help="model folder whose weights a new run begins with")
    add("--batch-tokens", type=int, help="tokens in a batch; the configuration's by default")
    add("--attention", help="see train_subject.py")
    add("--whitening", type=float, help="of the latents; see train_subject.py")
    add("--minutes-per-call", type=float, default=math.inf, help="end in time, to be called again")
    add("--old", type=Path, default=ROOT / "svg2_compile" / "tiny_wan", help="an older subject to judge beside it")
    add("--quick", action="store_true", help="judge very little, to see that everything runs")
    add("--device", help="cuda where there is a GPU")
    add("--pack", type=Path, help="folder for results in files of at most 15 MiB")
    add("--unpack", type=Path, help="put together what --pack wrote in this folder, and stop")
    add("--into", type=Path, help="the model folder that --unpack writes")
    options = parser.parse_args(arguments)
    if (options.unpack is None) != (options.into is None):
        parser.error("--unpack and --into go together")
    return options


def work(options: argparse.Namespace) -> int:
    """Do the stages that are not done yet, as far as the time of this call goes."""
    call_seconds = 60 * options.minutes_per_call
    done = train(options, call_seconds)
    if done != 0:
        return done
    for stage in stages(options):
        if stage.leaves.is_file():
            console.print(f"{stage.name}: done before")
            continue
        if time.monotonic() - STARTED + 60 * stage.minutes > call_seconds:
            console.print(f"{stage.name}: no time left in this call; run the same command again")
            return NOT_DONE
        began = time.monotonic()
        if code := run(stage.command):
            return code
        console.print(f"{stage.name}: {(time.monotonic() - began) / 60:.1f} minutes")
    return 0


def train(options: argparse.Namespace, call_seconds: float) -> int:
    """Train for the rest of this call, export what there is, and return 0 when training is done."""
    given = {"--minutes": options.minutes, "--steps": options.steps, "--learning-rate": options.learning_rate}
    given |= {"--start-from": options.start_from, "--attention": options.attention}
    given |= {"--batch-tokens": options.batch_tokens, "--whitening": options.whitening, "--device": options.device}
    if math.isfinite(call_seconds):
        # a minute for what follows the last step: checkpoint, export, packing
        given["--stop-after"] = (call_seconds - (time.monotonic() - STARTED)) / 60 - 1
    extra = [text for name, value in given.items() if value is not None for text in (name, str(value))]
    out = ("--out", str(options.out), "--export", str(options.out / "model"))
    code = run(("examples/tiny_wan/train_subject.py", "--configuration", options.configuration, *out, *extra))
    if code == NOT_DONE:
        console.print("training is not done; run the same command again")
    return code


def stages(options: argparse.Namespace) -> list[Stage]:
    """Return what follows training, in its order."""
    out, folder = options.out, ("--folder", str(options.out / "model"))
    device = ("--device", options.device) if options.device else ()
    attention = QUICK_ATTENTION if options.quick else ATTENTION
    old = ("--old", str(options.old)) if options.old else ()
    judge = (*folder, *old, "--out", str(out / "judged"), *device, *(QUICK_JUDGE if options.quick else ()))
    count = (*folder, "--out", str(out / "attention"), *device, *attention)
    return [
        Stage("judging", out / "judged" / "judged.json", 2.0, ("examples/tiny_wan/judge_subject.py", *judge)),
        Stage(
            "attention",
            out / "attention" / "learned_attention.json",
            4.0,
            ("benchmarks/method/learned_attention.py", *count),
        ),
        Stage(
            "card",
            out / "model" / "card.json",
            0.5,
            ("examples/tiny_wan/write_card.py", "--run", str(out), *folder),
        ),
    ]


def run(command: tuple[str, ...]) -> int:
    """Run a script of this repository and return its exit code."""
    script, *arguments = command
    return subprocess.run([sys.executable, "-P", str(ROOT / script), *arguments]).returncode


def pack(out: Path, folder: Path) -> None:
    """Write ``figures.tar`` and the weights in pieces, as far as they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = folder / "figures.tar"
    with tarfile.open(figures, "w") as tar:
        for part in ("model", "judged", "attention"):
            for path in sorted((out / part).glob("*")) if (out / part).is_dir() else []:
                if path.name != WEIGHTS:
                    tar.add(path, f"{part}/{path.name}")
        for name in ("loss.jsonl", "state.json"):
            if (out / name).is_file():
                tar.add(out / name, name)
    weights = out / "model" / WEIGHTS
    if not weights.is_file():
        console.print(f"there is no {weights} yet")
        return
    size = weights.stat().st_size
    if size > MOST_PIECES * PIECE_BYTES:
        console.print(f"the weights have {size / 2**20:.0f} MiB and are not packed; they stay in {weights.parent}")
        return
    with weights.open("rb") as file:
        for number in range(math.ceil(size / PIECE_BYTES)):
            (folder / f"weights-{number}").write_bytes(file.read(PIECE_BYTES))
    console.print(f"packed into {folder}")


def unpack(folder: Path, into: Path) -> None:
    """Put the model folder together, and the other figures beside it into ``<into>_figures``.

    Raises:
        SystemExit: ``folder`` holds no packed model.

    """
    pieces = sorted(folder.glob("weights-*"))
    if not pieces or not (folder / "figures.tar").is_file():
        raise SystemExit(f"{folder} must hold figures.tar and weights-0, as --pack writes them")
    into.mkdir(parents=True, exist_ok=True)
    beside = into.with_name(f"{into.name}_figures")
    with tarfile.open(folder / "figures.tar") as tar:
        for member in tar.getmembers():
            file = tar.extractfile(member)
            part, _, name = member.name.rpartition("/")
            if file is None or Path(name).name != name:
                continue
            target = into / name if part == "model" else beside / Path(part).name / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read())
    (into / WEIGHTS).write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    console.print(f"wrote {into} and {beside}")


if __name__ == "__main__":
    sys.exit(main())
