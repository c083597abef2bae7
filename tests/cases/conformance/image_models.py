"""Tiny configurations of the image models: 64 to 128 image tokens, a dozen text tokens, one or two layers."""

from __future__ import annotations

import torch
from conformance.examine import ModelCase, Noise
from conformance.video_models import text_mask, timestep

FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 12,
    "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4),
}  # fmt: skip
COGVIEW = {
    "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2,
    "out_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4,
}  # fmt: skip
SANA = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
    "caption_channels": 16, "sample_size": 16,
}  # fmt: skip
DIT = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "num_layers": 2, "sample_size": 16,
    "patch_size": 2,
}  # fmt: skip
JOY = {
    "patch_size": [1, 2, 2], "in_channels": 4, "hidden_size": 24, "num_attention_heads": 2, "text_dim": 16,
    "num_layers": 2, "rope_dim_list": [4, 4, 4],
}  # fmt: skip


def grid(size: int = 8, axes: int = 3) -> torch.Tensor:
    """Return the positions of image tokens: frame zero, then row and column."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    zeros = torch.zeros(size * size, axes - 2)
    return torch.cat([zeros, torch.stack([rows.flatten(), columns.flatten()], 1)], 1)


def flux(noise: Noise, axes: int = 3, **more):
    return {
        "hidden_states": noise(1, 64, 4),
        "encoder_hidden_states": noise(1, 12, 16),
        "timestep": timestep() / 1000,
        "img_ids": grid(axes=axes),
        "txt_ids": torch.zeros(12, axes),
        **more,
    }


def latents(noise: Noise, batch: int = 2, **more):
    """Latents of an image and a text, conditional and unconditional rows in one batch."""
    return {
        "hidden_states": noise(batch, 4, 16, 16),
        "encoder_hidden_states": noise(batch, 12, 16),
        "timestep": timestep(batch),
        **more,
    }


def cogview(noise: Noise, batch: int = 2):
    sizes = {name: torch.full((batch, 2), 16.0) for name in ("original_size", "target_size", "crop_coords")}
    return latents(noise, batch, **sizes)


def glm(noise: Noise):
    sizes = {name: torch.full((1, 2), 16.0) for name in ("target_size", "crop_coords")}
    return latents(
        noise, 1, **sizes, prior_token_id=torch.arange(64).unsqueeze(0), prior_token_drop=torch.tensor([False])
    )


def qwen(noise: Noise, **more):
    return {
        "hidden_states": noise(1, 64, 4),
        "encoder_hidden_states": noise(1, 12, 16),
        "encoder_hidden_states_mask": text_mask(),
        "timestep": timestep() / 1000,
        "img_shapes": [(1, 8, 8)],
        **more,
    }


def z_image(noise: Noise):
    return {"x": [noise(4, 1, 16, 16)], "t": timestep() / 1000, "cap_feats": [noise(12, 16)]}


def ernie(noise: Noise):
    return {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": timestep(2),
        "text_bth": noise(2, 12, 16),
        "text_lens": torch.tensor([7, 12]),
    }


def krea(noise: Noise):
    return {
        "hidden_states": noise(1, 64, 4),
        "encoder_hidden_states": noise(1, 12, 2, 16),
        "timestep": timestep() / 1000,
        "position_ids": torch.cat([torch.zeros(12, 3), grid()]),
        "encoder_attention_mask": text_mask(),
    }


def joy(noise: Noise):
    return {
        "hidden_states": noise(1, 4, 2, 16, 16),
        "timestep": timestep(),
        "encoder_hidden_states": noise(1, 12, 16),
    }


def joy_plus(noise: Noise):
    return {
        "hidden_states": noise(1, 128, 4, 1, 2, 2),
        "timestep": timestep(),
        "encoder_hidden_states": noise(1, 12, 16),
        "encoder_hidden_states_mask": text_mask().float(),
        "shape_list": [[(1, 8, 8), (1, 8, 8)]],
    }


def hidream(noise: Noise):
    return {
        "hidden_states": noise(2, 4, 16, 16),
        "timesteps": timestep(2),
        "encoder_hidden_states_t5": noise(2, 4, 16),
        "encoder_hidden_states_llama3": noise(2, 2, 4, 16),
        "pooled_embeds": noise(2, 8),
    }


def ideogram(noise: Noise):
    return {
        "hidden_states": noise(1, 76, 4),
        "timestep": timestep() / 1000,
        "encoder_hidden_states": noise(1, 76, 16),
        "position_ids": torch.cat([torch.zeros(12, 3), grid()]).long().unsqueeze(0),
        "segment_ids": torch.ones(1, 76, dtype=torch.long),
        "indicator": torch.tensor([3] * 12 + [2] * 64).unsqueeze(0),
    }


def omnigen(noise: Noise):
    return {
        "hidden_states": noise(1, 4, 16, 16),
        "timestep": timestep() / 1000,
        "input_ids": torch.arange(12).unsqueeze(0),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(1, 77, 77).tril() + torch.ones(1, 77, 77).triu() * (torch.arange(77) > 12),
        "position_ids": torch.arange(77).unsqueeze(0),
    }


def hunyuan_image(noise: Noise):
    return {
        "hidden_states": noise(1, 4, 8, 8),
        "timestep": timestep(),
        "encoder_hidden_states": noise(1, 12, 16),
        "encoder_attention_mask": text_mask(),
        "encoder_hidden_states_2": noise(1, 5, 8),
        "encoder_attention_mask_2": text_mask(1, 5, 3),
    }


def dit(noise: Noise):
    return {
        "hidden_states": noise(2, 4, 16, 16),
        "timestep": torch.tensor([5, 5]),
        "class_labels": torch.tensor([1, 3]),
    }


def pixart(noise: Noise):
    sizes = {"resolution": None, "aspect_ratio": None}
    return latents(noise, encoder_attention_mask=text_mask(2).long(), added_cond_kwargs=sizes)


def hunyuan_dit(noise: Noise):
    angles = torch.outer(torch.arange(64.0), torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat_interleave(3))
    return {
        "hidden_states": noise(2, 4, 16, 16),
        "timestep": timestep(2),
        "encoder_hidden_states": noise(2, 7, 16),
        "text_embedding_mask": text_mask(2, 7, 5),
        "encoder_hidden_states_t5": noise(2, 5, 16),
        "text_embedding_mask_t5": text_mask(2, 5, 3),
        "image_meta_size": torch.full((2, 6), 16.0),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def lumina_next(noise: Noise):
    angles = torch.rand(64, 64, 6, generator=noise.generator)
    return {
        "hidden_states": noise(2, 4, 16, 16),
        "timestep": timestep(2) / 1000,
        "encoder_hidden_states": noise(2, 12, 16),
        "encoder_mask": text_mask(2),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


# fmt: off
IMAGE_MODELS = (
    ModelCase("FluxTransformer2DModel", FLUX | {"pooled_projection_dim": 8},
              lambda noise: flux(noise, pooled_projections=noise(1, 8))),
    ModelCase("Flux2Transformer2DModel",
              FLUX | {"axes_dims_rope": (2, 2, 4, 4), "timestep_guidance_channels": 8, "guidance_embeds": True},
              lambda noise: flux(noise, 4, guidance=timestep() / 1000)),
    ModelCase("Flux3Transformer2DModel",
              {name: value for name, value in FLUX.items() if name != "patch_size"}
              | {"cond_in_channels": 4, "timestep_channels": 8, "axes_dims_rope": (2, 2, 4, 4)},
              lambda noise: flux(noise, 4)),
    ModelCase("ChromaTransformer2DModel",
              FLUX | {"approximator_num_channels": 8, "approximator_hidden_dim": 8, "approximator_layers": 1},
              flux),
    ModelCase("BriaTransformer2DModel", FLUX, flux),
    ModelCase("BriaFiboTransformer2DModel", FLUX | {"text_encoder_dim": 16},
              lambda noise: flux(noise, text_encoder_layers=[noise(1, 12, 16), noise(1, 12, 16)])),
    ModelCase("BriaFibo2Transformer2DModel",
              {"in_channels": 4, "patch_size": 2, "dim": 24, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
               "cap_feat_dim": 16, "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4,
               "max_num_gist_tokens": 8, "gist_step": 4, "gist_min_text_len": 4, "gist_max_text_len": 16,
               "axes_dims": (4, 4, 4), "axes_lens": (64, 32, 32)},
              lambda noise: latents(noise, 1) | {"encoder_hidden_states": noise(1, 2, 12, 16)}),
    ModelCase("LongCatImageTransformer2DModel", FLUX | {"pooled_projection_dim": 16}, flux),
    ModelCase("OvisImageTransformer2DModel", FLUX | {"out_channels": 4}, flux),
    ModelCase("SD3Transformer2DModel",
              {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 12,
               "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 24,
               "pooled_projection_dim": 8, "out_channels": 4, "pos_embed_max_size": 16, "qk_norm": "rms_norm",
               "dual_attention_layers": (0,)},
              lambda noise: latents(noise, pooled_projections=noise(2, 8))),
    ModelCase("QwenImageTransformer2DModel",
              {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 12,
               "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4)}, qwen),
    ModelCase("AuraFlowTransformer2DModel",
              {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1,
               "num_single_dit_layers": 1, "attention_head_dim": 12, "num_attention_heads": 2,
               "joint_attention_dim": 16, "caption_projection_dim": 24, "out_channels": 4, "pos_embed_max_size": 64},
              lambda noise: latents(noise) | {"timestep": timestep(2) / 1000}),
    ModelCase("CogView3PlusTransformer2DModel", COGVIEW | {"pos_embed_max_size": 16, "sample_size": 16}, cogview),
    ModelCase("CogView4Transformer2DModel", COGVIEW | {"sample_size": 16, "rope_axes_dim": (16, 16)},
              lambda noise: cogview(noise, 1)),
    ModelCase("GlmImageTransformer2DModel", COGVIEW | {"prior_vq_quantizer_codebook_size": 64}, glm),
    ModelCase("ZImageTransformer2DModel",
              {"in_channels": 4, "dim": 24, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
               "cap_feat_dim": 16, "axes_dims": [4, 4, 4], "axes_lens": [64, 32, 32]}, z_image),
    ModelCase("ErnieImageTransformer2DModel",
              {"hidden_size": 24, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32, "in_channels": 4,
               "out_channels": 4, "patch_size": 1, "text_in_dim": 16, "rope_axes_dim": (4, 4, 4)}, ernie),
    ModelCase("Krea2Transformer2DModel",
              {"in_channels": 4, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 4,
               "num_key_value_heads": 2, "intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": 16,
               "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
               "text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
               "axes_dims_rope": (4, 4, 4)}, krea),
    ModelCase("JoyImageEditTransformer3DModel", JOY, joy),
    ModelCase("JoyImageEditPlusTransformer3DModel", JOY, joy_plus),
    ModelCase("HiDreamImageTransformer2DModel",
              {"patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 12,
               "num_attention_heads": 2, "caption_channels": [16, 16], "text_emb_dim": 8, "num_routed_experts": 2,
               "num_activated_experts": 1, "axes_dims_rope": (4, 4, 4), "max_resolution": (16, 16),
               "llama_layers": [0, 1], "force_inference_output": True}, hidream,
              breaks="the number of tokens of each expert is read as a Python number"),
    ModelCase("HunyuanImageTransformer2DModel",
              {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12,
               "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": (1, 1),
               "text_embed_dim": 16, "text_embed_2_dim": 8, "rope_axes_dim": (6, 6)}, hunyuan_image,
              breaks="valid and padded text rows are picked by mask, of a length known only at run time"),
    ModelCase("Ideogram4Transformer2DModel",
              {"in_channels": 4, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2,
               "intermediate_size": 32, "adaln_dim": 8, "llm_features_dim": 16, "mrope_section": (2, 2, 2)}, ideogram,
              dense={"attn_mask is bool …, not a key mask": 2}, dense_by_block=0,
              note="segments of a packed sequence do not see each other; by block, one segment is sparse"),
    ModelCase("OmniGenTransformer2DModel",
              {"in_channels": 4, "patch_size": 2, "hidden_size": 24, "num_attention_heads": 2,
               "num_key_value_heads": 2, "intermediate_size": 32, "num_layers": 2, "pad_token_id": 0,
               "vocab_size": 32, "max_position_embeddings": 128, "original_max_position_embeddings": 64,
               "pos_embed_max_size": 16, "time_step_dim": 8,
               "rope_scaling": {"long_factor": [1.0] * 6, "short_factor": [1.0] * 6}}, omnigen,
              dense={"attn_mask is float32 …, not a key mask": 2},
              breaks="its rotary embedding branches on the largest position",
              note="text is causal, images are not"),
    ModelCase("Lumina2Transformer2DModel",
              {"sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
               "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8,
               "axes_dim_rope": (4, 4, 4), "axes_lens": (64, 32, 32), "cap_feat_dim": 16},
              lambda noise: latents(noise, encoder_attention_mask=text_mask(2)) | {"timestep": timestep(2) / 1000},
              breaks="the lengths of the prompts are read as Python numbers",
              note="the sequence is written by slices, so text and image are one kind of rows"),
    ModelCase("LuminaNextDiT2DModel",
              {"sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
               "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "cross_attention_dim": 16}, lumina_next),
    ModelCase("NucleusMoEImageTransformer2DModel",
              {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 12,
               "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4),
               "moe_enabled": False}, qwen,
              note="only the image rows ask; the text rows are keys"),
    ModelCase("PRXTransformer2DModel",
              {"in_channels": 4, "patch_size": 2, "context_in_dim": 16, "hidden_size": 24, "num_heads": 2, "depth": 2,
               "axes_dim": [6, 6]},
              lambda noise: latents(noise, attention_mask=text_mask(2)),
              note="only the image rows ask; the text rows are keys"),
    ModelCase("DiTTransformer2DModel", DIT | {"num_embeds_ada_norm": 8},
              dit),
    ModelCase("PixArtTransformer2DModel", DIT | {"out_channels": 4, "cross_attention_dim": 24, "caption_channels": 16},
              pixart),
    ModelCase("HunyuanDiT2DModel",
              DIT | {"hidden_size": 24, "cross_attention_dim": 16, "cross_attention_dim_t5": 16,
                     "pooled_projection_dim": 8, "text_len": 7, "text_len_t5": 5,
                     "activation_fn": "gelu-approximate"}, hunyuan_dit),
    ModelCase("SanaTransformer2DModel", SANA, lambda noise: latents(noise, encoder_attention_mask=text_mask(2).long()),
              note="its self-attention is linear: there is nothing to make sparse"),
    ModelCase("DreamLiteTransformer2DModel",
              {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 8, "cross_attention_dim": 16,
               "norm_num_groups": 4},
              lambda noise: latents(noise) | {"hidden_states": noise(2, 8, 16, 16)}),
    ModelCase("Transformer2DModel",
              {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 8, "cross_attention_dim": 16,
               "norm_num_groups": 4},
              lambda noise: latents(noise) | {"hidden_states": noise(2, 8, 16, 16)}),
)
# fmt: on
