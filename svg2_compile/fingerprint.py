"""What tells a model from another one, at the price of a few numbers: class, names and shapes, and a few weights."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch.nn import Module

from svg2_compile.passes.budgets import Budgets, Fingerprint
from svg2_compile.passes.errors import ConfigError

SAMPLED_PARAMETERS = 8
SAMPLED_ELEMENTS = 8
FEWEST_ELEMENTS = 64
"""Of a parameter that is sampled: small ones are alike in many models."""
DIGITS = 5
MOST_DISTANCE_RATIO = 0.05
"""Weights that are nearer than this are the same in another dtype: rounding to 8 bits moves them by 3 %."""


def fingerprint_of(model: Module) -> Fingerprint:
    """Return the fingerprint of a model; reads a few dozen of its weights from the device."""
    named = sorted(model.named_parameters(), key=lambda each: each[0])
    lines = "\n".join(f"{name} {tuple(parameter.shape)}" for name, parameter in named)
    sampled = [(name, each) for name, each in named if each.dim() > 1 and each.numel() >= FEWEST_ELEMENTS]
    sampled = sampled[:: max(1, len(sampled) // SAMPLED_PARAMETERS)][:SAMPLED_PARAMETERS]
    weights = ((name, _elements(parameter)) for name, parameter in sampled)
    return Fingerprint(
        type(model).__name__,
        len(named),
        hashlib.sha256(lines.encode()).hexdigest(),
        tuple((name, values) for name, values in weights if values),
    )


def budgets_for(model: Module, budgets: Budgets) -> Budgets:
    """Return the budgets of a model alone, which may be inside of ``model``.

    Raises:
        ConfigError: the file has none for it.
    """
    why_not: list[str] = []
    for module in model.modules():
        classes = {each.__name__ for each in type(module).__mro__}
        wanted = [each for each in budgets.models if each.fingerprint.model_class in classes]
        if not wanted:
            continue
        found = fingerprint_of(module)
        for each in wanted:
            if (difference := _difference(each.fingerprint, found)) is None:
                return budgets.only(each.name)
            why_not.append(f"{each.name} {difference}")
    classes_told = ", ".join(sorted({each.fingerprint.model_class for each in budgets.models}))
    reason = "; ".join(dict.fromkeys(why_not)) or f"it is no {classes_told}"
    raise ConfigError(
        f"budgets {budgets.source} must be of the model that is compiled, got those of another one than this "
        f"{type(model).__name__}: {reason}; make them anew with svg2 calibrate, or leave budgets away"
    )


def _difference(wanted: Fingerprint, found: Fingerprint) -> str | None:
    """Return in what two models of a class differ; None where in nothing that is looked at."""
    if (wanted.parameters, wanted.shapes) != (found.parameters, found.shapes):
        return f"has other parameters ({wanted.parameters} there, {found.parameters} here)"
    here = dict(found.weights)
    pairs = [(there, now) for name, values in wanted.weights if name in here for there, now in zip(values, here[name])]
    distance, size = (math.sqrt(sum(each)) for each in ([(a - b) ** 2 for a, b in pairs], [a * a for a, _ in pairs]))
    if distance > MOST_DISTANCE_RATIO * size:
        return f"has other weights ({distance / size if size else math.inf:.0%} away)"
    return None


def _elements(parameter: Tensor) -> tuple[float, ...]:
    """Return a few elements; none where they are not at hand: not loaded, spread over devices, or made up."""
    data = parameter.detach()
    is_plain = type(data) is Tensor and data.device.type != "meta"
    if not is_plain or not data.is_floating_point() or not any(data.stride()):
        return ()
    places = torch.linspace(0, data.numel() - 1, SAMPLED_ELEMENTS, dtype=torch.float64, device="cpu").long()
    indices = torch.unravel_index(places, data.shape)
    values: list[float] = data[tuple(each.to(data.device) for each in indices)].double().cpu().tolist()
    return tuple(float(f"{value:.{DIGITS}g}") for value in values) if all(map(math.isfinite, values)) else ()
