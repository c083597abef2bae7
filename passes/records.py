"""What the passes find, as plain records: no graph is held, so a record may outlive the compilation."""

from dataclasses import dataclass
from typing import Literal

import torch

Size = int | torch.SymInt


def size_hint(size: Size) -> int | None:
    """Return the size that the compiler saw, without a guard; ``None`` for a size known only at run time."""
    if isinstance(size, int):
        return size
    node = size.node
    return int(node.hint) if node.has_hint() else None


def told(size: Size) -> str:
    """Return a size for people: the one that the compiler saw, its symbol where it is known only at run time."""
    hint = size_hint(size)
    return str(size if hint is None else hint)


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why one attention stays dense, and what its owner could do about it."""

    node: str
    """Name of the node in the traced graph."""

    path: str
    """Module path inside the compiled root, such as ``blocks.3.attn2``; the node's name where there is none."""

    reason: str
    """One clause a person understands, such as ``cross-attention: 8192 queries, 512 keys``."""

    hint: str
    """What could be done; empty where nothing can."""

    by_design: bool = False
    """True where the layer is meant to stay dense (cross-attention, short sequences); ``on_unsupported`` ignores it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous run of rows on the key axis of one attention, and on the query axis where that is as long."""

    length: Size
    """Rows, an int or a symbol."""

    is_video: bool
    """True for the rows that are clustered, False for context (text) rows."""

    source: str
    """Node whose axis carries this run: the operand of the ``cat`` that joined the sequence; empty if never joined."""

    source_axis: int
    """Axis of ``source`` whose size is ``length``."""

    asks: bool = True
    """False for rows that are keys only, and no queries."""

    is_exact: bool = False
    """True for rows that ``exact_rows`` names: treated as context rows are, whatever they hold."""

    cut: int = 0
    """Rows of ``source`` that are segments of their own, where ``length`` is symbolic."""


Lifetime = Literal["generation", "forever"]


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One tensor that the sparse graph takes as input and updates in place."""

    site: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    lifetime: Lifetime = "forever"
    """``generation``: every generation starts from ``initial`` again; ``forever``: only the first one does."""
    initial: float | tuple[float, ...] | tuple[tuple[float, ...], ...] = 0.0
    """What it starts as: one number, or those of the last axis or of the last two."""
    counts_clusterings: bool = False
    """Above 0 means that the centroids beside it hold something."""
    adds_up: bool = False
    """A statistic: its values may be added to those of another branch or generation."""

    def create(self, device: torch.device | str) -> torch.Tensor:
        """Return the tensor as it starts."""
        if not self.initial:
            return torch.zeros(self.shape, dtype=self.dtype, device=device)
        return torch.tensor(self.initial, dtype=self.dtype, device=device).expand(self.shape).clone()

    def restart(self, tensor: torch.Tensor) -> None:
        """Let the tensor be as it starts, in place."""
        if not self.initial:
            tensor.zero_()
        else:
            tensor.copy_(self.create(tensor.device))


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention that can be sparse.

    Axes: B batch, H query heads, G key heads, N video tokens, D head dim.
    """

    index: int
    """Ordinal among the SDPA nodes of the graph, in program order."""

    node: str
    path: str
    batch: int
    q_heads: int
    k_heads: int
    head_dim: int
    tokens: Size
    """Video tokens, N."""

    token_hint: int
    """Video tokens for which the cluster counts were chosen."""

    dtype: torch.dtype
    device: torch.device
    segments: tuple[Segment, ...]
    scale: float
    q_clusters: int
    k_clusters: int
    has_mask: bool
    """A key-padding mask is given."""
    is_mask_checked: bool = False
    """Only the values of the mask tell whether it hides keys alike for all queries: they are read at run time."""
    may_hide_video: bool = False
    """The mask is not known to show every video key."""
    is_for_one_length: bool = False
    """Other lengths run with the cluster counts chosen for ``token_hint``: an exported graph cannot be made anew."""

    @property
    def clusters_told(self) -> str:
        """The cluster counts in words."""
        told = f"{self.q_clusters} query and {self.k_clusters} key clusters"
        return f"{told}, chosen for {self.token_hint} tokens" if self.is_for_one_length else told

    @property
    def has_context_queries(self) -> bool:
        """False where only the video rows ask, and context rows are keys alone."""
        return all(segment.asks for segment in self.segments)

    @property
    def exact_tokens(self) -> int:
        """Rows that ``exact_rows`` names; their number is always plain."""
        return sum(int(segment.length) for segment in self.segments if segment.is_exact)

    @property
    def context_tokens(self) -> Size:
        """Rows that are not video."""
        return sum(segment.length for segment in self.segments if not segment.is_video)

    @property
    def layer(self) -> str:
        """The path up to its last number, ``blocks.3`` for ``blocks.3.attn1``; empty where there is none."""
        parts = self.path.split(".")
        numbered = [position for position, part in enumerate(parts) if part.isdigit()]
        return ".".join(parts[: numbered[-1] + 1]) if numbered else ""
