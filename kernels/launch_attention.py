"""From the name of an attention kernel to its launch, with the tiles that are given, timed or tuned."""

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from svg2_compile.kernels.autotune import TuningKey, fastest
from svg2_compile.kernels.checks import check_value
from svg2_compile.kernels.launch import padded_power_of_two
from svg2_compile.kernels.tuning import attention_candidates, chosen_tiles
from svg2_compile.kernels.why_not import capability_of

Launcher = Callable[..., tuple[Tensor, Tensor]]
CONTEXT_K = 6
"""Where the op takes the context keys."""


def launch_attention(
    implementation: str, arguments: tuple[Any, ...], scale: float, tiles: Sequence[int] | None, autotune: bool
) -> tuple[Tensor, Tensor]:
    """Run an attention kernel that ``choose_attention`` chose.

    Args:
        implementation: ``gluon``, ``descriptor`` or ``pointer``.
        arguments: those of ``block_sparse_attention_reference`` before ``scale``.
        scale: factor of the scores.
        tiles: block_m, block_n, num_warps and num_stages, or None for tuned ones.
        autotune: whether the candidates are timed at the first call of a kind; given tiles are taken as they are.

    Returns:
        What the op returns.

    Raises:
        ValueError: tiles are given for Gluon, whose tiles are part of its code.
    """
    launch = _launcher(implementation)
    q = arguments[0]
    if implementation == "gluon":
        check_value(tiles is None, lambda: f"the gluon attention has tiles of its own, got {tiles}; leave tiles out")
        return launch(*arguments, scale)
    if tiles is not None:
        return launch(*arguments, scale, tiles=chosen_tiles(tiles))
    if not autotune:
        return launch(*arguments, scale)
    capability, block_d = capability_of(q.device), padded_power_of_two(q.shape[3])
    key = TuningKey(capability, implementation, block_d, q.dtype, arguments[CONTEXT_K] is not None)
    candidates = attention_candidates(capability, block_d, q.dtype, implementation)
    # events are recorded on the current device's stream, which must be the one that the kernel runs on
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        best = fastest(key, candidates, lambda tiles: launch(*arguments, scale, tiles=tiles))
        return launch(*arguments, scale, tiles=best)


@cache
def _launcher(implementation: str) -> Launcher:
    """Return the function that is named like its module."""
    name = f"block_sparse_attention_{implementation}"
    launcher: Launcher = getattr(importlib.import_module(f"svg2_compile.kernels.{name}"), name)
    return launcher
