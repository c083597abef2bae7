"""Real diffusers pipelines around tiny models with random weights, and a log of what the backend did in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conformance.cases import CASES
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CosmosTextToWorldPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    MochiPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from svg2_compile import region, svg2_backend

STEPS = 5
OPTIONS = {"top_p": 0.3, "dense_steps": 0.4, "dense_layers": 0, "min_tokens": 64, "lowering": "eager"}
MODELS = {case.id: case.make for case in CASES}

Entry = tuple[int, int, str, str]
"""Run, step, stream and variant of one call of a region."""


class Prompt:
    """Embeddings of a prompt and of a negative one, of which the mask shows the first rows."""

    def __init__(self, seed: int, valid: int = 8) -> None:
        random = torch.Generator().manual_seed(seed)
        self.embeds, self.negative = (torch.randn(1, 12, 16, generator=random) for _ in range(2))
        self.pooled = torch.randn(1, 8, generator=random)
        self.mask = (torch.arange(12) < valid).long()[None]

    def both(self) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": self.embeds, "negative_prompt_embeds": self.negative}

    def both_with_masks(self) -> dict[str, torch.Tensor]:
        masks = {"prompt_attention_mask": self.mask.bool(), "negative_prompt_attention_mask": self.mask.bool()}
        return self.both() | masks


PROMPT = Prompt(0)


def quiet(pipeline: DiffusionPipeline) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: Any, seed: int, **inputs: Any) -> torch.Tensor:
    """Return the latents that a pipeline generates."""
    settings = {"num_inference_steps": STEPS, "width": 128, "num_frames": 5, "output_type": "latent"} | inputs
    return pipeline(generator=torch.Generator().manual_seed(seed), **settings).frames


def wan_transformer(layers: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=256, ffn_dim=32, num_layers=layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()  # fmt: skip


def wan_pipeline(experts: int = 1, layers: int = 2) -> WanPipeline:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    second = {"transformer_2": wan_transformer(), "boundary_ratio": 0.8} if experts == 2 else {}
    transformer = wan_transformer(layers)
    return quiet(
        WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer, **second)
    )


def generate_wan(
    pipeline: WanPipeline, seed: int = 1, height: int = 128, prompt: Prompt = PROMPT, **more: Any
) -> torch.Tensor:
    return run(pipeline, seed, height=height, guidance_scale=4.0, **prompt.both(), **more)


def hunyuan_transformer() -> torch.nn.Module:
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=2,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    ).eval()  # fmt: skip


def hunyuan_pipeline() -> HunyuanVideoPipeline:
    transformer = hunyuan_transformer()
    return quiet(
        HunyuanVideoPipeline(
            text_encoder=None, tokenizer=None, transformer=transformer, vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=None, tokenizer_2=None,
        )
    )  # fmt: skip


def generate_hunyuan(
    pipeline: HunyuanVideoPipeline,
    seed: int = 1,
    height: int = 128,
    prompt: Prompt = PROMPT,
    true_cfg: bool = False,
    **more: Any,
) -> torch.Tensor:
    if true_cfg:
        more |= {
            "negative_prompt_embeds": prompt.negative, "negative_pooled_prompt_embeds": prompt.pooled,
            "negative_prompt_attention_mask": prompt.mask, "negative_prompt": "x", "true_cfg_scale": 4.0,
        }  # fmt: skip
    return run(
        pipeline, seed, height=height, prompt_embeds=prompt.embeds, pooled_prompt_embeds=prompt.pooled,
        prompt_attention_mask=prompt.mask, **more,
    )  # fmt: skip


def cogvideox_pipeline() -> CogVideoXPipeline:
    transformer = MODELS["CogVideoXTransformer3DModel"]()
    scheduler = CogVideoXDDIMScheduler()
    return quiet(
        CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    )


def generate_cogvideox(
    pipeline: CogVideoXPipeline, seed: int = 1, height: int = 128, prompt: Prompt = PROMPT, **more: Any
) -> torch.Tensor:
    return run(pipeline, seed, height=height, **prompt.both(), **more)


def ltx_pipeline() -> LTXPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    transformer = MODELS["LTXVideoTransformer3DModel"]()
    return quiet(LTXPipeline(scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=transformer))


def generate_ltx(
    pipeline: LTXPipeline, seed: int = 1, height: int = 128, prompt: Prompt = PROMPT, **more: Any
) -> torch.Tensor:
    """A latent of LTX is 32 pixels wide, and 8 frames long."""
    sizes = {"height": 2 * height, "width": 256, "num_frames": 9}
    return run(pipeline, seed, **sizes, guidance_scale=3.0, **prompt.both_with_masks(), **more)


def mochi_pipeline() -> MochiPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    transformer = MODELS["MochiTransformer3DModel"]()
    return quiet(
        MochiPipeline(scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=transformer)
    )


def generate_mochi(
    pipeline: MochiPipeline, seed: int = 1, height: int = 128, prompt: Prompt = PROMPT, **more: Any
) -> torch.Tensor:
    return run(pipeline, seed, height=height, num_frames=7, **prompt.both_with_masks(), **more)


class NoGuardrail:
    """Stands in for the package that judges prompts and videos; embeddings and latents are not judged."""

    def to(self, device: Any) -> None:
        """Be on a device."""


def cosmos_pipeline() -> CosmosTextToWorldPipeline:
    return quiet(
        CosmosTextToWorldPipeline(
            text_encoder=None, tokenizer=None, transformer=MODELS["CosmosTransformer3DModel"](), vae=None,
            scheduler=EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5),
            safety_checker=NoGuardrail(),
        )
    )  # fmt: skip


def generate_cosmos(
    pipeline: CosmosTextToWorldPipeline, seed: int = 1, height: int = 128, prompt: Prompt = PROMPT, **more: Any
) -> torch.Tensor:
    return run(pipeline, seed, height=height, num_frames=9, **prompt.both(), **more)


@dataclass(frozen=True, slots=True)
class PipelineCase:
    """A family of models and how its pipeline calls them."""

    name: str
    make: Callable[[], Any]
    generate: Callable[..., torch.Tensor]
    """Takes the pipeline, a seed, a height, a prompt."""

    streams: tuple[str, ...]
    """The calls of one step, by the name that the clock gives them."""
    runs_numpy: bool = False
    """Whether the model computes with NumPy, which torch traces."""


PIPELINES = (
    PipelineCase("Wan 2.1", wan_pipeline, generate_wan, ("cond", "uncond")),
    PipelineCase("Wan 2.2", lambda: wan_pipeline(experts=2), generate_wan, ("cond", "uncond")),
    PipelineCase("HunyuanVideo", hunyuan_pipeline, generate_hunyuan, ("cond",)),
    PipelineCase("CogVideoX", cogvideox_pipeline, generate_cogvideox, ("cond_uncond",)),
    PipelineCase("LTX", ltx_pipeline, generate_ltx, ("cond_uncond",)),
    PipelineCase("Mochi", mochi_pipeline, generate_mochi, ("cond_uncond",)),
    PipelineCase("Cosmos", cosmos_pipeline, generate_cosmos, ("0", "1"), runs_numpy=True),
)


def sparse(model: torch.nn.Module, regional: bool = False, fullgraph: bool = True, **options: Any) -> torch.nn.Module:
    """Compile a model, or its blocks, in place."""
    compile_it = model.compile_repeated_blocks if regional else model.compile
    compile_it(backend=svg2_backend, options=OPTIONS | options, fullgraph=fullgraph)
    return model


def compiled(case: PipelineCase) -> Any:
    """Return a pipeline whose models are compiled."""
    pipeline = case.make()
    for model in (pipeline.transformer, getattr(pipeline, "transformer_2", None)):
        if model is not None:
            sparse(model)
    return pipeline


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    """Return a list to which every call of a region adds an entry from now on."""
    entries: list[Entry] = []
    why_dense = region.schedule.why_dense

    def recording(config: Any, now: Any, layer: int | None) -> str:
        why = why_dense(config, now, layer)
        entries.append((now.run, now.step, now.stream, "dense" if why else "sparse"))
        return why

    monkeypatch.setattr(region.schedule, "why_dense", recording)
    return entries


def expected(runs: int, streams: tuple[str, ...], layers: int = 1) -> list[Entry]:
    """Return the log that the schedule asks for: two dense steps of five."""
    return [
        (run, step, stream, "dense" if step < 2 else "sparse")
        for run in range(runs)
        for step in range(STEPS)
        for stream in streams
        for _ in range(layers)
    ]


def numbered(log: list[Entry]) -> list[Entry]:
    """Return the log with runs counted from 0."""
    runs = list(dict.fromkeys(entry[0] for entry in log))
    return [(runs.index(run), *rest) for run, *rest in log]
