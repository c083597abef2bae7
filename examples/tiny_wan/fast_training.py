"""What makes training fast on a GPU and does not change what is computed: compilation, attention, matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

FLASH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""PyTorch's own attention kernels, in order of preference."""


class LinearPatchEmbedding(nn.Conv3d):
    """The patch embedding as a matrix product: the same weights and result, without the slow bf16 3-D convolution."""

    def forward(self, latents: Tensor) -> Tensor:
        """Return ``[B, D, F, h/2, w/2]`` from ``[B, C, F, h, w]``."""
        _, rows, columns = self.kernel_size
        patches = latents.unflatten(4, (-1, columns)).unflatten(3, (-1, rows))  # [B, C, F, h/2, 2, w/2, 2]
        patches = patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


def use_linear_patch_embedding(transformer: nn.Module) -> None:
    """Replace the convolution by the matrix product that shares its weights."""
    convolution = transformer.patch_embedding
    linear = LinearPatchEmbedding(
        convolution.in_channels, convolution.out_channels, convolution.kernel_size, convolution.stride, device="meta"
    )
    linear.weight, linear.bias = convolution.weight, convolution.bias
    transformer.patch_embedding = linear


def compile_blocks(transformer: nn.Module) -> None:
    """Compile the repeated blocks, once for each size; what cannot be compiled runs eagerly."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.suppress_errors = True
    transformer.compile_repeated_blocks(dynamic=False)


def attention_backends(device: torch.device, heads: int, head_dim: int, console: Console) -> list[SDPBackend]:
    """Return the attention kernels in order of preference: cuDNN first where it works and is faster than flash."""
    if device.type != "cuda":
        return FLASH
    candidates = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    try:
        times = {one: _attention_ms(one, device, heads, head_dim) for one in candidates}
    except RuntimeError as error:
        console.print(f"cuDNN attention does not work here: {error}")
        return FLASH
    console.print(", ".join(f"{one.name.lower()} {ms:.2f} ms" for one, ms in times.items()), "forward and backward")
    cudnn_wins = times[SDPBackend.CUDNN_ATTENTION] < times[SDPBackend.FLASH_ATTENTION]
    return [SDPBackend.CUDNN_ATTENTION, *FLASH] if cudnn_wins else FLASH


def _attention_ms(backend: SDPBackend, device: torch.device, heads: int, head_dim: int) -> float:
    """Return the milliseconds of one forward and backward of 8192 tokens to themselves and to a prompt."""
    query, key, value, prompt_key, prompt_value = (
        torch.randn(8, length, heads, head_dim, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for length in (8192, 8192, 8192, 16, 16)
    )
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with sdpa_kernel(backend):
        for repeat in range(8):
            if repeat == 3:
                start.record()
            F.scaled_dot_product_attention(query, key, value).square().mean().backward()
            F.scaled_dot_product_attention(query, prompt_key, prompt_value).square().mean().backward()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 5


@contextmanager
def fast_math(device: torch.device) -> Iterator[None]:
    """Let fp32 matrix products use TF32 while training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
