"""Put one model class through the backend and say what became of each of its attentions."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers.models.transformers
import torch
from diffusers import ModelMixin
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import svg2_compile
from svg2_compile import svg2_backend
from svg2_compile.passes.records import AttentionSite
from svg2_compile.region import Region
from svg2_compile.reporting import Report

MIN_TOKENS = 64
TIMESTEP = 500.0
OPTIONS = {"dense_steps": 0, "dense_layers": 0, "min_tokens": MIN_TOKENS, "lowering": "eager"}

Inputs = dict[str, Any]


class Noise:
    """Makes the tensors of one set of inputs."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        """Return normal noise of a shape."""
        return torch.randn(shape, generator=self.generator)


@dataclass(frozen=True, slots=True)
class ModelCase:
    """A tiny configuration of a model class, and inputs for it."""

    name: str
    config: Mapping[str, Any]
    make_inputs: Callable[[Noise], Inputs]
    """The arguments of ``forward``; long enough that the video or image rows count as long."""

    variant: str = ""
    """Tells two cases of one class apart."""

    breaks: str = ""
    """Why Dynamo cannot trace the class as one graph; empty where it can."""

    ask_fullgraph: bool = True
    """False to let Dynamo break the graph although it could trace it whole."""

    dense: Mapping[str, int] = field(default_factory=dict)
    """Long attentions that stay dense, counted by reason; every other one must become sparse."""

    dense_by_block: int | None = None
    """The same in all where blocks are compiled one by one, if it differs: the mask is an input then, and is read."""

    unseen: int = 0
    """Long attentions that run eagerly, where no backend sees them."""

    unseen_by_block: int = 0
    """The same where diffusers compiles the blocks of the model one by one."""

    note: str = ""
    """What a reader of the table should know; a case with nothing sparse says why."""

    @property
    def id(self) -> str:
        """The name of the case in tests and tables."""
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def inputs(self) -> Inputs:
        """Return the same inputs each time."""
        return self.make_inputs(Noise())

    def make(self) -> torch.nn.Module:
        """Return the model with the same random weights each time."""
        torch.manual_seed(0)
        model = transformer_classes()[self.name](**self.config).eval()
        for name, parameter in sorted(model.named_parameters()):
            # parameters that start at zero would hide the attentions behind them
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
        return model


def transformer_classes() -> dict[str, type[torch.nn.Module]]:
    """Return every model class that the installed diffusers defines among its transformers."""
    found: dict[str, type[torch.nn.Module]] = {}
    package = diffusers.models.transformers
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, each in vars(module).items():
            if isinstance(each, type) and issubclass(each, ModelMixin) and each.__module__ == module.__name__:
                found[name] = each
    return found


class Attentions(TorchFunctionMode):
    """Sees every attention of an eager forward: an account of the model's attentions that is not the backend's."""

    def __init__(self, remove_long: bool = False) -> None:
        super().__init__()
        self.remove_long = remove_long
        self.long = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = dict(zip(("query", "key", "value"), args)) | kwargs
        queries, keys = names["query"].shape[-2], names["key"].shape[-2]
        # few keys are cross-attention to a text; more keys than queries may be the queries' own rows and others
        is_long = keys >= queries >= MIN_TOKENS
        self.long += is_long
        output = func(*args, **kwargs)
        return torch.zeros_like(output) if is_long and self.remove_long else output


class InDouble(TorchFunctionMode):
    """Lets a model that pins parts of itself to float32 run in double precision: what meets a double becomes one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if any(each.dtype is torch.float64 for each in tensors):
            if func is torch.nn.functional.linear or func is torch.nn.functional.layer_norm:
                args, kwargs = doubled((args, kwargs))
            if kwargs.get("dtype") is torch.float32 and func is torch.linalg.vector_norm:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def doubled(values: Any) -> Any:
    """Return nested values with their floating tensors in double precision."""
    return pytree.tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, values)


@dataclass(frozen=True, slots=True)
class Site:
    """What the table tells of a sparse attention."""

    order: tuple[str, ...]
    """Kinds of rows of the keys, ``video`` or ``context``."""

    has_mask: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a model class."""

    fullgraph: bool
    long_attentions: int
    """With at least as many keys as queries; counted by watching the eager model, without the backend."""

    full: Report
    """With full selection."""

    sparse: Report
    """With ``top_p=0.9``."""

    sites: tuple[Site, ...]
    exact: torch.Tensor
    """In double precision."""

    dense_output: torch.Tensor
    full_output: torch.Tensor
    sparse_output: torch.Tensor
    sparse_by_block: int | None
    """Sparse attentions after ``compile_repeated_blocks``; None where diffusers names no blocks of the class."""

    by_block_output: torch.Tensor
    """With full selection."""

    removed_output: torch.Tensor
    """The dense output were the long attentions to return zeros: how much they matter."""

    @property
    def left(self) -> Counter[tuple[str, str]]:
        """Attentions that stay dense, counted by reason (without its figures) and hint."""
        return Counter((kind_of(site.plan), kind_of(site.hint)) for site in self.sparse.sites if not site.sparse)

    @property
    def left_by_reason(self) -> Counter[str]:
        """The same, whatever the hint."""
        counts: Counter[str] = Counter()
        for (reason, _), count in self.left.items():
            counts[reason] += count
        return counts


def kind_of(reason: str) -> str:
    """Return a reason or hint without the figures of a tiny configuration."""
    return re.sub(r"\d+(×\d+)+|(?<==)\d+", "…", reason.split(":")[0])


def examine(case: ModelCase) -> Verdict:
    """Run a case eagerly, in double precision, and through the backend with full and with sparse selection."""
    torch._dynamo.reset()
    svg2_compile.reset()
    with torch.no_grad():
        model = case.make()
        judge = in_double(case)
        with Attentions() as seen:
            dense = output_of(model, case.inputs())
        with Attentions(remove_long=True):
            removed = output_of(model, case.inputs())
        options = {"full": {**OPTIONS, "top_p": 1.0}, "sparse": {**OPTIONS, "top_p": 0.9}}
        chosen = "full"

        def backend(gm: Any, example_inputs: Any) -> Any:
            runners = {name: svg2_backend(gm, example_inputs, options=each) for name, each in options.items()}
            return lambda *args: runners[chosen](*args)

        fullgraph = case.ask_fullgraph
        compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
        try:
            full = output_of(compiled, case.inputs())
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError):
            fullgraph = False
            torch._dynamo.reset()
            svg2_compile.reset()
            compiled = torch.compile(model, backend=backend)
            full = output_of(compiled, case.inputs())
        full_report = svg2_compile.report(model)
        ran = sorted((region for region in Region.instances if region.owners()), key=lambda region: region.number)
        sites = [site for region in ran for site in region.plan.sites]
        svg2_compile.reset()
        chosen = "sparse"
        sparse = output_of(compiled, case.inputs())
        sparse_report = svg2_compile.report(model)
        sparse_by_block, by_block = run_by_block(case, options["full"]) or (None, full)
        return Verdict(
            fullgraph=fullgraph,
            long_attentions=seen.long,
            full=full_report,
            sparse=sparse_report,
            sites=tuple(dict.fromkeys(Site(order_of(site), site.has_mask) for site in sites)),
            exact=judge,
            dense_output=dense,
            full_output=full,
            sparse_output=sparse,
            sparse_by_block=sparse_by_block,
            by_block_output=by_block,
            removed_output=removed,
        )


def run_by_block(case: ModelCase, options: dict[str, Any]) -> tuple[int, torch.Tensor] | None:
    """Compile the blocks of a model one by one and return how many attentions are sparse, and the output."""
    model = case.make()
    if not getattr(model, "_repeated_blocks", None):
        return None
    torch._dynamo.reset()
    svg2_compile.reset()
    model.compile_repeated_blocks(backend=svg2_backend, options=options)
    output = output_of(model, case.inputs())
    return len(svg2_compile.report(model).sparse_sites), output


def order_of(site: AttentionSite) -> tuple[str, ...]:
    """Return the kinds of rows of a site in their order."""
    return tuple("video" if segment.is_video else "context" for segment in site.segments)


def output_of(model: Any, inputs: Inputs) -> torch.Tensor:
    """Return everything that a model returns, as one vector."""
    outputs = pytree.tree_leaves(model(**inputs, return_dict=False))
    return torch.cat([each.flatten() for each in outputs if isinstance(each, torch.Tensor)])


def in_double(case: ModelCase) -> torch.Tensor:
    """Return the output in double precision."""
    with InDouble():
        return output_of(case.make().double(), doubled(case.inputs()))
