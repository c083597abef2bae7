"""Figures and names as text, for the report, the console and the page of an evaluation."""

from __future__ import annotations


def number(value: float | None, digits: int = 2, unit: str = "", *, unknown: str = "–") -> str:
    """Return a figure with its unit; ``unknown`` where there is none."""
    return unknown if value is None else f"{value:.{digits}f}{unit}"


def percent(share: float | None, digits: int = 1, unit: str = "%", *, unknown: str = "–") -> str:
    """Return a share, 0 to 1, as a percentage; ``unknown`` where there is none."""
    return number(None if share is None else 100 * share, digits, unit, unknown=unknown)


def dotted(prefix: str, path: str) -> str:
    """Return the path of a module inside another; either may be empty."""
    return f"{prefix}.{path}" if prefix and path else prefix or path
