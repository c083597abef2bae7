"""``svg2 explain``: what would be sparse in a model, what not and why, and the speed-up to expect, without weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule, Node

from svg2_compile.explaining.empty_pipeline import ExplainError, TransformerCall, first_call
from svg2_compile.explaining.prediction import (
    BYTES,
    ELEMENTWISE_PASSES,
    Gpu,
    Prediction,
    SparseWork,
    Work,
    gpu_named,
    predict,
)
from svg2_compile.explaining.tracing import trace
from svg2_compile.formatting import dotted
from svg2_compile.options import configure
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.errors import ConfigError
from svg2_compile.passes.nodes import is_sdpa, sdpa_arguments, shape_of, target_name
from svg2_compile.passes.plan import SitePlan
from svg2_compile.passes.records import AttentionSite, Rejection, size_hint
from svg2_compile.passes.sparsify import Sparsified
from svg2_compile.passes.stages.keep_top_p import BudgetsOfHeads

USUAL_DENSITY = 0.2
DENSITIES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
PRODUCTS = ("matmul", "bmm", "mm", "baddbmm", "addmm")


@dataclass(frozen=True, slots=True)
class ExplainSettings:
    """What is asked about."""

    model: str
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    gpu: str = "h100"
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the two configs."""

    def __post_init__(self) -> None:
        """Refuse what means nothing, before anything is loaded.

        Raises:
            ConfigError: a size below 1, or an unknown GPU.
        """
        for name in ("frames", "height", "width", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        gpu_named(self.gpu)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would happen."""

    pipeline: str
    is_whole: bool
    """One graph without breaks, as ``fullgraph=True`` asks for."""
    steps: int
    config: SparseConfig
    decisions: tuple[tuple[str, SitePlan | Rejection], ...]
    """(module path, what was decided) of every attention, in program order."""
    work: Work
    gpu: Gpu
    prediction: Prediction

    @property
    def dense_share(self) -> float:
        """Share of the steps that stay dense."""
        dense = self.config.dense_steps
        return dense if isinstance(dense, float) else min(1.0, dense / self.steps)


def explain_model(settings: ExplainSettings) -> Explanation:
    """Build the model without weights, trace its first call and count what it would compute.

    Raises:
        ConfigError: an option is unknown or out of range.
        ExplainError: the model cannot be built from its configuration, or not be traced.
    """
    with configure(**settings.options) as options:
        call = first_call(settings.model, settings.frames, settings.height, settings.width)
        graphs, is_whole = _graphs(call)
        decisions = tuple((dotted(prefix, each.path), each) for prefix, found in graphs for each in found.decisions)
        sites = [each for _, each in decisions if isinstance(each, SitePlan)]
        work = _work([found.gm for _, found in graphs], sites)
        gpu = gpu_named(settings.gpu)
        steps = settings.steps or call.steps
        return Explanation(call.pipeline, is_whole, steps, options.sparse, decisions, work, gpu, predict(work, gpu))


def _graphs(call: TransformerCall) -> tuple[list[tuple[str, Sparsified]], bool]:
    """Return the graphs of a model, one if that is possible, and whether it was."""
    for fullgraph in (True, False):
        try:
            return trace(call.transformer, call.args, call.kwargs, fullgraph), fullgraph
        except RuntimeError as error:  # of Dynamo, or of the model on inputs that do not fit
            failure = error
    reason = " ".join(str(failure).split("Hint:")[0].split())
    raise ExplainError(f"{type(call.transformer).__name__} cannot be traced at that size: {reason}") from failure


def _work(graphs: list[GraphModule], sites: list[SitePlan]) -> Work:
    """Count what rewritten graphs compute."""
    sparse = tuple(SparseWork(site.head_dim, tuple(stage.work(site) for stage in site.stages)) for site in sites)
    nodes = [node for gm in graphs for node in gm.graph.nodes if node.op == "call_function"]
    dense = [_sizes(node) for node in nodes if is_sdpa(node)]
    rows = [batch * heads * queries * dim for batch, heads, queries, keys, dim in dense if queries == keys]
    rows += [site.batch * site.q_heads * site.token_hint * site.head_dim for site in sites]
    return Work(
        sparse=sparse,
        product_flops=sum(map(_product_flops, nodes)),
        dense_attention_flops=sum(4.0 * math.prod(each) for each in dense) + sum(map(_context_flops, sites)),
        elementwise_bytes=float(BYTES * ELEMENTWISE_PASSES * sum(rows)),
    )


def _sizes(node: Node) -> tuple[int, ...]:
    """Return batch, heads, queries, keys and head dimension of an attention."""
    call = sdpa_arguments(node)
    query, key = ([size_hint(size) or 0 for size in shape_of(each) or (0,) * 4] for each in (call.query, call.key))
    return (math.prod(query[:-3]), *query[-3:-1], key[-2], query[-1])


def _context_flops(site: AttentionSite) -> float:
    """Count what stays dense of a sparse attention: context keys for all rows, and context rows over all keys."""
    context = sum(size_hint(segment.length) or 0 for segment in site.segments if not segment.is_video)
    asking = sum(size_hint(each.length) or 0 for each in site.segments if each.asks and not each.is_video)
    pairs = site.token_hint * context + asking * (site.token_hint + context)
    return 4.0 * site.batch * site.q_heads * pairs * site.head_dim


def _product_flops(node: Node) -> float:
    """Count the operations of a matrix product or a convolution, 0 for anything else."""
    name = target_name(node)
    shapes = [[size_hint(size) or 0 for size in shape_of(each) or ()] for each in node.args]
    result = math.prod(size_hint(size) or 0 for size in shape_of(node) or (0,))
    if name == "linear" or name in PRODUCTS:
        left = shapes[1] if name in ("addmm", "baddbmm") else shapes[0]
        return 2.0 * result * (left[-1] if left else 0)
    if name.startswith("conv") and len(shapes) > 1 and shapes[1]:
        return 2.0 * result * math.prod(shapes[1][1:])
    return 0.0


def print_explanation(explanation: Explanation, console: Console) -> None:
    """Print what is sparse, what is not and why, and the prediction."""
    how = "fullgraph=True" if explanation.is_whole else "fullgraph=False, for it breaks the graph"
    console.print(f"{explanation.pipeline}, {explanation.steps} steps; compile its transformer with {how}")
    table = Table("attentions", "first", "what", title="What the backend would do")
    for count, path, what in _groups(explanation):
        table.add_row(str(count), path, what)
    console.print(table)
    work, prediction, gpu = explanation.work, explanation.prediction, explanation.gpu
    if not work.sparse:
        console.print("Nothing would be sparse, so nothing would be faster.")
        return
    console.print(
        f"One forward on {gpu.name} ({gpu.source}): {1e3 * prediction.dense_step:,.0f} ms dense, of which "
        f"{1e3 * prediction.attention:,.0f} ms are attention that would be sparse; clustering and selection "
        f"{1e3 * prediction.clustering:,.0f} ms."
    )
    if prediction.highest_density <= 0:
        console.print("Sparse attention would not pay here at any density: clustering costs what it could save.")
        return
    console.print(
        f"It pays below a density of {min(1.0, prediction.highest_density):.0%}. If attention cost nothing, a forward "
        f"would be {prediction.limit:.2f}x faster; {explanation.dense_share:.0%} of the steps stay dense."
    )
    speed = Table("density", "sparse forward", "generation, dense steps included", title="Predicted speed-up")
    for density in DENSITIES:
        generation = prediction.generation_speedup(density, explanation.dense_share)
        speed.add_row(f"{density:.0%}", f"{prediction.speedup(density):.2f}x", f"{generation:.2f}x")
    console.print(speed)
    if prediction.waits_for_the_host(USUAL_DENSITY):
        console.print(
            f"The host takes some {1e3 * prediction.launching:,.0f} ms to launch what is sparse, the GPU "
            f"{1e3 * prediction.sparse_step(USUAL_DENSITY):,.0f} ms for the whole forward at {USUAL_DENSITY:.0%}: "
            "replay CUDA graphs (docs/integration.md), or it waits for the host and gains less."
        )
    console.print(
        "Estimates: of the transformer alone, without text encoder and decoder. The density depends on the model and "
        f"on top_p={explanation.config.top_p}; a run and svg2_compile.report tell it."
    )


def _groups(explanation: Explanation) -> Iterator[tuple[int, str, str]]:
    """Return equal decisions together: how many, the path of the first, and what was decided."""
    groups: dict[str, list[str]] = {}
    for path, each in explanation.decisions:
        if isinstance(each, Rejection):
            advice = f"; {each.hint}" if each.hint else ""
            what = f"dense: {each.reason}{advice}"
        else:
            size = f"{each.batch}x{each.q_heads}x{each.token_hint}x{each.head_dim}"
            context = f" + {each.context_tokens} context" if len(each.segments) > 1 else ""
            context += f" ({each.exact_tokens} of them exact_rows)" if each.exact_tokens else ""
            what = f"sparse: {size}{context}, {each.q_clusters} query and {each.k_clusters} key clusters"
            what += "" if each.budgets is None else f", {BudgetsOfHeads.told(each.budgets)}"
        groups.setdefault(what, []).append(path)
    for what, paths in groups.items():
        yield len(paths), paths[0], what
