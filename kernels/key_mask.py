"""``svg2::key_mask``: what a mask does that nobody knows before it is there.

Sparse attention takes a mask that hides keys, the same ones from every query. Models give such a mask as numbers to
add, or repeated over queries and heads; only its values tell. They are read once a forward, and where the mask turns
out to be another one, ``svg2::redo_densely_`` computes the attention as the model wrote it.
"""

import torch
from torch import Tensor

from svg2_compile.kernels.checks import FLOATING, check_dtype, check_rank
from svg2_compile.kernels.op import define

LARGEST_HIDING_BIAS = -9000.0
"""A key with at most this added to its scores is hidden. Models write -10000, which is -9984 in bf16."""


def check_mask(mask: Tensor) -> None:
    """Check a mask of four axes."""
    check_rank("mask", mask, 4)
    check_dtype("mask", mask, torch.bool, *FLOATING)


def key_mask_reference(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return which keys ``mask`` shows to some query, and whether that is all that it says.

    A boolean mask shows a key where it is True, one to add where it is 0; it hides one where it is False, or at most
    -9000. It says nothing else if each row [b, h, n] shows exactly the keys that are shown to some query. A row of a
    square mask may also show none, if key n is hidden: nobody reads what a padding row attends to.

    Args:
        mask: bool, or floating and added to the scores, [B or 1, H or 1, N or 1, N_k].

    Returns:
        keys: bool [B or 1, 1, 1, N_k], True where a query sees the key; all True where that is not all: what is
            computed under them counts for nothing, and must be finite.
        is_key_mask: bool [] on the CPU. False as well where a mask to add hides every key of a batch element: then the
            lowest scores decide.

    Raises:
        TypeError: another dtype.
        ValueError: not four axes.

    Promises:
        Deterministic, no aliasing. The device is synchronised, once.
    """
    check_mask(mask)
    shown = mask if mask.dtype is torch.bool else mask == 0
    keys = shown.any(2, keepdim=True).any(1, keepdim=True)
    is_as_keys = (shown == keys).all(-1)  # [B or 1, H or 1, N or 1]
    if mask.shape[2] == mask.shape[3]:
        is_as_keys |= ~shown.any(-1) & ~keys[:, :, 0]
    is_key_mask = is_as_keys.all()
    if mask.dtype is not torch.bool:
        is_key_mask &= (shown | (mask <= LARGEST_HIDING_BIAS)).all() & keys.any(-1).all()
    return keys | ~is_key_mask, is_key_mask.cpu()


define(
    key_mask_reference,
    name="key_mask",
    part="selection",
    check=check_mask,
    fake=lambda mask: (
        mask.new_empty((mask.shape[0], 1, 1, mask.shape[3]), dtype=torch.bool),
        torch.empty((), dtype=torch.bool, device="cpu"),
    ),
    runs="pytorch",
)
