"""One denoising step of a real architecture on an NVIDIA GPU: compiled dense with cuDNN against compiled sparse.

    python -P benchmarks/denoising_step.py --model wan-14b-720p --densities 0.25 --out step.json

Weights are random, bf16, and so are the inputs; what such a model attends to says nothing. Therefore the selection is
forced: clustering and selection run and take their time, and then their results are replaced by clusters of lognormal
sizes (standard deviation 0.8 of the mean), tokens in random order, and random key clusters kept up to the density. All
layers and steps are sparse, and the steps timed are not the first. Layers are compiled one by one, as
`compile_repeated_blocks` does. Times are medians of whole forwards; shares are from a profile of one more. Without a
GPU it says so and stops.

ideal: what the step would take if attention took its density and nothing else changed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from dense_baselines import time_once_ms
from random_blocks import lognormal_sizes, random_blocks, shuffled_labels

import svg2_compile
from svg2_compile.environment import describe_environment
from svg2_compile.kernels import ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.work_list import kept_runs_reference
from svg2_compile.measure import fastest_attention

ATTENTION_KERNELS = ("_attention_kernel", "cudnn_generated", "flash_fwd", "fmha", "query_tiles")
CLUSTERING_KERNELS = ("start_kernel", "order_kernel", "assign_kernel", "scan_kernel", "place_kernel", "sum_kernel")
CLUSTERING_KERNELS += ("mean_kernel", "select_kernel")
KERNEL_KINDS = {"attention": ATTENTION_KERNELS, "clustering": CLUSTERING_KERNELS}


@dataclass(frozen=True, slots=True)
class Model:
    """A diffusers transformer at one size."""

    class_name: str
    config: dict[str, Any]
    latents: tuple[int, ...]
    clusters: tuple[int, int]
    """Query and key clusters, about one per 750 and 150 tokens."""
    text: dict[str, tuple[int, ...]]
    """Shapes of the other inputs."""


WAN_TEXT = {"encoder_hidden_states": (1, 512, 4096)}
MODELS = {
    "wan-1.3b-480p": Model(
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        (1, 16, 21, 60, 104),
        (55, 218),
        WAN_TEXT,
    ),
    "wan-14b-720p": Model("WanTransformer3DModel", {}, (1, 16, 21, 90, 160), (100, 500), WAN_TEXT),
    "hunyuan-720p": Model(
        "HunyuanVideoTransformer3DModel",
        {"guidance_embeds": True},
        (1, 16, 33, 90, 160),
        (158, 792),
        {"encoder_hidden_states": (1, 256, 4096), "pooled_projections": (1, 768)},
    ),
}


def main() -> int:
    """Measure the models one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--densities", type=float, nargs="+", default=[0.15, 0.25, 0.4])
    parser.add_argument("--layers", type=int, help="at most this many of each kind of layer; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device; nothing was timed")
        return 0
    record: dict[str, Any] = {"environment": describe_environment(), "date": time.strftime("%Y-%m-%d"), "models": {}}
    for name in args.model:
        record["models"][name] = measure(name, args.densities, args.layers, args.repeats)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()
    print(f"on {record['environment']}, {record['date']}")
    return 0


def measure(name: str, densities: list[float], layers: int | None, repeats: int) -> dict[str, Any]:
    """Time one model dense and at every density, print and return it."""
    spec = MODELS[name]
    model = build(spec, layers)
    inputs = make_inputs(spec)
    with fastest_attention(torch.device("cuda")):
        dense = timed(compiled(model), inputs, repeats)
    print(f"{name}: dense {dense['ms']:.1f} ms, {shares(dense)}, peak {dense['peak_gib']:.1f} GiB", flush=True)
    result: dict[str, Any] = {"dense": dense, "layers": layers, "clusters": spec.clusters, "sparse": {}}
    for density in densities:
        svg2_compile.reset()
        with forced_selection(density):
            sparse = timed(compiled(model, spec.clusters), inputs, repeats)
        attention, rest = dense["kinds_ms"]["attention"], dense["ms"] - dense["kinds_ms"]["attention"]
        sparse |= {"speedup": dense["ms"] / sparse["ms"], "ideal": dense["ms"] / (rest + density * attention)}
        result["sparse"][density] = sparse
        print(
            f"  density {density:.2f}: {sparse['ms']:.1f} ms, {sparse['speedup']:.2f}x (ideal {sparse['ideal']:.2f}x), "
            f"{shares(sparse)}, peak {sparse['peak_gib']:.1f} GiB",
            flush=True,
        )
    return result


def shares(result: dict[str, Any]) -> str:
    """Return the time of every kind of kernel as text."""
    return ", ".join(f"{kind} {ms:.1f}" for kind, ms in result["kinds_ms"].items())


def build(spec: Model, layers: int | None) -> torch.nn.Module:
    """Return the model with random bf16 weights on the GPU."""
    import diffusers

    config = dict(spec.config)
    if layers is not None:
        config |= {"num_layers": layers}
        config |= {"num_single_layers": layers} if "Hunyuan" in spec.class_name else {}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model: torch.nn.Module = getattr(diffusers, spec.class_name)(**config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def make_inputs(spec: Model) -> dict[str, Any]:
    """Return random inputs of the model's forward."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = {"hidden_states": spec.latents, **spec.text}
    inputs: dict[str, Any] = {
        name: torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }
    inputs |= {"timestep": torch.tensor([500], device="cuda"), "return_dict": False}
    if "Hunyuan" in spec.class_name:
        tokens = spec.text["encoder_hidden_states"][1]
        inputs["encoder_attention_mask"] = torch.ones((1, tokens), dtype=torch.bool, device="cuda")
        inputs["guidance"] = torch.tensor([6000.0], device="cuda", dtype=torch.bfloat16)
    return inputs


def compiled(model: torch.nn.Module, clusters: tuple[int, int] | None = None) -> torch.nn.Module:
    """Return the model with its layers compiled afresh; sparse where cluster counts are given."""
    torch._dynamo.reset()
    for module in model.modules():
        module._compiled_call_impl = None
    if clusters is None:
        model.compile_repeated_blocks(fullgraph=True)
    else:
        options = {"q_clusters": clusters[0], "k_clusters": clusters[1], "dense_steps": 0, "dense_layers": 0}
        model.compile_repeated_blocks(backend=svg2_compile.svg2_backend, options=options, fullgraph=True)
    return model


@torch.no_grad()
def timed(model: torch.nn.Module, inputs: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Return compile seconds, the median time of a forward, its parts by kind of kernel, and the peak memory."""

    def step(index: int) -> None:
        # told which step it is, the clustering of all but the first starts from the one before
        with svg2_compile.denoise_step(index, repeats + 2, "benchmark"):
            model(**inputs)

    started = time.perf_counter()
    step(0)
    torch.cuda.synchronize()
    first_s = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    times = [time_once_ms(partial(step, index)) for index in range(1, repeats + 1)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(repeats + 1)
        torch.cuda.synchronize()
    kinds = dict.fromkeys((*KERNEL_KINDS, "rest"), 0.0)
    for event in profile.key_averages():
        kind = next((kind for kind, names in KERNEL_KINDS.items() if any(name in event.key for name in names)), "rest")
        kinds[kind] += event.self_device_time_total / 1000
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"ms": statistics.median(times), "first_s": first_s, "kinds_ms": kinds, "peak_gib": peak}


@contextmanager
def forced_selection(density: float) -> Iterator[None]:
    """Let clustering and selection run, and replace what they return."""
    from svg2_compile.kernels import cluster_tokens_triton as clustering
    from svg2_compile.kernels import select_blocks_triton as selecting

    cluster, select = clustering.cluster_tokens_triton, selecting.select_blocks_triton
    plans: dict[tuple[int, ...], tuple[Tensor, ...]] = {}

    def plan(heads: int, tokens: int, q_clusters: int, k_clusters: int) -> tuple[Tensor, ...]:
        key = (heads, tokens, q_clusters, k_clusters)
        if key not in plans:
            generator = torch.Generator("cuda").manual_seed(0)
            q_sizes, k_sizes = (lognormal_sizes(generator, 1, heads, count, tokens) for count in key[2:])
            q_order, _ = torch.ops.svg2.sort_labels(shuffled_labels(generator, q_sizes), q_clusters)
            kept = kept_runs_reference(random_blocks(generator, density, k_sizes, q_clusters), k_sizes)
            plans[key] = (q_order, q_sizes, k_sizes, kept.runs, kept.counts)
        return plans[key]

    def cluster_then_pretend(
        q: Tensor, k: Tensor, v: Tensor, q_centroids: Tensor, k_centroids: Tensor, *rest: Any
    ) -> Any:
        *_, keys, values = cluster(q, k, v, q_centroids, k_centroids, *rest)
        planned = plan(q.shape[1], q.shape[2], q_centroids.shape[2], k_centroids.shape[2])
        return (*planned[:3], keys, values)

    def select_then_pretend(q_centroids: Tensor, k_centroids: Tensor, q_sizes: Tensor, *rest: Any) -> Any:
        select(q_centroids, k_centroids, q_sizes, *rest)
        return next(planned[3:] for planned in plans.values() if planned[1].data_ptr() == q_sizes.data_ptr())

    clustering.cluster_tokens_triton, selecting.select_blocks_triton = cluster_then_pretend, select_then_pretend
    try:
        yield
    finally:
        clustering.cluster_tokens_triton, selecting.select_blocks_triton = cluster, select


if __name__ == "__main__":
    sys.exit(main())
