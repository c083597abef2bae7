"""Tiny configurations of what is neither a plain video nor a plain image model: sound, flex masks, caches."""

from __future__ import annotations

import torch
from conformance.examine import TIMESTEP, ModelCase, Noise
from conformance.image_models import grid
from conformance.video_models import LTX, LTX2_AUDIO, WAN, text_mask, timestep
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache


def stable_audio(noise: Noise):
    angles = torch.outer(torch.arange(129.0), torch.tensor([1.0, 0.1, 0.01])).repeat(1, 2)
    return {
        "hidden_states": noise(2, 4, 128),
        "timestep": timestep(2),
        "encoder_hidden_states": noise(2, 12, 16),
        "global_hidden_states": noise(2, 1, 8),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


def stable_audio3(noise: Noise):
    return {
        "hidden_states": noise(2, 4, 128),
        "timestep": timestep(2) / 1000,
        "encoder_hidden_states": noise(2, 12, 16),
        "global_hidden_states": noise(2, 16),
        "local_add_cond": noise(2, 5, 128),
    }


def ace_step(noise: Noise):
    return {
        "hidden_states": noise(1, 256, 4),
        "timestep": timestep() / 1000,
        "timestep_r": timestep() / 1000,
        "encoder_hidden_states": noise(1, 12, 24),
        "context_latents": noise(1, 256, 8),
    }


def longcat_audio(noise: Noise):
    return {
        "hidden_states": noise(2, 128, 4),
        "encoder_hidden_states": noise(2, 12, 16),
        "encoder_attention_mask": text_mask(2),
        "timestep": timestep(2) / 1000,
        "latent_cond": noise(2, 128, 4),
    }


def music(noise: Noise):
    return {
        "hidden_states": noise(1, 4, 128),
        "timestep": timestep() / 1000,
        "encoder_hidden_states": noise(1, 128, 8),
    }


def prior(noise: Noise):
    return {
        "hidden_states": noise(2, 16),
        "timestep": timestep(2),
        "proj_embedding": noise(2, 16),
        "encoder_hidden_states": noise(2, 70, 16),
        "attention_mask": text_mask(2, 70, 50),
    }


def temporal(noise: Noise):
    return {"hidden_states": noise(64, 8, 2, 2), "num_frames": 64}


def anyflow_far(noise: Noise):
    return {
        "hidden_states": noise(1, 4, 4, 16, 16),
        "timestep": TIMESTEP * torch.ones(1, 4),
        "r_timestep": torch.zeros(1, 4),
        "encoder_hidden_states": noise(1, 12, 16),
        "chunk_partition": [1, 3],
    }


def cosmos3(noise: Noise):
    return {
        "input_ids": torch.arange(12),
        "text_indexes": torch.arange(12),
        "position_ids": torch.cat([torch.arange(12.0).unsqueeze(1).repeat(1, 3), 12 + grid(8), 13 + grid(8)]).T,
        "und_len": 12,
        "sequence_length": 140,
        "vision_tokens": [noise(1, 4, 2, 16, 16)],
        "vision_token_shapes": [(2, 8, 8)],
        "vision_sequence_indexes": torch.arange(12, 140),
        "vision_mse_loss_indexes": torch.arange(12, 140),
        "vision_timesteps": TIMESTEP * torch.ones(128),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


def kandinsky6_sr(noise: Noise):
    return {"hidden_states": noise(1, 2, 16, 16, 9), "timestep": timestep()}


def qwen21(noise: Noise):
    return {
        "hidden_states": noise(1, 64, 4),
        "encoder_hidden_states": noise(1, 12, 16),
        "timestep": timestep() / 1000,
        "img_shapes": [[(1, 8, 8)]],
        "img_mask": torch.tensor([[False] * 12 + [True] * 16]),
        "encoder_hidden_states_mask": text_mask(),
    }


def sana_wm(noise: Noise):
    return {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "timestep": TIMESTEP * torch.ones(1, 1, 2),
        "encoder_hidden_states": noise(1, 1, 12, 16),
        "encoder_attention_mask": text_mask().long(),
    }


def sana_wm_refiner(noise: Noise):
    angles = noise(1, 128, 24)
    return {
        "hidden_states": noise(1, 128, 4),
        "encoder_hidden_states": noise(1, 12, 16),
        "timestep": timestep(),
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": text_mask().long(),
    }


def wan_animate2(noise: Noise):
    """The pass over the reference frames; the other pass is flex attention."""
    return {
        "hidden_states": [noise(4, 2, 16, 16)],
        "timestep": timestep(),
        "encoder_hidden_states": [noise(12, 16)],
        "condition_latents": [noise(4, 2, 16, 16)],
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": 128,
        "encoder_hidden_states_image": noise(1, 257, 1280),
        "offset_grid_sizes": torch.tensor([[2, 8, 8]]),
    }


# fmt: off
OTHER_MODELS = (
    ModelCase("StableAudioDiTModel",
              {"sample_size": 128, "in_channels": 4, "num_layers": 2, "attention_head_dim": 12,
               "num_attention_heads": 2, "num_key_value_attention_heads": 1, "out_channels": 4,
               "cross_attention_dim": 12, "time_proj_dim": 8, "global_states_input_dim": 8,
               "cross_attention_input_dim": 16}, stable_audio),
    ModelCase("StableAudio3DiTModel",
              {"io_channels": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "cond_token_dim": 16,
               "global_cond_dim": 16, "local_add_cond_dim": 5, "timestep_features_dim": 8, "num_memory_tokens": 4},
              stable_audio3),
    ModelCase("AceStepTransformer1DModel",
              {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
               "num_key_value_heads": 1, "head_dim": 12, "in_channels": 12, "audio_acoustic_hidden_dim": 4,
               "sliding_window": 16, "encoder_hidden_size": 24}, ace_step,
              dense={"attn_mask is float32 …, not a key mask": 1},
              note="every second layer attends within a window already"),
    ModelCase("LongCatAudioDiTTransformer",
              {"dit_dim": 24, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 4}, longcat_audio),
    ModelCase("MiniMaxMusic3Transformer1DModel",
              {"in_channels": 4, "condition_dim": 8, "num_layers": 2, "num_attention_heads": 2,
               "attention_head_dim": 12, "ff_inner_dim": 32, "rotary_dim": 4, "fourier_embedding_dim": 8}, music),
    ModelCase("PriorTransformer",
              {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "embedding_dim": 16,
               "num_embeddings": 70, "additional_embeddings": 4}, prior,
              dense={"attn_mask is float32 …, not a key mask": 2},
              note="causal; a sequence of text embeddings, never long"),
    ModelCase("TransformerTemporalModel",
              {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 8, "norm_num_groups": 4}, temporal),
    ModelCase("AnyFlowFARTransformer3DModel", WAN | {"chunk_partition": (1, 3), "full_chunk_limit": 3}, anyflow_far,
              note="chunks of frames see earlier chunks only: a block mask"),
    ModelCase("Cosmos3OmniTransformer",
              {"head_dim": 12, "hidden_size": 24, "intermediate_size": 32, "latent_channel": 4,
               "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1, "patch_latent_dim": 16,
               "vocab_size": 32, "rope_scaling": {"mrope_section": [2, 2, 2]}, "dtype": "float32"}, cosmos3,
              note="grouped key heads; only the video rows ask all, text is causal"),
    ModelCase("Kandinsky6SRTransformer3DModel",
              {"in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 24, "ff_dim": 32,
               "num_visual_blocks": 2, "axes_dims": (4, 4, 4)}, kandinsky6_sr,
              note="brings its own block-sparse attention (NABLA)"),
    ModelCase("QwenImage21Transformer2DModel",
              {"in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 12,
               "num_attention_heads": 2, "context_in_dim": 16, "axes_dims_rope": (4, 4, 4)}, qwen21,
              breaks="the layout of the sequence is read as Python numbers",
              note="only the image rows ask all; text is causal"),
    ModelCase("SanaWMTransformer3DModel",
              {"in_channels": 4, "num_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "softmax_every_n": 2,
               "linear_head_dim": 12, "caption_channels": 16, "chunk_plucker_channels": 4,
               "chunk_plucker_post_attn_blocks": 2, "mixed_precision": "fp32"}, sana_wm,
              note="every second layer here, every fourth by default; the others are recurrent"),
    ModelCase("SanaWMLTX2RefinerTransformer3DModel", LTX | LTX2_AUDIO | {"num_layers": 2}, sana_wm_refiner),
    ModelCase("WanAnimate2Transformer3DModel",
              {"text_len": 12, "in_dim": 8, "dim": 24, "ffn_dim": 32, "freq_dim": 16, "text_dim": 16, "out_dim": 4,
               "num_heads": 2, "num_layers": 2}, wan_animate2,
              dense={"cross-attention": 2},
              breaks="the grid is read as Python numbers",
              note="the pass over the reference; the pass over the video is flex attention with a block mask"),
)
# fmt: on
