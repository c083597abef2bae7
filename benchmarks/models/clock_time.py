"""What the clock and the state cost the host per forward: the forwards of a model so small that nothing else counts.

    python -P benchmarks/models/clock_time.py --out clock_time.json

All layers run densely, uncompiled, through the backend and without it, whole and block by block, in turns; the
difference of the least times is what the backend costs. No GPU is used. It needs only the public interface, so an
older version can be timed with it too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import svg2_compile

CHANNELS, TOKENS = 16, 64
OPTIONS = {"min_tokens": 32, "dense_steps": 1000, "dense_layers": 0, "lowering": "eager"}


class Block(nn.Module):
    """Attention and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows after attention."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, CHANNELS)).permute(2, 0, 3, 1, 4)
        return x + scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Blocks, a noise level and a prompt."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(1, CHANNELS)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Return the rows after all blocks."""
        x = x + self.embed(timestep[:, None] / 1000)[:, None] + text
        for block in self.blocks:
            x = block(x)
        return x


def make(way: str, layers: int) -> Model:
    """Return a model that is compiled as ``way`` says; its first forward compiles."""
    model = Model(layers).eval()
    for each in {"eager": (), "whole": (model,), "blocks": model.blocks}[way]:
        each.compile(backend="svg2", options=OPTIONS)
    return model


def main() -> int:
    """Time the ways in turns and write the microseconds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {way: make(way, args.layers) for way in ("eager", "whole", "blocks")}
    x, texts = torch.randn(1, TOKENS, CHANNELS), torch.randn(2, 1, 1, CHANNELS)
    least: dict[str, float] = dict.fromkeys(models, float("inf"))
    with torch.no_grad():
        for number in range(args.repeats):
            level = torch.tensor([1000.0 - number % 50])
            for way, model in models.items():
                for text in texts:
                    started = time.perf_counter()
                    model(x, level, text)
                    least[way] = min(least[way], 1e6 * (time.perf_counter() - started))
    found: dict[str, Any] = {"version": svg2_compile.__version__, "torch": torch.__version__, "layers": args.layers}
    found |= {f"{way}_us": round(least[way] - least["eager"], 1) for way in ("whole", "blocks")}
    print(json.dumps(found))
    if args.out:
        args.out.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
