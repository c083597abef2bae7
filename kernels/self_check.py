"""Compare each kernel that is about to run with what it should compute, once per process, device and dtype.

A compiler or a GPU that nobody has tried can make a kernel wrong without any error. A wrong one is reported to
``why_not``, which then chooses the next: the log, ``svg2 doctor`` and the report say so. The inputs are 150 to
2,100 tokens, made so that rounding decides nothing; the expected results are computed on the CPU.
"""

import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from svg2_compile.kernels.block_masses import block_masses_reference
from svg2_compile.kernels.block_sparse_attention import block_sparse_attention_reference
from svg2_compile.kernels.card import Kernels
from svg2_compile.kernels.cluster_means import cluster_means_reference
from svg2_compile.kernels.log_dropped_sizes import log_dropped_sizes_reference
from svg2_compile.kernels.measure_recall import measure_recall_reference
from svg2_compile.kernels.op import function_of
from svg2_compile.kernels.ops import CARDS
from svg2_compile.kernels.permute import permute_tokens_reference, unpermute_tokens_reference
from svg2_compile.kernels.select_blocks import select_blocks_reference
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.kernels.sort_labels import sort_labels_reference
from svg2_compile.kernels.why_not import (
    GLUON_ASSIGNMENT,
    PSEUDO_KEYS,
    choose_attention,
    report_wrong_kernel,
    why_not_gluon_assign,
    why_not_triton,
)
from svg2_compile.kernels.work_list import kept_keys, kept_runs_reference

log = logging.getLogger(__name__)

HEADS = 2
CONTEXT = 17
ROWS = 19
MOVED_TOKENS = 1037
MAY_BE_ABSENT = ("context_k", "context_mask", "masses", "errors", "least_keys", "pseudo_k", "metric")
"""Arguments that kernels are compiled with and without."""
# Queries of one cluster.
MORE_THAN_A_TILE = 140
# Of near equals, rounding may choose another cluster.
MAX_OTHER_KEYS_RATIO = 0.01
# fp32 sums in another order; 16-bit results err by their own rounding, and by that of the weights.
MIN_TOLERANCE, ROUNDINGS = 1e-4, 4


@dataclass(frozen=True, slots=True)
class Kind:
    """The tensors that the kernels of an op are compiled for."""

    device: torch.device
    dtype: torch.dtype
    """Of the tensor that dispatch looks at."""
    dim: int
    q_clusters: int
    k_clusters: int
    given: frozenset[str] = frozenset()
    """The arguments that may be None and are not."""
    attention: str = "auto"
    """The attention kernel that is asked for."""

    @property
    def clusters(self) -> int:
        """Clusters of the side that has more."""
        return max(self.q_clusters, self.k_clusters)

    @property
    def compiled_apart(self) -> tuple[object, ...]:
        """What a kernel has code of its own for, by far the most of it."""
        return self.device, self.dtype, self.dim, self.given

    @property
    def tokens(self) -> int:
        """Tokens of a head in a check."""
        return max(150, 2 * self.clusters + 37)


_lock = threading.Lock()
_checked: set[tuple[object, ...]] = set()


def kinds_of(calls: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[tuple[str, Kind], ...]:
    """Return what the kernels of some calls will be given, each op and kind once; ops without kernels are left out.

    Args:
        calls: names of ops with their arguments by name; tensors may be fake.
    """
    return tuple(
        dict.fromkeys(
            (name, _kind_of(card.kernels, arguments))
            for name, arguments in calls
            if (card := CARDS.get(name)) is not None and card.kernels is not None
        )
    )


def _kind_of(kernels: Kernels, arguments: Mapping[str, Any]) -> Kind:
    """Return the kind of tensors that a call is given."""
    tensor, dim, *clusters = kernels.seen(*(arguments[name] for name in inspect.signature(kernels.seen).parameters))
    q_clusters, k_clusters = map(int, clusters)
    given = frozenset(name for name in MAY_BE_ABSENT if arguments.get(name) is not None)
    implementation = arguments.get("implementation", "auto")
    return Kind(tensor.device, tensor.dtype, int(dim), q_clusters, k_clusters, given, implementation)


def check_kernels(kinds: Iterable[tuple[str, Kind]]) -> None:
    """Check the kernels that dispatch would choose, and replace the wrong ones until what runs is right.

    Checks only what no call has checked before; does nothing where no kernel runs, or while a CUDA graph is captured.

    Args:
        kinds: names of ops, each with the tensors that it will be given.

    Raises:
        ValueError: the attention kernel that a kind names is wrong or cannot run.
    """
    for op, kind in kinds:
        if kind.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            continue
        with (
            _lock,
            torch.cuda.device(kind.device),
            torch.device("cpu"),
            torch.no_grad(),
            torch.autocast(kind.device.type, enabled=False),
        ):
            while (name := kernel_of(op, kind)) is not None:
                key = (op, name, *kind.compiled_apart)
                if key in _checked:
                    break
                reason = why_wrong(op, kind)
                if reason is None:
                    _checked.add(key)
                else:
                    name = _suspect(op, kind, name)
                    report_wrong_kernel(name, kind.device, kind.dtype, reason)
                    message = "the kernel %r is wrong on %s with %s and will not be used: %s; please report this"
                    log.warning(message, name, kind.device, kind.dtype, reason)


def kernel_of(op: str, kind: Kind) -> str | None:
    """Return the kernel that dispatch would choose, by the name that ``why_not`` knows it by; None for plain PyTorch.

    Where two kernels work for one op, it is the one to suspect first.
    """
    device, dtype, dim, clusters = kind.device, kind.dtype, kind.dim, kind.clusters
    if op == "block_sparse_attention":
        sizes = {"dim": dim, "clusters": clusters, "keys": kind.tokens, "rows": HEADS * kind.tokens}
        further = "pseudo_k" in kind.given
        choice = choose_attention(device, dtype, **sizes, pseudo_keys=further, implementation=kind.attention)
        return None if choice.implementation == "reference" else choice.implementation
    if why_not_triton(op, device, dtype, dim=dim, clusters=clusters) is not None:
        return None
    kernels = CARDS[op].kernels
    assigns = kernels is not None and kernels.assigns
    return GLUON_ASSIGNMENT if assigns and why_not_gluon_assign(device, dtype, dim=dim) is None else op


def _suspect(op: str, kind: Kind, name: str) -> str:
    """Return the kernel to blame for a wrong result: an attention that is right alone, or ``PSEUDO_KEYS`` after it."""
    alone = replace(kind, given=kind.given - {"pseudo_k"})
    return name if alone == kind or why_wrong(op, alone) is not None else PSEUDO_KEYS


def why_wrong(op: str, kind: Kind, call: Callable[..., Any] | None = None) -> str | None:
    """Return how an op is wrong on a kind of tensors, or None where it is right.

    Args:
        op: the name of one that has kernels.
        kind: what to give it.
        call: what computes the op; what dispatch chooses, if absent.
    """
    kernels = CARDS[op].kernels
    assert kernels is not None
    try:
        reason: str | None = function_of(kernels.self_check)(call or getattr(torch.ops.svg2, op), kind)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return reason


def _random(seed: int, tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(1, HEADS, tokens, dim, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def _grouped_tokens(kind: Kind, clusters: int) -> tuple[Tensor, Tensor]:
    """Return tokens [1, H, N, D] in far groups, and the group of each, [N].

    Groups are the stretches of the sequence that the first clustering draws one token from: it finds them exactly.
    """
    ends = torch.arange(1, clusters + 1, dtype=torch.int64, device="cpu") * kind.tokens // clusters
    group = torch.searchsorted(ends, torch.arange(kind.tokens, dtype=torch.int64, device="cpu"), right=True)
    centres = 4 * _random(0, clusters, kind.dim, torch.float32)
    noise = _random(1, kind.tokens, kind.dim, torch.float32)
    return (centres[:, :, group] + noise / 16).to(kind.dtype), group


def _zeros(kind: Kind, clusters: int, width: int) -> Tensor:
    return torch.zeros(1, HEADS, clusters, width, dtype=torch.float32, device=kind.device)


def _random_labels(kind: Kind, clusters: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(clusters)
    return torch.randint(clusters, (1, HEADS, kind.tokens), generator=generator, dtype=torch.int32, device="cpu")


def _far(got: Tensor, wanted: Tensor, tolerance: float) -> str | None:
    """Return how far results are off, None where within ``tolerance`` of the largest."""
    error = (got.cpu().double() - wanted.double()).abs().max()
    allowed = tolerance * wanted.double().abs().max()
    return None if bool(error <= allowed) else f"off by {float(error):.3g}, at most {float(allowed):.3g} is rounding"


def _wrong_groups(labels: Tensor, centroids: Tensor, x: Tensor, group: Tensor) -> str | None:
    """Return what is wrong with a clustering whose labels should be ``group`` but for their numbers."""
    clusters = centroids.shape[2]
    if not 0 <= int(labels.min()) <= int(labels.max()) < clusters:
        return f"labels run from {int(labels.min())} to {int(labels.max())}, there are {clusters} clusters"
    first = torch.searchsorted(group, torch.arange(clusters, dtype=torch.int64, device="cpu"))
    label_of = labels[:, :, first].long()  # [1, H, C]
    if not torch.equal(label_of[:, :, group], labels.long()):
        return "tokens of one group are in several clusters"
    if label_of.sort(-1).values.ne(torch.arange(clusters, dtype=torch.int64, device="cpu")).any():
        return "groups far from each other share a cluster"
    means = torch.zeros(1, HEADS, clusters, x.shape[3], dtype=torch.float32, device="cpu").index_add_(
        2, group, x.float()
    )
    means /= group.bincount(minlength=clusters)[:, None]
    got = centroids.gather(2, label_of.unsqueeze(-1).expand_as(centroids))
    reason = _far(got, means, MIN_TOLERANCE)
    return reason and f"centroids {reason}"


def check_kmeans(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how a clustering is wrong: twice, from tokens and then from centroids."""
    x, group = _grouped_tokens(kind, kind.k_clusters)
    metric: tuple[Tensor, ...] = ()
    if "metric" in kind.given:
        # where the metric does not look, tokens of a group are farther from each other than groups are
        unseen = torch.linalg.qr(_random(2, kind.dim, max(1, kind.dim // 4), torch.float32)).Q  # [1, H, D, D / 4]
        x = (x.float() + 16 * _random(3, kind.tokens, unseen.shape[3], torch.float32) @ unseen.mT).to(kind.dtype)
        seen = torch.eye(kind.dim, dtype=torch.float32, device="cpu") - unseen @ unseen.mT
        metric = (seen.to(kind.device),)
    centroids = _zeros(kind, kind.k_clusters, kind.dim)
    calls = torch.zeros(1, dtype=torch.int32, device=kind.device)
    for _ in range(2):  # from tokens, then from centroids
        labels = call(x.to(kind.device), centroids, calls, 2, 1, 0, *metric)
        if reason := _wrong_groups(labels.cpu(), centroids.cpu(), x, group):
            return reason
    return None


def check_cluster_tokens(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how a clustering of both sides is wrong, or the order of keys and values."""
    sides = [_grouped_tokens(kind, clusters) for clusters in (kind.q_clusters, kind.k_clusters)]
    (q, _), (k, _) = sides
    # a value says which token it belongs to, in numbers that every dtype holds
    place = torch.arange(kind.tokens, dtype=torch.int64, device="cpu")
    v = torch.nn.functional.pad(torch.stack((place // 256, place % 256), -1), (0, kind.dim - 2)).to(kind.dtype)
    v = v.expand(1, HEADS, -1, -1).contiguous()
    counts = (kind.q_clusters, kind.k_clusters)
    state = [_zeros(kind, count, kind.dim) for count in counts]
    state += [torch.zeros(1, dtype=torch.int32, device=kind.device) for _ in counts]
    for _ in range(2):
        results = call(*(each.to(kind.device) for each in (q, k, v)), *state, 2, 1, 0)
        q_order, q_sizes, k_sizes, k_clustered, v_clustered = (each.cpu() for each in results)
        k_order = (v_clustered[..., 0].float() * 256 + v_clustered[..., 1].float()).int()
        orders = (("queries", q_order, q_sizes), ("keys", k_order, k_sizes))
        for (name, order, sizes), (x, group), centroids in zip(orders, sides, state):
            if (
                not torch.equal(order.sort(-1).values, place.int().expand_as(order))
                or (sizes.sum(-1) != len(place)).any()
            ):
                return f"{name}: their order is no permutation, or their clusters do not add up"
            in_order = torch.stack(
                [
                    torch.arange(sizes.shape[2], dtype=torch.int64, device="cpu").repeat_interleave(each)
                    for each in sizes[0]
                ]
            )
            labels = torch.empty_like(order).scatter_(2, order.long(), in_order.int()[None])
            if not torch.equal(sort_labels_reference(labels, sizes.shape[2])[0], order):
                return f"{name}: tokens of a cluster do not keep their order"
            if reason := _wrong_groups(labels, centroids.cpu(), x, group):
                return f"{name}: {reason}"
        if not torch.equal(k_clustered, permute_tokens_reference(k, k_order)):
            return "keys and values are in different orders"
    return None


def check_sort_labels(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how an order or its sizes are wrong."""
    labels = _random_labels(kind, kind.k_clusters)
    got = call(labels.to(kind.device), kind.k_clusters)
    wanted = sort_labels_reference(labels, kind.k_clusters)
    return None if all(map(torch.equal, (each.cpu() for each in got), wanted)) else "order or sizes differ"


def check_permute_tokens(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how tokens that are put into an order are wrong."""
    return _wrong_copy(call, kind, permute_tokens_reference)


def check_unpermute_tokens(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how tokens that are put back are wrong."""
    return _wrong_copy(call, kind, unpermute_tokens_reference)


def _wrong_copy(call: Callable[..., Any], kind: Kind, reference: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    x = _random(0, MOVED_TOKENS, kind.dim, kind.dtype)
    order = _random(1, MOVED_TOKENS, 1, torch.float32)[..., 0].argsort(-1).int()
    right = torch.equal(call(x.to(kind.device), order.to(kind.device)).cpu(), reference(x, order))
    return None if right else "tokens are in the wrong order"


def check_block_masses(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how the masses of blocks are wrong."""
    q = _random(0, kind.tokens, kind.dim, kind.dtype)
    k_means = _random(1, kind.k_clusters, kind.dim, torch.float32)
    q_labels = _random_labels(kind, kind.q_clusters)
    q_labels[:, :, :MORE_THAN_A_TILE] = 0
    q_order, q_sizes = sort_labels_reference(q_labels, kind.q_clusters)
    k_sizes = sort_labels_reference(_random_labels(kind, kind.k_clusters), kind.k_clusters)[1]
    arguments = (q, q_order, k_means, q_sizes, k_sizes)
    scale = kind.dim**-0.5
    got = call(*_on(kind.device, arguments), scale)
    return _far(got, block_masses_reference(*arguments, scale), 10 * MIN_TOLERANCE)


def check_select_blocks(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how a selection or its statistics are wrong."""
    q_sizes, k_sizes = (
        sort_labels_reference(_random_labels(kind, c), c)[1] for c in (kind.q_clusters, kind.k_clusters)
    )
    q_means = _random(0, kind.q_clusters, kind.dim, torch.float32)
    k_means = _random(1, kind.k_clusters, kind.dim, torch.float32)
    numbers = (kind.dim**-0.5, 0.7, 0.1)
    given = [_random(seed, kind.q_clusters, kind.k_clusters, torch.float32) for seed in (2, 3)]
    masses = given[0].softmax(-1) if "masses" in kind.given else None
    errors = given[1] if "errors" in kind.given else None
    # the only head keeps at least an eighth of the clusters and at most half of them
    of_heads = [[0.5, kind.k_clusters // 8, max(1, kind.k_clusters // 2)]]
    budgets = torch.tensor(of_heads, dtype=torch.float32, device="cpu") if "budgets" in kind.given else None
    floor = torch.full((1, HEADS), kind.tokens // 2, dtype=torch.int32, device="cpu")
    choosing = [masses, errors, floor if "least_keys" in kind.given else None, budgets]
    on_device = _zeros(kind, kind.q_clusters, len(STATISTICS))
    statistics = on_device.cpu().clone()
    got = call(
        *_on(kind.device, (q_means, k_means, q_sizes, k_sizes)), *numbers, on_device, *_on(kind.device, choosing)
    )
    wanted = select_blocks_reference(q_means, k_means, q_sizes, k_sizes, *numbers, statistics, *choosing)
    runs, counts = (each.cpu() for each in got)
    keep = kept_keys(runs, counts, kind.tokens), kept_keys(*wanted, kind.tokens)
    other = float((keep[0] != keep[1]).float().mean())
    if other > MAX_OTHER_KEYS_RATIO:
        return f"{100 * other:.1f} % of the pairs are chosen otherwise"
    reason = _far(on_device.sum(2), statistics.sum(2), MAX_OTHER_KEYS_RATIO)
    return reason and f"statistics {reason}"


def check_attention(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how an attention or its log-sum-exp is wrong."""
    q, k, v = (_random(seed, kind.tokens, kind.dim, kind.dtype) for seed in range(3))
    labels = [_random_labels(kind, clusters) for clusters in (kind.q_clusters, kind.k_clusters)]
    (q_order, q_sizes), (_, k_sizes) = (
        sort_labels_reference(each, c) for each, c in zip(labels, (kind.q_clusters, kind.k_clusters))
    )
    keep = _random(3, kind.q_clusters, kind.k_clusters, torch.float32) < 0
    keep[..., 0] = True
    kept = kept_runs_reference(keep, k_sizes)
    context_k, context_v, mask = None, None, None
    if "context_k" in kind.given:
        context_k, context_v = (_random(seed, CONTEXT, kind.dim, kind.dtype) for seed in (4, 5))
        mask = (
            (torch.arange(CONTEXT, dtype=torch.int64, device="cpu") % 3 > 0).view(1, 1, 1, -1)
            if "context_mask" in kind.given
            else None
        )
    arguments = (q, k, v, q_sizes, kept.runs, kept.counts, context_k, context_v, mask, q_order)
    scale = 4 * kind.dim**-0.5  # a few keys weigh most, so that a wrong one shows
    further: tuple[Any, ...] = (kind.attention,) if kind.attention != "auto" else ()
    pseudo: tuple[Tensor, ...] = ()
    if "pseudo_k" in kind.given:
        means = (cluster_means_reference(each, k_sizes) for each in (k, v))
        pseudo = (*means, log_dropped_sizes_reference(kept.runs, kept.counts, k_sizes))
        further = (kind.attention, None, False)
    got = call(*_on(kind.device, arguments), scale, *further, *_on(kind.device, pseudo))
    exact: list[Any] = [_in_fp64(each) for each in arguments]
    reference: Callable[..., tuple[Tensor, Tensor]] = block_sparse_attention_reference
    in_order = ("auto", None, False, *map(_in_fp64, pseudo[:2]), *pseudo[2:]) if pseudo else ()
    out, lse = reference(*exact, scale, *in_order)
    tolerance = max(ROUNDINGS * torch.finfo(kind.dtype).eps, MIN_TOLERANCE)
    return _far(got[0], out, tolerance) or _far(got[1], lse, 10 * MIN_TOLERANCE)


def check_measure_recall(call: Callable[..., Any], kind: Kind) -> str | None:
    """Return how a recall is wrong."""
    q, k = (_random(seed, kind.tokens, kind.dim, kind.dtype) for seed in range(2))
    (q_order, q_sizes), (_, k_sizes) = (
        sort_labels_reference(_random_labels(kind, c), c) for c in (kind.q_clusters, kind.k_clusters)
    )
    keep = _random(3, kind.q_clusters, kind.k_clusters, torch.float32) < 0
    kept = kept_runs_reference(keep, k_sizes)
    calls = torch.ones(1, dtype=torch.int32, device="cpu")
    arguments = (q, k, q_order, q_sizes, k_sizes, kept.runs, kept.counts, None, None, calls)
    numbers = (4 * kind.dim**-0.5, ROWS, 1, 0)
    got = call(*_on(kind.device, arguments), *numbers)
    return _far(got, measure_recall_reference(*arguments, *numbers), 10 * MIN_TOLERANCE)


def _in_fp64(x: Tensor | None) -> Tensor | None:
    return x.double() if x is not None and x.is_floating_point() else x


def _on(device: torch.device, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if each is None else each.to(device) for each in tensors]
