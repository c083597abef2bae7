"""Which CFG branch a call belongs to: told by the tensors that are its own, as prompts are, or else by their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FIRST_BRANCHES = 3
"""Branches told apart by their order before a step has ended; what is more shares one place without a memory."""
MOST_BRANCHES = 64
REMEMBERED = 16
"""Steps for which a tensor is remembered that was seen in one step only."""

SHARED = "+"
"""Ends the name of the place that further branches share."""

Identity = tuple[int, int]
"""A tensor: the number it was given when first seen, never given again, and its version."""


def is_shared(stream: str) -> bool:
    """Say whether a branch has no place of its own, so that nothing is kept for it."""
    return stream.endswith(SHARED)


@dataclass(slots=True)
class _Sighting:
    """Where a tensor was seen among the inputs of one model, within a generation."""

    streams: set[str]
    first_step: int
    last_step: int


class Branches:
    """The CFG branches of one model in one generation: told by their own tensors (the prompts), else by order."""

    def __init__(self, expected: int = 0) -> None:
        self.expected = expected
        """Calls in a step, as far as known."""
        self.is_uneven = False
        """A step had another number of calls than the ones before, and its branches were told by their order."""
        self.has_stranger = False
        """A call had a tensor of its own that no branch has, in a step whose other calls were told by theirs."""
        self._step = 0
        self._by_order = False
        self._is_strange = False
        self._used: set[str] = set()
        self._ran: list[str] = []
        self._seen: dict[tuple[str, Identity], _Sighting] = {}

    def stream_of(self, step: int, objects: Mapping[str, Identity]) -> tuple[str, str]:
        """Return the branch of this call, and how it was told."""
        if step != self._step:
            self.is_uneven |= self._by_order and 0 < len(self._ran) != self.expected > 0
            self.expected = min(MOST_BRANCHES, max(self.expected, len(self._ran)))
            stale = [key for key, each in self._seen.items() if each.first_step == each.last_step < step - REMEMBERED]
            for key in stale:
                del self._seen[key]
            self._step, self._ran, self._by_order, self._is_strange = step, [], False, False
        own: dict[str, int] = {}
        for item in objects.items():
            sighting = self._seen.get(item)
            streams = sighting.streams if sighting is not None else ()
            for stream in streams if len(streams) == 1 else ():
                own[stream] = own.get(stream, 0) + 1
        votes = {stream: count for stream, count in own.items() if stream not in self._ran and not is_shared(stream)}
        if votes:
            stream, how = max(votes, key=votes.__getitem__), "told by their own tensors"
        else:
            # a branch that had to share a place takes the first that nobody had
            has_shared = any(map(is_shared, own))
            taken = self._used if has_shared else {*self._ran}
            others = self._owners(objects) - taken
            if others and (self._is_strange or (self._ran and not self._by_order)):
                # the places that are next belong to other prompts
                taken, self._is_strange, self.has_stranger = taken | others, True, True
            self._by_order = True
            place = 0 if has_shared else len(taken)
            while str(place) in taken:
                place += 1
            most = max(FIRST_BRANCHES, self.expected)
            stream, how = f"{most}{SHARED}" if place >= most else str(place), "told by their order"
        self._used.add(stream)
        self._ran.append(stream)
        for item in objects.items():
            sighting = self._seen.get(item)
            if sighting is None:
                self._seen[item] = _Sighting({stream}, step, step)
            else:
                sighting.last_step = step
                if sighting.streams != {stream}:
                    sighting.streams = {each for each in sighting.streams if not is_shared(each)} | {stream}
        return stream, how

    def _owners(self, objects: Mapping[str, Identity]) -> set[str]:
        """Return the branches that an input of one of these names belongs to through several steps."""
        stay = [each for (name, _), each in self._seen.items() if name in objects and each.last_step > each.first_step]
        return {stream for each in stay if len(each.streams) == 1 for stream in each.streams}

    def goes_on(self, objects: Mapping[str, Identity]) -> bool | None:
        """Say whether these inputs are of the generation seen so far; None where nothing stays the same within it."""
        stays = {key for key, each in self._seen.items() if each.last_step > each.first_step}
        names = {name for name, _ in stays}
        if not names & objects.keys():
            return None
        return all((name, objects[name]) in self._seen for name in names & objects.keys())
