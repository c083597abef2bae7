"""A video from text with Wan 2.1, or Wan 2.2 with its two models, with sparse attention.

python -P examples/generate_wan.py "A cat walks on the grass, realistic style." --out cat.mp4
python -P examples/generate_wan.py "..." --model Wan-AI/Wan2.2-T2V-A14B-Diffusers --height 720 --width 1280
"""

import argparse
from pathlib import Path

import torch
from diffusers import WanPipeline

import svg2_compile
from svg2_compile.presets import preset
from svg2_compile.video.pictures import write_video

parser = argparse.ArgumentParser()
parser.add_argument("prompt")
parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="model id or local folder")
parser.add_argument("--preset", default="balanced", help="for 720p the paper has paper-wan-2.1 and paper-wan-2.2")
parser.add_argument("--frames", type=int, default=81)
parser.add_argument("--height", type=int, default=480)
parser.add_argument("--width", type=int, default=832)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("wan.mp4"))
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = WanPipeline.from_pretrained(args.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)
models = [model for model in (pipe.transformer, pipe.transformer_2) if model is not None]
for model in models:
    model.compile_repeated_blocks(backend=svg2_compile.svg2_backend, options=preset(args.preset), fullgraph=True)

video = pipe(
    args.prompt,
    height=args.height,
    width=args.width,
    num_frames=args.frames,
    num_inference_steps=args.steps,
    generator=torch.Generator().manual_seed(args.seed),
    output_type="pt",
).frames[0]
write_video(args.out, video, fps=16)
for model in models:
    print(svg2_compile.report(model))
