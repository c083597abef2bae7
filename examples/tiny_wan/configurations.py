"""What is trained: the subject that ships with the package, a larger one for evaluation only, and a minute one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svg2_compile.tiny_wan.transform import CHANNELS, COORDINATE_CHANNELS

EXAMPLES = (
    "mountains, camera pans right, large cat moves left, medium ball circles",
    "meadow, camera zooms in, light brightens, large cup swings, small star falls",
    "sunset, camera tilts up, medium horse moves right, large ring spins",
    "bricks, camera pans left, light sweeps, large dahlia grows, medium cube rises",
    "stream, camera pans left, large dog rests, medium bowl moves right",
    "stars, camera turns right, large rocket rises, medium ring circles",
    "palace, light darkens, medium pagoda shrinks, large drum moves left",
    "gravel, camera zooms out, medium dandelion circles, medium star spins",
)
"""Prompts that are worth looking at, for ``subject.json``."""


@dataclass(frozen=True, slots=True)
class Size:
    """One size of training video, and how often it is drawn."""

    frames: int
    height: int
    width: int

    first_share: float = 1.0
    """Weight in the draw of sizes when training begins."""

    last_share: float = 1.0
    """Weight in the draw of sizes when training ends."""

    @property
    def tokens(self) -> int:
        """The length of the attention sequence: a token is 8 x 8 pixels of one frame."""
        return self.frames * (self.height // 8) * (self.width // 8)

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True, slots=True)
class Configuration:
    """An architecture and how it is trained."""

    heads: int
    head_dim: int
    layers: int
    feed_forward: int
    sizes: tuple[Size, ...]

    text_dim: int = 64
    """Numbers of a word's vector."""

    batch_tokens: int = 65_536
    """Tokens in a batch, of as many videos as fit."""

    learning_rate: float = 5e-4
    """At its peak."""

    warmup_steps: int = 500

    ema_decay: float = 0.999
    """Of the moving average of the weights, which is what is exported."""

    minutes: float = 18.0
    """Wall clock of training, start-up and compilation of every run included, which the learning rate follows."""

    @property
    def architecture(self) -> Mapping[str, Any]:
        """The arguments of ``WanTransformer3DModel``."""
        return {
            "patch_size": [1, 2, 2],
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "in_channels": CHANNELS + COORDINATE_CHANNELS,
            "out_channels": CHANNELS + COORDINATE_CHANNELS,
            "text_dim": self.text_dim,
            "freq_dim": 256,
            "ffn_dim": self.feed_forward,
            "num_layers": self.layers,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "rope_max_seq_len": 1024,
        }


CONFIGURATIONS = {
    # 9.7 million parameters: 19.3 MB in fp16; a token has 192 numbers of picture, all of which the width must carry
    # through every layer beside what is found out about them
    "shipped": Configuration(
        heads=3,
        head_dim=128,
        layers=5,
        feed_forward=576,
        sizes=(
            Size(8, 128, 128, 0.15, 0.02),
            Size(8, 128, 256, 0.45, 0.13),
            Size(16, 128, 256, 0.30, 0.45),
            Size(32, 128, 256, 0.08, 0.25),
            Size(64, 128, 256, 0.02, 0.15),
        ),
    ),
    # 135 million parameters; eight heads of 128 make a width of 1024, and twelve layers of that are not smaller
    "large": Configuration(
        heads=8,
        head_dim=128,
        layers=12,
        feed_forward=1024,
        learning_rate=2.5e-4,
        warmup_steps=300,
        ema_decay=0.998,
        sizes=(
            Size(8, 128, 256, 0.60, 0.25),
            Size(16, 128, 256, 0.30, 0.45),
            Size(32, 128, 256, 0.08, 0.20),
            Size(64, 128, 256, 0.02, 0.10),
        ),
    ),
    # for tests, and to see on a CPU that everything runs
    "minute": Configuration(
        heads=2,
        head_dim=16,
        layers=2,
        feed_forward=64,
        text_dim=32,
        batch_tokens=256,
        learning_rate=2e-3,
        warmup_steps=10,
        ema_decay=0.9,
        minutes=1.0,
        sizes=(Size(2, 32, 64, 0.5, 0.5), Size(4, 32, 64, 0.5, 0.5)),
    ),
}
