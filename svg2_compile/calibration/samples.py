"""What was measured, on disk: one file for each step that was looked at, so that a run that was stopped goes on."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from svg2_compile.calibration.errors import CalibrationError
from svg2_compile.calibration.try_budgets import Measured

Sample = dict[str, dict[str, Measured]]
"""By model and by path of the attention: what one step of one generation has measured."""
SEPARATOR = "|"
"""Between model and path: neither holds it."""


class Samples:
    """The finished samples in one folder."""

    def __init__(self, folder: Path) -> None:
        """Args: ``folder`` is made where it is not there.

        Raises:
            CalibrationError: it cannot be used.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CalibrationError(f"cannot use the folder {folder}: {error.strerror or error}") from error

    def get(self, key: str) -> Sample | None:
        """Return a sample; None where it is not there, or is damaged and must be measured again."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(str(self._path(key)))
        except (OSError, SafetensorError):
            return None
        sample: Sample = {}
        for name, values in tensors.items():
            model, _, rest = name.partition(SEPARATOR)
            path, _, numbers = rest.partition(SEPARATOR)
            calls, _, tokens = numbers.partition(SEPARATOR)
            if not (calls.isdecimal() and tokens.isdecimal() and values.dtype is torch.float64 and values.dim() == 3):
                return None
            sample.setdefault(model, {})[path] = Measured(int(calls), int(tokens), values)
        return sample

    def put(self, key: str, sample: Sample) -> None:
        """Write a sample; afterwards it is all on the disk.

        Raises:
            CalibrationError: it cannot be written.
        """
        from safetensors.torch import save

        tensors = {
            SEPARATOR.join((model, path, str(each.calls), str(each.tokens))): each.values.contiguous()
            for model, attentions in sample.items()
            for path, each in attentions.items()
        }
        path = self._path(key)
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                file.write(save(tensors))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise CalibrationError(
                f"cannot write to {self.folder}: {error.strerror or error}; what is there is whole: make room and run "
                "the same command again to go on"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
