"""Finished work on disk: one JSON line each, and frames beside them; what was killed in the middle leaves no trace."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svg2_compile.evaluation.errors import EvaluationError
from svg2_compile.video.pictures import to_uint8

LINES = "results.jsonl"
FRAMES = "frames"


def key_of(**settings: Any) -> str:
    """Return a name for work done under these settings; equal settings give equal names."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Ledger:
    """The finished work in one folder."""

    def __init__(self, folder: Path) -> None:
        """Read what is finished.

        Raises:
            EvaluationError: the folder cannot be used, or the file in it is not ours.
        """
        self.folder, self.path = folder, folder / LINES
        self.records: dict[str, dict[str, Any]] = {}
        try:
            (folder / FRAMES).mkdir(parents=True, exist_ok=True)
            self._whole = self._read()
        except OSError as error:
            raise EvaluationError(f"cannot use the folder {folder}: {error.strerror or error}") from error

    def __contains__(self, key: str) -> bool:
        record = self.records.get(key)
        return record is not None and ("frames_file" not in record or (self.folder / record["frames_file"]).is_file())

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.records[key]

    def add(self, key: str, record: dict[str, Any], pixels: Tensor | None = None) -> None:
        """Write finished work, frames first; afterwards it is on the disk.

        Raises:
            EvaluationError: it cannot be written; what was there before is whole.
        """
        record = {"key": key, **record}
        try:
            if pixels is not None:
                from safetensors.torch import save

                record["frames_file"] = f"{FRAMES}/{key}.safetensors"
                _write_whole(self.folder / record["frames_file"], save({"frames": to_uint8(pixels)}))
            self._append(json.dumps(record, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise EvaluationError(
                f"cannot write to {self.folder}: {error.strerror or error}; {len(self.records)} finished results there "
                "are whole: make room and run the same command again to go on"
            ) from error
        self.records[key] = record

    def pixels(self, key: str) -> Tensor:
        """Return the kept frames as float [F, 3, H, W] in [0, 1].

        Raises:
            EvaluationError: the file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / self[key]["frames_file"]
        try:
            tensors = load_file(str(path))
        except (OSError, SafetensorError) as error:
            raise EvaluationError(f"{path} is damaged: {error}; delete it and run the same command again") from error
        if "frames" not in tensors:
            raise EvaluationError(f"{path} is damaged: it holds no frames; delete it and run the same command again")
        frames: Tensor = tensors["frames"]
        return frames.permute(0, 3, 1, 2).to(torch.float32) / 255

    def _read(self) -> int:
        """Fill ``records`` and return the bytes of whole lines; a last line cut short by a kill does not count."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            record = _record_of(line)
            if record is None:
                raise EvaluationError(
                    f"{self.path}, line {number}, is no result of svg2 evaluate; give another --out, or delete the line"
                )
            self.records[record["key"]] = record
        return whole

    def _append(self, line: bytes) -> None:
        try:
            with self.path.open("ab") as file:
                file.truncate(self._whole)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            os.truncate(self.path, self._whole)
            raise
        self._whole += len(line)


def _record_of(line: bytes) -> dict[str, Any] | None:
    """Return what a line holds; None where it is no record of ours."""
    try:
        record = json.loads(line)
    except ValueError:  # no JSON, or no text
        return None
    return record if isinstance(record, dict) and isinstance(record.get("key"), str) else None


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file that is either all there or not at all."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
