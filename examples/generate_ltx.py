"""A video from text with LTX-Video, with sparse attention.

python -P examples/generate_ltx.py "A cat walks on the grass, realistic style." --out cat.mp4

LTX packs 32 × 32 pixels and 8 frames into a token: only large videos have sequences long enough to gain.
"""

import argparse
from pathlib import Path

import torch
from diffusers import LTXPipeline

import svg2_compile
from svg2_compile.presets import preset
from svg2_compile.video.pictures import write_video

parser = argparse.ArgumentParser()
parser.add_argument("prompt")
parser.add_argument("--model", default="Lightricks/LTX-Video", help="model id or local folder")
parser.add_argument("--preset", default="balanced")
parser.add_argument("--frames", type=int, default=161)
parser.add_argument("--height", type=int, default=704)
parser.add_argument("--width", type=int, default=1216)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("ltx.mp4"))
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = LTXPipeline.from_pretrained(args.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)
pipe.transformer.compile(backend=svg2_compile.svg2_backend, options=preset(args.preset))

video = pipe(
    args.prompt,
    height=args.height,
    width=args.width,
    num_frames=args.frames,
    num_inference_steps=args.steps,
    generator=torch.Generator().manual_seed(args.seed),
    output_type="pt",
).frames[0]
write_video(args.out, video, fps=24)
print(svg2_compile.report(pipe.transformer))
