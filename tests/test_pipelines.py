"""Real diffusers pipelines around tiny models: schedule, CFG branches, generations, several pipelines at once."""

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

import svg2_compile
from svg2_compile import svg2_backend
from svg2_compile.region import Region
from svg2_compile.state import store

STEPS = 5
OPTIONS = {"top_p": 0.3, "dense_steps": 0.4, "dense_layers": 0, "min_tokens": 64, "lowering": "eager"}
random = torch.Generator().manual_seed(0)
PROMPT, NEGATIVE = torch.randn(1, 12, 16, generator=random), torch.randn(1, 12, 16, generator=random)
POOLED = torch.randn(1, 8, generator=random)
MASK = torch.ones(1, 12)
MASK[:, 8:] = 0


def wan_transformer() -> torch.nn.Module:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()  # fmt: skip


def wan_pipeline(experts: int = 1) -> WanPipeline:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    second = {"transformer_2": wan_transformer(), "boundary_ratio": 0.8} if experts == 2 else {}
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=wan_transformer(), **second
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate_wan(pipeline: WanPipeline, seed: int = 1, height: int = 128, **extra) -> torch.Tensor:
    return pipeline(
        prompt_embeds=PROMPT, negative_prompt_embeds=NEGATIVE, height=height, width=128, num_frames=5,
        num_inference_steps=STEPS, guidance_scale=4.0, generator=torch.Generator().manual_seed(seed),
        output_type="latent", **extra,
    ).frames  # fmt: skip


def hunyuan_pipeline() -> HunyuanVideoPipeline:
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=2,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    ).eval()  # fmt: skip
    pipeline = HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=transformer, vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate_hunyuan(pipeline: HunyuanVideoPipeline, seed: int = 1, true_cfg: bool = False) -> torch.Tensor:
    negative = {
        "negative_prompt_embeds": NEGATIVE, "negative_pooled_prompt_embeds": POOLED,
        "negative_prompt_attention_mask": MASK, "negative_prompt": "x", "true_cfg_scale": 4.0,
    }  # fmt: skip
    return pipeline(
        prompt_embeds=PROMPT, pooled_prompt_embeds=POOLED, prompt_attention_mask=MASK, height=128, width=128,
        num_frames=5, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed), output_type="latent",
        **(negative if true_cfg else {}),
    ).frames  # fmt: skip


def sparse(model: torch.nn.Module, regional: bool = False, **options) -> torch.nn.Module:
    if regional:
        model.compile_repeated_blocks(backend=svg2_backend, options=OPTIONS | options, fullgraph=True)
    else:
        model.compile(backend=svg2_backend, options=OPTIONS | options, fullgraph=True)
    return model


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    svg2_compile.reset()


@pytest.fixture
def log(monkeypatch) -> list[tuple[int, int, str, str]]:
    """Return (run, step, stream, variant) of every call of a region, in order."""
    entries: list[tuple[int, int, str, str]] = []
    from svg2_compile import region

    decide = region.is_dense

    def recording(config, now, layer):
        dense = decide(config, now, layer)
        entries.append((now.run, now.step, now.stream, "dense" if dense else "sparse"))
        return dense

    monkeypatch.setattr(region, "is_dense", recording)
    return entries


def expected(runs: int, branches: tuple[str, ...], layers: int = 1) -> list[tuple[int, int, str, str]]:
    return [
        (run, step, branch, "dense" if step < 2 else "sparse")
        for run in range(runs)
        for step in range(STEPS)
        for branch in branches
        for _ in range(layers)
    ]


def numbered(log: list[tuple[int, int, str, str]]) -> list[tuple[int, int, str, str]]:
    runs = list(dict.fromkeys(entry[0] for entry in log))
    return [(runs.index(run), *rest) for run, *rest in log]


@pytest.mark.parametrize(("regional", "layers"), [(False, 1), (True, 2)], ids=["whole", "regional"])
def test_wan_follows_its_schedule_and_keeps_cond_and_uncond_apart(log, regional, layers):
    pipeline = wan_pipeline()
    sparse(pipeline.transformer, regional)
    first, second = generate_wan(pipeline, seed=1), generate_wan(pipeline, seed=2)
    assert numbered(log) == expected(2, ("cond", "uncond"), layers)
    assert not torch.equal(first, second)


def test_two_experts_share_one_graph_and_one_count_of_steps_but_no_state(log):
    pipeline = wan_pipeline(experts=2)
    sparse(pipeline.transformer)
    sparse(pipeline.transformer_2)
    generate_wan(pipeline)
    assert numbered(log) == expected(1, ("cond", "uncond"))
    assert svg2_compile.report(pipeline.transformer).sparse_sites[0].dense_calls > 0
    assert svg2_compile.report(pipeline.transformer_2).sparse_sites[0].sparse_calls > 0
    assert len([region for region in Region.instances if region.owners()]) == 1 and len(store.owners()) >= 1


@pytest.mark.parametrize(("true_cfg", "branches"), [(False, 1), (True, 2)])
def test_hunyuan_with_one_or_two_calls_a_step(log, true_cfg, branches):
    pipeline = hunyuan_pipeline()
    sparse(pipeline.transformer)
    generate_hunyuan(pipeline, true_cfg=true_cfg)
    seen = numbered(log)
    assert [entry[1] for entry in seen] == [step for step in range(STEPS) for _ in range(branches)]
    assert len({entry[2] for entry in seen}) == branches


def test_full_selection_through_the_whole_wan_pipeline_equals_dense():
    pipeline = wan_pipeline()
    dense = generate_wan(pipeline)
    sparse(pipeline.transformer, top_p=1.0, lowering="inductor")
    difference = (generate_wan(pipeline) - dense).abs().max()
    assert difference <= 2e-5 * dense.abs().max()  # fp32 rounding, carried through five steps of guidance


def test_full_selection_through_the_whole_hunyuan_pipeline_equals_dense():
    pipeline = hunyuan_pipeline()
    dense = generate_hunyuan(pipeline)
    sparse(pipeline.transformer, top_p=1.0, lowering="inductor")
    difference = (generate_hunyuan(pipeline) - dense).abs().max()
    assert difference <= 2e-5 * dense.abs().max()


def test_every_generation_is_the_same_whatever_came_before():
    pipeline = wan_pipeline()
    sparse(pipeline.transformer)
    first = generate_wan(pipeline)
    generate_wan(pipeline, seed=9)
    assert torch.equal(generate_wan(pipeline), first)
    generate_wan(pipeline, seed=3, height=192)
    assert torch.equal(generate_wan(pipeline), first)
    svg2_compile.reset()
    assert torch.equal(generate_wan(pipeline), first)


def test_an_interrupted_generation_leaves_nothing_behind():
    pipeline = wan_pipeline()
    sparse(pipeline.transformer)
    whole = generate_wan(pipeline)

    def stop(pipe, step, timestep, tensors):
        if step == 3:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        generate_wan(pipeline, seed=5, callback_on_step_end=stop)
    assert torch.equal(generate_wan(pipeline), whole)


def test_two_pipelines_interleaved_do_not_disturb_each_other():
    """The second pipeline generates a whole video inside each step of the first."""
    outer, inner = wan_pipeline(), wan_pipeline()
    sparse(outer.transformer)
    sparse(inner.transformer)
    alone = generate_wan(outer)
    inner_alone = generate_wan(inner, seed=7)
    seen = []

    def generate_inner(pipe, step, timestep, tensors):
        seen.append(torch.equal(generate_wan(inner, seed=7), inner_alone))
        return tensors

    assert torch.equal(generate_wan(outer, callback_on_step_end=generate_inner), alone)
    assert seen == [True] * STEPS


def test_pipelines_that_share_a_transformer_do_not_share_centroids():
    outer = wan_pipeline()
    sparse(outer.transformer)
    inner = WanPipeline.from_pipe(outer)
    inner.set_progress_bar_config(disable=True)
    inner.scheduler = UniPCMultistepScheduler.from_config(outer.scheduler.config)
    alone = generate_wan(outer)

    def generate_inner(pipe, step, timestep, tensors):
        generate_wan(inner, seed=7)
        return tensors

    assert torch.equal(generate_wan(outer, callback_on_step_end=generate_inner), alone)
