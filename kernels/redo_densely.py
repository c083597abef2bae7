"""``svg2::redo_densely_``: dense attention, as the model wrote it, where its mask does more than hide keys."""

import logging
from functools import cache

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from svg2_compile.kernels.checks import check_rank, check_shape
from svg2_compile.kernels.key_mask import check_mask
from svg2_compile.kernels.op import define

log = logging.getLogger(__name__)


def _check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
    check_rank("q", q, 4)
    check_rank("k", k, 4)
    check_shape("out", out, (*q.shape[:3], v.shape[3]))
    check_shape("v", v, (*k.shape[:3], v.shape[3]))
    check_mask(mask)


def redo_densely_reference(
    out: Tensor,
    calls: Tensor,
    is_key_mask: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    refuses: bool,
) -> None:
    """Overwrite ``out`` by dense attention under ``mask``, and count that, unless ``is_key_mask``.

    Args:
        out: [B, H, N, D], any strides; as it is where ``is_key_mask``.
        calls: int32 [1], counted up.
        is_key_mask: bool [] on the CPU, of ``key_mask``.
        q: floating [B, H, N, D].
        k: [B, G, N_k, D] in the dtype of ``q``.
        v: [B, G, N_k, D], likewise.
        mask: bool or in the dtype of ``q``, broadcastable to [B, H, N, N_k].
        scale: factor of the scores.
        refuses: raise instead.

    Raises:
        ValueError: shapes disagree; or the mask does not only hide keys, and ``refuses``.

    Promises:
        Deterministic; no device synchronisation; nothing is computed where ``is_key_mask``.
    """
    _check(out, q, k, v, mask)
    if bool(is_key_mask):
        return
    if refuses:
        raise ValueError(f"{_told(tuple(mask.shape))}; give a boolean key mask, or set on_unsupported='dense'")
    _warn(tuple(mask.shape))
    out.copy_(scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]))
    calls += 1


def _told(shape: tuple[int, ...]) -> str:
    sizes = "×".join(map(str, shape))
    return f"attn_mask {sizes} does more than to hide keys, the same ones from every query, so attention is dense"


@cache
def _warn(shape: tuple[int, ...]) -> None:
    """Say it once a shape: layers and steps have the same mask."""
    log.warning("%s and costs more than without this backend", _told(shape))


define(
    redo_densely_reference,
    name="redo_densely_",
    part="attention",
    check=_check,
    fake=lambda: None,
    mutates=("out", "calls"),
    runs="sdpa",
)
