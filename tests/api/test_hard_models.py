"""Models whose attention is not plain: masks that follow the prompt, unknown lengths, attentions side by side."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from conformance.cases import CASES
from conformance.examine import OPTIONS, Noise, output_of
from conformance.video_models import text_mask
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import svg2_compile
from svg2_compile import svg2_backend
from svg2_compile.region import Region
from svg2_compile.reporting import Report
from svg2_compile.state import store

pytestmark = pytest.mark.usefixtures("no_grad_and_a_fresh_start")

FULL, SPARSE = {**OPTIONS, "top_p": 1.0}, {**OPTIONS, "top_p": 0.3}
CASE = {case.id: case for case in CASES}


def compiled_pair(name: str, options: dict[str, Any], fullgraph: bool = True) -> tuple[torch.nn.Module, Any]:
    """Return a model that stays eager and the same model compiled."""
    model = CASE[name].make()
    return CASE[name].make(), torch.compile(model, backend=svg2_backend, options=options, fullgraph=fullgraph)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def assert_close_to_rounding(output: torch.Tensor, reference: torch.Tensor) -> None:
    """Two fp32 evaluations of one or two layers, which add the same numbers in another order, at each layer."""
    assert (output - reference).abs().max() <= 32 * torch.finfo(torch.float32).eps * reference.abs().max()


def calls(report: Report) -> dict[str, tuple[int, int]]:
    return {site.path: (site.dense_calls, site.sparse_calls) for site in report.sparse_sites}


def streams() -> dict[str, list[dict[str, torch.Tensor]]]:
    """Return the state of every site by CFG branch."""
    found: dict[str, list[dict[str, torch.Tensor]]] = {}
    for region in Region.instances:
        for owner in region.owners():
            for site in region.plan.sites:
                for stream, states in store.states_of(owner, site).items():
                    found.setdefault(stream, []).extend(state.tensors for state in states)
    return found


@pytest.mark.parametrize("name", ["HunyuanVideoTransformer3DModel", "MotifVideoTransformer3DModel"])
def test_a_mask_that_follows_the_prompt_needs_one_compilation(name):
    eager, compiled = compiled_pair(name, FULL)
    for valid in (7, 11, 1, 12):
        inputs = CASE[name].inputs() | {"encoder_attention_mask": text_mask(valid=valid)}
        assert_close_to_rounding(output_of(compiled, inputs), output_of(eager, inputs))
    assert graphs() == 1


@pytest.mark.parametrize("name", ["HunyuanVideoTransformer3DModel", "QwenImageTransformer2DModel"])
def test_padding_of_the_prompt_cannot_influence_a_sparse_output(name):
    _, compiled = compiled_pair(name, SPARSE)
    inputs = CASE[name].inputs()
    before = output_of(compiled, inputs)
    svg2_compile.reset()
    inputs["encoder_hidden_states"][:, 7:] = 100 * Noise()(1, 5, 16)
    assert_close_to_rounding(output_of(compiled, inputs), before)


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "blocks"])
def test_padding_of_the_smaller_image_of_a_batch_is_hidden_from_the_sparse_attention(regional):
    """JoyImage edits images of different sizes in one batch; its mask hides image rows, beside those of the prompt."""
    case = CASE["JoyImageEditPlusTransformer3DModel"]
    inputs = case.inputs() | {"timestep": torch.tensor([500.0, 500.0])}
    for name in ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask"):
        inputs[name] = inputs[name].repeat(2, *[1] * (inputs[name].dim() - 1))
    inputs["shape_list"] = [[(1, 8, 8), (1, 8, 8)], [(1, 8, 8), (1, 4, 8)]]
    model = case.make()
    (model.compile_repeated_blocks if regional else model.compile)(backend=svg2_backend, options=FULL)
    assert_close_to_rounding(output_of(model, inputs), output_of(case.make(), inputs))
    assert len(svg2_compile.report(model).sparse_sites) == 2
    without_mask = inputs | {"encoder_hidden_states_mask": None}
    assert not torch.allclose(output_of(case.make(), without_mask), output_of(case.make(), inputs), atol=1e-3)


@pytest.mark.parametrize("image", [True, False], ids=["image to video", "text to video"])
def test_hunyuan_video_15_is_sparse_on_schedule_across_its_graph_breaks(image):
    name = "HunyuanVideo15Transformer3DModel"
    eager, compiled = compiled_pair(name, FULL | {"dense_steps": 1}, fullgraph=False)
    for step, timestep in enumerate((900.0, 800.0, 700.0)):
        inputs = CASE[name].inputs() | {"timestep": torch.tensor([timestep])}
        inputs["image_embeds"] *= image
        inputs["encoder_attention_mask"] = text_mask(valid=7 + step)
        assert_close_to_rounding(output_of(compiled, inputs), output_of(eager, inputs))
    assert calls(svg2_compile.report(compiled)) == {"transformer_blocks.0.attn": (1, 2)}


def test_mochi_serves_prompts_of_any_length_with_one_compilation():
    """Each sample of the batch has its own attention, over as many text rows as its prompt has."""
    name = "MochiTransformer3DModel"
    eager, compiled = compiled_pair(name, FULL)
    for lengths in ((7, 7), (3, 12), (9, 5)):
        mask = torch.cat([text_mask(valid=valid) for valid in lengths])
        inputs = CASE[name].inputs() | {"encoder_attention_mask": mask}
        assert_close_to_rounding(output_of(compiled, inputs), output_of(eager, inputs))
    assert graphs() == 1
    assert len(svg2_compile.report(compiled).sparse_sites) == 4


def test_a_timestep_per_token_counts_steps_by_the_noisiest_token():
    """In Wan 2.2 image to video, the tokens of the first frame stay at noise level zero."""
    name = "WanTransformer3DModel (a timestep per token)"
    eager, compiled = compiled_pair(name, FULL | {"dense_steps": 2})
    for timestep in (900.0, 800.0, 700.0, 600.0):
        per_token = torch.full((1, 128), timestep)
        per_token[:, :64] = 0
        inputs = CASE[name].inputs() | {"timestep": per_token}
        assert_close_to_rounding(output_of(compiled, inputs), output_of(eager, inputs))
    assert set(calls(svg2_compile.report(compiled)).values()) == {(2, 2)}


def test_ltx2_is_sparse_in_video_and_long_sound_side_by_side():
    """Sound as long as video: equal lengths do not make the attention between the two a self-attention."""
    name = "LTX2VideoTransformer3DModel"
    eager, compiled = compiled_pair(name, FULL)
    inputs = CASE[name].inputs() | {"audio_hidden_states": Noise()(2, 128, 4), "audio_num_frames": 128}
    assert_close_to_rounding(output_of(compiled, inputs), output_of(eager, inputs))
    report = svg2_compile.report(compiled)
    assert set(calls(report)) == {"transformer_blocks.0.attn1", "transformer_blocks.0.audio_attn1"}
    reasons = {site.path.rsplit(".", 1)[1]: site.plan.split(":")[0] for site in report.sites if not site.sparse}
    crossing = ("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
    assert reasons == dict.fromkeys(crossing, "cross-attention")
    video, sound = streams()["0"]
    assert not torch.equal(video["q_centroids"], sound["q_centroids"])


@pytest.mark.parametrize("name", ["CogVideoXTransformer3DModel", "LTXVideoTransformer3DModel"])
def test_guidance_in_one_batch_keeps_its_rows_apart(name):
    """The unconditional row has the same output and centroids whatever the prompt of the conditional one."""
    _, compiled = compiled_pair(name, SPARSE)
    kept = []
    for scale in (1.0, 5.0):
        svg2_compile.reset()
        inputs = CASE[name].inputs()
        inputs["encoder_hidden_states"][1] *= scale
        first, second = output_of(compiled, inputs).chunk(2)
        assert set(streams()) == {"0"}
        centroids = streams()["0"][0]["k_centroids"]
        assert centroids.shape[0] == 2 and not torch.equal(centroids[0], centroids[1])
        kept.append((first, second, centroids[0].clone()))
    (first, second, centroids), (first_again, second_again, centroids_again) = kept
    assert_close_to_rounding(first_again, first)
    assert_close_to_rounding(centroids_again, centroids)
    assert (second - second_again).abs().max() > 1e-3 * second.abs().max()


def test_prompts_of_different_lengths_take_turns_each_with_its_own_state():
    """QwenImage calls the model for the prompt and the negative prompt, which are not as long."""
    name = "QwenImageTransformer2DModel"
    eager, compiled = compiled_pair(name, FULL)
    for timestep in (0.9, 0.8, 0.7):
        for branch, length in (("cond", 12), ("uncond", 5)):
            inputs = CASE[name].inputs() | {
                "timestep": torch.tensor([timestep]),
                "encoder_hidden_states": Noise()(1, length, 16),
                "encoder_hidden_states_mask": text_mask(1, length, length - 2),
            }
            with compiled.cache_context(branch):
                assert_close_to_rounding(output_of(compiled, inputs), output_of(eager, inputs))
    assert graphs() == 2
    assert set(calls(svg2_compile.report(compiled)).values()) == {(0, 6)}
    assert {stream: {int(site["q_calls"]) for site in sites} for stream, sites in streams().items()} == {
        "cond": {3},
        "uncond": {3},
    }


def test_branches_without_names_are_told_apart_by_their_order():
    """Cosmos calls the model twice a step and does not say for what."""
    name = "CosmosTransformer3DModel"
    _, compiled = compiled_pair(name, SPARSE)
    for timestep in (0.9, 0.8):
        for seed in (1.0, -1.0):
            inputs = CASE[name].inputs() | {"timestep": torch.tensor([timestep])}
            inputs["encoder_hidden_states"] *= seed
            output_of(compiled, inputs)
    assert {stream: [int(site["q_calls"]) for site in sites] for stream, sites in streams().items()} == {
        "0": [2, 2],
        "1": [2, 2],
    }


def test_grouped_key_heads_are_clustered_once_for_their_queries():
    _, compiled = compiled_pair("Cosmos3OmniTransformer", SPARSE)
    output_of(compiled, CASE["Cosmos3OmniTransformer"].inputs())
    for site in streams()["0"]:
        assert (site["q_centroids"].shape[1], site["k_centroids"].shape[1]) == (2, 1)


def test_framepack_generates_section_after_section_across_its_graph_breaks():
    """Every section has its own frame positions, prompt length and run; all of its blocks are sparse."""
    name = "HunyuanVideoFramepackTransformer3DModel (with graph breaks)"
    eager, compiled = compiled_pair(name, FULL, fullgraph=False)
    for section, valid in enumerate((7, 11)):
        for timestep in (900.0, 800.0):
            inputs = CASE[name].inputs() | {"encoder_attention_mask": text_mask(valid=valid)}
            inputs |= {"timestep": torch.tensor([timestep]), "indices_latents": torch.arange(2) + 2 * section}
            assert_close_to_rounding(output_of(compiled, inputs), output_of(eager, inputs))
    assert calls(svg2_compile.report(compiled)) == {
        "transformer_blocks.0.attn": (0, 4),
        "single_transformer_blocks.0.attn": (0, 4),
    }


def test_rows_packed_by_index_are_attended_to_wherever_they_lie():
    """MiniMax-H3 writes text, video and sound into one sequence: their places are data, known at run time only."""
    name = "MiniMaxH3Transformer3DModel"
    eager, compiled = compiled_pair(name, FULL)
    places = torch.arange(146)
    for order in (places, places.flip(0)):
        inputs = CASE[name].inputs() | {
            "text_indices": order[:12],
            "video_indices": order[12:140],
            "audio_indices": order[140:],
        }
        assert_close_to_rounding(output_of(compiled, inputs), output_of(eager, inputs))
    assert graphs() == 1
    assert len(svg2_compile.report(compiled).sparse_sites) == 2


def test_a_model_that_runs_flex_attention_is_reported_with_the_way_out():
    case = CASE["WanTransformer3DModel"]
    model = case.make()
    model.set_attention_backend("flex")
    compiled = torch.compile(model, backend=svg2_backend, options=SPARSE)
    output_of(compiled, case.inputs())
    text = str(svg2_compile.report(compiled))
    assert "runs flex_attention, not SDPA" in text and 'model.set_attention_backend("native")' in text
    model.set_attention_backend("native")
    torch._dynamo.reset()
    output_of(compiled, case.inputs())
    assert len(svg2_compile.report(compiled).sparse_sites) == 2


KERNEL = """
import torch

torch.library.define("{namespace}::fwd", "(Tensor q, Tensor k, Tensor v) -> Tensor")

@torch.library.impl("{namespace}::fwd", "cpu")
def forward(q, k, v):
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()

torch.library.register_fake("{namespace}::fwd", lambda q, k, v: q.new_empty(q.shape))

{decorator}
def {function}(q, k, v, **options):
    return torch.ops.{namespace}.fwd(q, k, v)

class flash_attn_interface:
    _flash_attn_forward = _flash_attn_backward = None
"""


@pytest.mark.parametrize("is_operator", [True, False], ids=["operator", "opaque"])
@pytest.mark.parametrize(
    ("backend", "repository", "function"),
    [
        ("flash_hub", "kernels-community/flash-attn2", "flash_attn_func"),
        ("sage_hub", "SageAttention/sage-attention", "sageattn"),
    ],
)
def test_a_hub_kernel_as_attention_backend_is_reported_with_the_way_out(
    backend, repository, function, is_operator, tmp_path, monkeypatch
):
    """A repository of our own stands in for the Hub's, by the variable that the package ``kernels`` has for that."""
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    pytest.importorskip("kernels")
    name = repository.split("/")[1]
    namespace = f"_{name.replace('-', '_')}_{'operator' if is_operator else 'opaque'}"
    variant = tmp_path / "build" / "torch-cpu"
    variant.mkdir(parents=True)
    facts = {"id": namespace, "name": name, "version": 3, "license": "Apache-2.0", "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps(facts | {"backend": {"type": "cpu"}}))
    decorator = "" if is_operator else "@torch.compiler.disable"
    (variant / "__init__.py").write_text(KERNEL.format(namespace=namespace, decorator=decorator, function=function))
    monkeypatch.setenv("LOCAL_KERNELS", f"{repository}={tmp_path}")
    monkeypatch.setattr(dispatch, "HF_HUB_OFFLINE", True)
    key = dispatch.AttentionBackendName(backend)
    monkeypatch.setitem(dispatch._HUB_KERNELS_REGISTRY, key, dataclasses.replace(dispatch._HUB_KERNELS_REGISTRY[key]))

    case = CASE["WanTransformer3DModel"]
    model = case.make()
    expected = output_of(model, case.inputs())
    model.set_attention_backend(backend)
    try:
        for on_unsupported in ("dense", "error"):
            torch._dynamo.reset()
            options = SPARSE | {"on_unsupported": on_unsupported}
            compiled = torch.compile(model, backend=svg2_backend, options=options, fullgraph=is_operator)
            if on_unsupported == "error":
                with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="set_attention_backend"):
                    output_of(compiled, case.inputs())
            else:
                assert_close_to_rounding(output_of(compiled, case.inputs()), expected)
                report = svg2_compile.report(compiled)
                wanted = f"runs {namespace}::fwd, not" if is_operator else f"the attention backend '{backend}' is not"
                assert report.sites and all(site.plan.startswith(wanted) for site in report.sites)
                assert all('model.set_attention_backend("native")' in site.hint for site in report.sites)
    finally:
        model.set_attention_backend("native")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=svg2_backend, options=SPARSE, fullgraph=True)
    output_of(compiled, case.inputs())
    assert len(svg2_compile.report(compiled).sparse_sites) == 2


class InAnOldContext(nn.Module):
    """Asks for kernels in the way of older scripts, directly or through a helper."""

    def __init__(self, context):
        super().__init__()
        self.qkv, self.context = nn.Linear(16, 48), context

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 16)).permute(2, 0, 3, 1, 4)
        with self.context():
            return x + torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def old_context():
    return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_math=True, enable_mem_efficient=False)


@pytest.mark.filterwarnings("ignore:.*sdp_kernel.*:FutureWarning")
@pytest.mark.parametrize("way", ["whole", "blocks"])
def test_attention_in_a_context_that_ends_the_graph_is_told_or_refused(way):
    options = {"min_tokens": 64, "dense_steps": 0, "dense_layers": 0, "lowering": "eager"}
    for on_unsupported in ("dense", "error"):
        torch._dynamo.reset()
        model = nn.Sequential(*(InAnOldContext(old_context) for _ in range(2))).eval()
        for part in (model,) if way == "whole" else model:
            part.compile(backend="svg2", options=options | {"on_unsupported": on_unsupported})
        x = torch.randn(1, 128, 16)
        with torch.no_grad():
            if on_unsupported == "error":
                with pytest.raises(
                    BackendCompilerFailed, match=r"InAnOldContext stays dense.*nn\.attention\.sdpa_kernel"
                ):
                    model(x)
                continue
            model(x)
        report = svg2_compile.report(model)
        assert report.sites and not report.sparse_sites
        assert all("torch.backends.cuda.sdp_kernel is around it" in site.plan for site in report.sites)
        assert "hint: " in str(report)
