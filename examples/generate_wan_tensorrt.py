"""Generate a video with Wan 2.1: sparse attention in PyTorch, everything between attentions in TensorRT engines.

    pip install ".[demo,tensorrt]"
    python -P examples/generate_wan_tensorrt.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --out video.mp4

Needs an NVIDIA GPU with the memory for the model twice: engines hold their weights themselves. The first run builds the
engines, later ones read them from the disk. Nobody has run this on a GPU yet; docs/tensorrt.md says what is tested.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import svg2_compile


def main() -> None:
    """Generate one video and print what became of the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="a Wan text-to-video pipeline")
    parser.add_argument("--prompt", default="a rabbit stretches in the morning sun")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--engines", help="folder of engines; default: beside Inductor's caches")
    parser.add_argument("--out", type=Path, default=Path("video.mp4"))
    arguments = parser.parse_args()

    pipeline = WanPipeline.from_pretrained(arguments.model, dtype=torch.bfloat16).to("cuda")
    pipeline.transformer.compile(
        backend=svg2_compile.svg2_backend,
        fullgraph=True,
        dynamic=False,  # an engine has fixed sizes
        options={"lowering": "tensorrt", "engine_folder": arguments.engines},
    )
    frames = pipeline(
        arguments.prompt,
        height=arguments.height,
        width=arguments.width,
        num_frames=arguments.frames,
        num_inference_steps=arguments.steps,
        generator=torch.Generator("cuda").manual_seed(0),
    ).frames[0]
    export_to_video(frames, str(arguments.out), fps=16)
    # one line per attention, and which segments are engines, or why not
    print(svg2_compile.report(pipeline.transformer))


if __name__ == "__main__":
    main()
