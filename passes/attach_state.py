"""Give the graph the tensors that its sparse attentions carry from one denoising step to the next.

    graph(q, k, v)   →   graph(q, k, v, svg2_0_q_centroids, svg2_0_q_calls, ...)      attach_inputs, for torch.compile
    graph(q, k, v)   →   the same, with gm.svg2_0_q_centroids, ... as buffers         attach_buffers, for torch.export

As inputs, the caller chooses the set of tensors per call (per CFG stream, per layer) and compilation caches keep
hitting; as buffers, the set belongs to the graph.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from svg2_compile.passes.dynamo_graphs import FakeTensorMode, mark_sourceless, mark_static_input
from svg2_compile.passes.nodes import set_value
from svg2_compile.passes.plan import SitePlan
from svg2_compile.passes.records import StateSpec

StateNodes = dict[tuple[int, str], Node]


def state_name(spec: StateSpec) -> str:
    """Return the graph's name for one state tensor."""
    return f"svg2_{spec.site}_{spec.name}"


def attach_inputs(gm: GraphModule, sites: Iterable[SitePlan], fake_mode: FakeTensorMode) -> StateNodes:
    """Append one placeholder per state tensor after the last input of ``gm``, which must be ours to change."""
    nodes: StateNodes = {}
    # nested inputs and outputs of an exported module have no room for more inputs: both become flat
    gm.graph.set_codegen(CodeGen())
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    last = placeholders[-1]
    for site in sites:
        for spec in site.state_specs:
            with gm.graph.inserting_after(last):
                last = gm.graph.placeholder(state_name(spec))
            mark_sourceless(last)
            mark_static_input(last)
            set_value(last, _fake(spec, site.device, fake_mode))
            nodes[site.index, spec.name] = last
    return nodes


def attach_buffers(gm: GraphModule, sites: Iterable[SitePlan], fake_mode: FakeTensorMode) -> StateNodes:
    """Register one buffer per state tensor on ``gm`` and read it where the graph begins to compute."""
    nodes: StateNodes = {}
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    for site in sites:
        for spec in site.state_specs:
            gm.register_buffer(state_name(spec), spec.create(site.device))
            with gm.graph.inserting_before(first):
                node = gm.graph.get_attr(state_name(spec))
            set_value(node, _fake(spec, site.device, fake_mode))
            nodes[site.index, spec.name] = node
    return nodes


def _fake(spec: StateSpec, device: torch.device, fake_mode: FakeTensorMode) -> torch.Tensor:
    with fake_mode:
        return spec.create(device)
