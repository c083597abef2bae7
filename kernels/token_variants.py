"""Kernels for tokens, compiled ahead of time: for which rows, and of which types their arguments are."""

from typing import Any

import torch

from svg2_compile.kernels.ahead_of_time import AotVariant

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ROWS = (
    (torch.bfloat16, 128),
    (torch.bfloat16, 64),
    (torch.float16, 128),
    (torch.float16, 64),
    (torch.float16, 80),
    (torch.bfloat16, 256),
    (torch.float32, 64),
    (torch.float32, 128),
)
"""What is compiled ahead of time: the usual rows, and padded and fp32 ones."""
# Pointers to something else than tokens.
POINTERS = {
    "fp32": ("half_norms_ptr", "sums_ptr", "q_centroids_ptr", "k_centroids_ptr", "metric_ptr"),
    "i32": (
        *("labels_ptr", "counts_ptr", "starts_ptr", "needed_ptr"),
        *("q_order_ptr", "k_order_ptr", "q_calls_ptr", "k_calls_ptr"),
    ),
}


def token_variant(
    name: str,
    fn: Any,
    dtype: torch.dtype,
    constexprs: dict[str, object],
    num_warps: int,
    num_stages: int,
    max_registers: int | None = None,
) -> AotVariant:
    """Return a kernel for tokens of ``dtype``, with aligned pointers and strides."""
    names: list[str] = [each for each in fn.arg_names if each not in constexprs]
    types = dict.fromkeys((each for each in names if each.endswith("_ptr")), f"*{NAMES[dtype]}")
    types |= {each: f"*{kind}" for kind, pointers in POINTERS.items() for each in pointers if each in names}
    return AotVariant(
        name=name,
        fn=fn,
        signature={each: types.get(each, "i32") for each in names},
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=num_stages,
        divisible_by_16=tuple(each for each in names if each.endswith("_ptr") or each.startswith("stride_")),
        max_registers=max_registers,
    )
