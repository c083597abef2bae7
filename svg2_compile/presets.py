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

    Ours, on the curve of quality over density of the tiny Wan (docs/measurements.md, 20): ``quality``, ``balanced``
    (the defaults) and ``turbo``. They leave the cluster counts to ``auto``, so they fit any model.

    The paper's are fixed to a model and a size. Two of its settings are nobody's default: clusters are counted, not
    scaled with the sequence, and the first clustering takes 50 iterations.

    ==========================  ==========================================================================
    name                        source
    ==========================  ==========================================================================
    ``paper-wan-2.1``           text to video, 720p: the scripts of svg-project/Sparse-VideoGen, 5ce7b01
    ``paper-wan-2.1-i2v``       image to video, 720p: the same
    ``paper-wan-2.1-i2v-480p``  image to video, 480p: the same
    ``paper-wan-2.2``           the SVG2 baseline of SVG-EAR, arXiv 2603.08982; iterations and floor not given
                                there, so those of the scripts
    ``paper-wan-2.2-turbo``     SVG2-Turbo, text to video, of SVG-EAR; likewise
    ``paper-wan-2.2-i2v-turbo`` SVG2-Turbo, image to video, of SVG-EAR; likewise
    ``paper-hunyuan-video``     720p: the scripts
    ``paper-hunyuan-video-480p``  480p: the scripts
    ``paper-cosmos``            Cosmos 1.0: the scripts
    ==========================  ==========================================================================

    The text of the paper (arXiv 2505.18875) names 100 and 500 clusters and 30 % dense steps; its scripts do not.

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
