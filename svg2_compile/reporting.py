"""What was made sparse, what was not and why, and what it kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import torch

from svg2_compile.cut_graphs import SegmentReport, segments_of
from svg2_compile.dynamo import code_of_compiled, uncompiled
from svg2_compile.formatting import dotted, number, percent
from svg2_compile.forwards import Caller, recognition_of
from svg2_compile.kernels.why_not import wrong_kernels
from svg2_compile.obstacles import obstacles
from svg2_compile.passes.plan import SitePlan
from svg2_compile.passes.records import Rejection, told
from svg2_compile.passes.sparsify import Sparsified
from svg2_compile.passes.stages.keep_top_p import BudgetsOfHeads
from svg2_compile.recompilation import exhausted
from svg2_compile.region import DenseGraph, Region
from svg2_compile.site_paths import without_common_end
from svg2_compile.state import SiteState, store

MIB = 2**20

Called = TypeVar("Called", Region, DenseGraph)


@dataclass(frozen=True, slots=True)
class DenseHead:
    """A head that the guard (``min_recall``) made dense in the generation that ran last."""

    head: int
    batch: int
    """Element of the batch."""

    stream: str
    """CFG branch."""

    since_call: int
    """First sparse call of that generation, counting from 1, in which the head was dense."""

    recall: float
    """What its selection would have kept then."""


@dataclass(frozen=True, slots=True)
class PlanReport:
    """One attention at one of the sizes, or under one of the settings, for which it was compiled."""

    shape: str
    plan: str
    sparse: bool
    sparse_calls: int = 0
    dense_calls: int = 0
    density: float | None = None


@dataclass(frozen=True, slots=True)
class SiteReport:
    """One attention of the model."""

    path: str
    shape: str
    """Batch × heads × tokens × head dim, and the context tokens; empty for an attention left dense."""

    plan: str
    """The cluster counts of a sparse attention, or why it is dense; as it was compiled last."""

    hint: str
    sparse: bool
    sparse_calls: int = 0
    dense_calls: int = 0
    dense_because: Mapping[str, int] = field(default_factory=dict)
    """The dense calls by reason: the first steps of a generation, or the first layers of the model."""

    branches: tuple[str, ...] = ()
    """CFG branches that have centroids of their own."""

    density: float | None = None
    """Share of query-key pairs computed in the sparse calls, 0 to 1; ``None`` before the first one."""

    kept_mass: float | None = None
    """Share of the attention mass, estimated from the centroids, that the kept pairs hold."""

    lowest_kept_mass: float | None = None
    """The same for the query cluster that kept least on average, averaged over heads."""

    recall: float | None = None
    """Share of the true attention mass that the kept pairs hold, on the rows sampled by ``recall_rows``, the mean over
    heads and measured calls; ``None`` where nothing was measured."""

    k_padding: float | None = None
    """Keys multiplied over keys kept, in tiles of 128 made of pieces of 16; 1 is no padding."""

    density_per_head: tuple[float, ...] = ()
    recall_per_head: tuple[float, ...] = ()
    """Empty where nothing was measured."""

    dense_heads: tuple[DenseHead, ...] = ()
    """Heads that kept less than ``min_recall``; their density counts as 1 since then, and so does their recall."""

    dense_flops: int = 0
    """Floating-point operations of one call of the video rows over the video keys, were it dense; 0 if left dense."""

    recalls_measured: int = 0
    """How often the recall of a head was measured: the weight of ``recall`` as a running mean."""

    more: Mapping[str, Any] = field(default_factory=dict)
    """What other stages tell, by name."""

    plans: tuple[PlanReport, ...] = ()
    """Each shape and plan in the order of compilation, where there are several; what stands above adds them up."""


@dataclass(frozen=True, slots=True)
class ScheduleReport:
    """How the steps of one model were told, in its last forward."""

    path: str
    steps: str
    """Where its step came from: announced, read from an input, or guessed."""
    branches: str
    total: str
    guesses: Mapping[str, int] = field(default_factory=dict)
    """What had to be guessed since the last reset, and how often."""

    def __str__(self) -> str:
        """Return lines for people."""
        name = f" of {self.path}" if self.path else ""
        lines = [f"schedule{name}: steps {self.steps}; branches {self.branches}; steps in all: {self.total}"]
        lines += [f"guess{name}, {count} times: {guess}" for guess, count in self.guesses.items()]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Report:
    """Every attention of a model, and the totals."""

    sites: tuple[SiteReport, ...]
    state_mib: float
    compile_seconds: dict[str, float]
    """Seconds spent compiling, by variant; engines count in their segments."""

    wrong_kernels: tuple[str, ...] = ()
    """Kernels that failed their self-check, in this process, and how; they are not used."""

    segments: tuple[SegmentReport, ...] = ()
    """What ``lowering="tensorrt"`` cut the graphs into; empty with another lowering."""

    schedules: tuple[ScheduleReport, ...] = ()
    """How steps and branches were told, for each model that has run."""

    exhausted: tuple[str, ...] = ()
    """Code that Dynamo does not compile again for further sizes and settings, which run dense; and what to set."""

    @property
    def sparse_sites(self) -> tuple[SiteReport, ...]:
        """The attentions that are sparse."""
        return tuple(site for site in self.sites if site.sparse)

    @property
    def density(self) -> float | None:
        """Mean density of the sparse calls."""
        return _weighted_mean((site.density, site.sparse_calls) for site in self.sparse_sites)

    @property
    def density_with_dense_calls(self) -> float | None:
        """Mean density of all calls of the sparse sites, the scheduled dense ones counted as 1."""
        dense = [(1.0, site.dense_calls) for site in self.sparse_sites]
        return _weighted_mean([*((site.density, site.sparse_calls) for site in self.sparse_sites), *dense])

    @property
    def kept_mass(self) -> float | None:
        """Mean kept mass of the sparse calls."""
        return _weighted_mean((site.kept_mass, site.sparse_calls) for site in self.sparse_sites)

    @property
    def recall(self) -> float | None:
        """Mean recall of the sparse calls, of the attentions where it was measured."""
        return _weighted_mean((site.recall, site.sparse_calls) for site in self.sparse_sites)

    @property
    def k_padding(self) -> float | None:
        """Mean of keys multiplied over keys kept in the sparse calls."""
        return _weighted_mean((site.k_padding, site.sparse_calls) for site in self.sparse_sites)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        names = ("density", "density_with_dense_calls", "kept_mass", "recall", "k_padding")
        totals = {name: getattr(self, name) for name in names}
        return {**asdict(self), **totals}

    def __str__(self) -> str:
        """Return a table: one line per attention, then the totals."""
        lines = [f"{'attention':<32} {'density':>7} {'mass':>6} {'recall':>6} {'sparse':>6} {'dense':>6}  plan"]
        for site in self.sites:
            density, mass, recall = (percent(each, unknown="") for each in (site.density, site.kept_mass, site.recall))
            calls = f"{site.sparse_calls or '':>6} {site.dense_calls or '':>6}"
            plan = f"{site.shape}, {site.plan}" if site.sparse else f"dense: {site.plan}"
            lines.append(f"{site.path:<32} {density:>7} {mass:>6} {recall:>6} {calls}  {plan}")
            for each in site.plans:
                calls = f"{each.sparse_calls or '':>6} {each.dense_calls or '':>6}"
                density = percent(each.density, unknown="")
                plan = f"{each.shape}, {each.plan}" if each.sparse else f"dense: {each.plan}"
                lines.append(f"{'':<32} {density:>7} {'':>6} {'':>6} {calls}  of these: {plan}")
            if site.more:
                told = ", ".join(f"{name.replace('_', ' ')} {_told(value)}" for name, value in site.more.items())
                lines.append(f"{'':<32} {told}")
            lines += [
                f"{'':<32} guard: head {each.head} of batch element {each.batch}, branch {each.stream!r}, is dense "
                f"since sparse call {each.since_call} of the generation, where it kept {percent(each.recall)}"
                for each in site.dense_heads
            ]
        sparse = len(self.sparse_sites)
        lines.append(
            f"{sparse} attentions sparse, {len(self.sites) - sparse} dense; density "
            f"{percent(self.density, unknown='-')} in sparse calls, "
            f"{percent(self.density_with_dense_calls, unknown='-')} with the dense ones; kept mass "
            f"{percent(self.kept_mass, unknown='-')}, recall {percent(self.recall, unknown='-')}; "
            f"key padding {number(self.k_padding, unknown='-')}; state {self.state_mib:.1f} MiB"
        )
        lines += [f"NOT RECOMPILED: {each}" for each in self.exhausted]
        lines += [f"WRONG KERNEL, not used: {each}" for each in self.wrong_kernels]
        if self.segments:
            engines = sum(segment.compiler == "tensorrt" for segment in self.segments)
            lines.append(f"{engines} of {len(self.segments)} dense segments are TensorRT engines")
        lines += [
            f"{segment.name} of a {segment.graph} graph ({segment.ops} ops) is compiled by Inductor: {segment.why_not}"
            for segment in self.segments
            if segment.why_not
        ]
        because: dict[str, int] = {}
        for site in self.sparse_sites:
            for why, count in site.dense_because.items():
                because[why] = because.get(why, 0) + count
        if because:
            told = ", ".join(f"{count} in the {why}" for why, count in because.items())
            lines.append(f"dense calls of sparse attentions: {told}")
        lines += [str(each) for each in self.schedules]
        hints = dict.fromkeys(f"{site.plan}: {site.hint}" for site in self.sites if site.hint)
        lines += [f"hint: {hint}" for hint in hints]
        if not self.sites:
            lines.append(
                "no attention was found: compile the model with this backend and run it once; a model whose attention "
                'is not scaled_dot_product_attention needs model.set_attention_backend("native")'
            )
        return "\n".join(lines)


def report(model: torch.nn.Module | Callable[..., Any]) -> Report:
    """Return what the backend did to ``model``, so far; reads the statistics back from the device.

    It may be asked at any time, from any thread.

    Args:
        model: the model, or what ``torch.compile`` returned for it or for a function.

    Returns:
        One entry per attention, in program order, layers in the order of the model.

    Raises:
        TypeError: ``model`` is neither a module nor a compiled function.
    """
    if isinstance(model, torch.nn.Module):
        model = uncompiled(model)
    elif code_of_compiled(model) is None:
        raise TypeError(
            f"report takes a torch.nn.Module or what torch.compile returned, got {type(model).__name__}; "
            "give the denoiser, such as pipeline.transformer"
        )
    regions = _called_for(model, Region.instances)
    paths = {id(each): path for path, each in model.named_modules()} if isinstance(model, torch.nn.Module) else {}
    rows: dict[tuple[str, str], _Row] = {}
    for region, caller, prefix in regions:
        dense_calls = region.dense_calls(caller)
        for decision in region.plan.decisions:
            # a layer may be compiled several times, for other sizes or modes: its calls add up
            row = rows.setdefault((dotted(prefix, decision.path), decision.node), _Row(decision, caller))
            row.add(decision, dense_calls)
    for graph, _, prefix in _called_for(model, DenseGraph.instances):
        for rejection in graph.rejections:
            row = rows.setdefault((dotted(prefix, rejection.path), rejection.node), _Row(rejection, None))
            row.add(rejection, {}, is_last=False)
    if isinstance(model, torch.nn.Module) and all(isinstance(row.decision, Rejection) for row in rows.values()):
        seen = [f"{path}." for path, _ in rows]
        for path, rejection in obstacles(model):
            if not any(each.startswith(f"{path}.") for each in seen):
                rows[path, rejection.reason] = _Row(rejection, None)
    seconds: dict[str, float] = {}
    for region in {id(region): region for region, _, _ in regions}.values():
        for variant in (region.dense, region.sparse):
            seconds[variant.name] = seconds.get(variant.name, 0.0) + variant.compile_seconds
    sites = [row.describe(path) for (path, _), row in rows.items()]
    wrong = [f"{name} on {device}, {dtype}: {reason}" for (name, device, dtype), reason in wrong_kernels.items()]
    module = model if isinstance(model, torch.nn.Module) else None
    return Report(
        tuple(sites),
        sum(row.state_bytes for row in rows.values()) / MIB,
        seconds,
        tuple(wrong),
        () if module is None else segments_of(module),
        tuple(_schedules((caller for _, caller, _ in regions), paths)),
        () if module is None else tuple(exhausted(module)),
    )


def report_before_running(graphs: Iterable[tuple[str, Sparsified]]) -> Report:
    """Return what would be done to graphs that were only traced, each with the path of its module."""
    rows = [(dotted(prefix, each.path), each) for prefix, found in graphs for each in found.decisions]
    return Report(tuple(_Row(each, None).describe(path) for path, each in rows), 0.0, {})


def _schedules(callers: Iterable[Caller], paths: Mapping[int, str]) -> Iterator[ScheduleReport]:
    models = {id(model): model for caller in callers if (model := caller.model()) is not None}
    for model in models.values():
        if (told := recognition_of(model)) is not None:
            guesses = dict(told.guesses)
            yield ScheduleReport(paths.get(id(model), ""), told.steps, told.branches, told.total, guesses)


def _called_for(
    model: torch.nn.Module | Callable[..., Any], compiled: Iterable[Called]
) -> list[tuple[Called, Caller, str]]:
    """Return (graph, caller, module path) for every caller that is part of the model, in the model's order."""
    if not isinstance(model, torch.nn.Module):
        code = code_of_compiled(model)
        graphs = [graph for graph in list(compiled) if graph.owner.code is code]
        return [(each, caller, "") for each in sorted(graphs, key=lambda each: each.number) for caller in each.owners()]
    names: list[tuple[int, str]] = []
    for path, module in model.named_modules():
        names += [(id(module), path)]
        names += [(id(parameter), dotted(path, name)) for name, parameter in module.named_parameters(recurse=False)]
    position = {part: place for place, (part, _) in enumerate(names)}
    found = []
    for graph in list(compiled):
        for caller in graph.owners():
            layer = caller.layer()
            place = position.get(id(layer))
            if layer is not None and place is not None:
                path = dotted(names[place][1], caller.name) if caller.name else names[place][1]
                prefix = without_common_end(path, graph.owner.name)
                found.append(((place, graph.number), (graph, caller, prefix)))
    return [each for _, each in sorted(found, key=lambda ranked: ranked[0])]


@dataclass(slots=True)
class _Row:
    """What is known about one attention, while a report is put together."""

    decision: SitePlan | Rejection
    caller: Caller | None
    dense_calls: dict[str, int] = field(default_factory=dict)
    plans: dict[tuple[str, str], tuple[SitePlan | Rejection, int]] = field(default_factory=dict)
    """By shape and plan in words what was compiled, and its dense calls."""

    def add(self, decision: SitePlan | Rejection, dense_calls: Mapping[str, int], *, is_last: bool = True) -> None:
        """Add what a graph does with the attention."""
        for why, count in dense_calls.items():
            self.dense_calls[why] = self.dense_calls.get(why, 0) + count
        before = self.plans.get(_in_words(decision), (decision, 0))
        self.plans[_in_words(decision)] = decision, before[1] + sum(dense_calls.values())
        if is_last:
            self.decision = decision

    @property
    def states_by_stream(self) -> dict[str, list[SiteState]]:
        if self.caller is None or isinstance(self.decision, Rejection):
            return {}
        return store.states_of(self.caller, self.decision)

    @property
    def states(self) -> list[SiteState]:
        return [state for states in self.states_by_stream.values() for state in states]

    @property
    def state_bytes(self) -> int:
        return sum(tensor.nbytes for state in self.states for tensor in state.tensors.values())

    def shown(self, site: SitePlan) -> dict[str, Any]:
        """Return what the stages tell, by the names of ``SiteReport`` and others."""
        streams = [stream for stream, states in self.states_by_stream.items() for _ in states]
        tensors = [state.tensors for state in self.states]
        shown: dict[str, Any] = {}
        for stage in site.stages:
            shown |= stage.shows(site, tensors)
        if self.caller is None and site.budgets is not None:
            shown["budgets"] = BudgetsOfHeads.told(site.budgets)  # nothing has run, and the whole model was traced
        if "dense_heads" in shown:
            shown["dense_heads"] = tuple(
                DenseHead(head, batch, streams[place], since_call, recall)
                for place, batch, head, since_call, recall in shown["dense_heads"]
            )
        return shown

    def describe(self, path: str) -> SiteReport:
        if isinstance(self.decision, Rejection):
            reason, hint = self.decision.reason, self.decision.hint
            return SiteReport(path, "", reason, hint, sparse=False, plans=self.describe_plans())
        site, states = self.decision, self.states
        shape, plan = _in_words(site)
        shown = self.shown(site)
        own = {each.name for each in fields(SiteReport)}
        return SiteReport(
            path=path,
            shape=shape,
            plan=plan,
            hint=next((each.budgets.why_not for each in states if each.budgets is not None), ""),
            sparse=True,
            sparse_calls=sum(state.calls for state in states),
            dense_calls=sum(self.dense_calls.values()),
            dense_because=self.dense_calls,
            branches=tuple(sorted(stream for stream in self.states_by_stream if stream)),
            dense_flops=int(sum(stage.work(site).pair_flops for stage in site.stages)),
            more={name: value for name, value in shown.items() if name not in own},
            plans=self.describe_plans(),
            **{name: value for name, value in shown.items() if name in own},
        )

    def describe_plans(self) -> tuple[PlanReport, ...]:
        """Return each plan with the calls that were its own; nothing where there is one only."""
        return tuple(self._describe_plan(*each) for each in self.plans.values()) if len(self.plans) > 1 else ()

    def _describe_plan(self, decision: SitePlan | Rejection, dense_calls: int) -> PlanReport:
        shape, plan = _in_words(decision)
        if isinstance(decision, Rejection):
            return PlanReport(shape, plan, sparse=False, dense_calls=dense_calls)
        by_stream = {} if self.caller is None else store.states_of(self.caller, decision, of_plan=True)
        states = [state for states in by_stream.values() for state in states]
        shown: dict[str, Any] = {}
        for stage in decision.stages:
            shown |= stage.shows(decision, [state.tensors for state in states])
        calls = sum(state.calls for state in states)
        return PlanReport(
            shape, plan, sparse=True, sparse_calls=calls, dense_calls=dense_calls, density=shown["density"]
        )


def _in_words(decision: SitePlan | Rejection) -> tuple[str, str]:
    """Return the shape of an attention and what is done with it."""
    if isinstance(decision, Rejection):
        return "", decision.reason
    context = f" + {told(decision.context_tokens)} context" if len(decision.segments) > 1 else ""
    shape = f"{decision.batch}×{decision.q_heads}×{told(decision.tokens)}×{decision.head_dim}{context}"
    return shape, decision.clusters_told


def _told(value: Any) -> str:
    """Return what a stage tells, a number in few digits."""
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _weighted_mean(weighted: Iterable[tuple[float | None, int]]) -> float | None:
    known = [(value, weight) for value, weight in weighted if value is not None and weight]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None
