"""The machine and the versions behind a figure."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "diffusers", "svg2-compile")


def describe_environment() -> dict[str, str]:
    """Return device, thread count and package versions, for the record beside every figure."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"device": _device(), "python": platform.python_version(), **versions}


def _device() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"
