"""Which kernel can take which tensors, and why the others cannot. Imports without Triton.

Dispatch, ``svg2 doctor`` and the self-check all ask here.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch

from svg2_compile.kernels.card import CARDS

# The kernels use bf16 arithmetic and assume the shared memory of this generation.
MIN_CAPABILITY = (8, 0)

wrong_kernels: dict[tuple[str, torch.device, torch.dtype], str] = {}
"""What ``self_check`` found: kernels that gave wrong results, and how. Nothing here uses them again in this process."""


def report_wrong_kernel(name: str, device: torch.device, dtype: torch.dtype, reason: str) -> None:
    """Let nobody use a kernel: an op, one of ``ATTENTIONS``, ``GLUON_ASSIGNMENT`` or ``PSEUDO_KEYS``."""
    wrong_kernels[name, _with_index(device), dtype] = reason


def _why_wrong(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    reason = wrong_kernels.get((name, _with_index(device), dtype)) if wrong_kernels else None
    return reason and f"its self-check failed: {reason}"


def _with_index(device: torch.device) -> torch.device:
    return torch.device(device.type, device.index or 0)


def why_not_triton(
    op: str, device: torch.device, dtype: torch.dtype, *, dim: int = 0, clusters: int = 0, keys: int = 0
) -> str | None:
    """Return why the Triton kernels of ``op`` cannot take such tensors, or None where they can.

    Dispatch and ``svg2 doctor`` both ask here. Numbers that the op has no limit for do not matter.
    """
    kernels = CARDS[op].kernels
    if kernels is None:
        return "it has no kernels"
    limits = kernels.limits
    if limits.dtypes is not None and dtype not in limits.dtypes:
        return f"{str(dtype).removeprefix('torch.')} has no kernel"
    for name, limit, size in (
        ("head dimension", limits.dim, dim),
        ("clusters", limits.clusters, clusters),
        ("keys", limits.keys, keys),
    ):
        if limit is not None and size > limit:
            return f"{name}: at most {limit:,}, got {size:,}"
    if device.type != "cuda":
        return f"no kernel for the {device.type}"
    if not _triton_is_installed():
        return "triton is not installed"
    return _why_too_old(device, MIN_CAPABILITY) or _why_wrong(op, device, dtype)


def _why_too_old(device: torch.device, needed: tuple[int, int]) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= needed:
        return None
    least, got = (".".join(map(str, version)) for version in (needed, capability))
    return f"compute capability {least} or newer is needed, the GPU has {got}"


# What the Gluon kernels are written for: warp-group products and the tensor memory accelerator as Hopper has them.
GLUON_CAPABILITY = (9, 0)
GLUON_DTYPES = (torch.float16, torch.bfloat16)
GLUON_DIMS = (64, 128)
GLUON_ASSIGNMENT = "gluon assignment"


def why_not_gluon(device: torch.device, dtype: torch.dtype, *, dim: int, rows: int) -> str | None:
    """Return why the Gluon attention cannot take such tensors where Triton's can, or None where it can.

    ``rows`` are the keys of all heads and batch elements together.
    """
    if not 0 < rows < 2**31:
        return f"keys of all heads: 1 to 2^31 - 1, got {rows:,}"
    reason = _why_not_hopper(device, dtype, dim)
    return reason or _why_no_module("svg2_compile.kernels.block_sparse_attention_gluon")


def why_not_gluon_assign(device: torch.device, dtype: torch.dtype, *, dim: int) -> str | None:
    """Return why the Gluon assignment of k-means cannot take such tokens where Triton's can, or None where it can."""
    reason = _why_not_hopper(device, dtype, dim) or _why_no_module("svg2_compile.kernels.assign_gluon")
    return reason or _why_wrong(GLUON_ASSIGNMENT, device, dtype)


def why_not_boxes(x: torch.Tensor) -> str | None:
    """Return why the tensor memory accelerator cannot read tokens [B, H, N, D] box by box, or None where it can."""
    if x.numel() == 0:
        return "there are no tokens"
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    if x.data_ptr() % 16 or any(stride <= 0 or stride * x.element_size() % 16 for stride in strides):
        return f"rows must begin at different multiples of 16 bytes, got strides {tuple(x.stride())}"
    return None


def _why_not_hopper(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    if dtype not in GLUON_DTYPES:
        return f"{str(dtype).removeprefix('torch.')} has no Gluon kernel"
    if dim not in GLUON_DIMS:
        return f"head dimension: 64 or 128, got {dim}"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != GLUON_CAPABILITY:
        return "made for compute capability 9.0"
    return None


# What the attention with tensor descriptors needs: the tensor memory accelerator, and rows of whole 16-byte units.
DESCRIPTOR_CAPABILITY = (9, 0)
DESCRIPTOR_DTYPES = (torch.float16, torch.bfloat16)
DESCRIPTOR_DIM_STEP, MAX_DESCRIPTOR_DIM = 8, 128


def why_not_descriptor(device: torch.device, dtype: torch.dtype, *, dim: int, rows: int) -> str | None:
    """Return why the attention with descriptors cannot take such tensors where Triton's can, or None where it can.

    ``rows`` are the keys of all heads and batch elements together.
    """
    if dtype not in DESCRIPTOR_DTYPES:
        return f"{str(dtype).removeprefix('torch.')} has no descriptor kernel"
    if dim % DESCRIPTOR_DIM_STEP or not 0 < dim <= MAX_DESCRIPTOR_DIM:
        return f"head dimension: a multiple of {DESCRIPTOR_DIM_STEP} and at most {MAX_DESCRIPTOR_DIM}, got {dim}"
    if not 0 < rows < 2**31:
        return f"keys of all heads: 1 to 2^31 - 1, got {rows:,}"
    if device.type != "cuda":
        return f"no kernel for the {device.type}"
    too_old = _why_too_old(device, DESCRIPTOR_CAPABILITY)
    return too_old or _why_no_module("svg2_compile.kernels.block_sparse_attention_descriptor")


@cache
def _why_no_module(name: str) -> str | None:
    """Return why a module cannot be imported: Gluon and descriptors change from one version of Triton to the next."""
    try:
        importlib.import_module(name)
    except (ImportError, AttributeError) as error:
        return f"it does not go with this Triton: {error}"
    return None


ATTENTIONS = ("gluon", "descriptor", "pointer")
"""The attention kernels."""
PSEUDO_KEYS = "pseudo-keys"
"""The kernel that attends to pseudo-keys after each of them."""
# Timed on an H100 (docs/lab, 11); elsewhere the other order is an expectation.
HOPPERS_ORDER = ("gluon", "pointer", "descriptor")


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The attention that runs, and why not a faster one."""

    implementation: str
    """One of ``ATTENTIONS``, or ``reference``, plain PyTorch."""
    why_not: Mapping[str, str] = field(default_factory=dict)
    """The reason against each of ``ATTENTIONS`` that is faster here; empty where the implementation was named."""


def why_not_attention(
    implementation: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    dim: int,
    clusters: int = 0,
    keys: int = 0,
    rows: int = 1,
    pseudo_keys: bool = False,
) -> str | None:
    """Return why one of ``ATTENTIONS`` cannot take such tensors, or None where it can.

    Args:
        implementation: one of ``ATTENTIONS``.
        device: where the tensors are.
        dtype: of the tokens.
        dim: head dimension.
        clusters: most clusters on either side.
        keys: keys of a head.
        rows: keys of all heads and batch elements together.
        pseudo_keys: whether pseudo-keys are attended to afterwards.
    """
    reason = why_not_triton("block_sparse_attention", device, dtype, dim=dim, clusters=clusters, keys=keys)
    if reason is None and implementation != "pointer":
        why_not = {"gluon": why_not_gluon, "descriptor": why_not_descriptor}[implementation]
        reason = why_not(device, dtype, dim=dim, rows=rows)
    reason = reason or _why_wrong(implementation, device, dtype)
    if reason is None and pseudo_keys and (wrong := _why_wrong(PSEUDO_KEYS, device, dtype)) is not None:
        reason = f"the kernel for pseudo-keys: {wrong}"
    return reason


def choose_attention(
    device: torch.device,
    dtype: torch.dtype,
    *,
    dim: int,
    clusters: int,
    keys: int,
    rows: int,
    pseudo_keys: bool = False,
    implementation: str = "auto",
) -> AttentionChoice:
    """Return the attention that runs for such tensors: the fastest that can, or the one that is named.

    Dispatch and ``svg2 doctor`` both ask here. The arguments are those of ``why_not_attention``.

    Raises:
        ValueError: the named implementation does not exist or cannot take such tensors.
    """
    if implementation not in ("auto", *ATTENTIONS):
        known = ", ".join(map(repr, ATTENTIONS))
        raise ValueError(f"implementation must be 'auto' or one of {known}, got {implementation!r}")
    reasons: dict[str, str] = {}
    chosen = "reference"
    sizes = {"dim": dim, "clusters": clusters, "keys": keys, "rows": rows}
    for name in _fastest_first(device):
        reason = why_not_attention(name, device, dtype, **sizes, pseudo_keys=pseudo_keys)
        if reason is None:
            chosen = name
            break
        reasons[name] = reason
    if implementation == "auto":
        return AttentionChoice(chosen, reasons)
    reason = why_not_attention(implementation, device, dtype, **sizes, pseudo_keys=pseudo_keys)
    if reason is not None:
        raise ValueError(
            f"the {implementation} attention cannot run: {reason}; leave the choice to 'auto', which takes {chosen!r}"
        )
    return AttentionChoice(implementation)


def _fastest_first(device: torch.device) -> tuple[str, ...]:
    return HOPPERS_ORDER if capability_of(device) == 90 else ATTENTIONS


def capability_of(device: torch.device) -> int | None:
    """Return the compute capability of a GPU, such as 90 for 9.0, or None for another device."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
