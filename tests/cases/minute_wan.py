"""A model folder of a Wan whose prompts are words, minute and untrained."""

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from svg2_compile import tiny_wan
from svg2_compile.tiny_wan import model
from svg2_compile.tiny_wan.transform import CHANNELS, BlockTransform
from svg2_compile.tiny_wan.words import Vocabulary, WordVectors

CONFIG = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 64, "out_channels": 64,
    "text_dim": 24, "freq_dim": 32, "ffn_dim": 48, "num_layers": 1, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 64,
}  # fmt: skip


def write_model_of_words(folder: Path, vocabulary: Vocabulary, examples: list[str], window: list[int]) -> None:
    """Write weights, scheduler, transform, words and ``subject.json``; the velocity is not zero."""
    network = tiny_wan.untrained_transformer(seed=1, config=CONFIG)
    torch.nn.init.normal_(network.proj_out.weight[:CHANNELS], generator=torch.Generator().manual_seed(0))
    network.half().save_pretrained(folder)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder)
    BlockTransform(mean=(0.2,) * CHANNELS, std=(0.5,) * CHANNELS).save(folder / model.TRANSFORM_NAME)
    WordVectors.drawn(vocabulary, CONFIG["text_dim"]).save(folder / model.WORDS_NAME)
    (folder / model.SUBJECT_NAME).write_text(json.dumps({"examples": examples, "window": window}))
