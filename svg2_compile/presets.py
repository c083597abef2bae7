"""Named settings: three of our own, and those that the paper, its code and its follow-up were run with."""

from __future__ import annotations

import difflib
from typing import Any

from svg2_compile.passes.errors import ConfigError

_SCRIPTS: dict[str, Any] = {
    "top_p": 0.9,
    "min_keep_ratio": 0.1,
    "kmeans_iters_init": 50,
    "kmeans_iters_step": 2,
    "dense_layers": 1,
}

_PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"top_p": 0.95, "min_keep_ratio": 0.1, "dense_steps": 0.3},
    "balanced": {"top_p": 0.9, "min_keep_ratio": 0.1, "dense_steps": 0.2},
    "turbo": {"top_p": 0.7, "min_keep_ratio": 0.1, "dense_steps": 0.2},
    "paper-wan-2.1": {**_SCRIPTS, "q_clusters": 300, "k_clusters": 1000, "dense_steps": 0.2},
    "paper-wan-2.1-i2v": {**_SCRIPTS, "q_clusters": 300, "k_clusters": 1000, "dense_steps": 0.35},
    "paper-wan-2.1-i2v-480p": {**_SCRIPTS, "q_clusters": 200, "k_clusters": 1000, "dense_steps": 0.2},
    "paper-wan-2.2": {**_SCRIPTS, "q_clusters": 300, "k_clusters": 1000, "dense_steps": 0.2},
    "paper-wan-2.2-turbo": {**_SCRIPTS, "top_p": 0.7, "q_clusters": 100, "k_clusters": 500, "dense_steps": 0.3},
    "paper-wan-2.2-i2v-turbo": {**_SCRIPTS, "top_p": 0.7, "q_clusters": 300, "k_clusters": 1000, "dense_steps": 0.3},
    "paper-hunyuan-video": {**_SCRIPTS, "q_clusters": 400, "k_clusters": 1000, "dense_steps": 0.1},
    "paper-hunyuan-video-480p": {
        **_SCRIPTS,
        "q_clusters": 200,
        "k_clusters": 1000,
        "dense_steps": 0.04,
        "dense_layers": 0,
    },
    "paper-cosmos": {**_SCRIPTS, "q_clusters": 400, "k_clusters": 1000, "dense_steps": 0.3},
}


def preset(name: str) -> dict[str, Any]:
    """Return the options that a name stands for, fields of ``SparseConfig``, to give to ``torch.compile``.

    Ours are ``quality``, ``balanced`` (the defaults) and ``turbo``. They leave the cluster counts to ``auto``, so they
    fit any model. ``presets`` in docs/images/baselines.json has their place on the tiny Wan's curve.

    The published ones are fixed to a model and a size; docs/method.md has their table:

    - ``paper-wan-2.1``, ``paper-wan-2.1-i2v``, ``paper-wan-2.1-i2v-480p``, ``paper-hunyuan-video``,
      ``paper-hunyuan-video-480p``, ``paper-cosmos``: the scripts of svg-project/Sparse-VideoGen, 5ce7b01. The text of
      the paper (arXiv 2505.18875) names others, 100 and 500 clusters and 30 % dense steps.
    - ``paper-wan-2.2``, ``paper-wan-2.2-turbo``, ``paper-wan-2.2-i2v-turbo``: SVG2 and SVG2-Turbo as SVG-EAR
      (arXiv 2603.08982) measures them; iterations and floor, not given there, are those of the scripts.

    Args:
        name: one of ``preset_names()``.

    Returns:
        A dict of its own, which may be changed.

    Raises:
        ConfigError: no such preset.
    """
    if not isinstance(name, str) or name not in _PRESETS:
        close = difflib.get_close_matches(str(name), _PRESETS, n=1)
        advice = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"unknown preset {name!r}; {advice}there are {', '.join(_PRESETS)}")
    return dict(_PRESETS[name])


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets."""
    return tuple(_PRESETS)
