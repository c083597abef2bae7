"""SVG2's rewritten graph, run node by node, with the clustering and the selection replaced at will.

What ``baselines.py`` and ``ablations.py`` compare differs in one function only: the graph, the attention op, the warm
starts, the schedule and the count of what was kept are those of the backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from random_blocks import random_blocks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

import svg2_compile
from svg2_compile.kernels.select_blocks import block_logits, kept_clusters
from svg2_compile.kernels.work_list import kept_runs_reference
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.plan import stages_of
from svg2_compile.passes.records import AttentionSite
from svg2_compile.passes.stages.cluster import Cluster
from svg2_compile.passes.stages.flow import Flow, SiteWriter
from svg2_compile.passes.stages.keep_top_p import KeepTopP
from svg2_compile.passes.stages.stage import Stage
from svg2_compile.video.measure import Video, generate
from svg2_compile.video.quality import psnr, ssim

MASS_STRIDE = 16
"""Every so many queries are asked how much of their true softmax mass was kept."""
MAX_SCORES = 2**28
svg2 = torch.ops.svg2

Clustered = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
ClusterBy = Callable[..., Clustered]
"""Takes and returns what ``svg2::cluster_tokens_`` does."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """What a selection may look at: the arguments of ``svg2::select_blocks``, and the tokens themselves."""

    q: Tensor
    """[B, H, N, D], in token order."""
    q_order: Tensor
    k: Tensor
    """[B, H, N, D], in cluster order."""
    q_centroids: Tensor
    k_centroids: Tensor
    q_sizes: Tensor
    k_sizes: Tensor
    scale: float
    top_p: float
    min_keep_ratio: float
    statistics: Tensor


@dataclass(frozen=True, slots=True)
class Kept:
    """What the sparse calls kept, and what that did to their results; means over calls and heads."""

    density: float
    """Kept pairs over all pairs."""
    true_mass: float
    """Exact softmax mass of the kept keys, a mean over sampled queries."""
    low_true_mass: float
    """The same of the query at the lowest tenth."""
    output_error: float
    """Norm of the error of a head's results over the norm of the exact ones."""


Select = Callable[[Blocks], tuple[Tensor, Tensor]]
"""Returns the runs and counts that ``svg2::block_sparse_attention`` takes."""


class SwappedOps:
    """A backend for ``torch.compile`` whose ops can be replaced between two calls, without compiling again."""

    def __init__(self, **options: Any) -> None:
        self.options = {**options, "lowering": "eager"}
        self.cluster: ClusterBy = svg2.cluster_tokens_
        self.select: Select = by_centroids
        self.top_p: float | None = None
        """In place of the option, if given; likewise the next one."""
        self.min_keep_ratio: float | None = None
        self.forget()

    def forget(self) -> None:
        """Start the means again."""
        self.calls, self._sums = 0, torch.zeros(4)

    @property
    def kept(self) -> Kept:
        """The means over the sparse calls."""
        density, mass, low_mass, error = (self._sums / self.calls).tolist()
        return Kept(density, mass, low_mass, error)

    def compile(self, model: nn.Module) -> Any:
        """Return the model with these ops in its sparse steps."""

        def backend(gm: GraphModule, inputs: list[Any]) -> Any:
            return svg2_compile.svg2_backend(gm, inputs, options=self.options, stages=self._stages)

        return torch.compile(model, backend=backend, fullgraph=True)

    def _stages(self, config: SparseConfig, site: AttentionSite) -> tuple[Stage, ...]:
        swapped = {Cluster: SwappedCluster(call=self._cluster), KeepTopP: SwappedSelection(call=self._select)}
        stages = (swapped.get(type(stage), stage) for stage in stages_of(config, site))
        return *stages, Judge(self._judge)

    def _cluster(self, *arguments: Any) -> Clustered:
        return self.cluster(*arguments)

    def _select(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        blocks = blocks_of(*arguments)
        top_p = blocks.top_p if self.top_p is None else self.top_p
        floor = blocks.min_keep_ratio if self.min_keep_ratio is None else self.min_keep_ratio
        return self.select(replace(blocks, top_p=top_p, min_keep_ratio=floor))

    def _judge(self, out: Tensor, lse: Tensor, *arguments: Any) -> Tensor:
        """Add to the means; the arguments are those of ``svg2::block_sparse_attention``."""
        q, k, v, q_sizes, runs, counts, *_, scale = arguments
        self._sums = self._sums.to(out.device) + judge(q, k, v, q_sizes, runs, counts, out, lse, scale)
        self.calls += 1
        return out


def blocks_of(q: Tensor, q_order: Tensor, k: Tensor, *arguments: Any) -> Blocks:
    """Return what a ``SwappedSelection`` gives to its function."""
    *tensors, scale, top_p, min_keep_ratio, statistics = arguments
    return Blocks(q, q_order, k, *tensors, scale, top_p, min_keep_ratio, statistics)


@dataclass(frozen=True, slots=True)
class SwappedCluster(Cluster):
    """Clusters by a function that takes and returns what ``svg2::cluster_tokens_`` does."""

    call: Callable[..., Clustered]

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        state = [writer.state[name] for name in ("q_centroids", "k_centroids", "q_calls", "k_calls")]
        numbers = writer.site.kmeans_iters_init, writer.site.kmeans_iters_step, writer.site.seed
        function = as_function("cluster", self.call, svg2.cluster_tokens_)
        q_order, q_sizes, k_sizes, k, v = writer.parts(function, flow.q, flow.k, flow.v, *state, *numbers, count=5)
        return replace(flow, q_order=q_order, q_sizes=q_sizes, k_sizes=k_sizes, k_clustered=k, v_clustered=v)


@dataclass(frozen=True, slots=True)
class SwappedSelection(KeepTopP):
    """Selects by a function that takes the tokens, and what ``svg2::select_blocks`` does."""

    call: Callable[..., tuple[Tensor, Tensor]] = svg2.select_blocks

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        site, state = writer.site, writer.state
        function = as_function("select", self.call, lambda q, q_order, k, *rest: svg2.select_blocks(*rest))
        tokens = flow.q, flow.q_order, flow.k_clustered
        sides = state["q_centroids"], state["k_centroids"], flow.q_sizes, flow.k_sizes
        numbers = site.scale, site.top_p, site.min_keep_ratio
        runs, counts = writer.parts(function, *tokens, *sides, *numbers, state["statistics"], count=2)
        return replace(flow, runs=runs, counts=counts)


@dataclass(frozen=True, slots=True)
class Judge(Stage):
    """Shows the attention's results and arguments to a function, which returns the results."""

    call: Callable[..., Tensor]

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        function = as_function("judge", self.call, lambda out, *rest: torch.empty_like(out))
        selection = flow.q_sizes, flow.runs, flow.counts
        context = flow.context_k, flow.context_v, flow.context_mask
        tokens = flow.q, flow.k_clustered, flow.v_clustered
        arguments = (*tokens, *selection, *context, flow.q_order, writer.site.scale)
        return replace(flow, out=writer.emit(function, flow.out, flow.lse, *arguments))


def as_function(name: str, call: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that a graph can call; while the graph is written, it gives what ``fake`` does."""

    def function(*arguments: Any) -> Any:
        return (fake if isinstance(arguments[0], FakeTensor) else call)(*arguments)

    # the generated code cannot name a method
    function.__name__ = function.__qualname__ = f"swapped_{name}"
    return function


def judge(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sizes: Tensor,
    runs: Tensor,
    counts: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """Return the numbers of a ``Kept`` for one call, on the device; queries and results in token order."""
    rows = slice(None, None, MASS_STRIDE)
    scores = q[:, :, rows].float() @ k.float().transpose(-1, -2) * scale
    mass = (lse[:, :, rows] - scores.logsumexp(-1)).exp()
    exact = scores.softmax(-1) @ v.float()
    error = (out[:, :, rows] - exact).square().sum((2, 3)) / exact.square().sum((2, 3))
    density = density_of(q_sizes, runs, counts, k.shape[2])
    return torch.stack((density, mass.mean(), mass.quantile(0.1, -1).mean(), error.sqrt().mean()))


def density_of(q_sizes: Tensor, runs: Tensor, counts: Tensor, k_tokens: int) -> Tensor:
    """Return kept pairs over all pairs, a number on the device."""
    is_run = torch.arange(runs.shape[3], device=runs.device) < counts[..., :1]
    keys = ((runs[..., 1] - runs[..., 0]) * is_run).sum(-1)
    share = q_sizes.float() / q_sizes.sum(-1, keepdim=True)
    return (share * keys).sum(-1).mean() / k_tokens


# ---- selections


def by_centroids(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """SVG2's own: top-p over the masses that the centroids estimate."""
    return _by_masses(None, blocks)


def by_true_mass(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The oracle: the same rule over the exact masses."""
    return _by_masses(block_masses(blocks), blocks)


def by_queries(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """What ``estimate_by="queries"`` does: the same rule, the queries taken one by one and the keys by their centroids.

    A softmax each, then the mean.
    """
    masses = svg2.block_masses(
        blocks.q, blocks.q_order, blocks.k_centroids, blocks.q_sizes, blocks.k_sizes, blocks.scale
    )
    return _by_masses(masses, blocks)


def by_keys(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """What ``estimate_by="keys"`` does: the same rule, the keys taken one by one and the queries by their centroids."""
    masses = svg2.block_masses_by_keys(blocks.q_centroids, blocks.k, blocks.k_sizes, blocks.scale)
    return _by_masses(masses, blocks)


def _by_masses(masses: Tensor | None, blocks: Blocks) -> tuple[Tensor, Tensor]:
    sides = (blocks.q_centroids, blocks.k_centroids, blocks.q_sizes, blocks.k_sizes)
    return svg2.select_blocks(*sides, blocks.scale, blocks.top_p, blocks.min_keep_ratio, blocks.statistics, masses)


def by_spread(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """SVG2's rule, with the spread of the keys of a cluster beside their mean.

    The mean of exp(s) over a cluster is above exp of the mean: by exp(variance / 2), were the scores s normal. The
    variance is that of scale * <q_i, k> over the keys of cluster j, coordinates taken as independent.
    """
    members = membership(blocks.k_sizes, blocks.k.shape[2])
    squares = members.transpose(-1, -2) @ blocks.k.float().square() / blocks.k_sizes.clamp(min=1).unsqueeze(-1)
    variance = (squares - blocks.k_centroids.square()).clamp(min=0)
    # <(q, q^2), (k, variance * scale / 2)> is the mean of the score and half its variance, over the scale
    q = torch.cat((blocks.q_centroids, blocks.q_centroids.square()), dim=-1)
    k = torch.cat((blocks.k_centroids, variance * blocks.scale / 2), dim=-1)
    logits = block_logits(q, k, blocks.k_sizes, blocks.scale)
    return _runs(kept_clusters(logits, blocks.top_p, blocks.min_keep_ratio)[0], blocks)


@dataclass(slots=True)
class AtRandom:
    """Key clusters drawn at random, for every query cluster as many keys as SVG2 keeps there."""

    generator: torch.Generator

    def __call__(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        logits = block_logits(blocks.q_centroids, blocks.k_centroids, blocks.k_sizes, blocks.scale)
        keep, _ = kept_clusters(logits, blocks.top_p, blocks.min_keep_ratio)
        share = (keep * blocks.k_sizes.unsqueeze(2)).sum(-1, keepdim=True) / blocks.k.shape[2]
        return _runs(random_blocks(self.generator, share, blocks.k_sizes, keep.shape[2]), blocks)


def _runs(keep: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    kept = kept_runs_reference(keep, blocks.k_sizes)
    return kept.runs, kept.counts


def block_masses(blocks: Blocks) -> Tensor:
    """Return the exact softmax mass of every block, fp32 [B, H, C_q, C_k], a mean over the queries of the cluster."""
    q = svg2.permute_tokens(blocks.q, blocks.q_order).float()
    k = blocks.k.float()
    q_members, k_members = (membership(sizes, q.shape[2]) for sizes in (blocks.q_sizes, blocks.k_sizes))
    masses = q.new_zeros((*blocks.q_sizes.shape, blocks.k_sizes.shape[2]))
    rows = max(1, MAX_SCORES // k.shape[2])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            of_keys = q.new_zeros((q_members.shape[3], k.shape[2]))
            for start in range(0, q.shape[2], rows):
                here = slice(start, start + rows)
                probability = (q[b, h, here] @ k[b, h].T * blocks.scale).softmax(-1)
                of_keys += q_members[b, h, here].T @ probability
            masses[b, h] = of_keys @ k_members[b, h]
    return masses / blocks.q_sizes.clamp(min=1).unsqueeze(-1)


def membership(sizes: Tensor, tokens: int) -> Tensor:
    """Return fp32 [B, H, N, C], 1 where the token, in cluster order, is of the cluster."""
    token = torch.arange(tokens, device=sizes.device).view(1, 1, -1, 1)
    ends = sizes.cumsum(-1).unsqueeze(2)
    return ((token < ends) & (token >= ends - sizes.unsqueeze(2))).float()


# ---- clusterings


def with_labels(
    q: Tensor, k: Tensor, v: Tensor, means: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor]
) -> Clustered:
    """Return what ``svg2::cluster_tokens_`` does for given labels, and write the means of the clusters."""
    sides = []
    for x, centroids, label in zip((q, k), means, labels):
        order, sizes = svg2.sort_labels(label, centroids.shape[2])
        members = membership(sizes, x.shape[2])
        sums = members.transpose(-1, -2) @ svg2.permute_tokens(x, order).to(centroids.dtype)
        centroids.copy_(sums / sizes.clamp(min=1).unsqueeze(-1))
        sides.append((order, sizes))
    (q_order, q_sizes), (k_order, k_sizes) = sides
    return q_order, q_sizes, k_sizes, svg2.permute_tokens(k, k_order), svg2.permute_tokens(v, k_order)


@dataclass(frozen=True, slots=True)
class ByPosition:
    """Equal blocks of neighbours: stretches of the flattened sequence, or boxes of frames, rows and columns."""

    grid: tuple[int, int, int]
    """Tokens along frames, rows and columns."""
    boxes: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, q_centroids: Tensor, k_centroids: Tensor, *_: Any) -> Clustered:
        means = (q_centroids, k_centroids)
        labels = tuple(
            self.labels(each.shape[2]).to(q.device, torch.int32).expand(*q.shape[:3]).contiguous() for each in means
        )
        return with_labels(q, k, v, means, labels)

    def labels(self, clusters: int) -> Tensor:
        """Return the block of every token, int64 [N]."""
        frames, rows, columns = self.grid
        tokens = frames * rows * columns
        if not self.boxes:
            return torch.arange(tokens) * clusters // tokens
        splits = box_splits(self.grid, clusters)
        label = torch.zeros(self.grid, dtype=torch.int64)
        for axis, (length, parts) in enumerate(zip(self.grid, splits)):
            shape = [1, 1, 1]
            shape[axis] = length
            label = label * parts + (torch.arange(length) * parts // length).view(shape)
        return label.flatten()


def box_splits(grid: tuple[int, int, int], clusters: int) -> list[int]:
    """Return into how many parts each axis is cut: always the one whose boxes are longest, into halves."""
    splits = [1, 1, 1]
    while (made := splits[0] * splits[1] * splits[2]) < clusters:
        lengths = [length / parts for length, parts in zip(grid, splits)]
        splits[lengths.index(max(lengths))] *= 2
    if made != clusters:
        raise SystemExit(f"boxes are made by halving, so cluster counts must be powers of two, got {clusters}")
    return splits


# ---- generations


@dataclass(frozen=True, slots=True)
class Point:
    """One sparse video beside the dense one."""

    psnr_db: float
    ssim: float
    density: float
    true_mass: float
    low_true_mass: float
    output_error: float


class Workbench:
    """The pipeline, the dense videos, and what was compiled last."""

    def __init__(self, pipeline: Any, videos: list[Video]) -> None:
        self.pipeline, self.videos = pipeline, videos
        self.eager = pipeline.transformer
        self._dense = [generate(pipeline, video).pixels for video in videos]

    def compile(self, **options: Any) -> SwappedOps:
        """Return ops to replace; the next generations run with these options."""
        torch._dynamo.reset()
        ops = SwappedOps(**options)
        self.pipeline.transformer = ops.compile(self.eager)
        return ops

    def measure(self, ops: SwappedOps, index: int) -> Point:
        """Return how far the sparse video is from the dense one, and what was kept for it."""
        svg2_compile.reset()
        ops.forget()
        pixels = generate(self.pipeline, self.videos[index]).pixels
        dense = self._dense[index]
        return Point(psnr(pixels, dense), ssim(pixels, dense), **asdict(ops.kept))


def interpolate(curve: list[tuple[float, float]], at: float) -> float | None:
    """Return y at x, linear between the two neighbouring (x, y) of the curve; None outside of it."""
    curve = sorted(curve)
    for (low, y_low), (high, y_high) in pairwise(curve):
        if low <= at <= high:
            return y_low + (y_high - y_low) * ((at - low) / (high - low) if high > low else 0.0)
    return None


def at_density(points: list[Point], density: float) -> float | None:
    """Return the PSNR at a density, linear in its logarithm between two points."""
    return interpolate([(math.log(point.density), point.psnr_db) for point in points], math.log(density))


def density_at(points: list[Point], psnr_db: float) -> float | None:
    """Return the density that reaches a PSNR, its logarithm linear in the PSNR between two points."""
    found = interpolate([(point.psnr_db, math.log(point.density)) for point in points], psnr_db)
    return None if found is None else math.exp(found)
