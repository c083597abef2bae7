"""Whole pipelines with tokenizer, text encoder and VAE, tiny, random weights, as folders that diffusers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conformance.video_models import COGVIDEOX, LTX
from diffusers import (
    AuraFlowPipeline,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
)
from tiny_pipelines import MODELS, hunyuan_transformer, wan_transformer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ("a", "cat", "walks", "boat", "on", "the", "grass", "sails")
T5_SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 16}


def t5_tokenizer() -> T5TokenizerFast:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *((f"▁{word}", -1.0) for word in WORDS)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=64)


def t5() -> dict[str, Any]:
    return {"tokenizer": t5_tokenizer(), "text_encoder": T5EncoderModel(T5Config(**T5_SIZES))}


def umt5() -> dict[str, Any]:
    return {"tokenizer": t5_tokenizer(), "text_encoder": UMT5EncoderModel(UMT5Config(**T5_SIZES))}


def wan(experts: int = 1) -> WanPipeline:
    second = {"transformer_2": wan_transformer(), "boundary_ratio": 0.8} if experts == 2 else {}
    return WanPipeline(
        **umt5(),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=wan_transformer(), **second,
    )  # fmt: skip


def hunyuan() -> HunyuanVideoPipeline:
    # the pipeline cuts off the first 95 tokens, its template: two known letters make the template long enough
    pieces = ["<unk>", "<s>", "</s>", "e", "t", *(f"▁{word}" for word in WORDS)]
    llama_tokenizer = LlamaTokenizerFast(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[])
    llama_tokenizer.pad_token = "</s>"
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in WORDS)]
    llama = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=2
    )
    clip = CLIPTextConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, bos_token_id=0,
        eos_token_id=1, pad_token_id=1, projection_dim=8,
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama), tokenizer=llama_tokenizer, text_encoder_2=CLIPTextModel(clip),
        tokenizer_2=CLIPTokenizer(
            vocab={word: place for place, word in enumerate(words)}, merges=[], model_max_length=77
        ),
        vae=vae, transformer=hunyuan_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def cogvideox() -> CogVideoXPipeline:
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
    vae = AutoencoderKLCogVideoX(
        **blocks, block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(**COGVIDEOX | {"max_text_seq_length": 226})
    return CogVideoXPipeline(**t5(), vae=vae, transformer=transformer, scheduler=CogVideoXDDIMScheduler())


def ltx() -> LTXPipeline:
    vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(**LTX | {"num_layers": 2})
    return LTXPipeline(scheduler=scheduler, vae=vae, **t5(), transformer=transformer)


def auraflow() -> AuraFlowPipeline:
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    transformer = MODELS["AuraFlowTransformer2DModel"]()
    return AuraFlowPipeline(**umt5(), vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())


def save(make: Callable[[], Any], folder: Path) -> Path:
    """Write a pipeline to a folder and return it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make().save_pretrained(str(folder))
    return folder
