"""What is known of every op beside its meaning, on one card; every list of ops is made from these.

Imports without Triton.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

# What the tiles are made for: a whole row of either kind lies in the registers of one program.
MAX_HEAD_DIM = 256
MAX_CLUSTERS = 1024
# Rows of a head that are computed densely beside the sparse ones: the matrix of their products, likewise.
MAX_PROBES = 64
# fp64 is for judging only.
FAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Part = Literal["clustering", "selection", "attention", "recall"]
PARTS: tuple[Part, ...] = get_args(Part)
"""The parts of a sparse attention's time, in their order."""
Seen = tuple[Tensor, int, int, int]
"""The tensor whose device and dtype decide whether a kernel can run, its head dimension, and the clusters of queries
and of keys; 0 where an op has no such number, twice the same where it has one side only."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the launcher of one op can take; None where there is no such limit."""

    dtypes: tuple[torch.dtype, ...] | None = None
    dim: int | None = None
    """Largest row."""
    clusters: int | None = None
    """Most clusters on either side."""
    keys: int | None = None
    """Most keys of a head."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of one op."""

    limits: Limits
    seen: Callable[..., Seen]
    """What dispatch looks at; takes the arguments of the op that it names."""
    seen_dtype: Callable[[torch.dtype], torch.dtype]
    """The dtype of the tensor that dispatch looks at, from that of the tokens."""
    launch: str | None
    """The launcher, as ``module:function``; None where the op's own CUDA function chooses among several."""
    self_check: str
    """What says how the op is wrong on some kind of tensors, as ``module:function``."""
    modules: tuple[str, ...]
    """Where the kernels stand; a module that several ops use may be on the card of one of them only."""
    assigns: bool = False
    """Whether tokens are assigned to centroids, which Gluon does on Hopper."""


@dataclass(frozen=True, slots=True)
class Card:
    """One op."""

    name: str
    """Without the namespace."""
    reference: Callable[..., Any]
    """What the op means; the schema is inferred from it."""
    schema: str
    part: Part
    """Which part of the time it is counted to."""
    check: Callable[..., None]
    """Raises for arguments that do not go together; takes those that it names."""
    fake: Callable[..., Any]
    """Returns empty results; takes the arguments that it names, which are checked."""
    cpu: Callable[..., Any]
    """What runs on the CPU."""
    kernels: Kernels | None
    """None where PyTorch computes it on every device."""
    runs: str
    """``triton`` where there are kernels, else what computes it everywhere: ``sdpa``, PyTorch's fused attention, or
    ``pytorch``."""


CARDS: dict[str, Card] = {}
"""Every op by its name; complete once ``svg2_compile.kernels.ops`` is imported."""


def same_dtype(tokens: torch.dtype) -> torch.dtype:
    """Return the dtype of the tokens: what most ops look at."""
    return tokens
