"""What TensorRT engines give and cost on an NVIDIA GPU, beside Inductor: numerics segment by segment, then whole steps.

    python -P benchmarks/models/tensorrt_engines.py --model wan-1.3b-480p --layers 4 --out engines.json

Not run yet on any GPU. Needs `pip install "svg2-compile[tensorrt]"`; without it, or without a GPU, it says so and
stops.

numerics: at the first step, every engine's outputs beside the same segment run by PyTorch, op by op, on the same
inputs: the norm of the difference over the norm of PyTorch's output, the largest of the segment's outputs. Inductor's
of the same segment stands beside it, for scale.
speed: median time of a forward, sparse at a forced density as in `denoising_step.py`, layers compiled as one graph; the
rest is what is neither attention nor clustering, and is all that differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from denoising_step import MODELS, Steps, Way, build, compiled, make_inputs, summary
from forced_stages import Forced

import svg2_compile
from svg2_compile.environment import describe_environment
from svg2_compile.region import Variant
from svg2_compile.tensorrt import engines as tensorrt_engines

LOWERINGS = ("inductor", "tensorrt")


def main() -> int:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="wan-1.3b-480p")
    parser.add_argument("--layers", type=int, default=4, help="at most this many of each kind of layer")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device; nothing was measured")
        return 0
    if importlib.util.find_spec("torch_tensorrt") is None:
        print(f"no TensorRT: {tensorrt_engines.INSTALL}; nothing was measured")
        return 0
    tensorrt_engines.require_tensorrt()
    record: dict[str, Any] = {
        "environment": describe_environment() | tensorrt_engines.environment(),
        "date": time.strftime("%Y-%m-%d"),
        "model": args.model,
        "layers": args.layers,
        "density": args.density,
        "numerics": [],
    }
    spec = MODELS[args.model]
    model, inputs = build(spec, args.layers), make_inputs(spec)
    way = Way(whole=True, cuda_graphs=False)
    with Forced(int(model.config.num_attention_heads), spec.tokens, *spec.clusters) as forced:
        forced.keep(args.density)
        with compared(record["numerics"]):
            Steps(compiled(model, way, spec.clusters, "tensorrt"), inputs)
        print_numerics(record["numerics"])
        for lowering in LOWERINGS:
            steps = Steps(compiled(model, way, spec.clusters, lowering), inputs)
            record[lowering] = steps.measure(args.repeats)
            print(f"{lowering}: {summary(record[lowering])}", flush=True)
        segments = svg2_compile.report(model).segments
    record["segments"] = [
        {"name": each.name, "compiler": each.compiler, "engine": each.engine, "why_not": each.why_not}
        for each in segments
    ]
    print(f"{sum(each.compiler == 'tensorrt' for each in segments)} of {len(segments)} segments are engines")
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"on {record['environment']}, {record['date']}")
    return 0


@contextmanager
def compared(rows: list[dict[str, Any]]) -> Iterator[None]:
    """Let every engine's first outputs be compared with PyTorch's and Inductor's, one row each."""
    engine_for = tensorrt_engines.engine_for

    def comparing(module: GraphModule, folder: Path) -> tensorrt_engines.Engine:
        engine = engine_for(module, folder)
        seen: list[bool] = []

        def run(*inputs: Tensor) -> Any:
            outputs = engine.run(*inputs)
            if not seen:
                seen.append(True)
                rows.append(compare(module, inputs, outputs))
            return outputs

        return tensorrt_engines.Engine(run, engine.source)

    tensorrt_engines.engine_for = comparing
    try:
        yield
    finally:
        tensorrt_engines.engine_for = engine_for


def compare(module: GraphModule, inputs: tuple[Tensor, ...], outputs: Any) -> dict[str, Any]:
    """Return how far an engine's and Inductor's outputs of one segment are from PyTorch's."""
    with _disable_current_modes():
        wanted = module(*inputs)
        inductor: Callable[..., Any] = Variant("segment", module, compile_fx)
        others = inductor(*inputs)
    ops = sum(1 for node in module.graph.nodes if node.op == "call_function")
    return {"ops": ops, "tensorrt": difference(outputs, wanted), "inductor": difference(others, wanted)}


def difference(got: Any, wanted: Any) -> float:
    """Return the largest relative difference among some outputs; infinite where one is not finite."""
    worst = 0.0
    for one, other in zip(got, wanted, strict=True):
        scale = other.double().norm().clamp_min(1e-30)
        relative = float((one.double() - other.double()).norm() / scale)
        worst = max(worst, relative if relative == relative else float("inf"))
    return worst


def print_numerics(rows: list[dict[str, Any]]) -> None:
    """Print one line per segment."""
    for row in rows:
        print(
            f"segment of {row['ops']} ops: TensorRT {row['tensorrt']:.2e}, Inductor {row['inductor']:.2e}", flush=True
        )


if __name__ == "__main__":
    raise SystemExit(main())
