"""Compile a sparse model ahead of time, and generate from the packages in a process without the model's code.

    python -P examples/export_package.py write /tmp/packages
    python -P examples/export_package.py generate /tmp/packages

A small Wan with random weights stands for yours; ``write`` needs diffusers, ``generate`` does not. Dense steps come
from a package of the untouched program. The state of a package (centroids, counters) lives in tensors of the caller: a
set of zeros per generation and per CFG branch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import svg2_compile.kernels.ops  # noqa: F401  # the packages call torch.ops.svg2
from svg2_compile import SparseConfig, sparsify

LATENT = (1, 4, 2, 32, 32)  # [batch, channels, frames, height, width]: 512 tokens
CONFIG = SparseConfig(top_p=0.9, min_tokens=256, dense_layers=1)
STEPS, DENSE_STEPS, GUIDANCE = 8, 2, 3.0


def write(folder: Path) -> None:
    """Write dense.pt2, sparse.pt2 and state.safetensors."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(LATENT),
        "timestep": torch.tensor([999.0]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "return_dict": False,
    }
    program = torch.export.export(model, (), inputs)
    plan = sparsify(program.module(), CONFIG, state="buffers")
    for decision in plan.decisions:
        print(decision.path, getattr(decision, "reason", "sparse"), sep=": ")
    sparse = torch.export.export(plan.gm, (), inputs)
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "dense.pt2"))
    torch._inductor.aoti_compile_and_package(sparse, package_path=str(folder / "sparse.pt2"))
    state = {name: x for name, x in plan.gm.named_buffers() if name.startswith("svg2_")}
    save_file(state, folder / "state.safetensors")


def generate(folder: Path) -> Tensor:
    """Denoise noise to a latent video."""
    dense = torch._inductor.aoti_load_package(str(folder / "dense.pt2"))
    sparse = torch._inductor.aoti_load_package(str(folder / "sparse.pt2"))
    zeros: dict[str, Tensor] = load_file(folder / "state.safetensors")
    states = {stream: {name: x.clone() for name, x in zeros.items()} for stream in ("cond", "uncond")}
    random = torch.Generator().manual_seed(0)
    prompts = {"cond": torch.randn(1, 12, 16, generator=random), "uncond": torch.zeros(1, 12, 16)}
    latent = torch.randn(LATENT, generator=random)
    sigmas = torch.linspace(1, 0, STEPS + 1)
    for step in range(STEPS):
        flow = {}
        for stream, prompt in prompts.items():
            package: Any = dense if step < DENSE_STEPS else sparse
            if package is sparse:
                sparse.load_constants(states[stream], check_full_update=False, user_managed=True)
            inputs = {"hidden_states": latent, "timestep": 1000 * sigmas[step : step + 1]}
            (flow[stream],) = package(**inputs, encoder_hidden_states=prompt, return_dict=False)
        latent = latent + (sigmas[step + 1] - sigmas[step]) * (
            flow["uncond"] + GUIDANCE * (flow["cond"] - flow["uncond"])
        )
    calls = [int(x) for state in states.values() for name, x in state.items() if name.endswith("_calls")]
    print(f"clustered {calls} times; latent of mean {latent.mean():.4f}, deviation {latent.std():.4f}")
    save_file({"latent": latent}, folder / "result.safetensors")
    return latent


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "generate"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        {"write": write, "generate": generate}[arguments.what](arguments.folder)
