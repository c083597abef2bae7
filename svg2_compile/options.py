"""From ``torch.compile(options=...)`` to our two configs and Inductor's own options."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace, TracebackType
from typing import Any

from svg2_compile.dynamo import has_inductor_option, options_of_mode
from svg2_compile.passes import config, kernel_config
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.errors import ConfigError
from svg2_compile.passes.kernel_config import KernelConfig
from svg2_compile.presets import preset

PREFIX = "svg2."
FIELD_NAMES = (*config.FIELD_NAMES, *kernel_config.FIELD_NAMES)


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that a user can choose, besides Inductor's own options."""

    sparse: SparseConfig = field(default_factory=SparseConfig)
    """What can change the picture."""
    kernel: KernelConfig = field(default_factory=KernelConfig)
    """What can only change the time."""

    def replace(self, changes: Mapping[str, Any]) -> Options:
        """Return the options with other values of some fields of either config."""
        sparse, kernel = (
            {name: changes[name] for name in names if name in changes}
            for names in (config.FIELD_NAMES, kernel_config.FIELD_NAMES)
        )
        return Options(dataclasses.replace(self.sparse, **sparse), dataclasses.replace(self.kernel, **kernel))

    def by_name(self) -> dict[str, object]:
        """Return every field and its value."""
        both = (self.sparse, config.FIELD_NAMES), (self.kernel, kernel_config.FIELD_NAMES)
        return {name: getattr(options, name) for options, names in both for name in names}


_defaults = Options()

in_force = SimpleNamespace()
"""The defaults in words, for guards: an attribute for each set of fields that somebody's options left to them."""
_fields_in_force: dict[str, tuple[str, ...]] = {}
"""The fields that each attribute is about."""
_listeners: list[Callable[[set[str]], None]] = []


class configure:  # reads as a function, and as a context manager
    """Change the defaults, from the next call of a model on; as a context manager, only inside it.

    Needed where ``options`` cannot be given, as with ``torch.compile(mode="reduce-overhead", backend="svg2")``.
    What was compiled under other defaults is compiled again when it is called, except where its options give every
    field that changed; when the old defaults are back, it is found again.

    Args:
        **fields: fields of ``SparseConfig`` and ``KernelConfig``.

    Raises:
        ConfigError: a field is unknown or out of range; nothing is changed then.
    """

    def __init__(self, **fields: Any) -> None:
        for name in fields:
            if name not in FIELD_NAMES:
                raise ConfigError(_unknown(name))
        self._previous = _defaults
        self._chosen = _defaults.replace(fields)
        self._fields = fields
        _change_defaults(self._chosen)

    def __enter__(self) -> Options:
        """Return the defaults in force; entered once more, change what is in force then."""
        if _defaults is not self._chosen:
            self._previous, self._chosen = _defaults, _defaults.replace(self._fields)
            _change_defaults(self._chosen)
        return _defaults

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore what was in force before."""
        _change_defaults(self._previous)


def _change_defaults(defaults: Options) -> None:
    global _defaults
    _defaults = defaults
    values, changed = defaults.by_name(), set()
    for name, fields in _fields_in_force.items():
        words = ", ".join(f"{field}={values[field]!r}" for field in fields)
        if getattr(in_force, name, None) != words:
            setattr(in_force, name, words)
            changed.add(name)
    if changed:
        for listener in _listeners:
            listener(changed)


def call_when_changed(listener: Callable[[set[str]], None]) -> None:
    """Tell ``listener`` which attributes of ``in_force`` have changed, whenever some have."""
    _listeners.append(listener)


def current_defaults() -> Options:
    """Return the options in force where none are given."""
    return _defaults


def parse_options(text: str) -> dict[str, Any]:
    """Return the options in a text such as ``top_p=0.9,k_clusters=256``, as the command line takes them.

    Raises:
        ConfigError: it does not look like that; names and values are not judged here.
    """
    options: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not value:
            raise ConfigError(f"--config must look like top_p=0.9,k_clusters=256; got {part.strip()!r} in {text!r}")
        try:
            options[name] = json.loads(value)
        except ValueError:  # a word, such as lowering=eager
            options[name] = {"True": True, "False": False}.get(value, value)
    return options


def split_options(options: dict[str, Any] | None, mode: str | None = None) -> tuple[Options, dict[str, Any]]:
    """Return our options and those that are Inductor's.

    Args:
        options: field names of ``SparseConfig`` and ``KernelConfig``, bare or with the prefix ``svg2.``; ``preset``
            stands for those of a preset, and fields given beside it win; every other key is Inductor's.
        mode: a mode of ``torch.compile``; its Inductor options are added under the given ones.

    Raises:
        ConfigError: a key is neither ours nor Inductor's, a value is out of range, or there is no such preset.
    """
    ours, inductors = _sorted_by_owner(options)
    inductors = (options_of_mode(mode) if mode and mode != "default" else {}) | inductors
    return _defaults.replace(ours), inductors


def name_in_force(options: dict[str, Any] | None) -> str:
    """Return the attribute of ``in_force`` that changes when a default does that the options do not give."""
    given, _ = _sorted_by_owner(options)
    left = tuple(name for name in FIELD_NAMES if name not in given)
    known = {fields: name for name, fields in _fields_in_force.items()}
    name = known.get(left, f"defaults_{len(known)}")
    _fields_in_force[name] = left
    _change_defaults(_defaults)
    return name


def _sorted_by_owner(options: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of our configs, and Inductor's options."""
    ours: dict[str, Any] = {}
    inductors: dict[str, Any] = {}
    for key, value in (options or {}).items():
        name = key.removeprefix(PREFIX)
        if name in FIELD_NAMES:
            ours[name] = value
        elif name == "preset":
            ours = preset(value) | ours
        elif key.startswith(PREFIX) or not has_inductor_option(key):
            raise ConfigError(_unknown(key))
        else:
            inductors[key] = value
    return ours, inductors


def _unknown(key: str) -> str:
    close = difflib.get_close_matches(key.removeprefix(PREFIX), FIELD_NAMES, n=1)
    known = f"known options are {', '.join(FIELD_NAMES)}, and Inductor's own"
    advice = f"did you mean {close[0]!r}?" if close else known
    return f"unknown option {key!r}; {advice}"
