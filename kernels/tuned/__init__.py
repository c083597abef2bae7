"""Tuned tiles, one module per GPU generation, by compute capability.

In each module ``ATTENTION`` holds the tiles by implementation and padded head dimension, for 16-bit types; what is not
in it gets the tiles of ``tuning`` that spill nothing anywhere. ``CANDIDATES`` holds up to three others each, for
autotuning.
"""

from collections.abc import Mapping

from svg2_compile.kernels.tiles import AttentionTiles
from svg2_compile.kernels.tuned import sm_80, sm_86, sm_89, sm_90, sm_100, sm_120

ATTENTION: Mapping[int | None, Mapping[tuple[str, int], AttentionTiles]] = {
    80: sm_80.ATTENTION,
    86: sm_86.ATTENTION,
    89: sm_89.ATTENTION,
    90: sm_90.ATTENTION,
    100: sm_100.ATTENTION,
    120: sm_120.ATTENTION,
}
CANDIDATES: Mapping[int | None, Mapping[tuple[str, int], tuple[AttentionTiles, ...]]] = {
    80: sm_80.CANDIDATES,
    86: sm_86.CANDIDATES,
    89: sm_89.CANDIDATES,
    90: sm_90.CANDIDATES,
    100: sm_100.CANDIDATES,
    120: sm_120.CANDIDATES,
}
