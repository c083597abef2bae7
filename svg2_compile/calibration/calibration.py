"""``svg2 calibrate``: find the budgets of a model's heads on generations of its own, and write them to a file.

Every prompt and seed is generated dense, but for a few steps that are spread over those that will be sparse: there each
attention is exact too, and measures beside it what every budget would do wrong. Each of these steps is written down at
once (``samples``). A run that was stopped goes on with what is missing, and gives the same file.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.nn import Module

import svg2_compile
from svg2_compile.calibration.errors import CalibrationError
from svg2_compile.calibration.outcome import Outcome, find_budgets
from svg2_compile.calibration.samples import Sample, Samples
from svg2_compile.calibration.svoo import PROFILE_ROWS, WAN_BAND
from svg2_compile.calibration.try_budgets import EVERYTHING, Recorder
from svg2_compile.environment import describe_environment
from svg2_compile.evaluation.ledger import key_of
from svg2_compile.evaluation.pipelines import TINY, Size, load, request_for, twin
from svg2_compile.fingerprint import fingerprint_of
from svg2_compile.options import Options, split_options
from svg2_compile.passes import config
from svg2_compile.passes.budgets import METHODS, Budgets, Fingerprint, MadeFrom, Method, ModelBudgets, Setting
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.errors import ConfigError
from svg2_compile.passes.read_budgets import write_budgets
from svg2_compile.schedule import dense_step_count
from svg2_compile.video.measure import TINY_OPTIONS, Request, denoiser_names, fastest_attention, with_models
from svg2_compile.video.progress import Progress

ErrorOf = Literal["head", "attention"]
CANDIDATES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
"""Shares that are tried; HASTE tries 0.85, 0.9 and 0.95. Everything comes last."""
LEVELS = 4
"""Steps of a generation that are looked at; HASTE has as many."""
OURS: dict[str, Any] = {"dense_steps": 0, "recall_rows": 0, "min_recall": 0.0, "lowering": "eager", "budgets": None}
"""Options while it is measured: every step that is looked at is sparse, and nothing else is measured."""


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """What to calibrate, and how."""

    model: str
    out: Path
    method: Method
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    size: Size
    options: Mapping[str, Any]
    """As for ``torch.compile``: what the model will be run with."""
    density: float | None = None
    """Mean density of the sparse calls, for ``heart``; None: that of ``top_p`` in all heads."""
    error_of: ErrorOf = "head"
    """What the error of a head is compared with, for ``heart``: its own results, or those of its whole attention."""
    candidates: tuple[float, ...] = CANDIDATES
    band: tuple[float, float] = WAN_BAND
    """For ``svoo-clipped``."""
    levels: int = LEVELS
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot run, before anything is loaded.

        Raises:
            ConfigError: an option, or a setting, is unknown or out of range.
        """
        config.check_choice("method", self.method, METHODS)
        config.check_choice("error_of", self.error_of, get_args(ErrorOf))
        config.check_choice("device", self.device, ("auto", "cpu", "cuda"))
        config.check_choice("dtype", self.dtype, ("auto", "float32", "float16", "bfloat16"))
        config.check_integer("levels", self.levels, 1, 1000, f"{LEVELS} is the default")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, but torch sees no GPU; use cpu")
        if self.density is not None:
            config.check_number("density", self.density, 0, 1, "0.3 keeps 30 % of the pairs", exclusive_low=True)
        for each in self.candidates:
            config.check_number("candidates", each, 0, 1, "0.85,0.9,0.95 are HASTE's", exclusive_low=True)
        if not any(each < EVERYTHING for each in self.candidates):
            raise ConfigError(f"candidates must have a share below 1, got {self.candidates}; 0.85,0.9,0.95 are HASTE's")
        for each in self.band:
            config.check_number("band", each, 0, 1, "0.15,0.2 is SVOO's for Wan 2.1")
        if self.band[0] > self.band[1]:
            raise ConfigError(
                f"band must be a lower and a higher share, got {self.band}; 0.15,0.2 is SVOO's for Wan 2.1"
            )
        if not self.prompts or not self.seeds:
            raise ConfigError("there must be a prompt and a seed at least")
        if self.resolved.sparse.budgets is not None:
            raise ConfigError("budgets must be left away, got some; it is budgets that are made here")

    @property
    def resolved(self) -> Options:
        """All options that the model will be run with."""
        suited = TINY_OPTIONS if self.model == TINY else {}
        return split_options({**suited, **self.options})[0]

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

    @property
    def tried(self) -> tuple[float, ...]:
        """The shares that are measured: the candidates, the one of the options, and everything; none for profiles."""
        if self.method != "heart":
            return ()
        return tuple(sorted({*map(float, self.candidates), float(self.resolved.sparse.top_p), EVERYTHING}))


class _Enough(Exception):
    """The last step of a generation that is looked at has ended."""


class Calibration:
    """One run over all prompts and seeds."""

    def __init__(self, settings: CalibrationSettings) -> None:
        self.settings = settings
        self.samples = Samples(settings.out.with_name(f"{settings.out.name}.samples"))
        self.environment = {**describe_environment(), "dtype": str(settings.torch_dtype).removeprefix("torch.")}

    @cached_property
    def pipeline(self) -> Any:
        """The pipeline, dense and not compiled."""
        return load(self.settings.model, self.settings.torch_device, self.settings.torch_dtype)

    @cached_property
    def models(self) -> dict[str, Module]:
        """Its denoising models, by their names in it."""
        return {name: getattr(self.pipeline, name) for name in denoiser_names(self.pipeline)}

    @cached_property
    def fingerprints(self) -> dict[str, Fingerprint]:
        """What tells the models."""
        return {name: fingerprint_of(model) for name, model in self.models.items()}

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Every prompt with every seed."""
        return [(prompt, seed) for prompt in self.settings.prompts for seed in self.settings.seeds]

    def request(self, prompt: str, seed: int) -> Request:
        """Return what to ask the pipeline."""
        return request_for(self.settings.model, self.pipeline, prompt, seed, self.settings.size)

    @cached_property
    def measured_steps(self) -> tuple[int, ...]:
        """The steps that are looked at: the middles of equal parts of the sparse ones."""
        steps = self.request(*self.runs[0]).steps
        dense = dense_step_count(self.settings.resolved.sparse, steps)
        if dense >= steps:
            raise ConfigError(
                f"at least one step must be sparse, got {steps} steps of which {dense} are dense; give more --steps "
                "or fewer dense_steps"
            )
        levels = min(self.settings.levels, steps - dense)
        return tuple(dense + int((place + 0.5) * (steps - dense) / levels) for place in range(levels))

    def key(self, prompt: str, seed: int, step: int) -> str:
        """Return the name of a sample: it holds everything that the sample depends on."""
        settings = self.settings
        sparse = asdict(replace(settings.resolved.sparse, **OURS))
        if settings.tried:
            del sparse["top_p"]  # is among those that are tried
        return key_of(
            kind="errors" if settings.tried else "profile", tried=settings.tried, rows=PROFILE_ROWS, options=sparse,
            models={name: asdict(each) for name, each in self.fingerprints.items()}, size=asdict(settings.size),
            environment=self.environment, prompt=prompt, seed=seed, step=step,
            steps=self.request(prompt, seed).steps,
        )  # fmt: skip

    def run(self, console: Any) -> Budgets:
        """Measure what is missing, write the file, and return what is in it.

        Raises:
            CalibrationError: nothing is sparse, or the disk is full.
            ConfigError: no step would be sparse, or the density cannot be reached.
            EvaluationError: the pipeline cannot be loaded, or refuses the request.
        """
        wanted = {(run, step): self.key(*run, step) for run in self.runs for step in self.measured_steps}
        found = {place: sample for place, key in wanted.items() if (sample := self.samples.get(key)) is not None}
        missing = [place for place in wanted if place not in found]
        if missing:
            try:
                found |= self._measure(missing, wanted, console)
            except (CalibrationError, ConfigError):
                raise
            except BaseException:  # also the keys that stop a program
                kept = sum(self.samples.get(key) is not None for key in wanted.values())
                told = f"{kept} of {len(wanted)} measured steps are kept in {self.samples.folder}"
                console.print(f"stopped: {told}; run the same command again to go on", markup=False)
                raise
        elif len(wanted) > 1:
            console.print(f"all {len(wanted)} steps were measured before, in {self.samples.folder}", markup=False)
        by_run = {run: [found[run, step] for step in self.measured_steps] for run in self.runs}
        outcome = find_budgets(self.settings, by_run)
        written = self._write(outcome)
        for name in self.models:
            if name not in outcome.budgets:
                console.print(
                    f"{name} has no budgets: nothing of it is sparse, or none of the steps "
                    f"{', '.join(map(str, self.measured_steps))} runs it; then give more --levels",
                    markup=False,
                )
        outcome.show(console, self.settings)
        console.print(
            f'written to {self.settings.out}; run with options={{"budgets": "{self.settings.out}"}} and the options '
            f"that it was made with. {self.samples.folder} may be deleted: with it, another method or density of the "
            "same measurements takes seconds.",
            markup=False,
        )
        return written

    def _write(self, outcome: Outcome) -> Budgets:
        settings = self.settings
        models = tuple(
            ModelBudgets(name, self.fingerprints[name], attentions) for name, attentions in outcome.budgets.items()
        )
        made_from = MadeFrom(
            prompts=settings.prompts,
            seeds=settings.seeds,
            steps=self.request(*self.runs[0]).steps,
            measured_steps=self.measured_steps,
            size=tuple(settings.size.given.items()),
            options=tuple(_settings(settings.resolved.sparse).items()),
            environment=tuple(
                {**self.environment, **({"error_of": settings.error_of} if settings.tried else {})}.items()
            ),
            outcome=tuple(outcome.figures.items()),
        )
        try:
            settings.out.parent.mkdir(parents=True, exist_ok=True)
            return write_budgets(Budgets(settings.method, made_from, models, "", ""), settings.out)
        except OSError as error:
            raise CalibrationError(f"cannot write {settings.out}: {error.strerror or error}") from error

    def _measure(
        self,
        missing: list[tuple[tuple[str, int], int]],
        wanted: Mapping[tuple[tuple[str, int], int], str],
        console: Any,
    ) -> dict[tuple[tuple[str, int], int], Sample]:
        """Run the generations of the missing samples; each is on the disk as soon as it is there."""
        recorders = {name: Recorder(twin(model), self.settings.tried) for name, model in self.models.items()}
        options = (
            {**self.settings.options} if self.settings.model != TINY else {**TINY_OPTIONS, **self.settings.options}
        )
        torch.compiler.reset()  # what was compiled before in this process takes no place
        for recorder in recorders.values():
            recorder.compile({**options, **OURS})
        found: dict[tuple[tuple[str, int], int], Sample] = {}
        with torch.no_grad(), fastest_attention(self.settings.torch_device), Progress(console) as progress:
            dense_seconds, measured_seconds = self._rehearse(recorders, progress)
            runs = {run: [step for each, step in missing if each == run] for run in self.runs}
            runs = {run: steps for run, steps in runs.items() if steps}
            seconds = sum(
                dense_seconds * (steps[-1] + 1 - len(steps)) + measured_seconds * len(steps) for steps in runs.values()
            )
            progress.say(
                f"about {_told(seconds)}: {len(missing)} measured steps of {measured_seconds:.2g} s in {len(runs)} "
                f"generations, whose other steps take {dense_seconds:.2g} s each"
            )
            for run, steps in runs.items():
                advance = progress.bar(f"seed {run[1]}: {run[0]}", steps[-1] + 1)

                def keep(step: int, sample: Sample, run: tuple[str, int] = run) -> None:
                    self.samples.put(wanted[run, step], sample)
                    found[run, step] = sample

                self._generate(self.request(*run), steps, recorders, keep, advance)
        return found

    def _rehearse(self, recorders: Mapping[str, Recorder], progress: Progress) -> tuple[float, float]:
        """Return the seconds of a dense step and of a measured one, and refuse where nothing is sparse."""
        request = self.request(*self.runs[0])

        def seconds_of(models: Mapping[str, Module]) -> float:
            svg2_compile.reset()
            started = time.perf_counter()
            request.latents(with_models(self.pipeline, models), steps=1)
            if self.settings.torch_device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        measuring = {name: each.model for name, each in recorders.items()}
        dense = progress.call("rehearsal: one dense step", lambda: seconds_of(self.models))
        progress.call("compiling", lambda: seconds_of(measuring))
        if not any(each.take() for each in recorders.values()):
            reports = {name: svg2_compile.report(model) for name, model in measuring.items()}
            why = [f"{site.path}: {site.plan}" for report in reports.values() for site in report.sites]
            raise CalibrationError(
                "nothing is sparse, so there is nothing to calibrate: "
                f"{'; '.join(why[:3]) or 'no attention was found'}; "
                'give a larger size, or options such as --config "min_tokens=1024"'
            )
        measured = progress.call("rehearsal: one measured step", lambda: seconds_of(measuring))
        for each in recorders.values():
            each.take()
        return dense, measured

    def _generate(
        self,
        request: Request,
        steps: list[int],
        recorders: Mapping[str, Recorder],
        keep: Callable[[int, Sample], None],
        advance: Callable[[], None],
    ) -> None:
        """Generate up to the last of ``steps``; these are measured, the others dense."""
        pipeline = with_models(self.pipeline, self.models)

        def choose(step: int) -> None:
            # every measured step clusters from tokens, as if it were the first one
            svg2_compile.reset()
            for name, model in self.models.items():
                setattr(pipeline, name, recorders[name].model if step in steps else model)

        def on_step_end(_pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step in steps:
                found = {name: each.take() for name, each in recorders.items()}
                keep(step, {name: each for name, each in found.items() if each})
            advance()
            if step >= steps[-1]:
                raise _Enough
            choose(step + 1)
            return tensors

        choose(0)
        with contextlib.suppress(_Enough):
            request.latents(pipeline, on_step_end=on_step_end)


def _settings(sparse: SparseConfig) -> dict[str, Setting]:
    """Return the options that are not the defaults, and those that budgets stand beside."""
    usual = SparseConfig()
    found: dict[str, Setting] = {}
    for name in config.FIELD_NAMES:
        value = getattr(sparse, name)
        if value != getattr(usual, name) or name in ("top_p", "min_keep_ratio"):
            found[name] = value if isinstance(value, str | int | float | None) else repr(value)
    return found


def _told(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
