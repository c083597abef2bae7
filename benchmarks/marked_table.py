"""A generated table between two markers of a Markdown file."""

import re
from pathlib import Path


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- end of name -->`` by ``text``."""
    start, stop = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = path.read_text(encoding="utf-8")
    if start not in page or stop not in page:
        raise SystemExit(f"{path} lacks the markers {start} and {stop}")
    pattern = f"{re.escape(start)}.*?{re.escape(stop)}"
    path.write_text(re.sub(pattern, lambda _: f"{start}\n{text}\n{stop}", page, flags=re.S), encoding="utf-8")
