"""Take the rows that ``exact_rows`` names out of the video.

    segments: text 77, video 8192;    exact_rows: (0, 333), (-50, None)
    →  text 77, exact 256, video 7886, exact 50

Exact rows are treated as context: kept as keys for every query, and computed densely as queries. One segment may have
a symbolic length: what is named in it is counted from its beginning or from its end, and guards say that the two do not
meet.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from svg2_compile.passes.config import RowRanges
from svg2_compile.passes.decide_by_size import decide, is_guarded
from svg2_compile.passes.records import Segment, Size

Place = tuple[int, int]
"""Between two rows: (0, rows before it), or (1, minus the rows after it), which sorts places along the sequence."""


def split_exact_rows(segments: tuple[Segment, ...], ranges: RowRanges) -> tuple[Segment, ...] | None:
    """Return ``segments`` with the named rows cut out of the video; where there are such rows.

    Rows are counted along the keys, in their order. None where only a run tells which segment they are in, or how many
    they are.
    """
    symbolic = [place for place, segment in enumerate(segments) if not isinstance(segment.length, int)]
    if not symbolic:
        return _split(segments, ranges)
    is_known = len(symbolic) == 1 and is_guarded(segments[symbolic[0]].length)
    return _split_symbolic(segments, symbolic[0], ranges) if is_known else None


def _split(segments: tuple[Segment, ...], ranges: RowRanges) -> tuple[Segment, ...]:
    """Split segments of plain lengths."""
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


def _split_symbolic(segments: tuple[Segment, ...], symbolic: int, ranges: RowRanges) -> tuple[Segment, ...] | None:
    """Split segments of which one has a symbolic length."""
    length = segments[symbolic].length
    before = sum(int(segment.length) for segment in segments[:symbolic])
    after = sum(int(segment.length) for segment in segments[symbolic + 1 :])
    named: list[tuple[Place, Place]] = []
    for bounds in ranges:
        start, end = (_place(row, length, before, after) for row in bounds)
        if start is None or end is None:
            return None
        named.append((start, end))
    places = [place for bounds in named for place in bounds]
    head = max([rows - before for side, rows in places if side == 0 and rows > before], default=0)
    tail = max([-rows - after for side, rows in places if side == 1 and -rows > after], default=0)
    if not decide(lambda n: n > head + tail, length):
        return None
    found: list[Segment] = []
    begin: Place = (0, 0)
    for number, segment in enumerate(segments):
        last = (1, -after) if number == symbolic else (begin[0], begin[1] + int(segment.length))
        edges = {begin, last} | {place for place in places if begin < place < last and segment.is_video}
        for low, high in pairwise(sorted(edges)):
            is_exact = segment.is_video and any(start <= low and high <= end for start, end in named)
            is_video = segment.is_video and not is_exact
            if low[0] == high[0]:
                rows = high[1] - low[1]
                found.append(replace(segment, length=rows, is_video=is_video, is_exact=is_exact))
            elif is_exact:
                return None
            else:
                cut = low[1] - before - high[1] - after
                found.append(replace(segment, length=length - cut, cut=cut))
        begin = last
    return tuple(found)


def _place(row: int | None, length: Size, before: int, after: int) -> Place | None:
    """Return the place of a bound, cut off at the ends; None where it is on the far side of the symbolic segment."""
    if row is None or (row >= 0 and not decide(lambda n: before + n + after >= row, length)):
        return 1, 0
    if row >= 0:
        return (0, row) if row <= before or decide(lambda n: before + n >= row, length) else None
    if not decide(lambda n: before + n + after >= -row, length):
        return 0, 0
    return (1, row) if -row <= after or decide(lambda n: n + after >= -row, length) else None
