"""``svg2 evaluate``: what sparsity costs and gains for one pipeline, and which layer did it.

Work is done in items, and each finished item is written down at once (``ledger``): one rehearsal; for every prompt and
seed a dense eager, a dense compiled and one sparse generation per configuration; one measurement of speed per
configuration; the comparisons. A run that was stopped goes on with what is missing.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

import svg2_compile
from svg2_compile import tiny_wan
from svg2_compile.environment import describe_environment
from svg2_compile.evaluation.errors import EvaluationError
from svg2_compile.evaluation.ledger import Ledger, key_of
from svg2_compile.evaluation.pipelines import TINY, Size, counted_flops, load, request_for, twin
from svg2_compile.options import Options, split_options
from svg2_compile.passes import config
from svg2_compile.passes.errors import ConfigError
from svg2_compile.reporting import Report
from svg2_compile.schedule import dense_step_count
from svg2_compile.video.measure import (
    TINY_OPTIONS,
    StepLog,
    denoiser_names,
    fastest_attention,
    generate,
    generate_in_turns,
    report_of,
    time_split,
    warm_up,
    with_models,
)
from svg2_compile.video.progress import Progress
from svg2_compile.video.quality import compare, lpips_missing

EAGER, DENSE = "dense, eager", "dense, compiled"
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Configuration:
    """A way to be sparse."""

    name: str
    options: dict[str, Any]
    """As for ``torch.compile``."""

    @property
    def resolved(self) -> Options:
        """All options, those left to default too.

        Raises:
            ConfigError: an option is unknown or out of range.
        """
        return split_options(self.options)[0]


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """What to evaluate, and how."""

    model: str
    out: Path
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    configurations: tuple[Configuration, ...]
    size: Size
    device: str = "auto"
    dtype: str = "auto"
    recall_rows: int = 16
    """Query rows per head on which recall is measured; 0 measures none."""
    speed_steps: int = 10
    """Steps of the measurement of speed, if the generation has more."""
    blocks: bool = False
    """Compile one block for all, instead of the whole model."""

    def __post_init__(self) -> None:
        """Refuse what cannot run, before anything is loaded.

        Raises:
            ConfigError: an option of a configuration, or a name.
            EvaluationError: nothing to do.
        """
        for each in self.configurations:
            split_options(each.options)
        config.check_choice("device", self.device, ("auto", "cpu", "cuda"))
        config.check_choice("dtype", self.dtype, ("auto", "float32", "float16", "bfloat16"))
        config.check_integer("recall_rows", self.recall_rows, 0, None, "16 is the default")
        config.check_integer("speed_steps", self.speed_steps, 2, None, "10 is the default")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, but torch sees no GPU; use cpu")
        names = [each.name for each in self.configurations]
        if len(set(names)) < len(names):
            raise EvaluationError(f"configurations must differ, got {', '.join(names)}")
        for name in ("prompts", "seeds", "configurations"):
            if not getattr(self, name):
                raise EvaluationError(f"{name} must not be empty")

    @property
    def torch_device(self) -> torch.device:
        """Where the model runs."""
        has_gpu = torch.cuda.is_available()
        return torch.device("cuda" if has_gpu and self.device != "cpu" else "cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the weights."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)  # type: ignore[no-any-return]
        return torch.bfloat16 if self.torch_device.type == "cuda" else torch.float32


class Evaluation:
    """One run over all items; ``records`` finds the finished ones afterwards."""

    def __init__(self, settings: EvaluationSettings) -> None:
        self.settings = settings
        self.ledger = Ledger(settings.out)
        self.environment = {**describe_environment(), "dtype": str(settings.torch_dtype).removeprefix("torch.")}

    @cached_property
    def pipeline(self) -> Any:
        """The pipeline, dense and not compiled."""
        return load(self.settings.model, self.settings.torch_device, self.settings.torch_dtype)

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """Every prompt with every seed."""
        return [(prompt, seed) for prompt in self.settings.prompts for seed in self.settings.seeds]

    @property
    def compared(self) -> tuple[Configuration | str, ...]:
        """What is compared with the dense compiled generations: the noise floor first."""
        return (EAGER, *self.settings.configurations)

    def request(self, prompt: str, seed: int) -> Any:
        """Return what to ask the pipeline."""
        return request_for(self.settings.model, self.pipeline, prompt, seed, self.settings.size)

    def key(self, kind: str, configuration: Configuration | str, prompt: str = "", seed: int = 0, **more: Any) -> str:
        """Return the name of an item: it holds everything that the result depends on."""
        options: Any = configuration
        if isinstance(configuration, Configuration):
            ours, inductors = split_options(self.options(configuration))
            options = {**asdict(ours), **inductors}
        return key_of(
            kind=kind, model=self._model_identity, size=asdict(self.settings.size), environment=self.environment,
            options=options, prompt=prompt, seed=seed, blocks=self.settings.blocks, **more,
        )  # fmt: skip

    def generation_key(self, configuration: Configuration | str, prompt: str, seed: int) -> str:
        """Return the name of one generation."""
        rows = {"recall_rows": self.settings.recall_rows} if isinstance(configuration, Configuration) else {}
        return self.key("generation", configuration, prompt, seed, **rows)

    def speed_key(self, configuration: Configuration) -> str:
        """Return the name of a measurement of speed."""
        return self.key("speed", configuration, *self.pairs[0], steps=self.settings.speed_steps)

    def comparison_key(self, configuration: Configuration | str, prompt: str, seed: int) -> str:
        """Return the name of a comparison with the dense compiled generation."""
        video, reference = (self.generation_key(each, prompt, seed) for each in (configuration, DENSE))
        return key_of(kind="comparison", video=video, reference=reference, lpips=lpips_missing() is None)

    @property
    def rehearsal_key(self) -> str:
        """The name of the rehearsal."""
        return self.key("rehearsal", EAGER, *self.pairs[0])

    def run(self, console: Any) -> None:
        """Do what is missing.

        Raises:
            EvaluationError: the pipeline refuses the request or fails, or the disk is full.
            ConfigError: no step would be sparse.
        """
        try:
            self._run(console)
        except (ConfigError, EvaluationError, tiny_wan.TinyWanError):
            raise
        except BaseException:  # also the keys that stop a program
            kept = f"{len(self.ledger.records)} finished results are kept in {self.settings.out}"
            console.print(f"stopped: {kept}; run the same command again to go on", markup=False)
            raise

    def _run(self, console: Any) -> None:
        with Progress(console) as self._progress, fastest_attention(self.settings.torch_device):
            self._check()
            self._do(self.rehearsal_key, self._rehearse)
            self._generations(EAGER, lambda: (self.pipeline, 0.0))
            self._generations(DENSE, lambda: self._compiled(None))
            for each in self.settings.configurations:
                self._do(self.speed_key(each), partial(self._speed, each))
                self._generations(each, partial(self._compiled, each, self.settings.recall_rows))
            self._release()
            for configuration in self.compared:
                for prompt, seed in self.pairs:
                    self._compare(configuration, prompt, seed)

    def options(self, configuration: Configuration, recall_rows: int = 0) -> dict[str, Any]:
        """Return the options to compile with."""
        suited = TINY_OPTIONS if self.settings.model == TINY else {}
        # what a configuration with a guard measures is its own
        recall = {"recall_rows": recall_rows} if recall_rows and not configuration.resolved.sparse.min_recall else {}
        return {**suited, **configuration.options, **recall}

    def dense_steps(self, configuration: Configuration, steps: int) -> int:
        """Return how many of ``steps`` are dense under a configuration."""
        return dense_step_count(split_options(self.options(configuration))[0].sparse, steps)

    @cached_property
    def _model_identity(self) -> str:
        """What tells this model from another one, or from the same folder with other weights."""
        if self.settings.model == TINY:
            return TINY
        folder = Path(self.settings.model).expanduser()
        if not folder.is_dir():
            return self.settings.model
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        stamps = [f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
        return f"{folder.resolve()} {hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]}"

    def _check(self) -> None:
        """Refuse what cannot go well to the end."""
        models = [getattr(self.pipeline, name) for name in denoiser_names(self.pipeline)]
        for model in models if self.settings.blocks else []:
            if not getattr(model, "_repeated_blocks", None):
                raise EvaluationError(f"{type(model).__name__} names no repeated blocks; leave --blocks away")
        steps = self.request(*self.pairs[0]).steps
        for each in self.settings.configurations:
            if self.dense_steps(each, steps) >= steps:
                raise ConfigError(
                    f"{each.name}: at least one step must be sparse, got {steps} steps of which "
                    f"{self.dense_steps(each, steps)} are dense; give more --steps or fewer dense_steps"
                )

    def _do(self, key: str, work: Callable[[], tuple[dict[str, Any], torch.Tensor | None]]) -> None:
        if key not in self.ledger:
            record, pixels = work()
            self.ledger.add(key, record, pixels)

    def _rehearse(self) -> tuple[dict[str, Any], None]:
        """Run one step and decode it, so that a wrong size is found before hours are spent; count its operations."""
        request = self.request(*self.pairs[0])
        try:
            with counted_flops(self.pipeline) as flops:
                pixels = self._progress.call("rehearsal: one step", lambda: request.rehearse(self.pipeline))
        except (ConfigError, tiny_wan.TinyWanError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # pipelines, models and VAEs raise many kinds
            given = ", ".join(f"{name} {value}" for name, value in self.settings.size.given.items())
            raise EvaluationError(
                f"{type(self.pipeline).__name__} cannot do one step with {given or 'its own sizes'}: "
                f"{type(error).__name__}: {error}; change --height, --width or --frames to what it accepts"
            ) from error
        _check_numbers(pixels, EAGER)
        shape = dict(zip(("frames", "height", "width"), (pixels.shape[0], *pixels.shape[2:])))
        return {"kind": "rehearsal", **shape, "steps": request.steps, "flops": flops}, None

    def _generations(self, configuration: Configuration | str, make: Callable[[], tuple[Any, float]]) -> None:
        pairs = [pair for pair in self.pairs if self.generation_key(configuration, *pair) not in self.ledger]
        if not pairs:
            return
        pipeline, compile_seconds = make()
        name = configuration if isinstance(configuration, str) else configuration.name
        for prompt, seed in pairs:
            svg2_compile.reset()
            request = self.request(prompt, seed)
            log = StepLog(lambda: report_of(pipeline))
            advance = self._progress.bar(f"{name}, seed {seed}: {prompt}", request.steps)

            def after_step(log: StepLog = log, advance: Callable[[], None] = advance) -> None:
                log()
                advance()

            started = time.perf_counter()
            generation = generate(pipeline, request, after_step)
            _check_numbers(generation.pixels, name)
            record = {
                "kind": "generation", "configuration": name, "prompt": prompt, "seed": seed,
                "seconds": time.perf_counter() - started, "step_seconds": generation.step_seconds,
                "compile_seconds": compile_seconds,
            }  # fmt: skip
            if isinstance(configuration, Configuration):
                record |= {"options": self.options(configuration), "report": generation.report.to_dict()}
                record["heads"] = {name: _rounded(getattr(log, name)) for name in ("density", "recall")}
            self.ledger.add(self.generation_key(configuration, prompt, seed), record, generation.pixels)

    def _compiled(self, configuration: Configuration | None, recall_rows: int = 0) -> tuple[Any, float]:
        """Return the pipeline with models compiled dense or sparse, and the seconds that it took."""
        if configuration is None or recall_rows:
            torch.compiler.reset()  # every configuration compiles anew; a limit on recompilations is not met
        options: dict[str, Any] = {}
        if configuration is not None:
            options = {"backend": svg2_compile.svg2_backend, "options": self.options(configuration, recall_rows)}
        models = {name: twin(getattr(self.pipeline, name)) for name in denoiser_names(self.pipeline)}
        for model in models.values():
            if self.settings.blocks:
                model.compile_repeated_blocks(**options)  # type: ignore[operator]
            else:
                model.compile(**options)
        pipeline = with_models(self.pipeline, models)
        name = "dense" if configuration is None else configuration.name
        request = self.request(*self.pairs[0])
        return pipeline, self._progress.call(f"compiling {name}", lambda: warm_up(pipeline, request))

    def _speed(self, configuration: Configuration) -> tuple[dict[str, Any], None]:
        """Measure dense and sparse steps in turns, where their time goes, and their memory."""
        request = self.request(*self.pairs[0])
        steps = min(request.steps, self.settings.speed_steps)
        whole, request = request.steps, replace(request, steps=steps)
        dense, dense_compile = self._compiled(None)
        # as many of the fewer steps are dense
        share = self.dense_steps(configuration, whole) / whole
        sparse, sparse_compile = self._compiled(
            replace(configuration, options={**configuration.options, "dense_steps": share})
        )
        pipelines = (dense, sparse)
        memory = _PeakMemory(self.settings.torch_device)
        bars = [self._progress.bar(f"{name} in turns", steps) for name in ("dense", configuration.name)]

        def after_step(index: int) -> None:
            memory.read(index)
            bars[index]()

        models = [{name: getattr(each, name) for name in denoiser_names(self.pipeline)} for each in pipelines]
        generations = generate_in_turns(self.pipeline, models, request, after_step)
        # a first sparse step clusters from tokens, and the first of all also encodes the prompt
        first = max(self.dense_steps(configuration, whole) * steps // whole, 1)
        # of the same steps, because a drifting machine is fair to steps that ran side by side
        medians = [statistics.median(each.step_seconds[first:] or each.step_seconds) for each in generations]
        svg2_compile.reset()
        splits = [self._progress.call("profiling", partial(time_split, each, request)) for each in pipelines]
        dense_count = self.dense_steps(configuration, whole)
        report = generations[1].report
        record = {
            "kind": "speed", "configuration": configuration.name, "steps": steps,
            "compile_seconds": {"dense": dense_compile, "sparse": sparse_compile},
            "step_seconds": [each.step_seconds for each in generations],
            "dense_step_seconds": medians[0], "sparse_step_seconds": medians[1],
            "step_speedup": medians[0] / medians[1],
            "loop_speedup": whole * medians[0] / (dense_count * medians[0] + (whole - dense_count) * medians[1]),
            "predicted_step_speedup": self._predicted(report),
            "density": report.density,
            "split": {
                name: {"attention": each.attention, "clustering": each.clustering, "rest": each.rest}
                for name, each in zip(("dense", "sparse"), splits)
            },
            "peak_memory_gib": memory.peaks_gib,
        }  # fmt: skip
        return record, None

    def _predicted(self, report: Report) -> float | None:
        """Return the speed-up of a forward if time were operations, clustering were free, and nothing else changed."""
        flops = self.ledger[self.rehearsal_key]["flops"]
        first, *others = denoiser_names(self.pipeline)
        saved: dict[str, float] = {}
        for site in report.sparse_sites:
            if site.density is not None:
                name = next((name for name in others if site.path.startswith(f"{name}.")), first)
                saved[name] = saved.get(name, 0.0) + site.dense_flops * (1 - site.density)
        # of two equal models, one step has run but one
        total = float(sum(flops.get(name, next(iter(flops.values()))) for name in saved))
        return total / (total - sum(saved.values())) if total else None

    def _compare(self, configuration: Configuration | str, prompt: str, seed: int) -> None:
        key = self.comparison_key(configuration, prompt, seed)
        if key in self.ledger:
            return
        video, reference = (self.generation_key(each, prompt, seed) for each in (configuration, DENSE))
        quality = compare(self.ledger.pixels(video), self.ledger.pixels(reference))
        record = {"kind": "comparison", "configuration": self.ledger[video]["configuration"]}
        self.ledger.add(
            key, record | {"prompt": prompt, "seed": seed, "video": video, "to": reference} | asdict(quality)
        )

    def _release(self) -> None:
        """Let go of the models before the frames are compared and drawn."""
        torch.compiler.reset()
        svg2_compile.reset()


def _check_numbers(pixels: torch.Tensor, name: str) -> None:
    """Refuse frames that cannot be compared."""
    if not bool(torch.isfinite(pixels).all()):
        raise EvaluationError(f"{name}: the pipeline returns frames that are not numbers (NaN); try --dtype float32")


class _PeakMemory:
    """The most device memory that the steps of each model took."""

    def __init__(self, device: torch.device) -> None:
        self.peaks_gib: list[float] | None = [0.0, 0.0] if device.type == "cuda" else None
        """``None`` on the CPU, where it is not measured."""
        if self.peaks_gib is not None:
            torch.cuda.reset_peak_memory_stats()

    def read(self, index: int) -> None:
        if self.peaks_gib is not None:
            self.peaks_gib[index] = max(self.peaks_gib[index], torch.cuda.max_memory_allocated() / GIB)
            torch.cuda.reset_peak_memory_stats()


def _rounded(table: dict[str, list[tuple[float, ...] | None]]) -> dict[str, list[list[float] | None]]:
    return {
        path: [None if heads is None else [round(each, 4) for each in heads] for heads in steps]
        for path, steps in table.items()
    }
