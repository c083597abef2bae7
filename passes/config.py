"""The options that can change the picture."""

import os
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, fields
from typing import Literal

from svg2_compile.kernels.card import MAX_PROBES
from svg2_compile.passes.budgets import Budgets
from svg2_compile.passes.errors import ConfigError
from svg2_compile.passes.read_budgets import read_budgets

TOKENS_PER_Q_CLUSTER = 600
TOKENS_PER_K_CLUSTER = 150
MIN_AUTO_CLUSTERS = 16
MAX_CLUSTERS = 1024
MANY_TOKENS = TOKENS_PER_Q_CLUSTER * (MAX_CLUSTERS + 1)
"""From here on the cluster counts stay the same."""
GUARD_ROWS = 32
"""Rows that the guard looks at where ``recall_rows`` does not say."""


def check_number(
    name: str, value: object, low: float, high: float, advice: str, *, exclusive_low: bool = False
) -> None:
    """Raise ConfigError unless the option is a number in the range."""
    bounds = f"{'(' if exclusive_low else '['}{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number in {bounds}, got {value!r}; {advice}")
    if not low <= value <= high or (exclusive_low and value == low):
        raise ConfigError(f"{name} must be in {bounds}, got {value}; {advice}")


def check_integer(name: str, value: object, low: int, high: int | None, advice: str) -> None:
    """Raise ConfigError unless the option is an integer in the range; ``high`` None is no limit."""
    bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an integer {bounds}, got {value!r}; {advice}")
    if value < low or (high is not None and value > high):
        raise ConfigError(f"{name} must be {bounds}, got {value}; {advice}")


RowRanges = tuple[tuple[int, int | None], ...]
"""Ranges (start, end) of rows; negative numbers count from the end, and an end of None is the end."""


def row_ranges(name: str, value: object) -> RowRanges:
    """Return ranges of rows, given as pairs or as text such as ``0:333/-50:``, as pairs.

    Raises:
        ConfigError: it is neither, or a range holds no row whatever the length.
    """
    try:
        given = [_pair(text) for text in value.split("/")] if isinstance(value, str) else [tuple(x) for x in value]  # type: ignore[attr-defined]
        ranges = tuple((start, end) for start, end in given)
    except (TypeError, ValueError):
        ranges = ((None, None),)
    if not all(_holds_rows(start, end) for start, end in ranges):
        raise ConfigError(
            f"{name} must be ranges of rows (start, end) with start before end, got {value!r}; "
            "((0, 333), (-50, None)), or on the command line 0:333/-50:, is the first 333 rows and the last 50"
        )
    return ranges


def _pair(text: str) -> tuple[int, int | None]:
    start, end = text.split(":")
    return int(start) if start else 0, int(end) if end else None


def _holds_rows(start: object, end: object) -> bool:
    if any(isinstance(each, bool) or not isinstance(each, int) for each in (start, 0 if end is None else end)):
        return False
    assert isinstance(start, int)
    if end is None or not isinstance(end, int):
        return True
    return start < end if (start < 0) == (end < 0) else True


def budgets_of(value: object) -> Budgets | None:
    """Return budgets, given as such or as the path of their file.

    Raises:
        ConfigError: it is neither, or the file cannot be used.
    """
    if value is None or isinstance(value, Budgets):
        return value
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"budgets must be the path of a file that svg2 calibrate wrote, or None, got {value!r}")
    return read_budgets(value)


def check_choice(name: str, value: object, allowed: tuple[str | None, ...]) -> None:
    """Raise ConfigError unless the option is one of the words."""
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


@dataclass(frozen=True, slots=True)
class SparseConfig:
    """What is sparse, when, and how much is kept. Every field can change the picture."""

    top_p: float = 0.9
    """Share of the estimated attention mass that each query cluster keeps, in (0, 1]; 1 keeps everything (eq. 2)."""

    min_keep_ratio: float = 0.1
    """Least share of the key clusters (not tokens) that each query cluster keeps, in [0, 1]."""

    budgets: str | os.PathLike[str] | Budgets | None = None
    """Budgets of layers and heads in the place of ``top_p`` and ``min_keep_ratio``: a file that ``svg2 calibrate``
    wrote for the very model (not the paper's). What it does not say is left to the two options. It is read at once, and
    again where it has changed when a generation begins."""

    estimate_by: Literal["centroids", "queries", "keys"] = "centroids"
    """What the attention mass of a block is estimated from: the centroids of its queries and keys (the paper's, eq. 1);
    every one of its queries, which finds better blocks and costs time (not the paper's); or every one of its keys (not
    the paper's, experimental). The other side goes by its centroid."""

    cluster_metric: Literal["tokens", "queries"] = "tokens"
    """In what two keys are alike when they are clustered: in themselves (the paper's), or in how the queries' centroids
    score them (SVOO's co-clustering), which puts keys together that the queries cannot tell apart."""

    compensate: Literal["none", "centroids", "keys"] = "none"
    """What stands in for the key clusters that a query cluster drops: nothing (the paper's), or one pseudo-key each,
    the mean of its keys and the mean of its values (not the paper's). With ``centroids`` it weighs as many keys as
    there are; with ``keys`` it weighs for the mean query what these keys weigh, which is more faithful and takes one
    product of the mean queries with all keys. Nothing changes where everything is kept. Recall stays the share that is
    attended to exactly."""

    route: Literal["mass", "error"] = "mass"
    """What is kept: the key clusters with most mass (the paper's), or ``error``, as many keys, but where their mean
    would be most wrong in their place (not the paper's); it needs ``compensate``. Half of ``min_keep_ratio`` goes by
    mass then."""

    head_floor: Literal["online"] | None = None
    """What a query cluster keeps at least, beside ``min_keep_ratio``: nothing more (None, the paper's), or ``online``,
    as many keys as the query clusters of its head keep on average in the same call (SCOPE)."""

    repair_rows: int = 0
    """Query rows per head, spread over its clusters, that every sparse call computes densely too, 64 at most; what the
    sparse results of these rows lack is foretold for all rows of the head, where that makes them better (not the
    paper's). 0 repairs nothing. Recall is then measured on these rows, whatever ``recall_rows`` says."""

    q_clusters: int | Literal["auto"] = "auto"
    """Query clusters per head, 1 to 1024; ``auto`` takes one per 600 tokens, 16 at least."""

    k_clusters: int | Literal["auto"] = "auto"
    """Key clusters per head, 1 to 1024; ``auto`` takes one per 150 tokens, 16 at least.

    At most 1023 where a mask may hide video keys: they are sorted as one cluster more.
    """

    kmeans_iters_init: int = 10
    """Lloyd iterations when a site clusters for the first time in a generation."""

    kmeans_iters_step: int = 2
    """Lloyd iterations afterwards, starting from the centroids of the previous denoising step."""

    dense_steps: int | float = 0.2
    """First denoising steps that stay dense: a count (int) or a share of all steps (float in [0, 1])."""

    dense_layers: int = 1
    """First layers that stay dense, in the order in which the model runs them."""

    min_tokens: int = 4096
    """Shortest video sequence that is made sparse; below it clustering costs more than attention saves."""

    max_context_ratio: float = 0.5
    """Largest share of the sequence that context (text) rows may hold; above it all rows are clustered as one piece."""

    exact_rows: RowRanges = ()
    """Rows of every sequence, as ranges (start, end), that are always kept as keys and computed densely as queries:
    text or sound that the graph does not tell from video. Negative numbers count from the end, None is the end. Also
    as text: ``0:333/-50:``."""

    recall_rows: int = 0
    """Query rows per head, spread over its clusters, on which sparse calls measure the true attention mass kept; 0
    measures nothing. Measuring changes no picture."""

    min_recall: float = 0.0
    """Least share of the true attention mass, in [0, 1], that a head must keep to stay sparse, as measured on
    ``recall_rows`` (32 unless given); one that keeps less is dense from that call to the end of the generation."""

    recall_interval: int = 1
    """Which sparse calls of a generation measure: the first, and every so many after it."""

    seed: int = 0
    """Chooses the tokens that start the first clustering, and the rows of ``recall_rows``; nothing else is random."""

    lowering: Literal["inductor", "eager", "tensorrt"] = "inductor"
    """What compiles the graphs: Inductor, or TensorRT for everything between attentions; ``eager`` runs them node by
    node, for debugging."""

    on_unsupported: Literal["dense", "error"] = "dense"
    """What happens to a long self-attention that cannot be made sparse: it stays dense, or compilation fails."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ConfigError: naming the option, its range, and the value given.
        """
        check_number("top_p", self.top_p, 0, 1, "0.9 is a good start for Wan 2.1", exclusive_low=True)
        check_number("min_keep_ratio", self.min_keep_ratio, 0, 1, "0.1 is the paper's setting")
        object.__setattr__(self, "budgets", budgets_of(self.budgets))
        check_number("max_context_ratio", self.max_context_ratio, 0, 1, "0.5 is the default")
        for name in ("q_clusters", "k_clusters"):
            if getattr(self, name) != "auto":
                check_integer(name, getattr(self, name), 1, MAX_CLUSTERS, 'or "auto", which scales with the sequence')
        object.__setattr__(self, "exact_rows", row_ranges("exact_rows", self.exact_rows))
        check_integer("kmeans_iters_init", self.kmeans_iters_init, 1, 1000, "10 is the default")
        check_integer("kmeans_iters_step", self.kmeans_iters_step, 1, 1000, "2 is the paper's setting")
        check_integer("dense_layers", self.dense_layers, 0, None, "1 is the default")
        check_integer("min_tokens", self.min_tokens, 1, None, "4096 is the default")
        check_number("min_recall", self.min_recall, 0, 1, "0 guards nothing, 0.8 catches what goes badly wrong")
        check_integer("recall_rows", self.recall_rows, 0, None, "0 measures nothing, 32 is plenty")
        check_integer("repair_rows", self.repair_rows, 0, MAX_PROBES, "0 repairs nothing, 64 is what it was made for")
        check_integer("recall_interval", self.recall_interval, 1, None, "1 measures at every sparse call")
        check_integer("seed", self.seed, 0, 2**31 - 1, "0 is the default")
        if isinstance(self.dense_steps, float):
            advice = "as a float it is a share of all steps; use an int for a count"
            check_number("dense_steps", self.dense_steps, 0, 1, advice)
        else:
            advice = "as an int it is a count; use a float in [0, 1] for a share"
            check_integer("dense_steps", self.dense_steps, 0, None, advice)
        check_choice("estimate_by", self.estimate_by, ("centroids", "queries", "keys"))
        check_choice("cluster_metric", self.cluster_metric, ("tokens", "queries"))
        check_choice("compensate", self.compensate, ("none", "centroids", "keys"))
        check_choice("route", self.route, ("mass", "error"))
        check_choice("head_floor", self.head_floor, ("online", None))
        if self.route == "error" and self.compensate == "none":
            raise ConfigError(
                "route='error' must come with compensate='centroids' or 'keys', got compensate='none'; it keeps what "
                "the means of the dropped clusters would get wrong, which nothing stands in for otherwise"
            )
        check_choice("lowering", self.lowering, ("inductor", "eager", "tensorrt"))
        check_choice("on_unsupported", self.on_unsupported, ("dense", "error"))

    @property
    def measured_rows(self) -> int:
        """The rows per head on which recall is measured; 0 for none."""
        return self.recall_rows or (GUARD_ROWS if self.min_recall > 0 else 0)

    @property
    def head_budgets(self) -> Budgets | None:
        """What was read of ``budgets``."""
        return self.budgets if isinstance(self.budgets, Budgets) else None

    def clusters_for(self, tokens: int) -> tuple[int, int]:
        """Return the query and key cluster counts for a video sequence of ``tokens`` tokens."""
        auto = {"q_clusters": TOKENS_PER_Q_CLUSTER, "k_clusters": TOKENS_PER_K_CLUSTER}

        def count(name: str) -> int:
            given = getattr(self, name)
            if given != "auto":
                return int(given)
            return min(tokens, MAX_CLUSTERS, max(MIN_AUTO_CLUSTERS, round(tokens / auto[name])))

        return count("q_clusters"), count("k_clusters")

    def lengths_like(self, tokens: int) -> tuple[int, int | None]:
        """Return the shortest and the longest sequence that has the cluster counts of ``tokens``; None for no end."""
        counts = self.clusters_for(tokens)
        shortest = bisect_left(range(MANY_TOKENS), counts, key=self.clusters_for)
        beyond = bisect_right(range(MANY_TOKENS), counts, key=self.clusters_for)
        return shortest, None if beyond == MANY_TOKENS else beyond - 1


FIELD_NAMES = tuple(field.name for field in fields(SparseConfig))
