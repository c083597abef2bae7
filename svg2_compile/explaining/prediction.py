"""How much faster a model gets, from counted operations and what GPUs reach: an estimate before the first GPU hour.

dense step  = attention + rest                   sparse step = attention * density / efficiency + clustering + rest
rest        = products / product rate + other attention / attention rate + elementwise bytes / bandwidth
"""

from __future__ import annotations

from dataclasses import dataclass

from svg2_compile.passes.errors import ConfigError
from svg2_compile.passes.stages.stage import Work as StageWork

ELEMENTWISE_PASSES = 45
"""Times that norms, modulation, rotary embedding, activations and residuals of a layer read or write all its tokens."""
BYTES = 2
SPARSE_EFFICIENCY, PORTABLE_EFFICIENCY = 0.9, 0.7
"""Of the sparse attention per selected pair, over the dense one: on Hopper inside models, and of portable kernels."""
SMALL_HEAD_EFFICIENCY = 0.72
"""Of attention with head dimension 64, over 128."""
LAUNCHING_SECONDS = 1.4e-3
"""What the host takes to launch a sparse attention with its clustering, if no CUDA graph replays it: measured beside an
H200, docs/lab, 24."""
FAST_HEAD_DIMS = (64, 128)


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a GPU reaches in bf16."""

    name: str
    product_tflops: float
    attention_tflops: float
    """Dense, the fastest that PyTorch takes by itself, head dimension 128, tens of thousands of tokens."""
    bandwidth_tb: float
    """TB/s of a copy."""
    has_hopper_kernels: bool
    source: str


# What an H100 reaches of its data sheet (731 and 550 of 989 TFLOP/s, 3.0 of 3.35 TB/s) stands in where nobody measured.
_PRODUCT, _ATTENTION, _COPY = 0.74, 0.556, 0.9
_MEASURED = "measured, docs/lab,"
_ASSUMED = "data sheet ({} TFLOP/s dense bf16, {} TB/s), assuming the shares that an H100 reaches; not measured"


def _from_data_sheet(name: str, tflops: float, terabytes: float) -> Gpu:
    source = _ASSUMED.format(tflops, terabytes)
    return Gpu(name, _PRODUCT * tflops, _ATTENTION * tflops, _COPY * terabytes, False, source)


GPUS = {
    "h100": Gpu("NVIDIA H100 SXM", 731, 550, 3.0, True, f"{_MEASURED} 17 and 18"),
    "h200": Gpu("NVIDIA H200", 679, 550, 4.2, True, f"{_MEASURED} 22"),
    "a100": _from_data_sheet("NVIDIA A100 80 GB SXM", 312, 2.04),
    "l40s": _from_data_sheet("NVIDIA L40S", 362, 0.86),
    "4090": _from_data_sheet("NVIDIA GeForce RTX 4090", 165, 1.01),
    "5090": _from_data_sheet("NVIDIA GeForce RTX 5090", 210, 1.79),
    "b200": _from_data_sheet("NVIDIA B200", 2250, 8.0),
}


def gpu_named(name: str) -> Gpu:
    """Return the GPU.

    Raises:
        ConfigError: it is not in the table.
    """
    if name.lower() not in GPUS:
        raise ConfigError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}; take the one nearest to yours")
    return GPUS[name.lower()]


@dataclass(frozen=True, slots=True)
class SparseWork:
    """One attention that will be sparse."""

    head_dim: int
    stages: tuple[StageWork, ...]
    """What its stages compute, in their order."""

    @property
    def flops(self) -> float:
        """Operations of the dense attention between the video tokens."""
        return sum(each.pair_flops for each in self.stages)

    def attention_seconds(self, gpu: Gpu) -> float:
        """Time of the dense attention between the video tokens."""
        return self.flops / _attention_rate(gpu, self.head_dim)

    def efficiency(self, gpu: Gpu) -> float:
        """Of the sparse attention, per selected pair, over the dense one."""
        is_fast = gpu.has_hopper_kernels and self.head_dim in FAST_HEAD_DIMS
        return SPARSE_EFFICIENCY if is_fast else PORTABLE_EFFICIENCY

    def clustering_seconds(self, gpu: Gpu) -> float:
        """Time of all that the density does not change: products and passes over memory do not overlap."""
        products = sum(each.product_flops / each.product_rate_ratio for each in self.stages)
        passed = sum(each.passed_elements for each in self.stages)
        return products / (gpu.product_tflops * 1e12) + BYTES * passed / (gpu.bandwidth_tb * 1e12)


def _attention_rate(gpu: Gpu, head_dim: int) -> float:
    return gpu.attention_tflops * 1e12 * (SMALL_HEAD_EFFICIENCY if head_dim <= 64 else 1)


@dataclass(frozen=True, slots=True)
class Work:
    """Counted operations of one forward of a model."""

    sparse: tuple[SparseWork, ...]
    product_flops: float
    """Linear layers, convolutions and other matrix products."""
    dense_attention_flops: float
    """Attention that stays as it is: other layers, cross-attention, text rows."""
    elementwise_bytes: float

    @property
    def sparse_flops(self) -> float:
        """Operations of the attentions that will be sparse."""
        return sum(each.flops for each in self.sparse)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of one forward on a GPU."""

    attention: float
    """Of the attentions that will be sparse, dense."""
    selected: float
    """Of the same at a density of 1 by the sparse kernel: more, because it is less efficient per pair."""
    clustering: float
    rest: float
    launching: float = 0.0
    """What the host takes to launch the sparse attentions, beside the GPU's work or in front of it."""

    @property
    def dense_step(self) -> float:
        """The forward, dense."""
        return self.attention + self.rest

    @property
    def highest_density(self) -> float:
        """The density below which the sparse forward is faster than the dense one; 0 or less: nowhere."""
        return (self.attention - self.clustering) / self.selected

    @property
    def limit(self) -> float:
        """The speed-up if the attention cost nothing at all."""
        return self.dense_step / self.rest

    def sparse_step(self, density: float) -> float:
        """Return the time of a sparse forward."""
        return self.selected * density + self.clustering + self.rest

    def speedup(self, density: float) -> float:
        """Return how much faster a sparse forward is."""
        return self.dense_step / self.sparse_step(density)

    def waits_for_the_host(self, density: float) -> bool:
        """Return whether the GPU may have to wait: the host launches the rest of the forward too."""
        return self.launching > 0.5 * self.sparse_step(density)

    def generation_speedup(self, density: float, dense_share: float) -> float:
        """Return how much faster a generation is whose first steps, a share of all, are dense."""
        return 1 / (dense_share + (1 - dense_share) / self.speedup(density))


def predict(work: Work, gpu: Gpu) -> Prediction:
    """Return how long the parts of a forward take."""
    rest = work.product_flops / (gpu.product_tflops * 1e12) + work.elementwise_bytes / (gpu.bandwidth_tb * 1e12)
    return Prediction(
        attention=sum(each.attention_seconds(gpu) for each in work.sparse),
        selected=sum(each.attention_seconds(gpu) / each.efficiency(gpu) for each in work.sparse),
        clustering=sum(each.clustering_seconds(gpu) for each in work.sparse),
        rest=rest + work.dense_attention_flops / _attention_rate(gpu, 128),
        launching=LAUNCHING_SECONDS * len(work.sparse),
    )
