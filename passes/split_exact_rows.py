"""Take the rows that ``exact_rows`` names out of the video.

    segments: text 77, video 8192;    exact_rows: (0, 333), (-50, None)
    →  text 77, exact 256, video 7886, exact 50

Exact rows are treated as context: kept as keys for every query, and computed densely as queries.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from svg2_compile.passes.config import RowRanges
from svg2_compile.passes.records import Segment


def split_exact_rows(segments: tuple[Segment, ...], ranges: RowRanges) -> tuple[Segment, ...]:
    """Return ``segments``, of plain lengths, with the named rows cut out of the video; where there are such rows.

    Rows are counted along the keys, in their order.
    """
    total = sum(int(segment.length) for segment in segments)
    named = [slice(start, end).indices(total)[:2] for start, end in ranges]
    found: list[Segment] = []
    first = 0
    for segment in segments:
        last = first + int(segment.length)
        if segment.is_video:
            edges = {min(max(edge, first), last) for bounds in named for edge in bounds}
            for start, end in pairwise(sorted({first, last} | edges)):
                is_exact = any(low <= start and end <= high for low, high in named)
                found.append(replace(segment, length=end - start, is_video=not is_exact, is_exact=is_exact))
        else:
            found.append(segment)
        first = last
    return tuple(found)
