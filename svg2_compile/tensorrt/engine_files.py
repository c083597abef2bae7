"""TensorRT plans on disk: a line of JSON and the bytes of the plan, under a checksum; nothing in them is executed here.

A file that is damaged, belongs to someone else, or was made for another graph, version or GPU is refused, and the
engine is built anew. Files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from svg2_compile.tensorrt.private_names import folder_of_caches

log = logging.getLogger(__name__)

MAGIC = b"svg2 engine 1\n"
DIGEST = 64
"""Characters of a sha256 in hexadecimal."""


@dataclass(frozen=True, slots=True)
class EngineFile:
    """An engine as it is kept."""

    key: str
    """Digest of the graph and of ``environment``."""
    environment: dict[str, str]
    """Versions and the GPU."""
    weights: str
    """Digest of the weights that the plan holds."""
    inputs: tuple[str, ...]
    """Names of the bindings, in order."""
    outputs: tuple[str, ...]
    needs_output_allocator: bool
    plan: bytes


def default_folder() -> Path:
    """Return the folder of engines beside Inductor's caches; ``TORCHINDUCTOR_CACHE_DIR`` moves both."""
    return folder_of_caches() / "svg2_engines"


def write_engine(path: Path, engine: EngineFile) -> None:
    """Write an engine, replacing what is there."""
    names = ("key", "environment", "weights", "inputs", "outputs", "needs_output_allocator")
    facts = json.dumps({name: getattr(engine, name) for name in names}).encode()
    body = facts + b"\n" + engine.plan
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, delete=False) as file:
        try:
            file.write(MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def read_engine(path: Path, key: str, environment: dict[str, str]) -> EngineFile | None:
    """Return the engine of a file; None, with a warning, where it is not what was asked for, or None where none is."""
    try:
        with path.open("rb") as file:
            owner, content = os.fstat(file.fileno()).st_uid, file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s cannot be read: %s; the engine is built anew", path, error)
        return None
    start = len(MAGIC) + DIGEST + 1
    digest, body = content[len(MAGIC) : start - 1], content[start:]
    facts, _, plan = body.partition(b"\n")
    if hasattr(os, "getuid") and owner != os.getuid():
        reason = "belongs to another user"
    elif not content.startswith(MAGIC):
        reason = "is no engine of this version"
    elif hashlib.sha256(body).hexdigest().encode() != digest:
        reason = "is damaged"
    else:
        known = json.loads(facts)
        if known["key"] == key and known["environment"] == environment:
            known |= {name: tuple(known[name]) for name in ("inputs", "outputs")}
            return EngineFile(**known, plan=plan)
        reason = f"was made for {known['environment']}"
    log.warning("%s %s; the engine is built anew", path, reason)
    return None
