"""What a compiled artefact on disk must share with us besides its graph: the ops that the graph calls.

Inductor and AOTAutograd name what they keep after the graph and their own version. What our passes do is in the graph;
what our ops promise is not: strides that a fake returns, arguments that a schema writes. Without more in the name, a
new version of ours would be given code that an older one compiled. So the files of the ops are in the name too.
"""

from __future__ import annotations

import functools
import hashlib
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from svg2_compile import kernels


def named_after_ops() -> AbstractContextManager[None]:
    """Let what is compiled inside be found again only where the ops are the same; the user's own tag stays in force.

    Enter it around each call of a compiler that keeps what it made. torch patches its settings for one thread only
    (read in torch 2.13.0), so others that compile meanwhile are not concerned.
    """
    tag = " ".join(filter(None, (torch.compiler.config.cache_key_tag, f"svg2 ops {ops_digest()}")))
    patched: AbstractContextManager[None] = torch.compiler.config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
    return patched


@functools.cache
def ops_digest() -> str:
    """Return the digest of the ops of this installation; their files are read once."""
    return digest_of(Path(kernels.__path__[0]))


def digest_of(folder: Path) -> str:
    """Return the digest of the names and bytes of the Python files in ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
