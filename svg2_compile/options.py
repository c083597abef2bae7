"""From ``torch.compile(options=...)`` to a ``SparseConfig`` and Inductor's own options."""

from __future__ import annotations

import dataclasses
import difflib
from types import TracebackType
from typing import Any

import torch._inductor.config
from torch._inductor import list_mode_options

from svg2_compile.passes.config import FIELD_NAMES, SparseConfig
from svg2_compile.passes.errors import ConfigError

PREFIX = "svg2."

_defaults = SparseConfig()


class configure:  # reads as a function, and as a context manager
    """Change the defaults for what is compiled from now on; as a context manager, only inside it.

    Needed where ``options`` cannot be given, as with ``torch.compile(mode="reduce-overhead", backend="svg2")``.

    Args:
        **fields: fields of ``SparseConfig``.

    Raises:
        ConfigError: a field is unknown or out of range; nothing is changed then.
    """

    def __init__(self, **fields: Any) -> None:
        global _defaults
        for name in fields:
            if name not in FIELD_NAMES:
                raise ConfigError(_unknown(name, FIELD_NAMES))
        self._previous = _defaults
        _defaults = dataclasses.replace(_defaults, **fields)

    def __enter__(self) -> SparseConfig:
        """Return the defaults in force."""
        return _defaults

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore what was in force before."""
        global _defaults
        _defaults = self._previous


def current_defaults() -> SparseConfig:
    """Return the options in force where none are given."""
    return _defaults


def split_options(options: dict[str, Any] | None, mode: str | None = None) -> tuple[SparseConfig, dict[str, Any]]:
    """Return our config and the options that are Inductor's.

    Args:
        options: field names of ``SparseConfig``, bare or with the prefix ``svg2.``; every other key is Inductor's.
        mode: a mode of ``torch.compile``; its Inductor options are added under the given ones.

    Raises:
        ConfigError: a key is neither ours nor Inductor's, or a value is out of range.
    """
    ours: dict[str, Any] = {}
    inductors = dict(list_mode_options(mode)) if mode and mode != "default" else {}
    for key, value in (options or {}).items():
        name = key.removeprefix(PREFIX)
        if name in FIELD_NAMES:
            ours[name] = value
        elif key.startswith(PREFIX) or not _is_inductors(key):
            raise ConfigError(_unknown(key, FIELD_NAMES))
        else:
            inductors[key] = value
    return dataclasses.replace(_defaults, **ours), inductors


def _is_inductors(key: str) -> bool:
    return key.replace("-", "_") in torch._inductor.config.get_config_copy()


def _unknown(key: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(key.removeprefix(PREFIX), known, n=1)
    advice = f"did you mean {close[0]!r}?" if close else f"known options are {', '.join(known)}, and Inductor's own"
    return f"unknown option {key!r}; {advice}"
