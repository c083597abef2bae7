"""Write graphs to ``SVG2_DEBUG_DIR``, numbered in the order in which they were made."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from torch.fx import GraphModule

_counter = itertools.count()


def dump_graph(gm: GraphModule, name: str) -> Path | None:
    """Write the code of ``gm`` to ``$SVG2_DEBUG_DIR/<number>_<name>.py``; do nothing when the variable is unset."""
    folder = os.environ.get("SVG2_DEBUG_DIR")
    if not folder:
        return None
    path = Path(folder) / f"{next(_counter):04d}_{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(gm.print_readable(print_output=False), encoding="utf-8")
    return path
