"""Tiny configurations of the video models: 128 video tokens, a dozen text tokens, one or two layers."""

from __future__ import annotations

import torch
from conformance.examine import TIMESTEP, ModelCase, Noise

WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}  # fmt: skip
WAN_IMAGE = {"image_dim": 16, "added_kv_proj_dim": 24}
COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 16, "num_layers": 2, "sample_width": 16, "sample_height": 16, "sample_frames": 5,
    "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 12,
}  # fmt: skip
HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
    "num_refiner_layers": 1, "text_embed_dim": 16, "rope_axes_dim": (4, 4, 4),
}  # fmt: skip
HUNYUAN_PATCH = {"num_single_layers": 1, "patch_size": 2, "patch_size_t": 1, "pooled_projection_dim": 8}
LTX = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
    "cross_attention_dim": 24, "caption_channels": 16,
}  # fmt: skip
LTX2_AUDIO = {
    "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 12,
    "audio_cross_attention_dim": 24,
}  # fmt: skip
KANDINSKY = {
    "in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4,
    "patch_size": (1, 2, 2), "model_dim": 24, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
}  # fmt: skip
MOCHI = {
    "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "in_channels": 4,
    "pooled_projection_dim": 8, "text_embed_dim": 16, "time_embed_dim": 8, "max_sequence_length": 12,
}  # fmt: skip
FRAMEPACK = HUNYUAN | HUNYUAN_PATCH | {
    "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True,
}  # fmt: skip


def timestep(batch: int = 1) -> torch.Tensor:
    return torch.full((batch,), TIMESTEP)


def text_mask(batch: int = 1, tokens: int = 12, valid: int = 7) -> torch.Tensor:
    """Return a mask of text tokens of which the last ones are padding."""
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[:, valid:] = False
    return mask


def wan(noise: Noise, **more):
    return {
        "hidden_states": noise(1, 4, 2, 16, 16),
        "timestep": timestep(),
        "encoder_hidden_states": noise(1, 12, 16),
        **more,
    }


def anyflow(noise: Noise):
    """The frames come before the channels."""
    return {
        **wan(noise),
        "hidden_states": noise(1, 2, 4, 16, 16),
        "timestep": TIMESTEP * torch.ones(1, 2),
        "r_timestep": torch.zeros(1, 2),
    }


def hunyuan(noise: Noise, size: int = 16, **more):
    return {
        "hidden_states": noise(1, 4, 2, size, size),
        "timestep": timestep(),
        "encoder_hidden_states": noise(1, 12, 16),
        "encoder_attention_mask": text_mask(),
        **more,
    }


def wan_with_image(noise: Noise, **more):
    """The last 512 rows of the context are text, what precedes them is an image."""
    text_and_image = {"encoder_hidden_states": noise(1, 512, 16), "encoder_hidden_states_image": noise(1, 4, 16)}
    return {**wan(noise), **text_and_image, **more}


def framepack(noise: Noise):
    frames = {"indices_latents": 2, "indices_latents_clean": 1, "indices_latents_history_2x": 2,
              "indices_latents_history_4x": 4}  # fmt: skip
    latents = {"latents_clean": 1, "latents_history_2x": 2, "latents_history_4x": 4}
    return {
        **hunyuan(noise),
        "pooled_projections": noise(1, 8),
        "guidance": timestep(),
        "image_embeds": noise(1, 3, 16),
        **{name: torch.arange(count) for name, count in frames.items()},
        **{name: noise(1, 4, count, 16, 16) for name, count in latents.items()},
    }


def hunyuan15(noise: Noise):
    return {
        **hunyuan(noise, size=8),
        "encoder_hidden_states_2": noise(1, 5, 8),
        "encoder_attention_mask_2": text_mask(1, 5, 3),
        "image_embeds": noise(1, 3, 16),
    }


def cogvideox(noise: Noise, batch: int = 2):
    """Conditional and unconditional rows in one batch, as the pipeline sends them."""
    return {
        "hidden_states": noise(batch, 2, 4, 16, 16),
        "timestep": timestep(batch),
        "encoder_hidden_states": noise(batch, 12, 16),
    }


def ltx(noise: Noise):
    return {
        "hidden_states": noise(2, 128, 4),
        "encoder_hidden_states": noise(2, 12, 16),
        "timestep": timestep(2),
        "encoder_attention_mask": text_mask(2).long(),
        "num_frames": 2,
        "height": 8,
        "width": 8,
    }


def ltx2(noise: Noise):
    return {
        **ltx(noise),
        "audio_hidden_states": noise(2, 9, 4),
        "audio_encoder_hidden_states": noise(2, 12, 16),
        "audio_encoder_attention_mask": text_mask(2).long(),
        "audio_num_frames": 9,
    }


def mochi(noise: Noise):
    return {
        "hidden_states": noise(2, 4, 2, 16, 16),
        "encoder_hidden_states": noise(2, 12, 16),
        "timestep": timestep(2),
        "encoder_attention_mask": text_mask(2),
    }


def cosmos(noise: Noise):
    return {
        "hidden_states": noise(1, 4, 2, 16, 16),
        "timestep": timestep(),
        "encoder_hidden_states": noise(1, 12, 16),
        "fps": 16,
    }


def allegro(noise: Noise):
    return {
        "hidden_states": noise(2, 4, 2, 16, 16),
        "encoder_hidden_states": noise(2, 1, 12, 16),
        "timestep": timestep(2),
        "encoder_attention_mask": text_mask(2).long(),
    }


def latte(noise: Noise):
    return {
        "hidden_states": noise(2, 4, 2, 16, 16),
        "timestep": timestep(2),
        "encoder_hidden_states": noise(2, 12, 16),
    }


def easyanimate(noise: Noise):
    return {
        "hidden_states": noise(2, 4, 2, 16, 16),
        "timestep": timestep(2),
        "encoder_hidden_states": noise(2, 12, 16),
    }


def kandinsky5(noise: Noise):
    return {
        "hidden_states": noise(1, 2, 16, 16, 4),
        "encoder_hidden_states": noise(1, 12, 16),
        "timestep": timestep(),
        "pooled_projections": noise(1, 8),
        "visual_rope_pos": tuple(torch.arange(count) for count in (2, 8, 8)),
        "text_rope_pos": torch.arange(12),
    }


def kandinsky6(noise: Noise):
    return {
        "hidden_states": noise(1, 2, 16, 16, 4),
        "encoder_hidden_states": noise(1, 12, 16),
        "timestep": timestep(),
        "pooled_projections": noise(1, 8),
        "audio_hidden_states": noise(1, 9, 4),
    }


def motif(noise: Noise):
    return {
        "hidden_states": noise(1, 4, 2, 16, 16),
        "timestep": timestep(),
        "encoder_hidden_states": noise(1, 12, 16),
        "encoder_attention_mask": text_mask(),
    }


def helios(noise: Noise):
    return {
        **wan(noise),
        "indices_hidden_states": torch.arange(7, 9).unsqueeze(0),
        "indices_latents_history_short": torch.arange(6, 7).unsqueeze(0),
        "indices_latents_history_mid": torch.arange(4, 6).unsqueeze(0),
        "indices_latents_history_long": torch.arange(0, 4).unsqueeze(0),
        "latents_history_short": noise(1, 4, 1, 16, 16),
        "latents_history_mid": noise(1, 4, 2, 16, 16),
        "latents_history_long": noise(1, 4, 4, 16, 16),
    }


def minimax_h3(noise: Noise):
    video, audio, text = torch.arange(12, 140), torch.arange(140, 146), torch.arange(12)
    return {
        "hidden_states": noise(1, 128, 16),
        "audio_hidden_states": noise(1, 6, 4),
        "encoder_hidden_states": noise(1, 12, 16),
        "timestep": timestep(),
        "timestep_indices": torch.zeros(146, dtype=torch.long),
        "token_tags": torch.tensor([0] * 12 + [1] * 128 + [2] * 6),
        "position_ids": torch.arange(146 * 3).reshape(146, 3).float(),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


def sana_video(noise: Noise):
    return {
        "hidden_states": noise(2, 4, 2, 16, 16),
        "encoder_hidden_states": noise(2, 12, 16),
        "timestep": timestep(2),
        "encoder_attention_mask": text_mask(2).long(),
    }


def wan_animate(noise: Noise):
    return {
        **wan_with_image(noise),
        "hidden_states": noise(1, 12, 2, 16, 16),
        "pose_hidden_states": noise(1, 4, 1, 16, 16),
        "face_pixel_values": noise(1, 3, 4, 16, 16),
    }


# fmt: off
VIDEO_MODELS = (
    ModelCase("WanTransformer3DModel", WAN, wan),
    ModelCase(
        "WanTransformer3DModel", WAN | WAN_IMAGE, wan_with_image,
        variant="image to video", dense={"cross-attention": 2}),
    ModelCase(
        "WanTransformer3DModel", WAN, lambda noise: wan(noise) | {"timestep": TIMESTEP * torch.ones(1, 128)},
        variant="a timestep per token",
    ),
    ModelCase(
        "WanVACETransformer3DModel", WAN | {"vace_layers": [0], "vace_in_channels": 6},
        lambda noise: wan(noise, control_hidden_states=noise(1, 6, 2, 16, 16)),
    ),
    ModelCase(
        "WanAnimateTransformer3DModel",
        WAN | WAN_IMAGE | {
            "in_channels": 12, "latent_channels": 4, "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
        },
        wan_animate, dense={"cross-attention": 2}),
    ModelCase(
        "ChronoEditTransformer3DModel", WAN | WAN_IMAGE | {"rope_temporal_skip_len": 2},
        wan_with_image, dense={"cross-attention": 2}),
    ModelCase("SkyReelsV2Transformer3DModel", WAN, wan),
    ModelCase(
        "SkyReelsV2Transformer3DModel", WAN | {"num_frame_per_block": 1},
        lambda noise: wan(noise, enable_diffusion_forcing=True) | {"timestep": TIMESTEP * torch.ones(1, 2)},
        variant="diffusion forcing",
    ),
    ModelCase("AnyFlowTransformer3DModel", WAN, anyflow),
    ModelCase(
        "HeliosTransformer3DModel", {k: v for k, v in WAN.items() if k != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)},
        helios, note="the history frames are context"),
    ModelCase(
        "HunyuanVideoTransformer3DModel", HUNYUAN | HUNYUAN_PATCH | {"guidance_embeds": True},
        lambda noise: hunyuan(noise, pooled_projections=noise(1, 8), guidance=timestep()),
    ),
    ModelCase(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN | HUNYUAN_PATCH | {"guidance_embeds": False, "image_condition_type": "token_replace"},
        lambda noise: hunyuan(noise, pooled_projections=noise(1, 8)), variant="image to video",
        unseen_by_block=2, note="diffusers does not name the blocks of this variant for compile_repeated_blocks",
    ),
    ModelCase(
        "HunyuanVideo15Transformer3DModel",
        HUNYUAN | {"patch_size": 1, "text_embed_2_dim": 8, "image_embed_dim": 16, "target_size": 8},
        hunyuan15, breaks="it branches on whether the image embedding is all zero"),
    ModelCase(
        "HunyuanVideoFramepackTransformer3DModel",
        FRAMEPACK,
        framepack, dense={"its lengths are known only at run time": 1},
        note="the history and the new frames are one sequence; graph breaks make its lengths numbers"),
    ModelCase(
        "HunyuanVideoFramepackTransformer3DModel",
        FRAMEPACK,
        framepack, variant="with graph breaks", ask_fullgraph=False),
    ModelCase("CogVideoXTransformer3DModel", COGVIDEOX, cogvideox),
    ModelCase("ConsisIDTransformer3DModel", COGVIDEOX, cogvideox),
    ModelCase("LTXVideoTransformer3DModel", LTX, ltx),
    ModelCase("LTX2VideoTransformer3DModel", LTX | LTX2_AUDIO, ltx2,
              note="sound is too short in the tiny configuration"),
    ModelCase(
        "MochiTransformer3DModel",
        MOCHI,
        mochi, note="one attention for each sample of the batch"),
    ModelCase(
        "MochiTransformer3DModel",
        MOCHI,
        mochi, variant="with graph breaks", ask_fullgraph=False, unseen=4,
        note="the loop over samples cannot be traced in pieces and runs eagerly: compile with fullgraph=True"),
    ModelCase(
        "CosmosTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
            "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 16, 16),
            "patch_size": (1, 2, 2), "concat_padding_mask": False,
        },
        cosmos,
    ),
    ModelCase(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 2,
            "cross_attention_dim": 24, "sample_width": 16, "sample_height": 16, "sample_frames": 2,
            "caption_channels": 16,
        },
        allegro,
    ),
    ModelCase(
        "LatteTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 1,
            "cross_attention_dim": 24, "sample_size": 16, "patch_size": 2, "activation_fn": "gelu-approximate",
            "attention_bias": True, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
            "caption_channels": 16, "video_length": 2,
        },
        latte, note="attention over space is sparse, attention over time is short"),
    ModelCase(
        "EasyAnimateTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2,
            "sample_width": 16, "sample_height": 16, "num_layers": 2, "mmdit_layers": 1, "time_embed_dim": 8,
            "text_embed_dim": 16,
        },
        easyanimate,
    ),
    ModelCase("Kandinsky5Transformer3DModel", KANDINSKY, kandinsky5),
    ModelCase("Kandinsky6Transformer3DModel", KANDINSKY | {"in_audio_dim": 4, "out_audio_dim": 4, "visual_cond": False},
              kandinsky6),
    ModelCase(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
            "num_single_layers": 1, "patch_size": 2, "text_embed_dim": 16, "rope_axes_dim": (4, 4, 4),
        },
        motif,
    ),
    ModelCase(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 12, "hidden_size": 24, "num_layers": 2,
            "num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 4, "text_dim": 16,
            "freq_dim": 16, "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2,
        },
        minimax_h3, note="the sequence is packed by index, so text, video and sound are one kind of rows; "
              "name the text and sound with exact_rows"),
    ModelCase(
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
            "caption_channels": 16, "sample_size": 16, "rope_max_seq_len": 32,
        },
        sana_video, note="its self-attention is linear: there is nothing to make sparse"),
)
# fmt: on
