"""Many prompts with one compiled pipeline: every call is a new generation, and nothing of the last one is left.

python -P examples/many_prompts.py "a cat walks on the grass" "a boat sails" --folder videos

The first prompt is generated once more at the end, and must give the same bits.
"""

import argparse
import hashlib
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import svg2_compile
from svg2_compile.presets import preset
from svg2_compile.video.pictures import to_uint8, write_video

parser = argparse.ArgumentParser()
parser.add_argument("prompts", nargs="+")
parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="model id or local folder")
parser.add_argument("--preset", default="balanced")
parser.add_argument("--frames", type=int, default=81)
parser.add_argument("--height", type=int, default=480)
parser.add_argument("--width", type=int, default=832)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--folder", type=Path, default=Path("videos"))
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype).to(device)
pipe.transformer.compile(backend=svg2_compile.svg2_backend, options=preset(args.preset))
args.folder.mkdir(parents=True, exist_ok=True)

checksums = []
for number, prompt in enumerate([*args.prompts, args.prompts[0]]):
    started = time.perf_counter()
    frames = pipe(
        prompt=prompt,
        height=args.height,
        width=args.width,
        num_frames=args.frames,
        num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="pt",
    ).frames[0]
    checksums.append(hashlib.sha256(to_uint8(frames).numpy().tobytes()).hexdigest()[:16])
    write_video(args.folder / f"{number}.mp4", frames, fps=16)
    print(f"{number}: {time.perf_counter() - started:.1f} s, {checksums[-1]}, {prompt}")
print(svg2_compile.report(pipe.transformer))
if checksums[-1] != checksums[0]:
    raise SystemExit("the first prompt gave another video at the end: state was carried over")
print("the first prompt gave the same bits at the end")
