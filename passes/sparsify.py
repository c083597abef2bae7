"""The passes in their order: one graph in, its sparse twin and the reasons for what stayed dense out.

canonicalize  →  match  →  classify  →  attach_state  →  rewrite  →  fuse  →  verify
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch.export import ExportedProgram
from torch.fx import GraphModule

from svg2_compile.passes.attach_state import attach_buffers, attach_inputs
from svg2_compile.passes.canonicalize import canonicalize
from svg2_compile.passes.classify import classify
from svg2_compile.passes.clone import clone
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.dump import dump_graph
from svg2_compile.passes.dynamo_graphs import FakeTensor, FakeTensorMode
from svg2_compile.passes.errors import InternalError, UnsupportedError
from svg2_compile.passes.fuse import fuse
from svg2_compile.passes.kernel_config import KernelConfig
from svg2_compile.passes.match import match
from svg2_compile.passes.nodes import tensor_of
from svg2_compile.passes.records import AttentionSite, Rejection, StateSpec
from svg2_compile.passes.rewrite import rewrite
from svg2_compile.passes.verify import snapshot, verify

log = logging.getLogger(__name__)

PASSES = ("canonicalize", "match", "classify", "attach_state", "rewrite", "fuse", "verify")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sparsified:
    """A graph whose long self-attention is sparse, and what was decided about every attention in it."""

    gm: GraphModule
    """The rewritten copy; the graph that was given is untouched."""

    decisions: tuple[AttentionSite | Rejection, ...]
    """One entry per attention, in program order; look-alikes that ``canonicalize`` declined come first."""

    timings_ms: dict[str, float]
    """Milliseconds per pass, in the order of ``PASSES``."""

    @property
    def sites(self) -> tuple[AttentionSite, ...]:
        """The attentions that are sparse in ``gm``."""
        return tuple(each for each in self.decisions if isinstance(each, AttentionSite))

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """The attentions that stay dense, and why."""
        return tuple(each for each in self.decisions if isinstance(each, Rejection))

    @property
    def state_specs(self) -> tuple[StateSpec, ...]:
        """The state tensors, in the order in which they follow the graph's own inputs."""
        return tuple(spec for site in self.sites for spec in site.state_specs())


def sparsify(
    gm: GraphModule,
    config: SparseConfig | None = None,
    kernel_config: KernelConfig | None = None,
    *,
    state: Literal["inputs", "buffers"] = "inputs",
) -> Sparsified:
    """Make the long self-attention of a graph sparse (SVG2, arXiv 2505.18875, sections 4.1 to 4.3).

    For users with a compiler pipeline of their own: call it on a graph that Dynamo handed to a custom backend, or on
    ``torch.export.export(model, args).module()``, and compile the result with whatever compiles the rest.

    Args:
        gm: a Dynamo-level graph, or an exported one; nodes carry ``meta["example_value"]`` or ``meta["val"]``.
        config: what to keep; the defaults if absent.
        kernel_config: which kernels run; the defaults if absent.
        state: ``inputs`` appends the state tensors to the graph's inputs (pass zeros at first, the same tensors at
            every step, per CFG branch); ``buffers`` registers them on the graph, for ``torch.export``, which wants
            a fixed batch size then.

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
    config, kernel_config = config or SparseConfig(), kernel_config or KernelConfig()
    timings: dict[str, float] = {}
    work = clone(gm)

    def run(name: str, action: Callable[[], T]) -> T:
        started = time.perf_counter()
        try:
            result = action()
        except InternalError:
            dump_graph(work, f"failed_{name}")
            raise
        timings[name] = 1e3 * (time.perf_counter() - started)
        return result

    dump_graph(work, "before")
    canonicalized = run("canonicalize", lambda: canonicalize(work, config.min_tokens))
    found = run("match", lambda: match(work, config))
    classified = run("classify", lambda: classify(found, config, fixes_batch=state == "inputs"))
    decisions = (*canonicalized.declined, *classified)
    result = Sparsified(work, decisions, timings)
    sites = result.sites
    if config.on_unsupported == "error":
        raise_unsupported(result.rejections)
    if sites:
        before = snapshot(work)
        fake_mode = fake_mode_of(work)
        attach = attach_inputs if state == "inputs" else attach_buffers
        nodes = run("attach_state", lambda: attach(work, sites, fake_mode))
        with fake_mode:
            run("rewrite", lambda: rewrite(work, sites, config, kernel_config, nodes))
            run("fuse", lambda: fuse(work))
        run("verify", lambda: verify(work, before, sites))
        dump_graph(work, "sparse")
    for name, milliseconds in timings.items():
        log.debug("%s took %.1f ms", name, milliseconds)
    return result


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
