"""The passes in their order: one graph in, its sparse twin and the reasons for what stayed dense out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from svg2_compile.passes.attach_state import StateNodes, attach_buffers, attach_inputs
from svg2_compile.passes.canonicalize import canonicalize
from svg2_compile.passes.classify import classify
from svg2_compile.passes.clone import clone
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.dump import dump_graph
from svg2_compile.passes.dynamo_graphs import FakeTensor, FakeTensorMode
from svg2_compile.passes.errors import InternalError, UnsupportedError
from svg2_compile.passes.fold_axes import fold_axes
from svg2_compile.passes.inline_subgraphs import inline_subgraphs, subgraphs_left, why_not_inlined
from svg2_compile.passes.kernel_config import KernelConfig
from svg2_compile.passes.match import Candidate, match
from svg2_compile.passes.nodes import target_name, tensor_of
from svg2_compile.passes.plan import SitePlan, StagesOf, plan_site, stages_of
from svg2_compile.passes.records import AttentionSite, Rejection, StateSpec
from svg2_compile.passes.rewrite import rewrite
from svg2_compile.passes.verify import Snapshot, snapshot, verify, verify_outputs

log = logging.getLogger(__name__)

StateAs = Literal["inputs", "buffers"]


@dataclass(frozen=True, slots=True)
class Sparsified:
    """A graph whose long self-attention is sparse, and what was decided about every attention in it."""

    gm: GraphModule
    """The rewritten copy; the graph that was given is untouched."""

    decisions: tuple[SitePlan | Rejection, ...]
    """One entry per attention, in program order; look-alikes that ``canonicalize`` declined come first."""

    timings_ms: dict[str, float]
    """Milliseconds per pass, in the order of ``PASSES``; those after ``plan`` run only where something is sparse."""

    @property
    def sites(self) -> tuple[SitePlan, ...]:
        """The attentions that are sparse in ``gm``."""
        return tuple(each for each in self.decisions if isinstance(each, SitePlan))

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """The attentions that stay dense, and why."""
        return tuple(each for each in self.decisions if isinstance(each, Rejection))

    @property
    def state_specs(self) -> tuple[StateSpec, ...]:
        """The state tensors, in the order in which they follow the graph's own inputs."""
        return tuple(spec for site in self.sites for spec in site.state_specs)


@dataclass(slots=True)
class _Course:
    """A graph on its way through the passes, and what they have found so far."""

    gm: GraphModule
    config: SparseConfig
    kernel_config: KernelConfig
    state: StateAs
    stages: StagesOf
    before: Snapshot
    """Of the graph whose hand-written attentions are written out."""
    declined: list[Rejection] = field(default_factory=list)
    found: list[Candidate | Rejection] = field(default_factory=list)
    classified: list[AttentionSite | Rejection] = field(default_factory=list)
    sites: list[SitePlan] = field(default_factory=list)
    decisions: tuple[SitePlan | Rejection, ...] = ()
    nodes: StateNodes = field(default_factory=dict)
    fake_mode: FakeTensorMode | None = None


def _inline_subgraphs(course: _Course) -> None:
    inline_subgraphs(course.gm)
    course.declined += [each for call, body in subgraphs_left(course.gm) for each in _out_of_sight(call, body, course)]


def _out_of_sight(call: Node, body: GraphModule, course: _Course) -> Iterator[Rejection]:
    """Decline every attention of a subgraph that stays one: nothing outside of it may take part in it."""
    work = clone(body)
    canonicalize(work)
    fold_axes(work)
    for each in match(work, course.config):
        if isinstance(each, Rejection):
            yield each
        else:
            name = target_name(call)
            yield Rejection(
                each.node.name, each.path, f"it is inside {name}, a graph of its own", why_not_inlined(call)
            )


def _canonicalize(course: _Course) -> None:
    course.declined += list(canonicalize(course.gm, course.config.min_tokens).declined)


def _fold_axes(course: _Course) -> None:
    fold_axes(course.gm)


def _match(course: _Course) -> None:
    course.found = match(course.gm, course.config)


def _classify(course: _Course) -> None:
    course.classified = classify(course.found, course.config, fixes_batch=course.state == "inputs")


def _plan(course: _Course) -> None:
    config, kernel_config = course.config, course.kernel_config
    planned = [
        plan_site(each, config, kernel_config, course.stages) if isinstance(each, AttentionSite) else each
        for each in course.classified
    ]
    course.decisions = (*course.declined, *planned)
    course.sites = [each for each in planned if isinstance(each, SitePlan)]
    if config.on_unsupported == "error":
        raise_unsupported(each for each in course.decisions if isinstance(each, Rejection))


def _attach_state(course: _Course) -> None:
    course.before = snapshot(course.gm)
    course.fake_mode = fake_mode_of(course.gm)
    attach = attach_inputs if course.state == "inputs" else attach_buffers
    course.nodes = attach(course.gm, course.sites, course.fake_mode)


def _rewrite(course: _Course) -> None:
    assert course.fake_mode is not None
    with course.fake_mode:
        rewrite(course.gm, course.sites, course.nodes)


def _verify(course: _Course) -> None:
    verify(course.gm, course.before, course.sites)


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass: what it is called, what it does, and where it belongs in the course of a graph."""

    name: str
    run: Callable[[_Course], None]
    writes: bool = False
    """Whether it changes the graph, which is then checked and dumped."""
    needs_sites: bool = False
    """Whether it has nothing to do where nothing is sparse."""


PASSES = (
    Pass("inline_subgraphs", _inline_subgraphs, writes=True),
    Pass("canonicalize", _canonicalize, writes=True),
    Pass("fold_axes", _fold_axes, writes=True),
    Pass("match", _match),
    Pass("classify", _classify),
    Pass("plan", _plan),
    Pass("attach_state", _attach_state, writes=True, needs_sites=True),
    Pass("rewrite", _rewrite, writes=True, needs_sites=True),
    Pass("verify", _verify, needs_sites=True),
)
"""The passes, in their order."""


def sparsify(
    gm: GraphModule,
    config: SparseConfig | None = None,
    kernel_config: KernelConfig | None = None,
    *,
    state: StateAs = "inputs",
    stages: StagesOf = stages_of,
) -> Sparsified:
    """Make the long self-attention of a graph sparse (SVG2, arXiv 2505.18875, sections 4.1 to 4.3).

    For users with a compiler pipeline of their own: call it on a graph that Dynamo handed to a custom backend, or on
    ``torch.export.export(model, args).module()``, and compile the result with whatever compiles the rest.

    Args:
        gm: a Dynamo-level graph, or an exported one; nodes carry ``meta["example_value"]`` or ``meta["val"]``.
        config: what to keep; the defaults if absent.
        kernel_config: which kernels run; the defaults if absent.
        state: ``inputs`` appends the state tensors to the graph's inputs (pass zeros at first, with ``budgets`` what
            the specs create, and the same tensors at every step, per CFG branch); ``buffers`` registers them on the
            graph, for ``torch.export``, which wants a fixed batch size then.
        stages: what a sparse attention does, chosen per site; for experiments with stages of their own.

    Returns:
        The rewritten copy, with one site or rejection per attention of ``gm``.

    Raises:
        TypeError: ``gm`` is no graph module.
        UnsupportedError: a long self-attention must stay dense and ``config.on_unsupported`` is ``"error"``.

    Promises:
        ``gm`` is not changed; nothing global is touched; the same graph and configs give the same result.
    """
    if not isinstance(gm, GraphModule):
        advice = "give its module()" if isinstance(gm, ExportedProgram) else "give torch.export.export(...).module()"
        raise TypeError(f"gm must be a torch.fx.GraphModule, got {type(gm).__name__}; {advice}")
    work = clone(gm)
    config, kernel_config = config or SparseConfig(), kernel_config or KernelConfig()
    course = _Course(work, config, kernel_config, state, stages, snapshot(work))
    timings: dict[str, float] = {}
    dump_graph(work, "before")
    for each in PASSES:
        if each.needs_sites and not course.sites:
            continue
        timings[each.name] = _run(each, course)
    return Sparsified(work, course.decisions, timings)


def _run(each: Pass, course: _Course) -> float:
    """Run one pass, check and dump what it wrote, and return its milliseconds."""
    started = time.perf_counter()
    try:
        each.run(course)
        if each.writes:
            course.gm.graph.lint()
            verify_outputs(course.gm, course.before)
    except InternalError:
        dump_graph(course.gm, f"failed_{each.name}")
        raise
    milliseconds = 1e3 * (time.perf_counter() - started)
    log.debug("%s took %.1f ms", each.name, milliseconds)
    if each.writes:
        dump_graph(course.gm, each.name)
    return milliseconds


def raise_unsupported(rejections: Iterable[Rejection]) -> None:
    """Raise UnsupportedError for the first attention that stays dense and was not meant to."""
    for rejection in rejections:
        if not rejection.by_design:
            advice = f"{rejection.hint}, or " if rejection.hint else ""
            raise UnsupportedError(
                f'{rejection.path} stays dense: {rejection.reason}; {advice}set on_unsupported="dense" to accept that'
            )


def fake_mode_of(gm: GraphModule) -> FakeTensorMode:
    """Return the mode that the example values of ``gm`` belong to."""
    for node in gm.graph.nodes:
        tensor = tensor_of(node)
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)
