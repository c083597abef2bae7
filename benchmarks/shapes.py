"""The attentions of large models that figures are of: one layer's size, and the numbers of clusters to try."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer's attention, and the numbers of clusters to try."""

    name: str
    heads: int
    tokens: int
    dim: int
    clusters: tuple[tuple[int, int], ...] = ()
    """(query clusters, key clusters) of a head, what the model would take first."""

    @property
    def size(self) -> list[int]:
        """Batch, heads, tokens, head dimension."""
        return [1, self.heads, self.tokens, self.dim]


WAN_14B_720P = Shape("Wan 14B 720p", 40, 75_600, 128, ((100, 500), (300, 1000)))
HUNYUAN_720P = Shape("HunyuanVideo 720p", 24, 118_800, 128, ((100, 500), (400, 1000)))
HUNYUAN_720P_WITH_TEXT = Shape("HunyuanVideo 720p with text", 24, 119_056, 128)
WAN_1_3B_480P = Shape("Wan 1.3B 480p", 12, 32_760, 128, ((55, 218),))
COGVIDEOX = Shape("CogVideoX", 48, 17_776, 64, ((30, 118),))
TINY_WAN_64_FRAMES = Shape("tiny Wan, 64 frames", 4, 32_768, 64, ((128, 512),))
NARROW = Shape("head dimension 64", 24, 32_760, 64, ((55, 218),))
NARROW_FINE = Shape("head dimension 64, fine", 48, 33_000, 64, ((110, 440),))
