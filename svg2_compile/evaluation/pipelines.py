"""Any diffusers pipeline as a subject: load it, ask it for a video or an image, count its work, copy its models."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svg2_compile import tiny_wan
from svg2_compile.evaluation.errors import EvaluationError
from svg2_compile.kernels.private_torch import flash_attention_for_cpu
from svg2_compile.video.measure import Request, Video, denoiser_names

TINY = "tiny"
"""The name of the shipped model."""

PROMPTS = (
    "A cat walks on the grass, realistic style.",
    "A sailing boat leaves a small harbour at sunrise, the camera follows slowly.",
)
"""What is generated where no prompts are given."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
ASKED = {"frames": "num_frames", "height": "height", "width": "width", "guidance_scale": "guidance_scale"}
"""Our words and those of the pipelines' signatures."""


@dataclass(frozen=True, slots=True)
class Size:
    """What the user asked for; ``None`` leaves it to the pipeline."""

    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no pipeline can make.

        Raises:
            EvaluationError: a number below 1.
        """
        for name in ("frames", "height", "width", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvaluationError(f"{name} must be at least 1, got {value}")

    @property
    def given(self) -> dict[str, Any]:
        """What is not left to the pipeline."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if getattr(self, name) is not None}


@dataclass(frozen=True, slots=True)
class PipelineRequest:
    """One prompt and seed for a pipeline that makes videos or images from text."""

    prompt: str
    seed: int
    steps: int
    arguments: dict[str, Any]
    """Sizes and guidance, by the names of the pipeline's own signature."""

    def latents(self, pipeline: Any, *, steps: int | None = None, on_step_end: Any = None) -> Any:
        """Denoise without decoding."""
        return self._call(pipeline, "latent", steps, on_step_end)

    def pixels(self, pipeline: Any, *, on_step_end: Any = None) -> Tensor:
        """Denoise, and let the pipeline decode."""
        return self._decoded(pipeline, None, on_step_end)

    def lean(self) -> PipelineRequest:
        """Return the request itself: other guidance could change the shapes."""
        return self

    def rehearse(self, pipeline: Any) -> Tensor:
        """Return the pixels that one step gives."""
        return self._decoded(pipeline, 1, None)

    def _decoded(self, pipeline: Any, steps: int | None, on_step_end: Any) -> Tensor:
        output = torch.as_tensor(self._call(pipeline, "np", steps, on_step_end), device="cpu").float()
        frames = output[0] if output.ndim == 5 else output  # videos are [B, F, H, W, 3], images [B, H, W, 3]
        return frames.permute(0, 3, 1, 2).clamp(0, 1).contiguous()

    def _call(self, pipeline: Any, output_type: str, steps: int | None, on_step_end: Any) -> Any:
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        output = pipeline(
            prompt=self.prompt, num_inference_steps=self.steps if steps is None else steps, generator=generator,
            output_type=output_type, callback_on_step_end=on_step_end, return_dict=False, **self.arguments,
        )  # fmt: skip
        return output[0]


def load(model: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the pipeline of a model id, a local folder, or the tiny Wan.

    Raises:
        EvaluationError: it cannot be loaded, or is no pipeline from text to frames; says what to do.
    """
    if model == TINY:
        return tiny_wan.load_pipeline(dtype, device)
    pipeline = _from_pretrained(model, dtype)
    _check(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def request_for(model: str, pipeline: Any, prompt: str, seed: int, size: Size) -> Request:
    """Return the request for one prompt and seed; sizes that are not given are the pipeline's own.

    Raises:
        EvaluationError: the pipeline does not take what was given.
    """
    if model == TINY:
        return Video(prompt, seed=seed, **size.given)
    known = inspect.signature(pipeline.__call__).parameters
    arguments = {}
    for name, value in size.given.items():
        if name == "steps":
            continue
        if ASKED[name] not in known:
            raise EvaluationError(f"{type(pipeline).__name__} takes no {ASKED[name]}; leave --{name} away")
        arguments[ASKED[name]] = value
    steps = known["num_inference_steps"].default if size.steps is None else size.steps
    return PipelineRequest(prompt, seed, int(steps), arguments)


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy that shares the weights' memory, to be compiled in another way.

    Its parameters are objects of its own, so that statistics are not mixed up with those of the original.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = torch.nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def counted_flops(pipeline: Any) -> Iterator[dict[str, int]]:
    """Count the floating-point operations of the first forward of each denoising model, by its name."""
    from torch.utils import flop_counter as module

    flop_counter: Any = module  # has no types

    def attention_on_cpu(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(flop_counter.sdpa_flop_count(q, k, v))

    mapping = {flash_attention_for_cpu: attention_on_cpu}
    counts: dict[str, int] = {}
    hooks = []

    def count(name: str, model: torch.nn.Module) -> None:
        # on the CPU this attention has no count of its own
        mode: Any = flop_counter.FlopCounterMode(display=False, custom_mapping=mapping)

        def before(*_: Any) -> None:
            if name not in counts:
                counts[name] = -1
                mode.__enter__()

        def after(*_: Any) -> None:
            if counts[name] == -1:
                mode.__exit__(None, None, None)
                counts[name] = int(mode.get_total_flops())

        hooks.extend([model.register_forward_pre_hook(before), model.register_forward_hook(after, always_call=True)])

    for name in denoiser_names(pipeline):
        count(name, getattr(pipeline, name))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _from_pretrained(model: str, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    folder = Path(model).expanduser()
    if not folder.is_dir() and not HUB_ID.fullmatch(model):
        raise EvaluationError(
            f"{model} is neither a folder nor a model id; give a folder that pipeline.save_pretrained wrote, a model "
            f"id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, or {TINY}"
        )
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise EvaluationError(
            f"{folder} has no model_index.json: it is not a diffusers pipeline; give a folder that "
            "pipeline.save_pretrained wrote (weights in an original layout are converted by diffusers' scripts)"
        )
    try:
        return DiffusionPipeline.from_pretrained(str(folder) if folder.is_dir() else model, dtype=dtype)
    except Exception as error:  # diffusers and the hub raise many kinds
        advice = "check the folder" if folder.is_dir() else "check the model id, the network and your access"
        raise EvaluationError(f"cannot load {model}: {str(error).strip().splitlines()[0]}; {advice}") from error


def _check(pipeline: Any) -> None:
    name = type(pipeline).__name__
    parameters = inspect.signature(pipeline.__call__).parameters
    wanted = ("prompt", "num_inference_steps", "generator", "output_type", "callback_on_step_end", "return_dict")
    if missing := [each for each in wanted if each not in parameters]:
        raise EvaluationError(
            f"{name} takes no {', '.join(missing)}: evaluate needs a pipeline from text to a video or an image whose "
            "steps can be observed"
        )
    needed = [
        each.name
        for each in parameters.values()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD and each.name != "prompt"
    ]
    if needed:
        raise EvaluationError(f"{name} also needs {', '.join(needed)}; evaluate has nothing but prompts to give")
    if not denoiser_names(pipeline):
        raise EvaluationError(f"{name} has no transformer or unet; there is nothing to make sparse")
