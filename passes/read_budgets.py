"""The file of budgets: one JSON text, read strictly and written alike from alike budgets."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from svg2_compile.passes.budgets import (
    METHODS,
    NUMBERS,
    AttentionBudgets,
    Budgets,
    Fingerprint,
    MadeFrom,
    ModelBudgets,
    Setting,
)
from svg2_compile.passes.errors import ConfigError

FORMAT = "svg2_compile budgets"
VERSION = 1
MAX_BYTES = 8 * 2**20
MAX_MODELS = 8
MAX_ATTENTIONS = 4096
MAX_HEADS = 1024
MAX_ENTRIES = 1024
MAX_TEXT = 4096
AGAIN = "make it anew with svg2 calibrate"

Value = TypeVar("Value")
Read = Callable[[Any, str], Value]
"""Returns what a JSON value means; takes it, and where it stands."""


def read_budgets(path: str | os.PathLike[str]) -> Budgets:
    """Return the budgets in a file.

    Raises:
        ConfigError: it cannot be read, or holds anything else than budgets; says what and where.
    """
    source = os.fspath(path)
    file = Path(source).expanduser()
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ConfigError(
                f"budgets {source} must be at most {MAX_BYTES} bytes, got {size}; that is no file of svg2 calibrate"
            )
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"budgets {source} cannot be read: {error.strerror or error}; give a file that svg2 calibrate wrote"
        ) from error
    return parse_budgets(data, str(file.absolute()))


def parse_budgets(data: bytes, source: str) -> Budgets:
    """Return the budgets in the bytes of a file.

    Raises:
        ConfigError: they are no budgets; says what and where.
    """
    try:
        given = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # no text, no JSON, nested too deep
        raise ConfigError(f"budgets {source} must be JSON: {error or 'nested too deep'}; {AGAIN}") from error
    reader = _Reader(source)
    fields = reader.fields(given, "", ("format", "version", "method", "made_from", "models"))
    if fields["format"] != FORMAT:
        reader.refuse("format", repr(FORMAT), fields["format"])
    if fields["version"] != VERSION or isinstance(fields["version"], bool):
        reader.refuse("version", str(VERSION), fields["version"])
    if fields["method"] not in METHODS:
        reader.refuse("method", f"one of {', '.join(METHODS)}", fields["method"])
    models = reader.items(fields["models"], "models", MAX_MODELS, reader.model)
    if not models or len({each.name for each in models}) < len(models):
        reader.refuse("models", "models of different names, one at least", [each.name for each in models])
    made_from = reader.made_from(fields["made_from"], "made_from")
    digest = hashlib.sha256(data).hexdigest()
    return Budgets(fields["method"], made_from, models, source, digest)


def write_budgets(budgets: Budgets, path: str | os.PathLike[str]) -> Budgets:
    """Write a file that is either all there or not at all; return what it holds now.

    Raises:
        OSError: it cannot be written; what was there before is whole.
    """
    file = Path(path).expanduser()
    data = (json.dumps(_plain(budgets), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode("utf-8")
    # whatever is written can be read
    written = parse_budgets(data, str(path))
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return replace(written, source=str(file.absolute()))


def _plain(budgets: Budgets) -> dict[str, Any]:
    """Return what stands in the file."""
    made = budgets.made_from
    return {
        "format": FORMAT,
        "version": VERSION,
        "method": budgets.method,
        "made_from": {
            "prompts": list(made.prompts),
            "seeds": list(made.seeds),
            "steps": made.steps,
            "measured_steps": list(made.measured_steps),
            **{name: dict(getattr(made, name)) for name in ("size", "options", "environment", "outcome")},
        },
        "models": [
            {
                "name": model.name,
                "fingerprint": {
                    "class": model.fingerprint.model_class,
                    "parameters": model.fingerprint.parameters,
                    "shapes": model.fingerprint.shapes,
                    "weights": {name: list(values) for name, values in model.fingerprint.weights},
                },
                "attentions": {
                    each.path: {"heads": each.heads, **{name: list(values) for name, values in each.given.items()}}
                    for each in model.attentions
                },
            }
            for model in budgets.models
        ],
    }


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return dict(pairs)


class _Reader:
    """Turns JSON values into records, and refuses what they cannot be."""

    def __init__(self, source: str) -> None:
        self.source = source

    def refuse(self, where: str, expected: str, got: object) -> NoReturn:
        """Raise ConfigError that says what stands where, and what should."""
        shown = repr(got)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
        raise ConfigError(f"budgets {self.source}: {where or 'the file'} must be {expected}, got {shown}; {AGAIN}")

    def fields(self, value: Any, where: str, names: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return an object with all of the names, and no other but the optional ones."""
        if not isinstance(value, dict):
            self.refuse(where, f"an object with {', '.join(names)}", value)
        if missing := [name for name in names if name not in value]:
            self.refuse(where, f"an object with {', '.join(names)}", f"none with {', '.join(missing)}")
        if unknown := [name for name in value if name not in (*names, *optional)]:
            self.refuse(where, f"an object with {', '.join((*names, *optional))} only", unknown[0])
        return value

    def items(self, value: Any, where: str, most: int, read: Read[Value]) -> tuple[Value, ...]:
        """Return the elements of a list."""
        if not isinstance(value, list) or len(value) > most:
            self.refuse(where, f"a list of at most {most}", value)
        return tuple(read(each, f"{where}[{place}]") for place, each in enumerate(value))

    def entries(self, value: Any, where: str, most: int, read: Read[Value]) -> tuple[tuple[str, Value], ...]:
        """Return the names and values of an object."""
        if not isinstance(value, dict) or len(value) > most:
            self.refuse(where, f"an object with at most {most} entries", value)
        return tuple(
            (self.text(name, f"a name in {where}"), read(each, f"{where}.{name}")) for name, each in value.items()
        )

    def text(self, value: Any, where: str) -> str:
        """Return a text that is not empty and not too long."""
        if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT:
            self.refuse(where, f"text of 1 to {MAX_TEXT} characters", value)
        return value

    def integer(self, value: Any, where: str, low: int = 0, high: int = 2**63) -> int:
        """Return an integer in a range."""
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(where, f"an integer in [{low}, {high}]", value)
        return value

    def number(self, value: Any, where: str) -> float:
        """Return a finite number."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.refuse(where, "a finite number", value)
        return float(value)

    def share(self, value: Any, where: str, *, above_zero: bool) -> float:
        """Return a number in (0, 1] or [0, 1]."""
        number = self.number(value, where)
        if not 0 <= number <= 1 or (above_zero and number == 0):
            self.refuse(where, "in (0, 1]" if above_zero else "in [0, 1]", value)
        return number

    def setting(self, value: Any, where: str) -> Setting:
        """Return the value of an option."""
        if value is None or isinstance(value, bool | int):
            return value
        return self.number(value, where) if isinstance(value, float) else self.text(value, where)

    def made_from(self, value: Any, where: str) -> MadeFrom:
        """Return what the budgets were measured on."""
        lists = ("prompts", "seeds", "measured_steps")
        objects: Mapping[str, Read[Any]] = {
            "size": self.setting, "options": self.setting, "environment": self.text, "outcome": self.number
        }  # fmt: skip
        given = self.fields(value, where, (*lists, "steps", *objects))
        reads: Mapping[str, Read[Any]] = {"prompts": self.text, "seeds": self.integer, "measured_steps": self.integer}
        found: dict[str, Any] = {
            **{name: self.items(given[name], f"{where}.{name}", MAX_ENTRIES, reads[name]) for name in lists},
            **{name: self.entries(given[name], f"{where}.{name}", MAX_ENTRIES, objects[name]) for name in objects},
        }
        return MadeFrom(steps=self.integer(given["steps"], f"{where}.steps", 1), **found)

    def model(self, value: Any, where: str) -> ModelBudgets:
        """Return the budgets of one model."""
        given = self.fields(value, where, ("name", "fingerprint", "attentions"))
        attentions = self.entries(given["attentions"], f"{where}.attentions", MAX_ATTENTIONS, self.attention)
        if not attentions:
            self.refuse(f"{where}.attentions", "one attention at least", {})
        return ModelBudgets(
            self.text(given["name"], f"{where}.name"),
            self.fingerprint(given["fingerprint"], f"{where}.fingerprint"),
            tuple(replace(each, path=path) for path, each in attentions),
        )

    def fingerprint(self, value: Any, where: str) -> Fingerprint:
        """Return what tells the model."""
        given = self.fields(value, where, ("class", "parameters", "shapes", "weights"))

        def values(each: Any, at: str) -> tuple[float, ...]:
            return self.items(each, at, MAX_ENTRIES, self.number)

        return Fingerprint(
            self.text(given["class"], f"{where}.class"),
            self.integer(given["parameters"], f"{where}.parameters", 1),
            self.text(given["shapes"], f"{where}.shapes"),
            self.entries(given["weights"], f"{where}.weights", MAX_ENTRIES, values),
        )

    def attention(self, value: Any, where: str) -> AttentionBudgets:
        """Return the budgets of one attention, without its path."""
        given = self.fields(value, where, ("heads",), NUMBERS)
        heads = self.integer(given["heads"], f"{where}.heads", 1, MAX_HEADS)
        numbers: dict[str, tuple[float, ...] | None] = dict.fromkeys(NUMBERS)
        for name in NUMBERS:
            if name not in given:
                continue

            def share(each: Any, at: str, name: str = name) -> float:
                return self.share(each, at, above_zero=name != "min_keep_ratio")

            found = self.items(given[name], f"{where}.{name}", MAX_HEADS, share)
            if len(found) != heads:
                self.refuse(f"{where}.{name}", f"{heads} numbers, one a head", f"{len(found)} numbers")
            numbers[name] = found
        if not any(numbers.values()):
            self.refuse(where, f"an object with one of {', '.join(NUMBERS)} at least", given)
        floors, caps = numbers["min_keep_ratio"], numbers["max_keep_ratio"]
        if floors and caps and any(floor > cap for floor, cap in zip(floors, caps, strict=True)):
            self.refuse(where, "min_keep_ratio at most max_keep_ratio in every head", given)
        return AttentionBudgets("", heads, **numbers)
