"""One denoising step of a real architecture on an NVIDIA GPU: compiled dense with cuDNN against compiled sparse.

    python -P benchmarks/models/denoising_step.py --model wan-14b-720p --layers 10 --densities 0.25 --out steps.json
    python -P benchmarks/models/denoising_step.py --model wan-14b-720p --layers 4 --densities 0.25 --whole --out s.json

Layers are compiled one by one, as `compile_repeated_blocks` does, or the whole model with `--whole`; `--cuda-graphs`
lets Inductor record and replay what it compiled, dense and sparse. Every figure is written at once, and a file that has
some already gets the new ones added.

Weights are random, bf16, and so are the inputs; what such a model attends to says nothing. Therefore the selection is
forced: clustering and selection run and take their time, and then their results are replaced by clusters of lognormal
sizes (standard deviation 0.8 of the mean), tokens in random order, and random key clusters kept up to the density. All
layers and steps are sparse, and the steps timed are not the first: they start from the centroids of the one before, as
all but one of a generation do. A step is one forward. Times are medians of whole forwards; shares are from a profile of
one more. HunyuanVideo's text is not padded, and its dense attention is spared the mask that says so, which cuDNN would
have to read; the sparse one gets it. Without a GPU it says so and stops.

ideal: what the step would take if attention took its density and nothing else changed. target: the same if selected
pairs cost what 0.8 of cuDNN's efficiency makes of them, and clustering and selection 2.5 to 3 % of dense attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._inductor import cudagraph_trees

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from forced_stages import Forced, forced_backend
from gpu_targets import StepGoal, step_goal
from shapes import HUNYUAN_720P, WAN_1_3B_480P, WAN_14B_720P
from timing import time_once_ms

import svg2_compile
from svg2_compile.environment import describe_environment
from svg2_compile.kernels import ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.ahead_of_time import kernel_names
from svg2_compile.kernels.card import PARTS
from svg2_compile.video.measure import fastest_attention

DEVICE = "cuda"
DENSITIES = (0.15, 0.2, 0.25, 0.3, 0.4)
PYTORCHS_ATTENTION = ("cudnn_generated", "flash_fwd", "fmha")
LONGEST = 8
"""Kernels that are named in the record."""
WARM_STEPS = 3
"""The first one compiles; with CUDA graphs the second one records."""


@dataclass(frozen=True, slots=True)
class Model:
    """A diffusers transformer at one size."""

    class_name: str
    config: dict[str, Any]
    latents: tuple[int, ...]
    tokens: int
    """Video tokens of a self-attention."""
    clusters: tuple[int, int]
    """Query and key clusters."""
    text: dict[str, tuple[int, ...]]
    """Shapes of the other inputs."""


WAN_TEXT = {"encoder_hidden_states": (1, 512, 4096)}
MODELS = {
    "wan-1.3b-480p": Model(
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        (1, 16, 21, 60, 104),
        WAN_1_3B_480P.tokens,
        WAN_1_3B_480P.clusters[0],
        WAN_TEXT,
    ),
    "wan-14b-720p": Model(
        "WanTransformer3DModel",
        {},
        (1, 16, 21, 90, 160),
        WAN_14B_720P.tokens,
        WAN_14B_720P.clusters[0],
        WAN_TEXT,
    ),
    "hunyuan-720p": Model(
        "HunyuanVideoTransformer3DModel",
        {"guidance_embeds": True},
        (1, 16, 33, 90, 160),
        HUNYUAN_720P.tokens,
        HUNYUAN_720P.clusters[0],
        {"encoder_hidden_states": (1, 256, 4096), "pooled_projections": (1, 768)},
    ),
}


@dataclass(frozen=True, slots=True)
class Way:
    """How a model is compiled."""

    whole: bool
    """One graph for the model, not one for each kind of layer."""
    cuda_graphs: bool

    def __str__(self) -> str:
        return ("whole model" if self.whole else "layer by layer") + (", CUDA graphs" if self.cuda_graphs else "")


def main() -> int:
    """Measure the models one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--layers", type=int, help="at most this many of each kind of layer; default: all")
    parser.add_argument("--clusters", type=int, nargs=2, help="query and key clusters; default: the model's")
    parser.add_argument("--whole", action="store_true", help="compile the whole model as one graph")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay what was compiled as CUDA graphs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the JSON goes; runs that are there already stay")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device; nothing was timed")
        return 0
    record: dict[str, Any] = {"environment": describe_environment(), "date": time.strftime("%Y-%m-%d"), "runs": []}
    if args.out and args.out.exists():
        before = json.loads(args.out.read_text(encoding="utf-8"))
        if before["environment"] != record["environment"]:
            raise SystemExit(f"{args.out} is from {before['environment']}, this is {record['environment']}")
        record["runs"] = before["runs"]

    def save() -> None:
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    for name in args.model:
        run: dict[str, Any] = {"model": name}
        record["runs"].append(run)
        way = Way(args.whole, args.cuda_graphs)
        measure(run, way, args.densities, args.layers, args.clusters, args.repeats, save)
        torch.cuda.empty_cache()
    print(f"on {record['environment']}, {record['date']}")
    return 0


def measure(
    run: dict[str, Any],
    way: Way,
    densities: list[float],
    layers: int | None,
    clusters: tuple[int, int] | None,
    repeats: int,
    save: Callable[[], None],
) -> None:
    """Time one model dense and at every density; print, add to ``run``, and save after each."""
    name = run["model"]
    spec = MODELS[name]
    clusters = tuple(clusters or spec.clusters)
    model = build(spec, layers)
    inputs = make_inputs(spec)
    run |= {"way": str(way), "whole": way.whole, "cuda_graphs": way.cuda_graphs, "layers": layers, "clusters": clusters}
    with fastest_attention(torch.device(DEVICE)), without_full_masks(spec):
        steps = Steps(compiled(model, way), inputs)
        dense = steps.measure(repeats)
    run |= {"dense": dense, "sparse": {}}
    print(f"{name}, {way}: dense {summary(dense)}", flush=True)
    save()
    share = dense["kinds_ms"]["attention"] / sum(dense["kinds_ms"].values())
    heads = int(model.config.num_attention_heads)
    # the sparse HunyuanVideo has a mask; only the queries of its text are left to PyTorch's attention
    fastest = nullcontext() if has_mask(spec) else fastest_attention(torch.device(DEVICE))
    with fastest, Forced(heads, spec.tokens, *clusters, device=DEVICE) as forced:
        forced.keep(densities[0])
        steps = Steps(compiled(model, way, clusters), inputs)
        for density in densities:
            forced.keep(density)
            sparse = steps.measure(repeats)
            goal = step_goal(name, share, density)
            sparse |= {"speedup": dense["ms"] / sparse["ms"], "ideal": goal.ideal, "target": goal.target}
            run["sparse"][f"{density:g}"] = sparse
            print(f"  density {density:.2f}: {verdict(sparse['speedup'], goal)}, {summary(sparse)}", flush=True)
            save()


def summary(result: dict[str, Any]) -> str:
    """Return the figures of some steps as text."""
    kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in result["kinds_ms"].items())
    memory = f"peak {result['peak_gib']:.1f} GiB (reserved {result['reserved_gib']:.1f})"
    return f"{result['ms']:.1f} ms ({kinds}), compiled in {result['compile_s']:.0f} s, {memory}"


def verdict(speedup: float, goal: StepGoal) -> str:
    """Return a speed-up beside what it might be."""
    asked = (
        "" if goal.asked is None else f", asked {goal.asked:.2f}: {'reached' if speedup >= goal.asked else 'missed'}"
    )
    return f"{speedup:.2f}x (ideal {goal.ideal:.2f}, target {goal.target:.2f}{asked})"


def has_mask(spec: Model) -> bool:
    """Return whether the model masks its text."""
    return spec.class_name.startswith("Hunyuan")


def build(spec: Model, layers: int | None) -> torch.nn.Module:
    """Return the model with random bf16 weights on the GPU."""
    import diffusers

    config = dict(spec.config)
    if layers is not None:
        config |= {"num_layers": layers}
        config |= {"num_single_layers": layers} if spec.class_name.startswith("Hunyuan") else {}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model: torch.nn.Module = getattr(diffusers, spec.class_name)(**config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def make_inputs(spec: Model) -> dict[str, Any]:
    """Return random inputs of the model's forward."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = {"hidden_states": spec.latents, **spec.text}
    inputs: dict[str, Any] = {
        name: torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }
    inputs |= {"timestep": torch.tensor([500], device=DEVICE), "return_dict": False}
    if has_mask(spec):
        tokens = spec.text["encoder_hidden_states"][1]
        inputs["encoder_attention_mask"] = torch.ones((1, tokens), dtype=torch.bool, device=DEVICE)
        inputs["guidance"] = torch.tensor([6000.0], device=DEVICE, dtype=torch.bfloat16)
    return inputs


def compiled(
    model: torch.nn.Module, way: Way, clusters: tuple[int, int] | None = None, lowering: str = "inductor"
) -> torch.nn.Module:
    """Return the model compiled afresh; sparse where cluster counts are given."""
    svg2_compile.reset()
    torch._dynamo.reset()
    cudagraph_trees.reset_cudagraph_trees()
    for module in model.modules():
        module._compiled_call_impl = None
    options: dict[str, Any] = {"triton.cudagraphs": True} if way.cuda_graphs else {}
    arguments: dict[str, Any] = {"fullgraph": True}
    if clusters is not None:
        options |= {"q_clusters": clusters[0], "k_clusters": clusters[1], "dense_steps": 0, "dense_layers": 0}
        options["self_check"] = False  # it would find the forced selection wrong
        options |= {"lowering": lowering}
        arguments |= {"backend": forced_backend}
    compile_model = model.compile if way.whole else model.compile_repeated_blocks
    compile_model(**arguments, options=options or None)
    return model


class Steps:
    """The denoising steps of one compiled model, from the first one on."""

    def __init__(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.taken = 0
        started = time.perf_counter()
        self.step()
        torch.cuda.synchronize()
        self.first_s = time.perf_counter() - started
        """Compilation, and the first clustering."""
        for _ in range(1, WARM_STEPS):
            self.step()

    @torch.no_grad()
    def step(self) -> None:
        """Take the next one."""
        torch.compiler.cudagraph_mark_step_begin()
        # told which step it is, the clustering of all but the first starts from the one before
        with svg2_compile.denoise_step(self.taken, stream="benchmark"):
            self.model(**self.inputs)
        self.taken += 1

    def measure(self, repeats: int) -> dict[str, Any]:
        """Return the median time of a forward, its parts by kind of kernel, peak memory, seconds of compilation."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ms = statistics.median(time_once_ms(self.step) for _ in range(repeats))
        # what replayed CUDA graphs use is not allocated again, but it is reserved
        memory = {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
        kernels = kernels_ms(self.step)
        longest = dict(sorted(kernels.items(), key=lambda item: -item[1])[:LONGEST])
        seconds = {"first_s": self.first_s, "compile_s": self.first_s - ms / 1000}
        return {"ms": ms, **seconds, "kinds_ms": kinds_ms(kernels), **memory, "longest_kernels_ms": longest}


def kernels_ms(function: Callable[[], object]) -> dict[str, float]:
    """Return the time on the GPU of every kernel of a call, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / 1000 for event in profile.key_averages()}


def kinds_ms(kernels: dict[str, float]) -> dict[str, float]:
    """Return the time of attention, of clustering and selection, and of the rest."""
    kinds = {"attention": 0.0, "clustering": 0.0, "rest": 0.0}
    attention = kernel_names("attention")
    others = tuple(name for part in PARTS if part != "attention" for name in kernel_names(part))
    for name, ms in kernels.items():
        if name.startswith(others):
            kinds["clustering"] += ms
        elif name.startswith(attention) or any(each in name for each in PYTORCHS_ATTENTION):
            kinds["attention"] += ms
        else:
            kinds["rest"] += ms
    return kinds


@contextmanager
def without_full_masks(spec: Model) -> Iterator[None]:
    """Let HunyuanVideo's attention take no mask: all of its text is valid here, and the result is the same."""
    if not has_mask(spec):
        yield
        return
    from diffusers.models.transformers import transformer_hunyuan_video as module

    dispatch = module.dispatch_attention_fn
    module.dispatch_attention_fn = lambda *qkv, attn_mask, **rest: dispatch(*qkv, attn_mask=None, **rest)
    try:
        yield
    finally:
        module.dispatch_attention_fn = dispatch


if __name__ == "__main__":
    sys.exit(main())
