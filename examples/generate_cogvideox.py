"""A video from text with CogVideoX, with sparse attention.

python -P examples/generate_cogvideox.py "A cat walks on the grass, realistic style." --out cat.mp4
"""

import argparse
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline

import svg2_compile
from svg2_compile.presets import preset
from svg2_compile.video.pictures import write_video

parser = argparse.ArgumentParser()
parser.add_argument("prompt")
parser.add_argument("--model", default="zai-org/CogVideoX-5b", help="model id or local folder")
parser.add_argument("--preset", default="balanced")
parser.add_argument("--frames", type=int, default=49)
parser.add_argument("--height", type=int, default=480)
parser.add_argument("--width", type=int, default=720)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("cogvideox.mp4"))
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
pipe = CogVideoXPipeline.from_pretrained(args.model, dtype=dtype).to(device)
pipe.vae.enable_tiling()
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
write_video(args.out, video, fps=8)
print(svg2_compile.report(pipe.transformer))
