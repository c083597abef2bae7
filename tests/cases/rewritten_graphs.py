"""Models with attentions of every form, their traced graphs, and what is asked of a graph that was rewritten."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.nodes import target_name
from svg2_compile.passes.sparsify import Sparsified, sparsify

BATCH, HEADS, CHANNELS, TEXT, VIDEO = 2, 2, 8, 9, 55


WIDTH = HEADS * CHANNELS


DENSE = SparseConfig(top_p=1, min_tokens=40, dense_layers=0, q_clusters=3, k_clusters=5)


SPARSE = SparseConfig(top_p=0.3, min_keep_ratio=0, min_tokens=40, dense_layers=0, q_clusters=3, k_clusters=5)


ROUNDINGS_PER_SITE = 8
"""Rounding steps of the largest output that one site may add. Both graphs round the same exact attention, in another
order of summation; a site's error enters the residual stream once and passes a few matrix products on its way out."""


attend = F.scaled_dot_product_attention


def assert_equal_within_rounding(actual: Tensor, expected: Tensor, sites: int) -> None:
    step = torch.finfo(expected.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDINGS_PER_SITE * sites * step)


class Joint(nn.Module):
    """A block with text and video in one sequence; the order, a mask, and grouped key heads as asked."""

    def __init__(
        self, order: str = "text first", key_heads: int = HEADS, scale: float | None = None, layers: int = 2
    ) -> None:
        super().__init__()
        self.order, self.key_heads, self.scale = order, key_heads, scale
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH + 2 * key_heads * CHANNELS) for _ in range(layers)])

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, CHANNELS)).transpose(1, 2)

    def forward(self, text: Tensor, video: Tensor, mask: Tensor | None = None) -> Tensor:
        pieces = {"text first": (text, video), "video first": (video, text), "both ends": (text, video, 2 * text)}
        x = torch.cat(pieces[self.order], dim=1) if self.order in pieces else video
        for block in self.blocks:
            q, k, v = block(x).split([WIDTH, self.key_heads * CHANNELS, self.key_heads * CHANNELS], dim=-1)
            if self.order == "video asks":
                _, text_k, text_v = block(text).split([WIDTH, k.shape[-1], v.shape[-1]], dim=-1)
                k, v = torch.cat((text_k, k), dim=1), torch.cat((text_v, v), dim=1)
            out = attend(
                query=self.heads(q),
                key=self.heads(k),
                value=self.heads(v),
                attn_mask=mask,
                scale=self.scale,
                enable_gqa=self.key_heads != HEADS,
            )
            x = x + out.transpose(1, 2).flatten(2, 3)
        return x


def joint_inputs(text: int = TEXT, video: int = VIDEO, batch: int = BATCH) -> tuple[Tensor, ...]:
    return torch.randn(batch, text, WIDTH), torch.randn(batch, video, WIDTH)


def key_mask(hidden: slice, keys: int = TEXT + VIDEO, batch: int = BATCH) -> Tensor:
    mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    mask[-1, ..., hidden] = False
    return mask


def wan() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=8,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 3, 10, 14),
        "timestep": torch.tensor([1, 2]),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
    }
    return model, inputs


def hunyuan_video() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 3, 5, 7),
        "timestep": torch.tensor([1, 2]),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
        "encoder_attention_mask": (torch.arange(TEXT) < torch.tensor([[6], [8]])).float(),
        "pooled_projections": torch.randn(BATCH, 8),
        "guidance": torch.tensor([1000.0, 1000.0]),
    }
    return model, inputs


def cogvideox() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 3, 4, 8, 8),
        "timestep": torch.tensor([1, 2]),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 8),
    }
    return model, inputs


@dataclass(frozen=True, slots=True)
class Case:
    """What is traced, and what must come out of it."""

    build: Callable[[], tuple[nn.Module, dict[str, Any]]]
    sites: int
    context: int
    hides: bool = False
    """A mask from outside may hide video keys."""


def joint(mask: Tensor | None = None, **options: Any) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    def build() -> tuple[nn.Module, dict[str, Any]]:
        text, video = joint_inputs()
        return Joint(**options), {"text": text, "video": video} | ({} if mask is None else {"mask": mask})

    return build


CASES = {
    "text first": Case(joint(), sites=2, context=1),
    "video first": Case(joint(order="video first"), sites=2, context=1),
    "both ends": Case(joint(order="both ends"), sites=2, context=2),
    "video only": Case(joint(order="video only"), sites=2, context=0),
    "video asks": Case(joint(order="video asks"), sites=2, context=0),
    "masked video asks": Case(joint(key_mask(slice(2, 5)), order="video asks"), sites=2, context=0, hides=True),
    "grouped heads": Case(joint(key_heads=1), sites=2, context=1),
    "own scale": Case(joint(scale=0.9), sites=2, context=1),
    "masked text first": Case(joint(key_mask(slice(4, 9))), sites=2, context=1, hides=True),
    "masked text last": Case(joint(key_mask(slice(-4, None)), order="video first"), sites=2, context=1, hides=True),
    "masked grouped heads": Case(joint(key_mask(slice(0, 3)), key_heads=1), sites=2, context=1, hides=True),
    "one mask for the batch": Case(joint(key_mask(slice(0, 3), batch=1)), sites=2, context=1, hides=True),
    "masked both ends": Case(
        joint(key_mask(slice(-3, None), keys=2 * TEXT + VIDEO), order="both ends"), sites=2, context=2, hides=True
    ),
    "Wan": Case(wan, sites=2, context=0),
    "HunyuanVideo": Case(hunyuan_video, sites=2, context=1),
    "CogVideoX": Case(cogvideox, sites=2, context=1),
}


every_case = pytest.mark.parametrize("name", CASES)


@functools.cache
def traced(name: str) -> tuple[GraphModule, list[Any], Tensor]:
    """Return the graph Dynamo traces, its inputs, and its output."""
    torch.manual_seed(0)
    model, inputs = CASES[name].build()
    return trace(model.eval(), inputs)


def trace(model: nn.Module, inputs: dict[str, Any]) -> tuple[GraphModule, list[Any], Tensor]:
    graphs: list[tuple[GraphModule, list[Any], Any]] = []

    def backend(gm: GraphModule, _: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            outputs = gm(*args)
            graphs.append((gm, list(args), outputs[0]))
            return outputs

        return run

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    (result,) = graphs
    return result


def zeros(plan: Sparsified) -> list[Tensor]:
    return [torch.zeros(spec.shape, dtype=spec.dtype) for spec in plan.state_specs]


def run(plan: Sparsified, inputs: list[Any], state: list[Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return plan.gm(*inputs, *(zeros(plan) if state is None else state))[0]


def ops(gm: GraphModule) -> Counter[str]:
    return Counter(target_name(node) for node in gm.graph.nodes if node.op == "call_function")


class SparseBackend:
    """A backend that runs what ``sparsify`` gives, each graph with state of its own."""

    def __init__(self, config: SparseConfig, compiler: Callable[..., Any] | None = None) -> None:
        self.config, self.compiler = config, compiler
        self.plans: list[Sparsified] = []
        self.guards: list[Any] = []

    def __call__(self, gm: GraphModule, _: list[Any]) -> Callable[..., Any]:
        shape_env = torch._guards.TracingContext.get().fake_mode.shape_env
        guards = len(shape_env.guards)
        plan = sparsify(gm, self.config)
        self.guards += [guard.expr for guard in shape_env.guards[guards:]]
        self.plans.append(plan)
        return lambda *args: plan.gm(*args, *zeros(plan))
