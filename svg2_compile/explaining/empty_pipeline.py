"""A diffusers pipeline without weights, and what it would call its transformer with: configuration files are enough.

Parameters are views of single zeros, so a model of any size takes no memory. The pipeline itself is run until it calls
the transformer: nobody knows better how latents, embeddings and positions become its inputs.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svg2_compile.dynamo import over_all_tensors

CONFIGURATION_FILES = ["model_index.json", "*/config.json", "*/scheduler_config.json"]
TEXT_WIDTHS = ("text_dim", "text_embed_dim", "caption_channels", "joint_attention_dim", "cross_attention_dim")
"""Where transformers say how wide the embeddings of a prompt are; the first that is there."""
POOLED_WIDTHS = ("pooled_projection_dim",)
TEXT_LENGTHS = ("max_text_seq_length", "max_sequence_length")
"""Where some say how long; for the others the pipeline does."""
DEFAULT_TEXT_TOKENS = 256
OTHERWISE = "in Python, svg2_compile.explain(pipe.transformer, *inputs) explains any model whose inputs you have"


class ExplainError(Exception):
    """A model that cannot be explained from its configuration, and what to do."""


@dataclass(frozen=True, slots=True)
class TransformerCall:
    """A transformer and the inputs of its first call."""

    pipeline: str
    transformer: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    steps: int
    """Denoising steps that the pipeline makes unless told otherwise."""


class _Called(Exception):
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_of_call, self.kwargs = args, kwargs


def first_call(model: str, frames: int | None, height: int | None, width: int | None) -> TransformerCall:
    """Return what a pipeline would call its transformer with.

    Args:
        model: a local folder or a model id of the Hub, of which configuration files are fetched, or ``tiny``.
        frames: of the video; None for the pipeline's own number, as for the others.
        height: in pixels.
        width: in pixels.

    Raises:
        ExplainError: there is no such pipeline, or it wants what cannot be made up.
    """
    if model == "tiny":
        return _tiny_call(frames, height, width)
    pipeline = load_empty(_folder_of(model))
    name, signature = type(pipeline).__name__, inspect.signature(type(pipeline).__call__)
    arguments: dict[str, Any] = {"num_frames": frames, "height": height, "width": width}
    for option, value in arguments.items():
        if value is not None and option not in signature.parameters:
            raise ExplainError(f"{name} takes no {option}, got {value}; leave it out")
    arguments = {key: value for key, value in arguments.items() if value is not None}
    arguments |= _prompt_arguments(pipeline.transformer, signature)
    if "output_type" in signature.parameters:
        arguments["output_type"] = "latent"
    known = {*arguments, "self", "prompt"}
    missing = [
        each.name
        for each in signature.parameters.values()
        if each.default is inspect.Parameter.empty and each.name not in known
    ]
    if missing:
        raise ExplainError(
            f"{name} needs {', '.join(missing)}, which cannot be made up from a configuration; {OTHERWISE}"
        )
    call = _run_until_called(pipeline, name, lambda: pipeline(**arguments))
    steps = signature.parameters.get("num_inference_steps")
    return TransformerCall(name, pipeline.transformer, *call, steps.default if steps is not None else 50)


def _tiny_call(frames: int | None, height: int | None, width: int | None) -> TransformerCall:
    from svg2_compile import tiny_wan

    pipeline = tiny_wan.load_pipeline()
    size = {"frames": frames, "height": height, "width": width}
    given: dict[str, Any] = {name: value for name, value in size.items() if value is not None}
    steps = 16

    def generate() -> object:
        return tiny_wan.generate(pipeline, tiny_wan.example_prompts()[0], steps=steps, **given)

    return TransformerCall("tiny Wan", pipeline.transformer, *_run_until_called(pipeline, "tiny Wan", generate), steps)


def _run_until_called(pipeline: Any, name: str, run: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with which ``run`` first calls the pipeline's transformer, which is not run."""
    transformer = pipeline.transformer

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise _Called(args, kwargs)

    pipeline.set_progress_bar_config(disable=True)
    transformer.forward = forward
    try:
        run()
    except _Called as call:
        return call.args_of_call, call.kwargs
    except (ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise ExplainError(f"{name} did not reach its transformer: {error}; check the size, or {OTHERWISE}") from error
    finally:
        del transformer.forward
    raise ExplainError(f"{name} never called its transformer; {OTHERWISE}")


def _prompt_arguments(transformer: Any, signature: inspect.Signature) -> dict[str, Any]:
    """Return embeddings of prompts as the pipeline's text encoder would make them, as far as they are asked for."""
    length = signature.parameters.get("max_sequence_length")
    of_pipeline = length.default if length is not None and isinstance(length.default, int) else DEFAULT_TEXT_TOKENS
    tokens = next((n for key in TEXT_LENGTHS if (n := getattr(transformer.config, key, None))), of_pipeline)
    made: dict[str, Any] = {}
    for name in signature.parameters:
        if name.endswith("prompt_attention_mask"):
            made[name] = torch.ones(1, tokens, dtype=torch.bool, device="cpu")
        elif name.endswith("prompt_embeds"):
            widths = POOLED_WIDTHS if "pooled" in name else TEXT_WIDTHS
            width = next((w for key in widths if (w := getattr(transformer.config, key, None))), None)
            if width is not None:
                made[name] = torch.zeros(
                    *((1, width) if "pooled" in name else (1, tokens, width)), dtype=torch.bfloat16, device="cpu"
                )
    return made


def _folder_of(model: str) -> Path:
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise ExplainError(
            f"model must be a folder or a model id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, got {model!r}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=CONFIGURATION_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExplainError(
            f"the configuration of {model!r} cannot be fetched: {first_line}; give a pipeline's folder instead"
        ) from error


def load_empty(folder: Path) -> Any:
    """Return the pipeline of a folder, its diffusers models without weights, everything else None.

    Raises:
        ExplainError: the folder is no pipeline with a transformer.
    """
    import diffusers

    index = folder / "model_index.json"
    if not index.exists():
        raise ExplainError(f"there is no model_index.json in {folder}; give the folder of a pipeline, not of one model")
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        pipeline_class = getattr(diffusers, parts["_class_name"])
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ExplainError(f"{index} names no pipeline of diffusers {diffusers.__version__}: {error}") from error
    components = {name: _component(folder, name, part) for name, part in parts.items() if not name.startswith("_")}
    if components.get("transformer") is None:
        raise ExplainError(f"{parts['_class_name']} has no transformer; only diffusion transformers are made sparse")
    return pipeline_class(**components)


def _component(folder: Path, name: str, part: Any) -> Any:
    import diffusers

    if not isinstance(part, list):
        return part  # a number or a switch of the pipeline
    kind = getattr(diffusers, part[1], None) if part[0] == "diffusers" and part[1] else None
    if kind is None:
        return None
    try:
        if issubclass(kind, diffusers.ModelMixin):
            with torch.device("meta"):
                model = kind.from_config(kind.load_config(folder, subfolder=name))
            return over_all_tensors(model, _without_memory).eval()
        return kind.from_pretrained(folder, subfolder=name)
    except (OSError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ExplainError(f"{part[1]} cannot be made from {folder / name}: {error}; {OTHERWISE}") from error


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of that shape, bf16 where floating, all of whose elements are one zero."""
    dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
    return torch.zeros((), dtype=dtype, device="cpu").expand(tensor.shape)
