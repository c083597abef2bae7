"""The backend: ``torch.compile(model, backend="svg2")``.

Dynamo's graph is copied, its long self-attention made sparse, and both graphs go to Inductor behind one ``Region``.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from svg2_compile import announce
from svg2_compile.budgets import BudgetsInForce
from svg2_compile.cache_identity import named_after_ops
from svg2_compile.dynamo import fake_mode_of_trace, load_compile_fx
from svg2_compile.frames import Compiled, is_dynamic, owner_position, what_is_compiled
from svg2_compile.kernels.self_check import kinds_of
from svg2_compile.obstacles import certain_obstacles, obstacles_behind
from svg2_compile.options import Options, split_options
from svg2_compile.passes.budgets import Budgets
from svg2_compile.passes.clone import clone
from svg2_compile.passes.errors import ConfigError
from svg2_compile.passes.op_calls import op_calls
from svg2_compile.passes.plan import StagesOf, stages_of
from svg2_compile.passes.sparsify import Sparsified, raise_unsupported, sparsify
from svg2_compile.recompilation import watch
from svg2_compile.region import DenseGraph, Lower, Owner, Region, Runner, Variant, reset

log = logging.getLogger(__name__)

compile_fx = load_compile_fx()

announce.observe_cache_context()


def svg2_backend(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    stages: StagesOf = stages_of,
) -> Callable[..., Any]:
    """Compile a graph with its long self-attention made sparse (SVG2, arXiv 2505.18875).

    Give it to ``torch.compile`` as ``backend=svg2_backend`` or ``backend="svg2"``; do not call it.

    Args:
        gm: the graph that Dynamo traced.
        example_inputs: its inputs.
        options: fields of ``SparseConfig`` and ``KernelConfig``, bare or prefixed with ``svg2.``, and Inductor's own.
        mode: a mode of ``torch.compile``, for Inductor.
        stages: as ``sparsify`` takes them; ``torch.compile`` hands none on, so wrap this function to give some.

    Raises:
        ConfigError: an option is unknown or out of range, or TensorRT is asked for and missing.
        ConfigError: ``budgets`` are those of another model.
        UnsupportedError: an attention cannot be sparse and ``on_unsupported="error"``.
    """
    ours, inductor_options = split_options(options, mode)
    config = ours.sparse
    compiled = what_is_compiled(example_inputs)
    watch(options, compiled.root, svg2_backend)
    # one graph with all layers leaves the first ones out; layers that share a graph are told apart when they run
    model = compiled.root if compiled.parent is None else compiled.parent
    if config.on_unsupported == "error" and compiled.root is not None and model is not None:
        raise_unsupported(certain_obstacles(model, compiled.root))
    budgets = None if config.head_budgets is None else _budgets_of(model, config.head_budgets)
    own_layers = dataclasses.replace(config, dense_layers=0) if compiled.is_repeated else config
    if budgets is not None and model is not None:
        # of several models in the file, this one's
        own_layers = dataclasses.replace(own_layers, budgets=budgets.of_model(model, budgets.all))
    plan = sparsify(gm, own_layers, ours.kernel, stages=stages)
    if behind := obstacles_behind(gm):
        plan = dataclasses.replace(plan, decisions=(*plan.decisions, *behind))
        if config.on_unsupported == "error":
            where = "attention" if compiled.root is None else f"attention of {type(compiled.root).__name__}"
            raise_unsupported(dataclasses.replace(each, path=where) for each in behind)
    _announce(plan)
    lower = _lowering(ours, inductor_options)
    owner = _owner_of(gm, example_inputs, compiled)
    if not plan.sites:
        runner = lower(gm, example_inputs)
        if not plan.rejections and not compiled.begins_forward:
            return runner
        return DenseGraph(runner, plan.rejections, owner, begins_forward=compiled.begins_forward)
    # graphs with symbolic sizes are compiled while Dynamo listens, so that their guards reach it
    eager = is_dynamic(gm)
    return Region(
        config=config,
        plan=plan,
        dense=Variant("dense", clone(gm), lower, list(example_inputs) if eager else None),
        sparse=Variant("sparse", plan.gm, lower, [*example_inputs, *_fake_state(plan)] if eager else None),
        owner=owner,
        begins_forward=compiled.begins_forward,
        kinds=kinds_of(op_calls(plan.gm.graph)) if ours.kernel.self_check else (),
        budgets=budgets,
    )


def _budgets_of(model: torch.nn.Module | None, budgets: Budgets) -> BudgetsInForce:
    if model is None:
        raise ConfigError(
            f"budgets {budgets.source} must be of a torch.nn.Module, got code without one; compile the denoiser itself"
        )
    return BudgetsInForce(budgets, model)


def _lowering(options: Options, inductor_options: dict[str, Any]) -> Lower:
    def inductor(gm: GraphModule, inputs: list[Any]) -> Runner:
        # whoever calls, and whenever: a variant may wait for its first use, a segment of TensorRT's for its weights
        with named_after_ops():
            runner: Runner = compile_fx(gm, inputs, config_patches=inductor_options or None)
        return runner

    def eager(gm: GraphModule, inputs: list[Any]) -> Runner:
        return gm.forward

    if options.sparse.lowering == "tensorrt":
        return _tensorrt(options, inductor)
    return {"inductor": inductor, "eager": eager}[options.sparse.lowering]


def _tensorrt(options: Options, inductor: Lower) -> Lower:
    """Return the lowering with TensorRT, whose room is not entered by who does not ask for it."""
    from svg2_compile.tensorrt import engines
    from svg2_compile.tensorrt.engine_files import default_folder
    from svg2_compile.tensorrt.lowering import lower_with_tensorrt

    engines.require_tensorrt()
    folder = Path(options.kernel.engine_folder) if options.kernel.engine_folder else default_folder()

    def tensorrt(gm: GraphModule, inputs: list[Any]) -> Runner:
        return lower_with_tensorrt(gm, inputs, options.sparse.min_tokens, folder, inductor)

    return tensorrt


def _owner_of(gm: GraphModule, example_inputs: list[Any], compiled: Compiled) -> Owner:
    position, name = owner_position(gm, example_inputs, compiled) or (None, "")
    root = None if compiled.root is None else weakref.ref(compiled.root)
    return Owner(position, name, root, compiled.is_repeated, compiled.code)


def _fake_state(plan: Sparsified) -> list[torch.Tensor]:
    """Return stand-ins of the state tensors whose sizes are plain numbers, whatever else is dynamic."""
    with fake_mode_of_trace():
        devices = {site.index: site.device for site in plan.sites}
        return [each.create(devices[each.site]) for each in plan.state_specs]


def _announce(plan: Sparsified) -> None:
    for rejection in plan.rejections:
        level = logging.INFO if rejection.by_design else logging.WARNING
        log.log(level, "%s stays dense: %s; %s", rejection.path, rejection.reason, rejection.hint or "as it should")


svg2_backend.reset = reset  # type: ignore[attr-defined]  # torch._dynamo.reset() calls it
