"""``svg2 doctor``: which implementation of every op fits here, why not the others, and what the machine is."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from svg2_compile.environment import describe_environment
from svg2_compile.kernels.card import PARTS, Card, Kernels
from svg2_compile.kernels.ops import CARDS
from svg2_compile.kernels.self_check import Kind, check_kernels
from svg2_compile.kernels.why_not import MIN_CAPABILITY, choose_attention, why_not_gluon_assign, why_not_triton
from svg2_compile.passes.errors import ConfigError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class Workload:
    """The attention that is asked about."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    """Of the tokens."""
    dim: int = 128
    """Head dimension."""
    clusters: int = 500
    """Most clusters on either side."""
    tokens: int = 75_600
    """Keys of a head."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs for one op."""

    op: str
    implementation: str
    """``triton``, with ``gluon`` where clustering assigns by that; for attention ``gluon``, ``descriptor`` or
    ``pointer``; ``cpu``, ``sdpa``, ``pytorch``, or ``reference``, plain PyTorch for where nothing faster fits."""
    why_not: Mapping[str, str]
    """The reason against each faster implementation that there is, by name."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that the doctor says."""

    environment: dict[str, str]
    choices: list[Choice]
    warnings: list[str]


def default_device(name: str = "auto") -> torch.device:
    """Return the device of that name; ``auto`` is a GPU if there is one.

    Raises:
        ConfigError: there is no device of that name.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    known = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if name not in known:
        raise ConfigError(f"device must be auto or one of {', '.join(known)} here, got {name!r}")
    return torch.device(name)


def check(workload: Workload) -> None:
    """Compare the kernels for ``workload`` with their references, so that ``diagnose`` knows the wrong ones."""
    kinds = [(card.name, _kind(card.kernels, workload)) for card in _cards() if card.kernels is not None]
    selected_by = ("masses", "errors", "least_keys", "budgets")
    given = (*(("select_blocks", {name}) for name in selected_by), ("block_sparse_attention", {"pseudo_k"}))
    kinds += [(op, replace(dict(kinds)[op], given=frozenset(names))) for op, names in given]
    check_kernels(kinds)


def _kind(kernels: Kernels, workload: Workload) -> Kind:
    dtype, clusters = kernels.seen_dtype(workload.dtype), workload.clusters
    return Kind(workload.device, dtype, workload.dim, clusters, clusters)


def _cards() -> list[Card]:
    """Return the ops with kernels, then the others, each in the order of the parts of an attention."""
    return sorted(CARDS.values(), key=lambda card: (card.kernels is None, PARTS.index(card.part)))


def diagnose(workload: Workload) -> Diagnosis:
    """Return what would run for ``workload``, by the predicate that dispatch uses, and what to know about it."""
    choices = [_choose(card, workload) for card in _cards()]
    return Diagnosis(_environment(workload.device), choices, _warnings(workload, choices))


def _choose(card: Card, workload: Workload) -> Choice:
    if card.kernels is None:
        return Choice(card.name, card.runs, {})
    op, device, dtype = card.name, workload.device, card.kernels.seen_dtype(workload.dtype)
    dim, clusters, keys = workload.dim, workload.clusters, workload.tokens
    fallback = "reference" if device.type == "cuda" else "cpu"
    if op == "block_sparse_attention":
        attention = choose_attention(device, dtype, dim=dim, clusters=clusters, keys=keys, rows=keys)
        is_fast = attention.implementation != "reference"
        return Choice(op, attention.implementation if is_fast else fallback, attention.why_not)
    reason = why_not_triton(op, device, dtype, dim=dim, clusters=clusters, keys=keys)
    if reason:
        return Choice(op, fallback, {"triton": reason})
    if not card.kernels.assigns:
        return Choice(op, card.runs, {})
    reason = why_not_gluon_assign(device, dtype, dim=dim)
    return Choice(op, card.runs, {"gluon": reason}) if reason else Choice(op, f"{card.runs}, gluon", {})


def _environment(device: torch.device) -> dict[str, str]:
    """Return the machine, the versions, and of a GPU its capability and driver."""
    facts = describe_environment()
    for package in ("triton", "diffusers"):
        if importlib.util.find_spec(package) is None:
            facts[package] = "not installed"
    if device.type != "cuda":
        return facts | {"GPU": "in use: no" if torch.cuda.is_available() else "none"}
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    gpu = {"GPU": torch.cuda.get_device_name(device), "compute capability": capability, "driver": _driver()}
    return facts | gpu | {"CUDA of torch": str(torch.version.cuda)}


def _driver() -> str:
    """Return the version of NVIDIA's driver as its own tool tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer[0].strip() if answer else "unknown"


def _warnings(workload: Workload, choices: list[Choice]) -> list[str]:
    """Return what makes the workload slow or impossible here."""
    found = []
    if workload.device.type != "cuda":
        found.append("No GPU is used: attention is sparse in time on the CPU too, but video models are slow there.")
    slow = [choice.op for choice in choices if choice.implementation == "reference"]
    if slow:
        found.append(f"The plain reference runs for {', '.join(slow)}: correct, slow, with memory for all pairs.")
    if workload.device.type == "cuda" and workload.dtype == torch.float32:
        found.append("fp32 is multiplied exactly, without tensor cores: bf16 or fp16 is many times faster.")
    if importlib.util.find_spec("triton") is None:
        least = ".".join(map(str, MIN_CAPABILITY))
        found.append(
            f"Triton is not installed; GPUs of compute capability {least} or newer need it: pip install triton."
        )
    if importlib.util.find_spec("diffusers") is None:
        found.append("diffusers is not installed: steps are not recognised, use svg2_compile.denoise_step.")
    return found


def reasons_in_words(why_not: Mapping[str, str]) -> str:
    """Return one line per reason, after the names of those that it keeps from running."""
    names: dict[str, list[str]] = {}
    for name, reason in why_not.items():
        names.setdefault(reason, []).append(name)
    return "\n".join(f"{', '.join(held)}: {reason}" for reason, held in names.items()) or "–"


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print the two tables and the warnings."""
    ops = Table("op", "runs", "why not", title="Implementations")
    for choice in diagnosis.choices:
        ops.add_row(choice.op, choice.implementation, reasons_in_words(choice.why_not))
    environment = Table("what", "is", title="Environment")
    for name, value in diagnosis.environment.items():
        environment.add_row(name, value)
    console.print(ops)
    console.print(environment)
    for warning in diagnosis.warnings:
        console.print(f"warning: {warning}", style="yellow")
